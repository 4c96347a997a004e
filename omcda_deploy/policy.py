"""Policies: one interface for policies in process, behind a server, recorded or wrapped.

A policy acts for one agent, a team policy for all of them. Both take a batch [B, O] or one vector [O] per agent,
and answer in kind. They are deterministic functions of their inputs: the caller draws the ``noise`` that makes an
action random (:class:`NoiseSource`), so a served team and a local one act alike on the same noise.
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
    """Answer of one agent for a batch of B rows; the answer to a single vector lacks the first axis.

    * ``action``: float32 [B, A], or int64 [B] for discrete actions, ready for the simulator.
    * ``divergence``: float32 [B]; its meaning is the bundle's ``divergence_kind``.
    * ``parameters``: the distributions of the policy and the behaviour policy and the behaviour action, under the
      names of the graph's outputs (:mod:`omcda_deploy.bundle`); empty for policies without them.
    * ``policy_weight``: float32 [B], the policy's weight in the distribution that acted, below 1 where a guard
      replaced the action (:mod:`omcda_deploy.guard`); None without a guard.
    * ``fallback``: True where the policy did not answer in time and the caller's fallback chose ``action``
      (:mod:`omcda_deploy.client.fallback`); then ``divergence`` is nan and ``parameters`` is empty.
    """

    action: NDArray[Any]
    divergence: Float
    parameters: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    policy_weight: Float | None = None
    fallback: bool = False


class Policy(Protocol):
    """Policy of one agent."""

    spec: AgentSpec

    def reset(self) -> None:
        """Forget the episode; a no-op for the feed-forward policies of this package."""
        ...

    def act(
        self,
        observation: Float,
        *,
        noise: Float | None = None,
        action_mask: NDArray[np.uint8] | None = None,
    ) -> Decision:
        """Act on ``observation`` [B, O] or [O].

        ``noise`` [B, A] or [A] is None for the deterministic action; ``action_mask`` [B, A] or [A] is 1 where a
        discrete action is available, None where all are. Raises :class:`ContractError` for other shapes.
        """
        ...


class TeamPolicy(Protocol):
    """Policy of a whole team; mappings are keyed by agent name."""

    spec: TeamSpec

    def reset(self) -> None:
        """Forget the episode."""
        ...

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        """Act for all agents; arguments per agent are those of :meth:`Policy.act`."""
        ...


class NoiseSource:
    """Seeded noise that makes deterministic policies sample from their distributions.

    Continuous actions take standard normal noise (``tanh(mean + std * noise)``), discrete ones Gumbel noise
    (``argmax(logits + noise)``).
    """

    def __init__(self, spec: TeamSpec, seed: int) -> None:
        self._spec = spec
        self._generator = np.random.default_rng(seed)

    def draw(self, batch: int) -> dict[str, Float]:
        """Draw the noise [B, A_i] of every agent for one call of ``batch`` rows."""
        draw = (
            self._generator.standard_normal
            if self._spec.action_kind == "continuous"
            else lambda shape: self._generator.gumbel(size=shape)
        )
        return {
            agent.name: draw((batch, agent.action.size)).astype(np.float32) for agent in self._spec.agents
        }
