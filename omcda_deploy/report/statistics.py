"""Statistics over runs: interquartile mean, probability of improvement, intervals, an exact test, normalised score.

The definitions are rliable's (Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS 2021). The value of a run is its mean return over the evaluation episodes, so the spread is one
over seeds: episodes of one policy are not independent runs. Shape letter: R runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values: TypeAlias = NDArray[np.float64]

REPLICATIONS = 10_000
MOST_ARRANGEMENTS = 200_000  # ten runs against ten


@dataclass(frozen=True)
class Interval:
    """An interval estimate from ``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class ScoreReference:
    """The two returns between which a score is normalised, and their ``source`` in words."""

    low: float  # return of score 0
    high: float  # return of score 100
    source: str


def _mamujoco(random: float, expert: float) -> ScoreReference:
    return ScoreReference(
        random,
        expert,
        f"0: uniformly random actions, {random:g} (measured in this package's simulator, 100 episodes of seed 0, "
        f"1,000 of Hopper); 100: mean return of OMIGA's expert dataset, {expert:g} (OG-MARL's dataset cards)",
    )


# One reference per task, as in D4RL, and not one per dataset, so that scores of different datasets can be compared
# and averaged. Both returns are means and not bounds, so a score may lie below 0 or above 100.
REFERENCES = {
    "mamujoco/hopper-3x1": _mamujoco(19.1, 2452.02),
    "mamujoco/ant-2x4": _mamujoco(-49.7, 2055.07),
    "mamujoco/halfcheetah-6x1": _mamujoco(-285.2, 2785.10),
}
# Of all tasks of a family. Nothing published is in units of SMAX.
FAMILY_REFERENCES = {
    "smax": ScoreReference(0.0, 2.0, "0: return 0; 100: return 2, the most that a battle can return, won"),
}


def std(values: ArrayLike) -> float:
    """Population standard deviation of values [R] (division by R), as in the published tables; nan for one run."""
    values = np.asarray(values, np.float64)
    return float(values.std()) if values.size > 1 else math.nan


def interquartile_mean(values: ArrayLike) -> Any:
    """Mean of the middle half of ``values`` along the last axis: float64 [...] from [..., R].

    Equal to scipy's ``trim_mean(0.25)``, which rliable uses: ``floor(R/4)`` values are cut from each end, and no
    value counts in part. So up to three values all count, and of five the middle three. For runs of several tasks
    join their values first: the quartiles are those of all of them together. nan where one of the values is.
    """
    values = np.sort(np.asarray(values, np.float64), axis=-1)  # nan comes last
    runs = values.shape[-1]
    cut = runs // 4
    return np.where(np.isnan(values[..., -1]), np.nan, values[..., cut : runs - cut].mean(axis=-1))[()]


def bootstrap_interval(
    tasks: Sequence[ArrayLike],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    replications: int = REPLICATIONS,
) -> Interval | None:
    """Percentile interval of the :func:`interquartile_mean` by the stratified bootstrap.

    ``tasks`` holds the values [R] of each task's runs. Each replication samples a task's runs with replacement, as
    many as it has; the tasks are fixed. So the interval is for other runs of the same tasks. Of a single task with
    few runs all samples are taken, which leaves nothing to chance.

    Returns None unless every task has two runs or more: a single run says nothing about its spread. From few runs
    the interval comes out too narrow: at 95 % and for normal values it covers 74 % at three runs of one task, 91 %
    at five.
    """
    groups = [np.asarray(values, np.float64) for values in tasks]
    if not groups or min(values.size for values in groups) < 2:
        return None
    samples = _resampled(groups, seed, replications)
    return _percentiles(interquartile_mean(np.concatenate(samples, axis=1)), confidence)


def probability_of_improvement(tasks: Sequence[tuple[ArrayLike, ArrayLike]]) -> float:
    """Mean over tasks of ``P(X > Y) + P(X = Y)/2``: how likely a run of X returns more than one of Y.

    ``tasks`` holds the values of both methods' runs on each task, [R] and [R'], which need not be equally many. On
    one task this is the Mann-Whitney statistic U / (R R').
    """
    return float(np.mean([_wins(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in tasks]))


def improvement_interval(
    tasks: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    replications: int = REPLICATIONS,
) -> Interval | None:
    """Percentile interval of :func:`probability_of_improvement` by the stratified bootstrap.

    Each replication samples the runs of each method on each task with replacement. Returns None unless every task
    has two runs or more of both.
    """
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in tasks]
    if not pairs or min(values.size for pair in pairs for values in pair) < 2:
        return None
    samples = iter(_resampled([values for pair in pairs for values in pair], seed, replications))
    wins = [_wins(x, y) for x, y in zip(samples, samples, strict=True)]
    return _percentiles(np.mean(wins, axis=0), confidence)


