"""The divergence guard: what is done where a policy strays from the behaviour policy further than it is trusted to.

| mode       | where the divergence exceeds the threshold |
|------------|--------------------------------------------|
| `observe`  | the policy's action all the same; only counted |
| `fallback` | the behaviour policy's action |
| `blend`    | an action of ``pi_w ~ pi_b^(1-w) pi^w`` with the largest w for which KL(pi_w || pi_b) <= threshold |

A blend is taken between distributions (natural parameters of the Gaussians under the tanh, or log-probabilities),
never between actions: the mean of two good actions can be a bad one. KL(pi_w || pi_b) grows with w, from 0 at
w = 0, so the largest w is found by bisection. All modes use the noise that came with the request; none means the
mode of the distribution.

A threshold is in nats per agent and sample. Where none is set it is the 99th percentile of the divergence on the
training data: budgets d_i are means over a batch, and the divergence of single states has a heavy tail, so a budget
would be exceeded all the time.

Beside it stands the distance of the observation from the training data,

    distance = sqrt(mean_j ((o_j - mean_j) / std_j)^2)        about 1 on average where the data came from

over the entries of the normalised observation. The divergence does not replace it: on an observation that neither
policy has seen both extrapolate, and may well agree.

Shapes: B batch, k agents of a model (1, or N for the team), vectors joined along the last axis as in the team
graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError
from omcda_deploy.spec import AgentSpec, TeamSpec

Mode = Literal["observe", "fallback", "blend"]

PERCENTILE = 99.0
_BISECTIONS = 30
_LEAST_STD = (
    0.1  # of the root mean square over entries: an entry that was constant in the data may move that much
)


@dataclass(frozen=True)
class GuardSetting:
    """One agent's guard. ``threshold`` in nats, None for the bundle's; ``distance_limit``: refuse beyond it."""

    mode: Mode = "observe"
    threshold: float | None = None
    distance_limit: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"guard mode: expected one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        for name in ("threshold", "distance_limit"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0.0 <= value < np.inf):
                raise ConfigError(f"guard {name}: expected a number from 0 on, got {value!r}")


@dataclass(frozen=True)
class Reference:
    """What an agent's training data say, as a bundle's manifest holds it."""

    divergence_p99: float
    distance_p99: float
    observation_mean: Sequence[float]  # [O], normalised
    observation_std: Sequence[float]  # [O], floored so that constant entries have a scale

    def __post_init__(self) -> None:
        """Raises :class:`ConfigError` for what no data can have said."""
        for name in ("divergence_p99", "distance_p99"):
            if not _is_number(value := getattr(self, name)):
                raise ConfigError(f"reference.{name}: expected a finite number, got {value!r}")
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
    ) -> Reference:
        """From ``observations`` [M, O], raw or normalised, and the policy's ``divergence`` [M] on them."""
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
    """What a guard made of a batch.

    ``action``: as the graph's output of that name. ``policy_weight`` [B, k] float32: w of the distribution that
    acted, 1 for the policy, 0 for the behaviour policy.
    """

    action: NDArray[Any]
    policy_weight: NDArray[np.float32]


