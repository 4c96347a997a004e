"""Open Inference Protocol messages to arrays and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.protos import oip
from omcda_deploy.protos.tensors import DTYPES, Datatype, Tensor
from omcda_deploy.serve.session import NAME_LIMIT, Session
from omcda_deploy.serve.status import RequestError

CONTENTS: Mapping[Datatype, str] = {
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
}
SHOWN = 8  # dimensions and names of a request that a message repeats


def inputs_of(request: oip.ModelInferRequest, session: Session) -> dict[str, NDArray[Any]]:
    """The tensors that the request holds, raw or typed. Raises :class:`RequestError` where they do not fit."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(
            f"{session.name}: expected raw_input_contents for each of {len(request.inputs)} inputs, got {len(raw)}"
        )
    inputs: dict[str, NDArray[Any]] = {}
    rows: int | None = None
    for index, given in enumerate(request.inputs):
        name = given.name[:NAME_LIMIT]
        tensor = session.inputs.get(given.name)
        if tensor is None:
            raise RequestError(f"{session.name}: expected inputs {', '.join(session.inputs)}, got {name!r}")
        if name in inputs:
            raise RequestError(f"{session.name}: expected one input {name}, got it twice")
        batch = _batch(given, tensor, session.name)
        if rows is not None and batch != rows:
            raise RequestError(
                f"{name} of {session.name}: expected {rows} rows as in the other inputs, got {batch}"
            )
        rows = batch
        if raw:
            if given.HasField("contents"):
                raise RequestError(
                    f"{name} of {session.name}: expected raw_input_contents or contents, got both: send one"
                )
            inputs[name] = _decoded(raw[index], tensor, batch, session.name)
        else:
            inputs[name] = _collected(given.contents, tensor, batch, session.name)
    return inputs


def wanted_outputs(request: oip.ModelInferRequest, session: Session) -> tuple[Tensor, ...]:
    """The outputs that the request names, in its order; all where it names none.

    Raises :class:`RequestError` for a name that the model has not, or given twice.
    """
    if not request.outputs:
        return session.all_outputs
    names = [output.name for output in request.outputs]
    if (
        len(names) > len(session.outputs)
        or len(set(names)) < len(names)
        or not session.outputs.keys() >= set(names)
    ):
        shown = ", ".join(name[:NAME_LIMIT] for name in names[:SHOWN])
        raise RequestError(
            f"{session.name}: expected outputs out of {', '.join(session.outputs)}, each once, got {shown}"
        )
    return tuple(session.outputs[name] for name in names)


def step_of(request: oip.ModelInferRequest, session: Session) -> tuple[bytes, bytes, bytes] | None:
    """Observation, noise and mask of a request for one row, empty where absent; None for any other request."""
    raw = request.raw_input_contents
    if not raw or len(raw) != len(request.inputs):
        return None
    inputs: dict[str, bytes] = {}
    for given, data in zip(request.inputs, raw, strict=True):
        tensor = session.inputs.get(given.name)
        if (
            tensor is None
            or not data
            or given.datatype != tensor.datatype
            or given.shape != [1, tensor.width]
            or tensor.name in inputs
            or given.HasField("contents")
        ):
            return None
        inputs[tensor.name] = data
    return inputs.get("observation", b""), inputs.get("noise", b""), inputs.get("action_mask", b"")


def response_of(
    request: oip.ModelInferRequest,
    session: Session,
    wanted: tuple[Tensor, ...],
    rows: int,
    answer: Mapping[str, bytes],
) -> bytes:
    """A serialised ``ModelInferResponse``."""
    described, before = _around(session.name, session.version, wanted, rows)
    parts = [described]
    for tensor, prefix in zip(wanted, before, strict=True):
        parts += (prefix, answer[tensor.name])
    if request.id:
        parts.append(oip.ModelInferResponse(id=request.id).SerializeToString())
    return b"".join(parts)


@lru_cache(maxsize=256)
def _around(
    model: str, version: str, tensors: tuple[Tensor, ...], batch: int
) -> tuple[bytes, tuple[bytes, ...]]:
    """What is the same in every response: its description, and what stands before each tensor's bytes.

    Serialised messages in a row are one, with the fields of all.
    """
    described = oip.ModelInferResponse(
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
    return described, tuple(whole[:-size] for whole, size in zip(contents, sizes, strict=True))


def metadata_of(
    session: Session, versions: Iterable[str], properties: Mapping[str, str]
) -> oip.ModelMetadataResponse:
    def described(tensors: Iterable[Tensor]) -> list[oip.ModelMetadataResponse.TensorMetadata]:
        return [
            oip.ModelMetadataResponse.TensorMetadata(name=t.name, datatype=t.datatype, shape=t.shape(-1))
            for t in tensors
        ]

    return oip.ModelMetadataResponse(
        name=session.name,
        versions=versions,
        platform="onnx_onnxv1",
        inputs=described(session.inputs.values()),
        outputs=described(session.outputs.values()),
        properties=properties,
    )


def _batch(given: oip.ModelInferRequest.InferInputTensor, tensor: Tensor, model: str) -> int:
    if given.datatype != tensor.datatype:
        raise RequestError(
            f"{tensor.name} of {model}: expected datatype {tensor.datatype}, got {given.datatype[:NAME_LIMIT]!r}"
        )
    shape = given.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != tensor.width:
        shown = ", ".join(map(str, shape[:SHOWN])) + (", …" if len(shape) > SHOWN else "")
        raise RequestError(
            f"{tensor.name} of {model}: expected shape [B >= 1, {tensor.width}], got [{shown}]"
        )
    return shape[0]


def _decoded(data: bytes, tensor: Tensor, batch: int, model: str) -> NDArray[Any]:
    if len(data) != tensor.size(batch):
        raise RequestError(
            f"{tensor.name} of {model}: expected {tensor.size(batch)} bytes "
            f"({tensor.datatype} [{batch}, {tensor.width}]), got {len(data)}"
        )
    return tensor.decode(data, batch)


def _collected(contents: oip.InferTensorContents, tensor: Tensor, batch: int, model: str) -> NDArray[Any]:
    field = CONTENTS[tensor.datatype]
    given = [descriptor.name for descriptor, _ in contents.ListFields()]
    if given != [field]:
        raise RequestError(
            f"{tensor.name} of {model}: expected {field} or raw_input_contents, got {', '.join(given) or 'neither'}"
        )
    values = np.array(getattr(contents, field))
    if values.size != batch * (tensor.width or 1):
        raise RequestError(
            f"{tensor.name} of {model}: expected {batch * (tensor.width or 1)} values in {field}, got {values.size}"
        )
    if tensor.datatype == "UINT8" and values.max() > 255:
        raise RequestError(f"{tensor.name} of {model}: expected values up to 255, got {values.max()}")
    return values.astype(DTYPES[tensor.datatype]).reshape(batch, -1)
