"""``omcda.v1`` requests to arrays."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from omcda_deploy.protos.policy_pb2 import ActRequest
from omcda_deploy.serve.session import Session
from omcda_deploy.serve.status import RequestError

TENSORS = ("observation", "noise", "action_mask")


def inputs_of(request: ActRequest, session: Session) -> dict[str, NDArray[Any]]:
    """The tensors that the request holds. Raises :class:`RequestError` where they do not fit the model."""
    if request.batch < 1:
        raise RequestError(f"{session.name}: expected batch of at least 1, got {request.batch}")
    inputs = {}
    for name in TENSORS:
        data: bytes = getattr(request, name)
        if not data:
            continue
        tensor = session.inputs.get(name)
        if tensor is None:
            raise RequestError(f"{session.name} takes {', '.join(session.inputs)}, got {name}: leave it out")
        if len(data) != tensor.size(request.batch):
            raise RequestError(
                f"{name} of {session.name}: expected {tensor.size(request.batch)} bytes "
                f"({tensor.datatype} [{request.batch}, {tensor.width}]), got {len(data)}"
            )
        inputs[name] = tensor.decode(data, request.batch)
    return inputs
