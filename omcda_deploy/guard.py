"""Divergence guard: limit how far a served policy may stray from the behaviour policy.

| mode       | action where the divergence exceeds the threshold |
|------------|---------------------------------------------------|
| `observe`  | the policy's action; the row is only counted |
| `fallback` | the behaviour policy's action (:func:`behavior_action`) |
| `blend`    | an action of ``pi_w ~ pi_b^(1-w) pi^w`` with the largest w for which KL(pi_w || pi_b) <= threshold |

A blend mixes distributions (natural parameters of the Gaussians under the tanh, or log-probabilities), never
actions: the mean of two good actions can be a bad one (:mod:`omcda_deploy.blend`). All modes use the noise of the
request; a row of zeros stands for no noise and means the mode of the distribution.

A threshold is in nats per agent and sample. Its default is the 99th percentile of the divergence on the training
data. A budget d_i would not do: it bounds the mean over a batch, and the divergence of single states has a heavy
tail, so many of them would exceed it.

The guard also measures the distance of an observation from the training data,

    distance = sqrt(mean_j ((o_j - mean_j) / std_j)^2)        about 1 on average on the training data

over the entries j of the normalised observation. The divergence does not replace it: on an observation that neither
policy was trained on both extrapolate, and may well agree.

Shapes: B batch, k agents of a model (1, or N for the team), vectors joined along the last axis as in the team
graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.blend import Joined, JoinedActions
from omcda_deploy.errors import ConfigError
from omcda_deploy.spec import AgentSpec, TeamSpec

Mode = Literal["observe", "fallback", "blend"]

_ACTING: tuple[Mode, ...] = ("fallback", "blend")
_NOT_PARAMETERS = ("action", "divergence")  # outputs that describe no distribution

PERCENTILE = 99.0
# Smallest scale of an entry, relative to the root mean square of the standard deviations of all entries: even a
# constant entry of the data may move that much.
_LEAST_STD = 0.1


@dataclass(frozen=True)
class GuardSetting:
    """Guard of one agent.

    ``threshold`` is in nats, None for the bundle's own. Observations further from the training data than
    ``distance_limit`` are refused. Raises :class:`ConfigError` for an unknown mode and for negative or infinite
    numbers.
    """

    mode: Mode = "observe"
    threshold: float | None = None
    distance_limit: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"guard mode: expected one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        for name in ("threshold", "distance_limit"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0.0 <= value < np.inf):
                raise ConfigError(f"guard {name}: expected a number from 0 on, got {value!r}")


@dataclass(frozen=True)
class DataReference:
    """Statistics of one agent's training data, as a bundle's manifest stores them.

    Raises :class:`ConfigError` for numbers that are not finite, a distance below 0, standard deviations that are
    not positive and vectors of unequal length.
    """

    divergence_p99: float
    distance_p99: float
    observation_mean: Sequence[float]  # [O], normalised
    observation_std: Sequence[float]  # [O], raised to a least scale where an entry is (nearly) constant

    def __post_init__(self) -> None:
        for name in ("divergence_p99", "distance_p99"):
            if not _is_number(value := getattr(self, name)):
                raise ConfigError(f"reference.{name}: expected a finite number, got {value!r}")
        if self.distance_p99 < 0.0:
            raise ConfigError(f"reference.distance_p99: expected a number from 0 on, got {self.distance_p99}")
        for name, least in (("observation_mean", -math.inf), ("observation_std", 0.0)):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(_is_number(v) and v > least for v in values):
                raise ConfigError(f"reference.{name}: expected numbers above {least}")
        if len(self.observation_mean) != len(self.observation_std):
            raise ConfigError(
                f"reference: expected as many means as standard deviations, got {len(self.observation_mean)} "
                f"and {len(self.observation_std)}"
            )

    @classmethod
    def of(
        cls, spec: TeamSpec, agent: AgentSpec, observations: NDArray[Any], divergence: NDArray[Any]
    ) -> DataReference:
        """Measure ``observations`` [M, O], raw or normalised, and the policy's ``divergence`` [M] on them."""
        normalised = spec.normalizer.apply(observations.astype(np.float64))
        mean, std = normalised.mean(axis=0), normalised.std(axis=0)
        std = np.maximum(std, max(_LEAST_STD * float(np.sqrt(np.mean(std**2))), 1e-6))
        distance = _distance(normalised, mean, std)
        return cls(
            float(np.percentile(divergence, PERCENTILE)),
            float(np.percentile(distance, PERCENTILE)),
            mean.tolist(),
            std.tolist(),
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class Guarded(NamedTuple):
    """Actions of a batch after a guard.

    ``action`` has the shape and type of the graph's output of that name. ``policy_weight`` [B, k] float32 is w of
    the distribution that acted: 1 for the policy, 0 for the behaviour policy.
    """

    action: NDArray[Any]
    policy_weight: NDArray[np.float32]


def behavior_action(
    agent: AgentSpec, parameters: Mapping[str, NDArray[Any]], noise: NDArray[Any] | None
) -> NDArray[Any]:
    """Return the behaviour policy's action, sampled with the noise that the policy's action was sampled with.

    ``parameters`` are outputs of the agent's graph under the names of :mod:`omcda_deploy.bundle`:
    ``behavior_action``, with ``behavior_mean`` and ``behavior_log_std`` [..., A] for continuous actions, and with
    ``behavior_logits`` [..., A] for discrete ones. ``noise`` has as many entries as these, or is None.

    Rows without noise (None, or all zeros) take ``behavior_action`` itself, [..., A] or [...]. Other rows
    are computed in float64 from contiguous copies, because numpy rounds some functions differently on strided
    arrays: so the answer to a row does not depend on the arrays that it came in.
    """
    deterministic = parameters["behavior_action"]
    if noise is None:
        return deterministic
    size, discrete = agent.action.size, agent.action.kind == "discrete"
    rows = {
        name: np.reshape(values, (-1, 1 if discrete and name == "behavior_action" else size))
        for name, values in parameters.items()
        if name.startswith("behavior_")
    }
    action = _joined((agent,)).behavior(rows, np.reshape(noise, (-1, size)))
    return action.reshape(np.shape(deterministic))[()]  # a scalar rather than an array without dimensions


@lru_cache(maxsize=256)
def _joined(agents: tuple[AgentSpec, ...]) -> JoinedActions:
    return JoinedActions(agents)


class _Group:
    """The agents of a model that have one mode."""

    def __init__(self, mode: Mode, agents: Sequence[AgentSpec], members: Sequence[int]) -> None:
        """``members``: their indices among all ``agents`` of the model."""
        whole = len(members) == len(agents)
        places = Joined.of([agent.action.size for agent in agents])
        self.members: slice | NDArray[np.int64] = slice(None) if whole else np.array(members)
        self._entries = slice(None) if whole else np.flatnonzero(np.isin(places.owner, members))
        self._actions = _joined(tuple(agents[index] for index in members))
        self._mode = mode

    def replace(
        self,
        guarded: Guarded,
        untrusted: NDArray[np.bool_],
        thresholds: NDArray[np.float64],
        noise: NDArray[Any],
        outputs: Mapping[str, NDArray[Any]],
    ) -> None:
        """Replace the actions and weights of ``guarded`` that are ``untrusted`` [B, k], of these agents."""
        wanted = untrusted[:, self.members]
        acted = wanted.any(axis=1)
        rows = slice(None) if acted.all() else np.flatnonzero(acted)
        wanted = wanted[rows]
        if not len(wanted):
            return
        places, discrete = self._actions.places, self._actions.discrete
        columns = self.members if discrete else self._entries
        parameters = {
            name: values.reshape(len(noise), -1)[rows][
                :, columns if name == "behavior_action" else self._entries
            ]
            for name, values in outputs.items()
            if name not in _NOT_PARAMETERS
        }
        noise = noise[rows][:, self._entries]
        if self._mode == "fallback":
            action, weight = self._actions.behavior(parameters, noise), np.zeros(wanted.shape)
        else:
            action, weight = self._actions.blend(parameters, noise, thresholds[self.members], wanted)
        replaced = wanted if discrete else places.spread(wanted)
        for target, at, chosen, values in (
            (guarded.action.reshape(len(untrusted), -1), columns, replaced, action),
            (guarded.policy_weight, self.members, wanted, weight),
        ):
            block = target[rows]
            block[:, at] = np.where(chosen, values, block[:, at])
            target[rows] = block


class Guard:
    """Guards of the agents of one model, called with each batch of its answers.

    ``observation_slices`` and ``action_slices`` are the positions of its agents in the model's joined vectors.
    Raises :class:`ConfigError` where a setting needs something that the bundle lacks: a threshold, a description
    of the observations for ``distance_limit``, or, for ``blend``, a policy with a density.
    """

    def __init__(
        self,
        spec: TeamSpec,
        agents: Sequence[AgentSpec],
        divergence_kind: str,
        settings: Mapping[str, GuardSetting],
        references: Mapping[str, DataReference],
    ) -> None:
        """``agents``: one of the team's or all of them; an agent that ``settings`` leave out is only observed."""
        self.agents = tuple(agents)
        model_spec = replace(spec, agents=self.agents)
        self.observation_slices, self.action_slices = model_spec.observation_slices, model_spec.action_slices
        self.settings = tuple(settings.get(agent.name, GuardSetting()) for agent in agents)
        self._normalizer = spec.normalizer
        thresholds = []
        for agent, setting in zip(self.agents, self.settings, strict=True):
            if setting.mode == "blend" and divergence_kind != "kl":
                raise ConfigError(
                    f"guard of {agent.name}: blend expects a policy with a density, this bundle's divergence is "
                    f"{divergence_kind}: use fallback"
                )
            if setting.threshold is None and agent.name not in references and setting.mode != "observe":
                raise ConfigError(
                    f"guard of {agent.name}: the bundle states no threshold, as it was not made from training "
                    "data: set one"
                )
            default = references[agent.name].divergence_p99 if agent.name in references else np.inf
            thresholds.append(default if setting.threshold is None else setting.threshold)
        self.thresholds = np.array(thresholds)
        self.distance_limits = np.array(
            [
                np.inf if setting.distance_limit is None else setting.distance_limit
                for setting in self.settings
            ]
        )
        self._active = np.array([setting.mode != "observe" for setting in self.settings])
        self._acts = bool(self._active.any())
        modes = {mode: [i for i, s in enumerate(self.settings) if s.mode == mode] for mode in _ACTING}
        self._groups = [_Group(mode, self.agents, members) for mode, members in modes.items() if members]
        self._data = [
            (np.array(reference.observation_mean), np.array(reference.observation_std))
            for reference in (references[agent.name] for agent in agents if agent.name in references)
        ]
        if len(self._data) < len(agents) and np.isfinite(self.distance_limits).any():
            raise ConfigError(
                "guard distance_limit: the bundle does not describe its observations, as it was not made from "
                "training data: leave it out"
            )

    @property
    def limits(self) -> list[tuple[int, float]]:
        """Index and threshold of every agent whose action is replaced above it."""
        return [(index, float(self.thresholds[index])) for index in np.flatnonzero(self._active).tolist()]

    def exceeded(self, divergence: NDArray[Any]) -> NDArray[np.bool_]:
        """Mark the entries of a divergence [B, k] that are above their agents' thresholds."""
        above: NDArray[np.bool_] = divergence > self.thresholds
        return above

    def distance(self, observation: NDArray[Any]) -> NDArray[np.float64] | None:
        """Distance of each agent's observation from its training data: ``[B, sum O] -> [B, k]``.

        None for a bundle that does not describe the data of all its agents.
        """
        if len(self._data) < len(self.agents):
            return None
        rows = observation.astype(np.float64)
        distances = np.empty((len(rows), len(self.agents)))
        for index, (columns, moments) in enumerate(zip(self.observation_slices, self._data, strict=True)):
            distances[:, index] = _distance(self._normalizer.apply(rows[:, columns]), *moments)
        return distances

    def __call__(self, noise: NDArray[Any], outputs: Mapping[str, NDArray[Any]]) -> Guarded:
        """Replace the actions that a setting does not trust; ``outputs`` are the graph's for ``noise`` [B, sum A].

        ``outputs`` stay as they are.
        """
        divergence = outputs["divergence"].reshape(len(noise), -1)  # [B, k]
        guarded = Guarded(outputs["action"], np.ones(divergence.shape, np.float32))
        if self._acts and (untrusted := self.exceeded(divergence) & self._active).any():
            guarded = Guarded(guarded.action.copy(), guarded.policy_weight)
            for group in self._groups:
                group.replace(guarded, untrusted, self.thresholds, noise, outputs)
        return guarded


def _distance(
    normalised: NDArray[Any], mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance ``[B, O] -> [B]`` from data of the given moments, both [O]."""
    distance: NDArray[np.float64] = np.sqrt((((normalised - mean) / std) ** 2).mean(axis=1))
    return distance
