"""What trained runs say together: means over seeds, intervals and scores per variant.

Runs are averaged when they are the same :class:`Variant`: task, dataset (by its digest), algorithm, settings and
number of steps. Anything else keeps them apart. The statistics are those of
:mod:`omcda_deploy.report.statistics`; :mod:`omcda_deploy.report.comparison_report` writes them.

Shapes: R runs of a variant, one per seed; L logged steps; N agents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.report.statistics import (
    Interval,
    Values,
    bootstrap_interval,
    interquartile_mean,
    normalised_score,
    std,
)

CURVE_POINTS = 100  # most points of a training curve in figures and CSV; more are averaged in groups
_NEEDED = ("influence", "budget", "kl")  # metrics per agent without which there is nothing to show


@dataclass(frozen=True)
class Variant:
    """What runs must share to be averaged. ``settings``: those that differ from the algorithm's defaults."""

    task: str
    dataset: str  # a label; the digest tells datasets apart
    digest: str
    algorithm: str
    settings: tuple[tuple[str, Any], ...]
    steps: int

    @property
    def settings_label(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.settings)

    @property
    def method(self) -> tuple[str, tuple[tuple[str, Any], ...], int]:
        """What is compared between datasets."""
        return self.algorithm, self.settings, self.steps

    @property
    def sort_key(self) -> tuple[object, ...]:
        settings = tuple(
            (name, value if isinstance(value, (int, float)) else 0.0, str(value))
            for name, value in self.settings
        )
        return self.task, self.dataset, self.digest, self.algorithm, settings, self.steps


@dataclass(frozen=True)
class Curves:
    """What a run logged per agent while it trained: all [L, N] over ``steps`` [L].

    ``contribution`` is w_i V^r_i, agent i's part of the team's reward value (``value/reward``), where the run
    logged it. Where it did not, it is m_i KL_i: the influence times the deviation spent, a first-order estimate of
    what deviating adds to that value. ``measured`` says which.
    """

    agents: tuple[str, ...]
    steps: NDArray[np.int64]
    influence: Values
    budget: Values
    kl: Values
    contribution: Values
    measured: bool

    @cached_property
    def share(self) -> Values:
        """d_i / sum_k d_k."""
        shares: Values = self.budget / self.budget.sum(axis=1, keepdims=True)
        return shares

    @classmethod
    def of(cls, agents: Sequence[str], metrics: Sequence[Mapping[str, float]]) -> Curves | None:
        """From the lines of ``metrics.jsonl``; None for an algorithm that measures no influence."""
        columns = {
            name: [f"{name}/{agent}" for agent in agents]
            for name in ("influence", "budget", "kl", "value/reward")
        }
        lines = [line for line in metrics if all(key in line for name in _NEEDED for key in columns[name])]
        if not lines:
            return None
        # A group of lines is shown at its last step, as a line itself is the mean of the steps before it.
        groups = np.array_split(np.arange(len(lines)), min(CURVE_POINTS, len(lines)))

        def values(name: str) -> Values:
            every = np.array([[line[key] for key in columns[name]] for line in lines], np.float64)
            return np.stack([every[group].mean(axis=0) for group in groups])

        influence, kl = values("influence"), values("kl")
        measured = all(key in line for line in lines for key in columns["value/reward"])
        return cls(
            tuple(agents),
            np.array([lines[group[-1]]["step"] for group in groups], np.int64),
            influence,
            values("budget"),
            kl,
            values("value/reward") if measured else influence * kl,
            measured,
        )


@dataclass(frozen=True)
class Result:
    """One finished run and the evaluation of its last policy (``Evaluation.to_json()``)."""

    variant: Variant
    run: str  # the folder, as it was given
    seed: int
    settings: Mapping[str, Any]  # of the algorithm, all of them
    versions: Mapping[str, str]  # that it was trained with, the commit as ``git`` among them
    evaluation: Mapping[str, Any]
    curves: Curves | None
    seconds: float  # wall clock of its training; 0 where the run did not record it

    @property
    def value(self) -> float:
        """The run's mean return."""
        return float(np.mean(self.evaluation["returns"]))


@dataclass(frozen=True)
class LeftOut:
    """A run that no mean contains, and why."""

    run: str
    what: str  # algorithm and seed, where they are known
    reason: str


