"""Statistics over runs against numbers worked out by hand, by enumeration and by known distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from omcda_deploy.envs.vector import VectorEnvironment
from omcda_deploy.report.statistics import (
    REFERENCES,
    Interval,
    bootstrap_interval,
    difference_p_value,
    improvement_interval,
    interquartile_mean,
    mean_interval,
    normalised_score,
    probability_of_improvement,
    rank_correlation,
    regret_interval,
    std,
)

# -- interquartile mean ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 4.0], 2.5),
        ([0.0, 1.0, 11.0], 4.0),  # floor(3/4) = 0: nothing is cut
        ([-100.0, 1.0, 3.0, 100.0], 2.0),
        ([-100.0, 1.0, 2.0, 6.0, 100.0], 3.0),  # floor(5/4) = 1, not a weight of 1.25
        ([-100.0, 1.0, 2.0, 3.0, 6.0, 100.0], 3.0),
        ([-100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0], 3.0),
        ([-100.0, -90.0, 1.0, 2.0, 3.0, 6.0, 90.0, 100.0], 3.0),
    ],
)
def test_the_middle_half_is_averaged(values: list[float], expected: float) -> None:
    for order in (values, values[::-1], np.random.default_rng(0).permutation(values)):
        assert interquartile_mean(order) == pytest.approx(expected)


def test_it_is_taken_along_the_last_axis() -> None:
    rows = np.array([[4.0, 0.0, 2.0, 50.0], [1.0, 3.0, -9.0, 9.0]])
    np.testing.assert_allclose(interquartile_mean(rows), [3.0, 2.0])


def test_std_is_that_of_the_published_tables() -> None:
    assert std([1.0, 3.0]) == 1.0  # divided by two runs, not by one
    assert math.isnan(std([5.0]))


# -- bootstrap --------------------------------------------------------------------------------------------------


def test_the_interval_is_the_percentiles_of_all_resamples() -> None:
    """Four runs can be drawn in 4^4 equally likely ways; the interval has the percentiles of these."""
    values = np.array([0.0, 1.0, 4.0, 9.0])
    means = [sum(sorted(values[list(sample)])[1:3]) / 2 for sample in itertools.product(range(4), repeat=4)]
    for confidence in (0.5, 0.8, 0.95):
        tail = 50 * (1 - confidence)
        interval = bootstrap_interval([values], confidence=confidence)
        assert interval is not None
        assert [interval.low, interval.high] == pytest.approx(np.percentile(means, [tail, 100 - tail]))


def test_the_interval_of_drawn_samples_is_near_that_of_all() -> None:
    """Six runs can be drawn in 6^6 ways, more than are drawn."""
    values = np.array([0.0, 1.0, 2.0, 4.0, 6.0, 9.0])
    means = [sum(sorted(sample)[1:5]) / 4 for sample in itertools.product(values, repeat=6)]
    for confidence in (0.5, 0.8, 0.95):
        tail = 50 * (1 - confidence)
        interval = bootstrap_interval([values], confidence=confidence)
        assert interval is not None
        assert [interval.low, interval.high] == pytest.approx(
            np.percentile(means, [tail, 100 - tail]), abs=0.26
        )


def test_an_end_that_is_likely_enough_belongs_to_the_interval() -> None:
    """The least run comes three times in one of the 27 samples of three runs: 3.7 %."""
    assert bootstrap_interval([[1.0, 2.0, 3.0]]) == Interval(1.0, 3.0)
    assert bootstrap_interval([[1.0, 2.0, 3.0]], confidence=0.9) != Interval(1.0, 3.0)


def test_runs_are_drawn_within_their_task() -> None:
    """Tasks of very different returns whose runs agree leave no doubt, which drawing tasks or joint runs would."""
    assert bootstrap_interval([[0.0, 0.0], [50.0, 50.0, 50.0], [1000.0, 1000.0]]) == Interval(230.0, 230.0)


def test_quartiles_are_of_all_tasks_together() -> None:
    """Three zeros among eight runs are seen by that task's own quartiles, and cut among sixteen."""
    some, none = [0.0, *[10.0] * 7], [10.0] * 8
    assert bootstrap_interval([some, none]) == Interval(10.0, 10.0)
    alone = bootstrap_interval([some])
    assert alone is not None
    assert alone.low < 10.0


