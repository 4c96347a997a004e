"""Policies as every part of the package meets them: in process, behind a server, recorded, or wrapped.

A policy acts for one agent, a team policy for all of them. Both take a batch ``[B, O]`` or one vector ``[O]`` per
agent, and answer in kind. They are deterministic functions: what makes an action random is the ``noise`` that the
caller draws (:class:`NoiseSource`), so a served team and a local one given the same noise act alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.spec import AgentSpec, TeamSpec

Float: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Decision:
    """One agent's answer for a batch.

    ``action``: float32 [B, A], or int64 [B] for discrete actions, ready for the simulator.
    ``divergence``: float32 [B]; its meaning is the bundle's ``divergence_kind``.
    ``parameters``: the policy's and the behaviour policy's distributions and the behaviour action, under the
    names of the graph's outputs (:mod:`omcda_deploy.bundle`); empty for a policy that has none to tell.
    ``policy_weight``: float32 [B], the policy's weight in what acted, below 1 where a guard stepped in
    (:mod:`omcda_deploy.guard`); None where nothing guards.
    ``fallback``: the policy that was asked did not answer, and the caller's fallback chose ``action``
    (:mod:`omcda_deploy.client.fallback`); then ``divergence`` is nan and ``parameters`` is empty.
    """

    action: NDArray[Any]
    divergence: Float
    parameters: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    policy_weight: Float | None = None
    fallback: bool = False


class Policy(Protocol):
    """Acts for one agent."""

    spec: AgentSpec

    def reset(self) -> None:
        """Forget the episode. A no-op for the feed-forward policies of this package."""
        ...

    def act(
        self,
        observation: Float,
        *,
        noise: Float | None = None,
        action_mask: NDArray[np.uint8] | None = None,
    ) -> Decision:
        """``observation`` [B, O] or [O]; ``noise`` of the same leading shape, None for the deterministic action."""
        ...


class TeamPolicy(Protocol):
    """Acts for a whole team; mappings are keyed by agent name."""

    spec: TeamSpec

    def reset(self) -> None: ...

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]: ...


class NoiseSource:
    """Seeded noise that turns deterministic policies into samples of their distributions.

    Continuous actions take standard normal noise [B, A] (``tanh(mean + std * noise)``), discrete ones Gumbel
    noise [B, A] (``argmax(logits + noise)``).
    """

    def __init__(self, spec: TeamSpec, seed: int) -> None:
        self._spec = spec
        self._generator = np.random.default_rng(seed)

    def draw(self, batch: int) -> dict[str, Float]:
        draw = (
            self._generator.standard_normal
            if self._spec.action_kind == "continuous"
            else lambda shape: self._generator.gumbel(size=shape)
        )
        return {
            agent.name: draw((batch, agent.action.size)).astype(np.float32) for agent in self._spec.agents
        }