@dataclass(frozen=True)
class Summary:
    """A variant over its runs, in the order of their seeds."""

    variant: Variant
    results: tuple[Result, ...]

    @cached_property
    def values(self) -> Values:
        """[R]"""
        return np.array([result.value for result in self.results])

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def std(self) -> float:
        return std(self.values)

    @property
    def iqm(self) -> float:
        return float(interquartile_mean(self.values))

    @cached_property
    def interval(self) -> Interval | None:
        return bootstrap_interval([self.values])

    @property
    def std_of_episodes(self) -> float:
        """Mean over runs of the std over a run's episodes."""
        return float(np.mean([np.std(result.evaluation["returns"]) for result in self.results]))

    @property
    def won(self) -> Values | None:
        """[R] each run's share of episodes won, None where the simulator does not tell."""
        told = [result.evaluation.get("won") for result in self.results]
        shares = [float(np.mean(won)) for won in told if won is not None]
        return np.array(shares) if len(shares) == len(told) else None

    @property
    def seconds(self) -> float | None:
        """Mean wall clock of a run's training, None where a run did not record it."""
        spent = [result.seconds for result in self.results]
        return float(np.mean(spent)) if all(spent) else None

    @property
    def scores(self) -> Values | None:
        return normalised_score(self.variant.task, self.values)

    @property
    def d_tot(self) -> float | None:
        value = self.results[0].settings.get("d_tot")
        return None if value is None else float(value)

    @property
    def allocation(self) -> str:
        """What a line of the d_tot scan holds fixed: the allocation, and other settings that are not defaults."""
        rest = [f"{k} {v}" for k, v in self.variant.settings if k not in ("d_tot", "allocation")]
        first = self.results[0].settings.get("allocation", self.variant.algorithm)
        return ", ".join([str(first), *rest])


@dataclass(frozen=True)
class Overall:
    """One method over several datasets: statistics of its normalised scores, runs and datasets together."""

    summaries: tuple[Summary, ...]

    @property
    def scores(self) -> list[Values]:
        return [summary.scores for summary in self.summaries if summary.scores is not None]

    @property
    def runs(self) -> int:
        return sum(scores.size for scores in self.scores)

    @property
    def iqm(self) -> float:
        return float(interquartile_mean(np.concatenate(self.scores)))

    @cached_property
    def interval(self) -> Interval | None:
        return bootstrap_interval(self.scores)


def summarise(results: Iterable[Result]) -> tuple[list[Summary], list[LeftOut]]:
    """Group runs by variant. A second run of one variant and seed is no further sample, and is left out."""
    groups: dict[Variant, dict[int, Result]] = {}
    repeated = []
    for result in results:
        first = groups.setdefault(result.variant, {}).setdefault(result.seed, result)
        if first is not result:
            reason = f"repeats {first.run}: the same dataset, settings, steps and seed"
            repeated.append(LeftOut(result.run, f"{result.variant.algorithm}, seed {result.seed}", reason))
    return [
        Summary(variant, tuple(runs[seed] for seed in sorted(runs)))
        for variant, runs in sorted(groups.items(), key=lambda item: item[0].sort_key)
    ], repeated


@dataclass(frozen=True)
class Comparison:
    """Everything that is written. ``conditions``: how the runs were evaluated, for provenance."""

    summaries: Sequence[Summary]
    left_out: Sequence[LeftOut]
    conditions: Mapping[str, str]

    @cached_property
    def overall(self) -> list[Overall]:
        """Methods with scores on two datasets or more."""
        methods: dict[Any, list[Summary]] = {}
        for summary in self.summaries:
            if summary.scores is not None:
                methods.setdefault(summary.variant.method, []).append(summary)
        return [Overall(tuple(own)) for own in methods.values() if len(own) > 1]

    @cached_property
    def datasets(self) -> dict[tuple[str, str], list[Summary]]:
        """Summaries by (task, digest)."""
        found: dict[tuple[str, str], list[Summary]] = {}
        for summary in self.summaries:
            found.setdefault((summary.variant.task, summary.variant.digest), []).append(summary)
        return found

    def name(self, variant: Variant) -> str:
        """Algorithm and settings, and the number of steps where the runs' differ."""
        words = [variant.algorithm, *filter(None, [variant.settings_label])]
        if len({summary.variant.steps for summary in self.summaries}) > 1:
            words.append(f"{variant.steps:,} steps")
        return ", ".join(words)

    def dataset(self, variant: Variant) -> str:
        """The label, with the digest's beginning where another dataset of the task has the same label."""
        same = {
            s.variant.digest
            for s in self.summaries
            if (s.variant.task, s.variant.dataset) == (variant.task, variant.dataset)
        }
        return variant.dataset if len(same) == 1 else f"{variant.dataset} ({variant.digest[:8]})"
