"""Messages of the Open Inference Protocol v2, in a descriptor pool of their own.

The same names as a generated ``_pb2`` module has (``oip.pyi`` lists them), but not registered in protobuf's
default pool: tritonclient, MLServer and KServe register the package ``inference`` there, and a second
registration in one process is an error.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_files = descriptor_pb2.FileDescriptorSet.FromString(
    (Path(__file__).parent / "open_inference_grpc.binpb").read_bytes()
)
_pool = descriptor_pool.DescriptorPool()
for _file in _files.file:
    _pool.Add(_file)

DESCRIPTOR = _pool.FindFileByName(_files.file[-1].name)
for _name, _descriptor in DESCRIPTOR.message_types_by_name.items():
    globals()[_name] = message_factory.GetMessageClass(_descriptor)