def difference_p_value(x: ArrayLike, y: ArrayLike) -> float:
    """Two-sided p-value of the Mann-Whitney test that values [R] and [R'] are drawn alike.

    Exact, also with equal values, where the values can be divided between the two in at most
    :data:`MOST_ARRANGEMENTS` ways; else by the normal approximation, corrected for equal values and for continuity.
    nan where one side is empty or a value is nan. Unlike the interval of the improvement it is right for few runs:
    with five of both, the interval of 95 % leaves out 1/2 for one in ten pairs that are drawn alike.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    joined = np.concatenate([x, y])
    if not x.size or not y.size or np.isnan(joined).any():
        return math.nan
    ranks = _ranks(joined)
    middle = x.size * ranks.mean()
    deviation = abs(float(ranks[: x.size].sum()) - middle)
    if math.comb(joined.size, x.size) <= MOST_ARRANGEMENTS:
        chosen = np.array(list(combinations(range(joined.size), x.size)))
        sums = np.abs(ranks[chosen].sum(axis=1) - middle)
        return float(np.mean(sums >= deviation - 1e-9))
    variance = x.size * y.size / joined.size * float(ranks.var(ddof=1))
    return math.erfc(max(deviation - 0.5, 0.0) / math.sqrt(2 * variance)) if variance else 1.0


def mean_interval(
    groups: Sequence[ArrayLike], *, seed: int = 0, confidence: float = 0.95, replications: int = REPLICATIONS
) -> Interval | None:
    """Percentile interval of the mean over groups of the mean of their values [R], by the stratified bootstrap.

    Returns None unless every group has two values or more.
    """
    arrays = [np.asarray(values, np.float64) for values in groups]
    if not arrays or min(values.size for values in arrays) < 2:
        return None
    means = [sample.mean(axis=1) for sample in _resampled(arrays, seed, replications)]
    return _percentiles(np.mean(means, axis=0), confidence)


def regret_interval(
    chosen: ArrayLike,
    best: ArrayLike,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    replications: int = REPLICATIONS,
) -> Interval | None:
    """Percentile interval of the part of the mean of ``best`` [R'] by which that of ``chosen`` [R] is smaller.

    Both are resampled. Returns None unless both have two values or more and the mean of ``best`` is not 0.
    """
    arrays = [np.asarray(values, np.float64) for values in (chosen, best)]
    if min(values.size for values in arrays) < 2 or not arrays[1].mean():
        return None
    had, could = (sample.mean(axis=1) for sample in _resampled(arrays, seed, replications))
    return _percentiles((could - had) / abs(arrays[1].mean()), confidence)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation of two series [N] of two values or more; nan where one is constant or has a nan."""
    series = [np.asarray(values, np.float64) for values in (x, y)]
    if any(np.isnan(values).any() for values in series):
        return math.nan
    ranks = [_ranks(values) for values in series]
    first, second = (values - values.mean() for values in ranks)
    scale = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale else math.nan


def _ranks(values: Values) -> Values:
    """Ranks from 0, equal values sharing the mean of theirs."""
    less = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    ranks: Values = less + (equal - 1) / 2
    return ranks


def _wins(x: Values, y: Values) -> Values:
    """Share of pairs that X wins, equal ones half: [...] from [..., R] and [..., R']."""
    wins: Values = 0.5 + 0.5 * np.sign(x[..., :, None] - y[..., None, :]).mean(axis=(-2, -1))
    return wins


def _resampled(groups: Sequence[Values], seed: int, replications: int) -> list[Values]:
    """Samples of each group's runs [R] with replacement, [replications, R]; all that a small single group has."""
    if len(groups) == 1 and groups[0].size ** groups[0].size <= replications:
        return [np.array(list(product(groups[0], repeat=groups[0].size)))]
    generator = np.random.default_rng(seed)
    return [values[generator.integers(values.size, size=(replications, values.size))] for values in groups]


def _percentiles(samples: Values, confidence: float) -> Interval:
    tail = 50 * (1 - confidence)
    # Without interpolation: three runs have 27 samples, the least of which alone has more than 2.5 %.
    low, high = np.percentile(samples, (tail, 100 - tail), method="inverted_cdf")
    return Interval(float(low), float(high))


def reference_of(task: str) -> ScoreReference | None:
    """Return a task's own reference, or its family's; None where there is none."""
    return REFERENCES.get(task) or FAMILY_REFERENCES.get(task.partition("/")[0])


def normalised_score(task: str, returns: ArrayLike) -> Values | None:
    """``100 (return - low) / (high - low)`` by :func:`reference_of`, of any shape.

    Returns None for a task without a reference.
    """
    reference = reference_of(task)
    if reference is None:
        return None
    return 100 * (np.asarray(returns, np.float64) - reference.low) / (reference.high - reference.low)