def test_coverage_of_a_known_distribution() -> None:
    """Twenty normal runs: about 95 % of the intervals hold the true mean (1.1 % standard error of this test)."""
    generator = np.random.default_rng(3)
    held = 0
    for trial in range(400):
        interval = bootstrap_interval([generator.normal(100.0, 15.0, 20)], seed=trial, replications=400)
        assert interval is not None
        held += interval.low <= 100.0 <= interval.high
    assert 0.91 < held / 400 < 0.98


def test_the_seed_decides_the_interval() -> None:
    runs = [np.random.default_rng(0).normal(size=9)]
    assert bootstrap_interval(runs, replications=200) == bootstrap_interval(runs, replications=200)
    assert bootstrap_interval(runs, replications=200) != bootstrap_interval(runs, seed=1, replications=200)


@pytest.mark.parametrize("tasks", [[], [[5.0]], [[1.0, 2.0, 3.0], [4.0]]])
def test_there_is_no_interval_without_a_second_run(tasks: list[list[float]]) -> None:
    assert bootstrap_interval(tasks) is None


# -- rliable's aggregates, against scipy --------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 2, 3, 5, 8, 21, 105])
def test_the_interquartile_mean_is_scipys_trimmed_mean(runs: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(runs).standard_t(2, size=runs).round(1)  # with ties and outliers
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-12)


def test_the_probability_of_improvement_is_mann_whitneys_u() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(3)
    tasks = [
        (generator.integers(0, 6, size=n) * 1.0, generator.integers(0, 4, size=m) * 1.0)  # many are equal
        for n, m in ((5, 5), (3, 5), (1, 7), (2, 1))
    ]
    expected = [stats.mannwhitneyu(x, y).statistic / (x.size * y.size) for x, y in tasks]
    assert probability_of_improvement(tasks) == pytest.approx(np.mean(expected), abs=1e-12)
    for task, value in zip(tasks, expected, strict=True):
        assert probability_of_improvement([task]) == pytest.approx(value, abs=1e-12)
    reversed_tasks = [(y, x) for x, y in tasks]
    assert probability_of_improvement(reversed_tasks) == pytest.approx(1 - np.mean(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("sizes", "method"), [((5, 5), "exact"), ((8, 9), "exact"), ((30, 40), "asymptotic")]
)
def test_the_p_value_is_mann_whitneys(sizes: tuple[int, int], method: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(sum(sizes))
    for shift in (0.0, 0.5, 2.0):
        x, y = generator.normal(size=sizes[0]) + shift, generator.normal(size=sizes[1])
        if method == "asymptotic":
            x, y = x.round(), y.round()  # with ties, which scipy's exact distribution does not know
        expected = stats.mannwhitneyu(x, y, method=method).pvalue
        assert difference_p_value(x, y) == pytest.approx(expected, abs=1e-12)
        assert difference_p_value(y, x) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sizes", [(5, 5), (3, 5), (1, 7)])
def test_equal_values_share_their_ranks_in_every_arrangement(sizes: tuple[int, int]) -> None:
    """The share of all ways to divide the values in which U is at least as far from its mean."""
    generator = np.random.default_rng(sum(sizes))
    x, y = generator.integers(0, 4, size=sizes[0]) + 1.0, generator.integers(0, 4, size=sizes[1]) * 1.0
    joined = [*x, *y]

    def distance(first: tuple[int, ...]) -> float:
        rest = [value for index, value in enumerate(joined) if index not in first]
        return abs(probability_of_improvement([([joined[index] for index in first], rest)]) - 0.5)

    ways = [distance(first) for first in itertools.combinations(range(len(joined)), sizes[0])]
    expected = np.mean([way >= ways[0] - 1e-9 for way in ways])
    assert difference_p_value(x, y) == pytest.approx(expected, abs=1e-12)


def test_the_p_value_of_nothing_is_none_and_of_equals_one() -> None:
    assert math.isnan(difference_p_value([], [1.0]))
    assert math.isnan(difference_p_value([1.0, math.nan], [1.0]))
    assert difference_p_value([1.0] * 3, [1.0] * 4) == difference_p_value([1.0] * 30, [1.0] * 40) == 1.0
    five, other = [1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]
    assert difference_p_value(five, other) == pytest.approx(2 / 252)


def test_regret_is_resampled_over_both() -> None:
    interval = regret_interval([8.0, 10.0], [10.0, 10.0], replications=50_000)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.0, 0.2))
    assert regret_interval([8.0], [10.0, 10.0]) is None
    assert regret_interval([8.0, 9.0], [1.0, -1.0]) is None


