"""Expected returns and improvements from recorded episodes, with bounds.

An episode counts by how much likelier the team would have acted as recorded: ``W_t = prod_(u<=t) pi(a_u)/b(a_u)``,
b being the distribution that acted. ``sum_t W_t r_t`` has the team's expected return as its mean. Values Q, linear
in simple features and fitted to the team on other episodes, take noise out of it: with ``V(s) = E_pi[Q(s, a)]``,

    V(s_0) + sum_t W_t (V(s_(t+1)) - Q(s_t, a_t))

has mean 0 whatever Q is. Less that of b itself, which is off as much where b is not quite what acted, it is added
times the factor that leaves the least variance. Weights are capped at ``sqrt(E)``, so that no single episode
decides; what that leaves out is left to Q. Source: docs/derivation.md#estimates-before-acting.

Shapes: E episodes, M steps of them, T steps of the longest, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset, require_rewards
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.estimation.distributions import TeamDistributions, Values

LEAST_EPISODES = 30
LEAST_EFFECTIVE = 10.0  # episodes; below it neither a mean nor its error is known
UNSUPPORTED_NATS = (
    3.0  # of divergence in a state; above, its recorded actions say next to nothing of the team
)
MOST_UNSUPPORTED = 0.05  # share of such states
MEAN_WEIGHTS = (0.5, 2.0)  # of whole episodes; expected is 1
MOST_EPISODES = 10**6  # that anybody would record
POWER = 0.8  # with which as many episodes as are asked for would tell
_FOLDS = 5  # values are fitted on all but one
_RIDGE = 1.0
_MOST_FEATURES = 400  # beyond, values add up what states and actions are worth, without their products


def effective_sample_size(log_weights: Values) -> float:
    """Return ``(sum w)^2 / (M sum w^2)`` in (0, 1] of weights [M], given as logarithms."""
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.mean()
    return float(1.0 / np.square(weights).mean())


class Bounds(NamedTuple):
    """An estimate, and a lower and an upper bound that each hold with the confidence."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Estimates of what a team earns, and of what it earns above another one, from recorded episodes."""

    value: Bounds  # expected undiscounted return
    improvement: Bounds  # over the baseline
    standard_error: float  # of the improvement
    episodes: int
    effective_episodes: float  # how many whole episodes really speak for the team
    mean_weight: float  # of whole episodes, 1 expected; the farthest from 1 of both teams'
    unsupported: float  # share of recorded states in which the data cannot say
    divergence: (
        float  # from what acted, mean over recorded states, nats per step; infinite beyond its support
    )
    episode_divergence: float  # the same of a whole recorded episode
    confidence: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        finite = {
            name: None if isinstance(number, float) and not math.isfinite(number) else number
            for name, number in asdict(self).items()
        }
        return {**finite, "value": self.value._asdict(), "improvement": self.improvement._asdict()}

    @property
    def silence(self) -> str:
        """Reason why the data cannot tell, and what would have to be recorded; empty where they can."""
        if self.unsupported > MOST_UNSUPPORTED:
            return (
                f"in {100 * self.unsupported:.0f} % of the recorded states ({100 * MOST_UNSUPPORTED:.0f} % may be) "
                "the team acts in ways that are hardly recorded: record at a higher temperature, or estimate a "
                "team that is nearer to what acted"
            )
        if self.effective_episodes < LEAST_EFFECTIVE:
            # About exp(KL) samples are the least that importance sampling needs (Chatterjee & Diaconis 2018); the
            # effective share alone says too little where one episode carries all weight.
            needed = LEAST_EFFECTIVE * max(
                self.episodes / self.effective_episodes, math.exp(min(self.episode_divergence, 100.0))
            )
            more = (
                f"record about {_rounded(math.ceil(needed))} episodes in all, record"
                if needed <= MOST_EPISODES
                else "no number of episodes that one records would do: record"
            )
            return (
                f"{self.effective_episodes:.1f} of {self.episodes} episodes speak for the team, at least "
                f"{LEAST_EFFECTIVE:.0f} are needed, and it is {self.episode_divergence:.3g} nats an episode from "
                f"what acted: {more} at a higher temperature, or estimate a team that is nearer to it"
            )
        low, high = MEAN_WEIGHTS
        if not low <= self.mean_weight <= high:
            return (
                f"the episodes' weights have a mean of {self.mean_weight:.2g}, where 1 is expected and {low:g} to "
                f"{high:g} may be: most of what the team does was not recorded, or what acted is not the "
                "distribution it is taken for. Record more, with exact behaviour, or estimate a team that is nearer"
            )
        return ""

    def episodes_for(self, threshold: float) -> int | None:
        """Return roughly how many episodes would tell that the improvement exceeds ``threshold``.

        None where the estimate does not exceed it.
        """
        gap = self.improvement.estimate - threshold
        if gap <= 0.0:
            return None
        sigmas = NormalDist().inv_cdf(self.confidence) + NormalDist().inv_cdf(POWER)
        return _rounded(math.ceil(self.episodes * (sigmas * self.standard_error / gap) ** 2))


