"""Messages of the Open Inference Protocol to tensors and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np

from omcda_deploy.protos import oip
from omcda_deploy.protos.tensors import CONTENTS, DTYPES, Tensor
from omcda_deploy.serve.session import NAME_LIMIT, Session
from omcda_deploy.serve.status import RequestError
from omcda_deploy.serve.wire import WireTensors, wrong_size

REPEATED = 8  # dimensions and names of a request that an error message repeats at most


def wire_tensors(request: oip.ModelInferRequest, session: Session) -> WireTensors:
    """Return the tensors that the request holds, raw or typed; a batch of 0 if it holds none.

    Raises :class:`RequestError` if its description of them does not fit the model or the request's other tensors.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(
            f"{session.name}: expected raw_input_contents for each of {len(request.inputs)} inputs, got {len(raw)}"
        )
    data: dict[str, bytes] = {}
    batch = 0
    for index, entry in enumerate(request.inputs):
        name = entry.name
        tensor = session.inputs.get(name)
        if tensor is None:
            raise RequestError(
                f"{session.name}: expected inputs {', '.join(session.inputs)}, got {name[:NAME_LIMIT]!r}"
            )
        if name in data:
            raise RequestError(f"{session.name}: expected one input {name}, got it twice")
        rows = _rows(entry, tensor, session.name)
        if data and rows != batch:
            raise RequestError(
                f"{name} of {session.name}: expected {batch} rows as in the other inputs, got {rows}"
            )
        batch = rows
        if not raw:
            data[name] = _typed_bytes(entry.contents, tensor, rows, session.name)
            continue
        if entry.HasField("contents"):
            raise RequestError(
                f"{name} of {session.name}: expected raw_input_contents or contents, got both: send one"
            )
        if not (contents := raw[index]):  # would mean an absent tensor
            raise wrong_size(tensor, rows, session.name, 0)
        data[name] = contents
    return WireTensors(batch, **data)


def requested_outputs(request: oip.ModelInferRequest, session: Session) -> tuple[Tensor, ...]:
    """Return the outputs that the request names, in its order; all outputs if it names none.

    Raises :class:`RequestError` for a name that the model does not have, or that is repeated, and for a parameter,
    which would ask for another form of the output than its caller gets.
    """
    if not request.outputs:
        return session.all_outputs
    for output in request.outputs:
        if output.parameters:
            parameters = ", ".join(name[:NAME_LIMIT] for name in sorted(output.parameters)[:REPEATED])
            raise RequestError(
                f"output {output.name[:NAME_LIMIT]} of {session.name}: expected no parameters, got {parameters}: "
                "outputs come as they are, in the answer (no class_count, no shared memory)"
            )
    names = [output.name for output in request.outputs]
    if (
        len(names) > len(session.outputs)
        or len(set(names)) < len(names)
        or not session.outputs.keys() >= set(names)
    ):
        received = ", ".join(name[:NAME_LIMIT] for name in names[:REPEATED])
        raise RequestError(
            f"{session.name}: expected outputs out of {', '.join(session.outputs)}, each once, got {received}"
        )
    return tuple(session.outputs[name] for name in names)


def encode_response(
    request: oip.ModelInferRequest,
    session: Session,
    outputs: tuple[Tensor, ...],
    batch: int,
    answer: Mapping[str, bytes],
) -> bytes:
    """Return a serialised ``ModelInferResponse`` with ``outputs`` out of ``answer``."""
    description, prefixes = _response_frame(session.name, session.version, outputs, batch)
    parts = [description]
    for tensor, prefix in zip(outputs, prefixes, strict=True):
        parts += (prefix, answer[tensor.name])
    if request.id:
        parts.append(oip.ModelInferResponse(id=request.id).SerializeToString())
    return b"".join(parts)


@lru_cache(maxsize=256)
def _response_frame(
    model: str, version: str, tensors: tuple[Tensor, ...], batch: int
) -> tuple[bytes, tuple[bytes, ...]]:
    """Return the bytes that all such responses share: the description, and the prefix of each tensor's bytes.

    Serialised messages in a row are one message with the fields of all.
    """
    description = oip.ModelInferResponse(
        model_name=model,
        model_version=version,
        outputs=[
            oip.ModelInferResponse.InferOutputTensor(name=t.name, datatype=t.datatype, shape=t.shape(batch))
            for t in tensors
        ],
    ).SerializeToString()
    sizes = [tensor.size(batch) for tensor in tensors]
    contents = [
        oip.ModelInferResponse(raw_output_contents=[bytes(size)]).SerializeToString() for size in sizes
    ]
    return description, tuple(whole[:-size] for whole, size in zip(contents, sizes, strict=True))


def model_metadata(
    session: Session, versions: Iterable[str], properties: Mapping[str, str]
) -> oip.ModelMetadataResponse:
    """Describe a model's tensors; ``versions`` are those held, ``properties`` the contract's and the bundle's."""

    def metadata(tensors: Iterable[Tensor]) -> list[oip.ModelMetadataResponse.TensorMetadata]:
        return [
            oip.ModelMetadataResponse.TensorMetadata(name=t.name, datatype=t.datatype, shape=t.shape(-1))
            for t in tensors
        ]

    return oip.ModelMetadataResponse(
        name=session.name,
        versions=versions,
        platform="onnx_onnxv1",
        inputs=metadata(session.inputs.values()),
        outputs=metadata(session.outputs.values()),
        properties=properties,
    )


def _rows(entry: oip.ModelInferRequest.InferInputTensor, tensor: Tensor, model: str) -> int:
    """Check an input's datatype and shape, and return its number of rows."""
    if entry.datatype != tensor.datatype:
        raise RequestError(
            f"{tensor.name} of {model}: expected datatype {tensor.datatype}, got {entry.datatype[:NAME_LIMIT]!r}"
        )
    shape = entry.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != tensor.width:
        received = ", ".join(map(str, shape[:REPEATED])) + (", …" if len(shape) > REPEATED else "")
        raise RequestError(
            f"{tensor.name} of {model}: expected shape [B >= 1, {tensor.width}], got [{received}]"
        )
    return shape[0]


def _typed_bytes(contents: oip.InferTensorContents, tensor: Tensor, batch: int, model: str) -> bytes:
    """Return typed contents as the bytes that ``raw_input_contents`` would hold."""
    field = CONTENTS[tensor.datatype]
    fields = [descriptor.name for descriptor, _ in contents.ListFields()]
    if fields != [field]:
        raise RequestError(
            f"{tensor.name} of {model}: expected {field} or raw_input_contents, "
            f"got {', '.join(fields) or 'neither'}"
        )
    values = np.array(getattr(contents, field))
    if values.size != batch * (tensor.width or 1):
        raise RequestError(
            f"{tensor.name} of {model}: expected {batch * (tensor.width or 1)} values in {field}, got {values.size}"
        )
    if tensor.datatype == "UINT8" and values.max() > 255:
        raise RequestError(f"{tensor.name} of {model}: expected values up to 255, got {values.max()}")
    return values.astype(DTYPES[tensor.datatype]).tobytes()
