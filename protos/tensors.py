"""A model's tensors on the wire: names, types and widths, and their bytes.

Server and client both derive the layout from the team's spec, so it need not travel. Bytes are row-major and
little-endian in both protocols.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM, parameter_names
from omcda_deploy.spec import AgentSpec, TeamSpec

Datatype = Literal["FP32", "INT64", "UINT8"]  # as the Open Inference Protocol writes them
DTYPES: Mapping[Datatype, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
}
CONTENTS: Mapping[
    Datatype, str
] = {  # fields of the Open Inference Protocol for values that are not sent as bytes
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
}


class Tensor(NamedTuple):
    """One input or output: [B, width], or [B] where ``width`` is None."""

    name: str
    datatype: Datatype
    width: int | None

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch,) if self.width is None else (batch, self.width)

    def size(self, batch: int) -> int:
        """Bytes of ``batch`` rows."""
        return batch * (1 if self.width is None else self.width) * DTYPES[self.datatype].itemsize

    def encode(self, values: NDArray[Any]) -> bytes:
        return np.ascontiguousarray(values, DTYPES[self.datatype]).tobytes()

    def decode(self, data: bytes, batch: int) -> NDArray[Any]:
        """A read-only view of ``data``, which holds :meth:`size` bytes."""
        return np.frombuffer(data, DTYPES[self.datatype]).reshape(self.shape(batch))


def input_tensors(spec: TeamSpec, model: str) -> tuple[Tensor, ...]:
    """Inputs of an agent's graph, or of the joint graph for ``"team"``."""
    agents = _agents(spec, model)
    actions = sum(agent.action.size for agent in agents)
    tensors = (
        Tensor("observation", "FP32", sum(agent.observation_size for agent in agents)),
        Tensor("noise", "FP32", actions),
    )
    return (
        tensors if spec.action_kind == "continuous" else (*tensors, Tensor("action_mask", "UINT8", actions))
    )


def output_tensors(spec: TeamSpec, model: str) -> tuple[Tensor, ...]:
    """Outputs of an agent's graph, or of the joint graph for ``"team"``."""
    agents = _agents(spec, model)
    actions = sum(agent.action.size for agent in agents)
    per_agent = len(agents) if model == TEAM else None
    action: tuple[Datatype, int | None] = (
        ("FP32", actions) if spec.action_kind == "continuous" else ("INT64", per_agent)
    )
    return (
        Tensor("action", *action),
        Tensor("divergence", "FP32", per_agent),
        Tensor("behavior_action", *action),
        *(Tensor(name, "FP32", actions) for name in parameter_names(spec)),
    )


def answer_tensors(spec: TeamSpec, model: str) -> tuple[Tensor, ...]:
    """Outputs of a server: the graph's after its guard, and the policy's weight in what acted."""
    per_agent = len(_agents(spec, model)) if model == TEAM else None
    return (*output_tensors(spec, model), Tensor("policy_weight", "FP32", per_agent))


def _agents(spec: TeamSpec, model: str) -> tuple[AgentSpec, ...]:
    return spec.agents if model == TEAM else (spec.agent(model),)