class _Terms(NamedTuple):
    """Sums over each episode for one team, [E] each."""

    weighted: Values  # sum_t W_t r_t
    control: Values  # of mean 0
    log_weight: Values  # of the whole episode

    @property
    def mean_weight(self) -> float:
        """Mean of the capped weights of whole episodes: 1 as far as the episodes hold what the team does."""
        return float(np.exp(np.minimum(self.log_weight, _largest_log_weight(len(self.log_weight)))).mean())


def require_estimable(dataset: Dataset) -> None:
    """Raise :class:`DatasetError` for fewer than :data:`LEAST_EPISODES` episodes, and without their rewards."""
    require_rewards(dataset, "returns cannot be estimated")
    if (count := len(dataset.episode_length)) < LEAST_EPISODES:
        raise DatasetError(
            f"expected at least {LEAST_EPISODES} closed episodes to estimate from, got {count}: record more"
        )


def require_confidence(confidence: float) -> None:
    """Raise :class:`ConfigError` for a confidence outside [0.5, 1)."""
    if not 0.5 <= confidence < 1.0:
        raise ConfigError(f"confidence: expected a number from 0.5 to below 1, got {confidence}")


class Estimator:
    """Compares teams on one dataset, whose closed episodes ``behavior`` played."""

    def __init__(self, dataset: Dataset, behavior: TeamDistributions, confidence: float = 0.95) -> None:
        """``confidence``: with which each bound holds alone.

        Raises :class:`ConfigError` for a confidence outside [0.5, 1), and :class:`DatasetError` as
        :func:`require_estimable`.
        """
        require_confidence(confidence)
        require_estimable(dataset)
        self.behavior, self.confidence = behavior, confidence
        self._dataset = dataset
        count, lengths = len(dataset.episode_length), dataset.episode_length
        self._episode = np.repeat(np.arange(count), lengths)  # [M]
        self._step = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)  # [M]
        self._rows = np.repeat(dataset.episode_start, lengths) + self._step  # [M]
        self._goes_on = self._step + 1 < np.repeat(lengths, lengths)  # [M]
        self._rewards = dataset.rewards[self._rows].astype(np.float64)
        self._actions = dataset.spec.squashed(dataset.actions)
        self._log_density = behavior.log_density(self._actions)[self._rows]

    @cached_property
    def recorded(self) -> Bounds:
        """Mean return of the recorded episodes."""
        returns = self._per_episode(self._rewards)
        return self._bounds(returns, len(returns))[0]

    def compare(self, team: TeamDistributions, baseline: TeamDistributions | None = None) -> Comparison:
        """Estimate what ``team`` earns, alone and above ``baseline``, or above what acted if that is None."""
        of_team = self._terms(team)
        of_baseline = self._of_behavior if baseline is None else self._terms(baseline)
        count = len(of_team.weighted)
        effective = count * min(effective_sample_size(terms.log_weight) for terms in (of_team, of_baseline))
        control = of_team.control - self._of_behavior.control
        value, _ = self._bounds(_controlled(of_team.weighted, control), effective)
        gain = _controlled(of_team.weighted - of_baseline.weighted, of_team.control - of_baseline.control)
        improvement, error = self._bounds(gain, effective)
        divergence = team.divergence(self.behavior)[self._rows]
        mean_weights = (of_team.mean_weight, of_baseline.mean_weight)
        return Comparison(
            value=value,
            improvement=improvement,
            standard_error=error,
            episodes=count,
            effective_episodes=effective,
            mean_weight=max(mean_weights, key=lambda mean: abs(math.log(max(mean, 1e-300)))),
            unsupported=float((divergence > UNSUPPORTED_NATS).mean()),
            divergence=float(divergence.mean()),
            episode_divergence=float(divergence.sum() / count),
            confidence=self.confidence,
        )

    @cached_property
    def _of_behavior(self) -> _Terms:
        return self._terms(self.behavior)

    def _bounds(self, parts: Values, effective: float) -> tuple[Bounds, float]:
        """Bound the mean of ``parts`` [E] as Student's t does, with as many degrees as episodes really speak."""
        mean, error = float(parts.mean()), float(parts.std(ddof=1) / math.sqrt(len(parts)))
        reach = _student(self.confidence, max(effective - 1.0, 1.0)) * error
        return Bounds(mean, mean - reach, mean + reach), error

    def _terms(self, team: TeamDistributions) -> _Terms:
        ratios = team.log_density(self._actions)[self._rows] - self._log_density
        # Episode by episode: differences of a sum over all would lose the digits that an unlikely step outweighs.
        starts = np.flatnonzero(self._step == 0)
        logs = np.concatenate([np.cumsum(part) for part in np.split(ratios, starts[1:])])
        weights = np.exp(np.minimum(logs, _largest_log_weight(len(starts))))
        value, following, chosen = self._values(team)
        control = self._per_episode(weights * (following - chosen)) + value[self._step == 0]
        return _Terms(self._per_episode(weights * self._rewards), control, logs[~self._goes_on])

    def _per_episode(self, terms: Values) -> Values:
        """Sum terms [M] over the steps of each episode: [E]."""
        return np.asarray(np.bincount(self._episode, terms), np.float64)

    def _values(self, team: TeamDistributions) -> tuple[Values, Values, Values]:
        """Return V(s), V(s') and Q(s, a) [M]; those of a fold's episodes are fitted on the other folds."""
        expected = [agent.features() for agent in team.agents]  # of a whole dataset's rows
        products, rewards = [], []
        for steps in self._folds():
            chosen, _, following = self._features(team, expected, steps)
            products.append(chosen.T @ (chosen - following))
            rewards.append(chosen.T @ self._rewards[steps])
        values = np.zeros((3, len(self._rows)))
        for fold, steps in enumerate(self._folds()):
            matrix = sum(products) - products[fold] + _RIDGE * np.eye(len(products[fold]))
            weights = np.linalg.lstsq(matrix, sum(rewards) - rewards[fold], rcond=None)[0]
            chosen, here, following = self._features(team, expected, steps)
            values[:, steps] = here @ weights, following @ weights, chosen @ weights
        value, following, chosen = values
        return value, following, chosen

    def _folds(self) -> Iterator[NDArray[np.int64]]:
        for fold in range(_FOLDS):
            yield np.flatnonzero(self._episode % _FOLDS == fold)

    def _features(
        self, team: TeamDistributions, expected: list[Values], steps: NDArray[np.int64]
    ) -> tuple[Values, Values, Values]:
        """Return features [m, F] at the recorded actions, and their expectations here and at the next rows."""
        rows = self._rows[steps]
        chosen = [agent.features_of(self._actions[rows, i]) for i, agent in enumerate(team.agents)]
        return (
            self._joined(rows, chosen),
            self._joined(rows, [values[rows] for values in expected]),
            self._joined(rows + 1, [values[rows + 1] for values in expected]) * self._goes_on[steps, None],
        )

    def _joined(self, rows: NDArray[np.int64], actions: list[Values]) -> Values:
        """Join 1, the state, and each agent's action times 1 and its observation: [m, F]."""
        states, observations = self._standardized
        parts = [np.ones((len(rows), 1)), states[rows]]
        widths = [action.shape[1] * (1 + observations.shape[2]) for action in actions]
        for index, action in enumerate(actions):
            parts.append(action)
            if sum(widths) + states.shape[1] <= _MOST_FEATURES:
                product = action[:, :, None] * observations[rows, index, None, :]
                parts.append(product.reshape(len(rows), -1))
        return np.concatenate(parts, axis=1)

    @cached_property
    def _standardized(self) -> tuple[Values, Values]:
        """States [R, S] and observations [R, N, O] of mean 0 and deviation 1 over the steps."""
        return _standardized(self._dataset.states, self._rows), _standardized(
            self._dataset.observations, self._rows
        )


def _largest_log_weight(episodes: int) -> float:
    return 0.5 * math.log(episodes)


def _standardized(values: NDArray[Any], rows: NDArray[np.int64]) -> Values:
    used = values[rows].astype(np.float64)
    deviation = used.std(0)
    scale = np.where(deviation > 1e-6, deviation, np.inf)
    return np.asarray((values - used.mean(0)) / scale)


def _controlled(weighted: Values, control: Values) -> Values:
    """Add the control variate times the factor, from 0 to 1, that leaves the least variance."""
    centered = control - control.mean()
    variance = float(centered @ centered)
    factor = 0.0 if variance == 0.0 else -float(weighted @ centered) / variance
    return np.asarray(weighted + min(max(factor, 0.0), 1.0) * control)


def _student(confidence: float, degrees: float) -> float:
    """Return Student's quantile by its expansion about the normal one, good to 1 % from three degrees on."""
    z = NormalDist().inv_cdf(confidence)
    return z + (z**3 + z) / (4.0 * degrees) + (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * degrees**2)


def _rounded(count: int) -> int:
    """Round up to two digits, as such numbers are rough."""
    unit = int(10 ** max(len(str(count)) - 2, 0))
    return -(-count // unit) * unit