def test_what_is_not_a_number_is_not_trimmed_away() -> None:
    assert math.isnan(interquartile_mean([1.0, 2.0, 3.0, 4.0, math.nan]))
    assert math.isnan(rank_correlation([math.nan, 1.0, 2.0], [1.0, 2.0, 3.0]))


def test_the_interval_of_the_improvement_is_the_percentiles_of_all_resamples() -> None:
    """Two and three runs can be drawn in 2^2 times 3^3 equally likely ways, on each of two tasks."""
    tasks = [
        (np.array([0.0, 2.0]), np.array([1.0, 2.0, -1.0])),
        (np.array([5.0, 1.0]), np.array([0.0, 3.0, 1.0])),
    ]

    def resamples(x: np.ndarray, y: np.ndarray) -> list[float]:
        return [
            float(np.mean([(a > b) + 0.5 * (a == b) for a in x[list(i)] for b in y[list(j)]]))
            for i in itertools.product(range(2), repeat=2)
            for j in itertools.product(range(3), repeat=3)
        ]

    means = [(a + b) / 2 for a in resamples(*tasks[0]) for b in resamples(*tasks[1])]
    for confidence in (0.5, 0.8):
        tail = 50 * (1 - confidence)
        low, high = np.percentile(means, (tail, 100 - tail))
        interval = improvement_interval(tasks, confidence=confidence, replications=100_000)
        assert interval is not None
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.03)


def test_single_runs_have_no_interval_of_improvement() -> None:
    several = (np.array([1.0, 2.0]), np.array([0.0, 3.0]))
    assert improvement_interval([several]) is not None
    assert improvement_interval([several, (np.array([1.0]), np.array([0.0, 2.0]))]) is None
    assert improvement_interval([several, (np.array([1.0, 2.0]), np.array([0.0]))]) is None
    assert improvement_interval([]) is None


def test_the_mean_over_groups_has_the_interval_of_its_resamples() -> None:
    groups = [np.array([0.0, 1.0]), np.array([2.0, 6.0])]
    means = [
        (np.mean(a) + np.mean(b)) / 2
        for a in itertools.product(groups[0], repeat=2)
        for b in itertools.product(groups[1], repeat=2)
    ]
    interval = mean_interval(groups, confidence=0.8, replications=50_000)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(means, (10, 90))), abs=1e-9)
    assert mean_interval([groups[0], [1.0]]) is None


@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_is_spearmans(ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 9))
    if ties:
        x, y = x.round(), y.round()
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(rank_correlation([1.0, 1.0], [0.0, 2.0]))


# -- normalised score -----------------------------------------------------------------------------------------


def test_the_references_are_the_ends_of_the_scale() -> None:
    for task, reference in REFERENCES.items():
        ends = [reference.low, (reference.low + reference.high) / 2, reference.high]
        np.testing.assert_allclose(normalised_score(task, ends), [0.0, 50.0, 100.0], atol=1e-9)  # type: ignore[arg-type]
        assert f"{reference.low:g}" in reference.source
        assert f"{reference.high:g}" in reference.source
    assert normalised_score("mamujoco/halfcheetah-6x1", 1249.95) == pytest.approx(50.0)
    assert normalised_score("smax/corridor", [0.5, 2.0]) == pytest.approx([25.0, 100.0])
    assert normalised_score("toy/chain", [1.0]) is None


@pytest.mark.parametrize(
    ("task", "episodes", "spread"),  # std of one episode's return, as measured with the reference
    [("mamujoco/hopper-3x1", 40, 19.0), ("mamujoco/ant-2x4", 4, 85.0), ("mamujoco/halfcheetah-6x1", 4, 77.0)],
)
def test_random_actions_score_nothing(task: str, episodes: int, spread: float) -> None:
    generator = np.random.default_rng(11)
    with VectorEnvironment(task, episodes) as environment:
        environment.reset({index: 1000 + index for index in range(episodes)})
        active, returns = np.ones(episodes, np.bool_), np.zeros(episodes)
        while active.any():
            actions = {
                agent.name: generator.uniform(-1, 1, (episodes, agent.action.size)).astype(np.float32)
                for agent in environment.spec.agents
            }
            step = environment.step(actions, active)
            returns[active] += step.reward[active]
            active &= ~(step.terminated | step.truncated)
    assert abs(returns.mean() - REFERENCES[task].low) < 3.5 * spread / math.sqrt(episodes)
