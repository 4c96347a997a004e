"""Policies: one interface for policies in process, behind a server, recorded or wrapped.

A policy acts for one agent, a team policy for all of them. Both take a batch [B, O] or one vector [O] per agent,
and answer in kind. Given ``noise`` (:class:`NoiseSource` draws it), they are deterministic functions of their
inputs, so a served team and a local one act alike on the same noise.

The temperature T of play is a factor of the noise: T 0 is the deterministic action, T 1 a sample of the policy's
distribution. A team of a bundle has a temperature and a seed for calls that bring no noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError
from omcda_deploy.spec import AgentSpec, TeamSpec

Float: TypeAlias = NDArray[np.float32]

LEAST_TEMPERATURE = 1e-6  # above 0
MAX_TEMPERATURE = 10.0  # where actions are noise; a larger number is more likely a slip


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
    * ``awaited``: False where the fallback chose at once, as the policy's last answers were missed
      (:mod:`omcda_deploy.client.circuit`).
    """

    action: NDArray[Any]
    divergence: Float
    parameters: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    policy_weight: Float | None = None
    fallback: bool = False
    awaited: bool = True


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

        ``noise`` [B, A] or [A] is used as it is; zeros mean the deterministic action, and so does None unless the
        policy has a temperature of its own. ``action_mask`` [B, A] or [A] is 1 where a discrete action is
        available, None where all are. Raises :class:`ContractError` for other shapes, numbers that are not finite,
        and masks that hold anything but 0 and 1 or allow nothing (:mod:`omcda_deploy.inputs`).
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
        """Act for all agents; arguments per agent are those of :meth:`Policy.act`.

        Observations and masks belong to the caller, and may refuse to be written to: a team changes copies.
        """
        ...


def own_temperature(team: TeamPolicy) -> float:
    """Temperature of a team's calls without noise, its attribute ``temperature``; 0 for a team without one."""
    return float(getattr(team, "temperature", 0.0))


class ScaledNoise(dict[str, Float]):
    """Noise by agent, and the ``temperature`` that it was multiplied by."""

    def __init__(self, noise: Mapping[str, Float], temperature: float) -> None:
        super().__init__(noise)
        self.temperature = temperature


class NoiseSource:
    """Seeded noise that makes deterministic policies sample from their distributions.

    Continuous actions take standard normal noise (``tanh(mean + std * noise)``), discrete ones Gumbel noise
    (``argmax(logits + noise)``), each times ``temperature``. So 0 gives the deterministic action, 1 a sample, and T
    a sample of the Gaussian with std times T, or of ``softmax(logits / T)``. Sources of one seed and different
    temperatures draw the same numbers before that factor.

    Raises :class:`ConfigError` for a temperature that is not a number from 0 to :data:`MAX_TEMPERATURE`, and for a
    seed that is none.
    """

    def __init__(self, spec: TeamSpec, seed: int, temperature: float = 1.0) -> None:
        self.temperature = checked_temperature(temperature)
        self._spec = spec
        try:
            self._generator = np.random.default_rng(seed)
        except (TypeError, ValueError):
            raise ConfigError(f"seed: expected a whole number from 0 on, got {seed!r}") from None

    def draw(self, batch: int) -> ScaledNoise:
        """Draw the noise [B, A_i] of every agent for one call of ``batch`` rows."""
        draw = (
            self._generator.standard_normal
            if self._spec.action_kind == "continuous"
            else lambda shape: self._generator.gumbel(size=shape)
        )
        factor = np.float32(self.temperature)
        noise = {
            agent.name: factor * draw((batch, agent.action.size)).astype(np.float32)
            for agent in self._spec.agents
        }
        return ScaledNoise(noise, self.temperature)

    def draw_for(self, team: TeamPolicy, batch: int) -> Mapping[str, Float] | None:
        """Draw the noise of one call of ``team``; None at temperature 0, unless the team would draw its own."""
        quiet = self.temperature == 0.0 and own_temperature(team) == 0.0
        return None if quiet else self.draw(batch)

    def for_call(
        self, noise: Mapping[str, Float] | None, observations: Mapping[str, Float]
    ) -> Mapping[str, Float] | None:
        """Return the caller's ``noise``, or noise drawn for ``observations`` [B, O_i] or [O_i] where there is none.

        At temperature 0 nothing is drawn, and the answer to None is None.
        """
        if noise is not None or self.temperature == 0.0:
            return noise
        rows = next(iter(observations.values()), np.zeros(1))
        if np.ndim(rows) == 1:
            return ScaledNoise({name: values[0] for name, values in self.draw(1).items()}, self.temperature)
        return self.draw(len(rows))


def checked_temperature(value: float) -> float:
    """Return ``value`` as a temperature of play.

    Raises :class:`ConfigError` unless it is 0, or a number from :data:`LEAST_TEMPERATURE` to
    :data:`MAX_TEMPERATURE`.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= MAX_TEMPERATURE:
        raise ConfigError(
            f"temperature: expected a number from 0 (deterministic) over 1 (sampled) to {MAX_TEMPERATURE:g}, "
            f"got {value!r}"
        )
    if 0.0 < value < LEAST_TEMPERATURE:  # of which nothing is left in float32, or in what it divides
        raise ConfigError(
            f"temperature: expected 0 (deterministic) or a number from {LEAST_TEMPERATURE:g} on, got {value!r}"
        )
    return float(value) + 0.0  # never -0


def checked_temperatures(values: Sequence[float]) -> tuple[float, ...]:
    """Return temperatures of play in ascending order.

    Raises :class:`ConfigError` for none, for one that is listed twice, and as :func:`checked_temperature` does.
    """
    temperatures = sorted(checked_temperature(value) for value in values)
    if not temperatures:
        raise ConfigError("temperatures: expected one or more numbers such as 0, 0.5 and 1, got none")
    for one, other in pairwise(temperatures):
        if one == other:
            raise ConfigError(f"temperatures: expected each once, got {one:g} twice: leave one out")
    return tuple(temperatures)