class Guard:
    """The guards of a model's agents.

    Raises :class:`ConfigError` for a mode that needs what the bundle has not: a threshold, or, for ``blend``, a
    policy with a density.
    """

    def __init__(
        self,
        spec: TeamSpec,
        agents: Sequence[AgentSpec],
        divergence_kind: str,
        settings: Mapping[str, GuardSetting],
        references: Mapping[str, Reference],
    ) -> None:
        self.agents = tuple(agents)
        self.settings = tuple(settings.get(agent.name, GuardSetting()) for agent in agents)
        self._discrete = spec.action_kind == "discrete"
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
            known = references[agent.name].divergence_p99 if agent.name in references else np.inf
            thresholds.append(known if setting.threshold is None else setting.threshold)
        self.thresholds = np.array(thresholds)
        self.distance_limits = np.array(
            [
                np.inf if setting.distance_limit is None else setting.distance_limit
                for setting in self.settings
            ]
        )
        self._active = np.array([setting.mode != "observe" for setting in self.settings])
        self._acts = bool(self._active.any())
        self._observations = list(pairwise(np.cumsum([0, *(a.observation_size for a in agents)]).tolist()))
        self._actions = list(pairwise(np.cumsum([0, *(a.action.size for a in agents)]).tolist()))
        self._data = [
            (np.array(own.observation_mean), np.array(own.observation_std))
            for own in (references[agent.name] for agent in agents if agent.name in references)
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
        """Where a divergence [B, k] is above its agent's threshold."""
        above: NDArray[np.bool_] = divergence > self.thresholds
        return above

    def distance(self, observation: NDArray[Any]) -> NDArray[np.float64] | None:
        """``[B, sum O] -> [B, k]``; None for a bundle that does not describe the data of all its agents."""
        if len(self._data) < len(self.agents):
            return None
        rows = observation.astype(np.float64)
        found = np.empty((len(rows), len(self.agents)))
        for index, (own, known) in enumerate(zip(self._observations, self._data, strict=True)):
            found[:, index] = _distance(self._normalizer.apply(rows[:, slice(*own)]), *known)
        return found

    def __call__(self, noise: NDArray[Any], outputs: Mapping[str, NDArray[Any]]) -> Guarded:
        """``noise`` [B, sum A] and the graph's outputs with it."""
        divergence = outputs["divergence"].reshape(len(noise), -1)  # [B, k]
        weight = np.ones(divergence.shape, np.float32)
        action = outputs["action"]
        if self._acts and (stopped := self.exceeded(divergence) & self._active).any():
            action = action.copy()
            for index in np.flatnonzero(stopped.any(axis=0)).tolist():
                rows = np.flatnonzero(stopped[:, index])
                weight[rows, index] = self._replace(action, rows, index, noise, outputs)
        return Guarded(action, weight)

    def _replace(
        self,
        action: NDArray[Any],
        rows: NDArray[np.int64],
        index: int,
        noise: NDArray[Any],
        outputs: Mapping[str, NDArray[Any]],
    ) -> NDArray[np.float64]:
        """Put other actions of agent ``index`` into ``rows`` of ``action``; returns their weights."""
        own = slice(*self._actions[index])
        kind = _Logits if self._discrete else _Gaussian
        pair = kind(outputs, rows, own)
        if self.settings[index].mode == "fallback":
            weight = np.zeros(len(rows))
        else:
            weight = _largest_weight(pair, float(self.thresholds[index]), len(rows))
        chosen = pair.act(weight, noise[rows, own].astype(np.float64))
        if self._discrete:
            action.reshape(len(action), -1)[rows, index] = chosen
        else:
            low, high = self.agents[index].action.low, self.agents[index].action.high
            action[rows, own] = (high + low) / 2.0 + (high - low) / 2.0 * chosen
        return weight


class _Gaussian:
    """pi_w of Gaussians under the tanh: precision and precision-weighted mean are linear in w."""

    def __init__(self, outputs: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], own: slice) -> None:
        mean, log_std, mean_b, log_std_b = (
            outputs[name][rows, own].astype(np.float64)
            for name in ("mean", "log_std", "behavior_mean", "behavior_log_std")
        )
        self._precision, self._precision_b = np.exp(-2.0 * log_std), np.exp(-2.0 * log_std_b)
        self._mean, self._mean_b = mean, mean_b

    def at(self, weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and precision [rows, A] of pi_w."""
        w = weight[:, None]
        precision = (1.0 - w) * self._precision_b + w * self._precision
        mean = ((1.0 - w) * self._precision_b * self._mean_b + w * self._precision * self._mean) / precision
        return mean, precision

    def kl(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """KL(pi_w || pi_b) [rows], in nats."""
        mean, precision = self.at(weight)
        ratio = self._precision_b / precision
        terms = ratio + self._precision_b * (mean - self._mean_b) ** 2 - 1.0 - np.log(ratio)
        kl: NDArray[np.float64] = 0.5 * terms.sum(axis=1)
        return kl

    def act(self, weight: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
        """Actions [rows, A] in [-1, 1]."""
        mean, precision = self.at(weight)
        return np.tanh(mean + noise / np.sqrt(precision))


class _Logits:
    """pi_w of categorical distributions: log-probabilities are linear in w, up to their normalisation."""

    def __init__(self, outputs: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], own: slice) -> None:
        self._logits, self._logits_b = (
            outputs[name][rows, own].astype(np.float64) for name in ("logits", "behavior_logits")
        )

    def at(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-probabilities [rows, A] of pi_w; what is unavailable is so to both and stays very unlikely."""
        w = weight[:, None]
        scores = (1.0 - w) * self._logits_b + w * self._logits
        scores -= scores.max(axis=1, keepdims=True)
        log_probs: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return log_probs

    def kl(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        log_probs = self.at(weight)
        terms = np.exp(log_probs) * (log_probs - self._logits_b)
        kl: NDArray[np.float64] = terms.sum(axis=1)
        return kl

    def act(self, weight: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.int64]:
        choice: NDArray[np.int64] = np.argmax(self.at(weight) + noise, axis=1)
        return choice


def _largest_weight(pair: _Gaussian | _Logits, threshold: float, rows: int) -> NDArray[np.float64]:
    """Largest w [rows] with KL(pi_w || pi_b) <= threshold, from below."""
    low, high = np.zeros(rows), np.ones(rows)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        inside = pair.kl(middle) <= threshold
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return low


def _distance(
    normalised: NDArray[Any], mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``[B, O] -> [B]``."""
    distance: NDArray[np.float64] = np.sqrt((((normalised - mean) / std) ** 2).mean(axis=1))
    return distance
