"""A request's tensors between the services and the models: bytes in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from omcda_deploy.protos.tensors import Tensor
from omcda_deploy.serve.status import RequestError


class WireTensors(NamedTuple):
    """Inputs of one request for ``batch`` rows, as both protocols carry them.

    Row-major, little-endian float32 ``[batch, width]``, uint8 for the mask; empty bytes where a tensor is absent.
    The fields but ``batch`` are named as a model's inputs are.
    """

    batch: int
    observation: bytes = b""
    noise: bytes = b""
    action_mask: bytes = b""


def decode(tensors: WireTensors, inputs: Mapping[str, Tensor], model: str) -> dict[str, NDArray[Any]]:
    """Return the tensors that are present as read-only arrays ``[batch, width]``.

    Only ``noise`` may be absent. Raises :class:`RequestError` for a tensor that is no input of ``model``, an input
    that is missing, and for another number of bytes than ``batch`` rows have.
    """
    data = {name: value for name, value in tensors._asdict().items() if name != "batch" and value}
    for name in data:
        if name not in inputs:
            raise RequestError(f"{model} takes {', '.join(inputs)}, got {name}: leave it out")
    if missing := inputs.keys() - data.keys() - {"noise"}:
        raise RequestError(
            f"{model}: expected inputs {', '.join(inputs)}, got {', '.join(data) or 'none'}: "
            f"send {', '.join(sorted(missing))}"
        )
    if tensors.batch < 1:
        raise RequestError(f"{model}: expected batch of at least 1, got {tensors.batch}")
    for name, value in data.items():
        if len(value) != inputs[name].size(tensors.batch):
            raise wrong_size(inputs[name], tensors.batch, model, len(value))
    return {name: inputs[name].decode(value, tensors.batch) for name, value in data.items()}


def wrong_size(tensor: Tensor, batch: int, model: str, size: int) -> RequestError:
    """Return the error for ``size`` bytes where ``batch`` rows of ``tensor`` have another number."""
    return RequestError(
        f"{tensor.name} of {model}: expected {tensor.size(batch)} bytes "
        f"({tensor.datatype} [{batch}, {tensor.width}]), got {size}"
    )
