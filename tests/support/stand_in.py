"""A small server of the Open Inference Protocol that holds a bundle as Triton does: a stand-in, not Triton itself.

It reads ``config.pbtxt`` by Triton's own messages, has versions, tensors and parameters from there, wants every
input, and knows no teams, guards or contracts.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2

from omcda_deploy.local import OnnxModel

DTYPES = {"FP32": np.float32, "INT64": np.int64, "UINT8": np.uint8}


class StandIn:
    """Answers for the models of a folder. ``parameters``: whether it tells those of their configurations.

    ``typed``: whether it answers numbers rather than bytes, as the protocol allows.
    """

    def __init__(self, folder: Path, parameters: bool = True) -> None:
        self.typed = False
        self.calls: list[str] = []
        self.parameters: set[str] = set()  # of requests
        self._configs, self._models = {}, {}
        for file in sorted(folder.glob("*/config.pbtxt")):
            config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
            if not parameters:
                config.ClearField("parameters")
            self._configs[config.name] = config
            self._models[config.name] = OnnxModel(file.parent / "1" / "model.onnx")

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        config = self._find(request.name, request.version, context)

        def tensors(entries: Any) -> list[Any]:
            return [
                service_pb2.ModelMetadataResponse.TensorMetadata(
                    name=entry.name, datatype=_datatype(entry), shape=entry.dims
                )
                for entry in entries
            ]

        return service_pb2.ModelMetadataResponse(
            name=config.name,
            versions=["1"],
            platform=config.platform,
            inputs=tensors(config.input),
            outputs=tensors(config.output),
        )

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelConfigResponse(config=self._find(request.name, request.version, context))

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.calls.append(request.model_name)
        self.parameters |= set(request.parameters)
        config = self._find(request.model_name, request.model_version, context)
        feeds = {
            entry.name: np.frombuffer(data, DTYPES[entry.datatype]).reshape(tuple(entry.shape))
            for entry, data in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        if set(feeds) != {entry.name for entry in config.input}:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"expected inputs {config.input}")
        answer = service_pb2.ModelInferResponse(model_name=config.name, model_version="1", id=request.id)
        for entry, values in zip(config.output, self._models[config.name].run(feeds).values(), strict=True):
            output = answer.outputs.add(name=entry.name, datatype=_datatype(entry), shape=values.shape)
            if self.typed:
                field = "fp32_contents" if values.dtype == np.float32 else "int64_contents"
                getattr(output.contents, field).extend(values.ravel().tolist())
            else:
                answer.raw_output_contents.append(values.tobytes())
        return answer

    def _find(self, name: str, version: str, context: Any) -> Any:
        if name not in self._configs or version not in ("", "1"):
            context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"Request for unknown model: '{name}' version {version} is not found",
            )
        return self._configs[name]


@contextmanager
def stand_in(folder: Path, *, parameters: bool = True) -> Iterator[tuple[str, StandIn]]:
    """Yield the address of a stand-in for ``folder`` in this process."""
    service = StandIn(folder, parameters)
    handlers: dict[str, Any] = {
        method: grpc.unary_unary_rpc_method_handler(
            getattr(service, method),
            request_deserializer=getattr(service_pb2, f"{method}Request").FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for method in ("ModelMetadata", "ModelConfig", "ModelInfer")
    }
    server = grpc.server(futures.ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", service
    finally:
        server.stop(None).wait()


def _datatype(entry: Any) -> str:
    return str(model_config_pb2.DataType.Name(entry.data_type)).removeprefix("TYPE_")
