"""Comparison of trained runs: means over seeds, intervals and scores per variant.

Runs are averaged when they are the same :class:`Variant`: task, dataset (by its digest), algorithm, settings and
number of steps. Anything else keeps them apart. The statistics are those of
:mod:`omcda_deploy.report.statistics`; :mod:`omcda_deploy.report.comparison_report` writes them.

Shapes: R runs of a variant, one per seed; L logged steps; N agents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.plugins import CurveSection, Scan
from omcda_deploy.report.scores import Score
from omcda_deploy.report.statistics import (
    Interval,
    Values,
    bootstrap_interval,
    interquartile_mean,
    normalised_score,
    std,
)

CLONE = "clone"  # stands for an algorithm in the row of the behaviour model that runs began with
CURVE_POINTS = 100  # most points of a training curve in figures and CSV; more are averaged in groups


@dataclass(frozen=True)
class Variant:
    """The properties that runs share to be averaged; ``settings`` are those that differ from the task's recipe."""

    task: str
    dataset: str = field(compare=False)  # a label; the digest tells datasets apart
    digest: str
    algorithm: str
    settings: tuple[tuple[str, Any], ...]
    steps: int

    @property
    def settings_label(self) -> str:
        """Settings in words."""
        return ", ".join(f"{name} {value}" for name, value in self.settings)

    @property
    def method(self) -> tuple[str, tuple[tuple[str, Any], ...], int]:
        """Algorithm, settings and steps, which are compared between datasets."""
        return self.algorithm, self.settings, self.steps

    @property
    def sort_key(self) -> tuple[object, ...]:
        """Key that orders variants in tables, numbers by size."""
        settings = tuple(
            (name, value if isinstance(value, (int, float)) else 0.0, str(value))
            for name, value in self.settings
        )
        return self.task, self.dataset, self.digest, self.algorithm, settings, self.steps


@dataclass(frozen=True)
class Curves:
    """The numbers of one run behind a :class:`CurveSection`: per agent, over the steps at which it logged them.

    An estimate stands in for a metric that the run did not log; ``estimated`` names such curves.
    """

    section: CurveSection
    agents: tuple[str, ...]
    steps: NDArray[np.int64]  # [L]
    values: Mapping[str, Values]  # by name of the curve, [L, N]
    estimated: frozenset[str]

    @classmethod
    def of(
        cls, section: CurveSection, agents: Sequence[str], metrics: Sequence[Mapping[str, float]]
    ) -> Curves | None:
        """Take the curves from the lines of ``metrics.jsonl``; None where a metric without estimate is missing."""

        def logged(line: Mapping[str, float], metric: str) -> bool:
            return all(f"{metric}/{agent}" in line for agent in agents)

        required = {curve.metric for curve in section.curves if curve.estimate is None}
        lines = [line for line in metrics if all(logged(line, metric) for metric in required)]
        if not lines:
            return None
        # A group of lines is shown at its last step, as a line itself is the mean of the steps before it.
        groups = np.array_split(np.arange(len(lines)), min(CURVE_POINTS, len(lines)))

        def means(metric: str) -> Values:
            every = np.array([[line[f"{metric}/{agent}"] for agent in agents] for line in lines], np.float64)
            return np.stack([every[group].mean(axis=0) for group in groups])

        values: dict[str, Values] = {}
        estimated = set()
        for curve in section.curves:
            if curve.estimate is None or all(logged(line, curve.metric) for line in lines):
                value = means(curve.metric)
                values[curve.name] = value / value.sum(axis=1, keepdims=True) if curve.share else value
            else:
                estimated.add(curve.name)
                values[curve.name] = np.prod([means(factor) for factor in curve.estimate.factors], axis=0)
        steps = np.array([lines[group[-1]]["step"] for group in groups], np.int64)
        return cls(section, tuple(agents), steps, values, frozenset(estimated))


@dataclass(frozen=True)
class Result:
    """One finished run and the score of its last policies."""

    variant: Variant
    run: str  # the folder, as it was given
    seed: int
    settings: Mapping[str, Any]  # all settings of the algorithm
    versions: Mapping[str, str]  # packages it was trained with, and the commit as ``git``
    score: Score
    curves: Curves | None
    scan: Scan | None  # declared by its algorithm
    seconds: float  # wall clock of its training; 0 where the run did not record it
    diverged: bool | None = None  # its reward values left the range of the data's returns; None: not known


@dataclass(frozen=True)
class LeftOut:
    """A run that no mean contains, with the reason."""

    run: str
    label: str  # algorithm and seed, or ? where they are unknown
    reason: str


@dataclass(frozen=True)
class Summary:
    """A variant over its runs, in the order of their seeds.

    Its value is that at the temperature which was selected on other episodes than those that are reported.
    """

    variant: Variant
    results: tuple[Result, ...]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that its runs were played at, [K]."""
        return self.results[0].score.temperatures

    @cached_property
    def curve(self) -> Values:
        """Each run's reported score at each temperature, [R, K]."""
        return np.array([result.score.values for result in self.results])

    @cached_property
    def selection(self) -> Values:
        """Mean over runs of the scores that select the temperature, [K]."""
        means: Values = np.array([result.score.selection for result in self.results]).mean(axis=0)
        return means

    @property
    def best(self) -> int:
        """Index of the selected temperature: the largest mean over runs, the lowest temperature of equal ones."""
        return int(np.argmax(self.selection))

    @property
    def values(self) -> Values:
        """Each run's value, [R]."""
        values: Values = self.curve[:, self.best]
        return values

    def at(self, temperature: float) -> Values:
        """Each run's reported score at one of the temperatures, [R]."""
        values: Values = self.curve[:, self.temperatures.index(temperature)]
        return values

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """Population standard deviation over runs."""
        return std(self.values)

    @property
    def iqm(self) -> float:
        """Interquartile mean over runs."""
        return float(interquartile_mean(self.values))

    @cached_property
    def interval(self) -> Interval | None:
        """Bootstrap interval of the interquartile mean, None for a single run."""
        return bootstrap_interval([self.values])

    @property
    def snapshots(self) -> tuple[int, int]:
        """Fewest and most policies that a run's score is a mean over."""
        counts = [len(result.score.snapshots) for result in self.results]
        return min(counts), max(counts)

    @cached_property
    def std_of_snapshots(self) -> Values:
        """Mean over runs of the std over a run's policies, at each temperature [K]; nan where no run has two."""
        several = [result.score.returns.mean(axis=2) for result in self.results]  # [S, K]
        stds = [values.std(axis=0) for values in several if len(values) > 1]
        return np.mean(stds, axis=0) if stds else np.full(len(self.temperatures), np.nan)

    @cached_property
    def std_of_episodes(self) -> Values:
        """Mean over runs and policies of the std over a policy's episodes, at each temperature [K]."""
        means: Values = np.mean([r.score.returns.std(axis=2).mean(axis=0) for r in self.results], axis=0)
        return means

    @property
    def lengths(self) -> Values:
        """Mean length of the episodes in steps, at each temperature [K]."""
        means: Values = np.mean([result.score.lengths for result in self.results], axis=0)
        return means

    @cached_property
    def shares(self) -> dict[str, Values | None]:
        """Each run's shares of episodes by outcome, [R, K]; None for one that a simulator does not report."""
        by_outcome: dict[str, Values | None] = {}
        for name in OUTCOMES:
            shares = [result.score.shares[name] for result in self.results]
            known = [share for share in shares if share is not None]
            by_outcome[name] = np.array(known) if len(known) == len(shares) else None
        return by_outcome

    @property
    def diverged(self) -> int | None:
        """Number of runs whose reward values left the range of the data's returns; None where no run is known."""
        known = [result.diverged for result in self.results if result.diverged is not None]
        return sum(known) if known else None

    @property
    def seconds(self) -> float | None:
        """Mean wall clock of a run's training, None where a run did not record it."""
        seconds = [result.seconds for result in self.results]
        return float(np.mean(seconds)) if all(seconds) else None

    @property
    def scores(self) -> Values | None:
        """Normalised scores of the runs, [R]; None for a task without reference."""
        return normalised_score(self.variant.task, self.values)

    @property
    def scan(self) -> Scan | None:
        """The scan that the variant belongs to, where its algorithm declares one."""
        return self.results[0].scan

    @property
    def scan_value(self) -> float:
        """The scanned setting."""
        assert self.scan is not None  # by the caller
        return float(self.results[0].settings[self.scan.setting])

    @property
    def scan_word(self) -> str:
        """The word that stands for the scanned setting where its value was chosen from the data, else empty."""
        assert self.scan is not None  # by the caller
        value = dict(self.variant.settings).get(self.scan.setting)
        return value if isinstance(value, str) else ""

    @property
    def scan_line(self) -> str:
        """The line of the scan that the variant is on: all settings that differ from the recipe but the scanned."""
        assert self.scan is not None  # by the caller
        scan = self.scan
        others = [
            f"{name} {value}"
            for name, value in self.variant.settings
            if name not in (scan.group, scan.setting)
        ]
        group = self.results[0].settings.get(scan.group, self.variant.algorithm)
        return ", ".join([str(group), *others])

    @property
    def scan_group(self) -> str:
        """The name of its line; where the value was chosen from the data, of one of its own."""
        assert self.scan is not None  # by the caller
        return ", ".join(
            [self.scan_line, *([f"{self.scan.setting} {self.scan_word}"] if self.scan_word else [])]
        )


@dataclass(frozen=True)
class Overall:
    """One method over several datasets: statistics of its normalised scores, runs and datasets together."""

    summaries: tuple[Summary, ...]

    @property
    def scores(self) -> list[Values]:
        """Scores of the runs, one array per dataset."""
        return [summary.scores for summary in self.summaries if summary.scores is not None]

    @property
    def runs(self) -> int:
        """Number of runs on all datasets."""
        return sum(scores.size for scores in self.scores)

    @property
    def iqm(self) -> float:
        """Interquartile mean of all scores."""
        return float(interquartile_mean(np.concatenate(self.scores)))

    @cached_property
    def interval(self) -> Interval | None:
        """Bootstrap interval of the interquartile mean, None where a dataset has a single run."""
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
    """Everything that a report shows.

    ``conditions`` say under which the runs were evaluated, for provenance; ``names`` are those that variants go by
    in place of their algorithm and settings; ``card`` describes the dataset of a comparison on one, in names and
    words.
    """

    summaries: Sequence[Summary]
    left_out: Sequence[LeftOut]
    conditions: Mapping[str, str]
    names: Mapping[Variant, str] = field(default_factory=dict)
    card: Sequence[tuple[str, str]] = ()

    @cached_property
    def overall(self) -> list[Overall]:
        """Methods with scores on two datasets or more."""
        methods: dict[Any, list[Summary]] = {}
        for summary in self.summaries:
            if summary.scores is not None:
                methods.setdefault(summary.variant.method, []).append(summary)
        return [Overall(tuple(summaries)) for summaries in methods.values() if len(summaries) > 1]

    @cached_property
    def datasets(self) -> dict[tuple[str, str], list[Summary]]:
        """Summaries by (task, digest)."""
        groups: dict[tuple[str, str], list[Summary]] = {}
        for summary in self.summaries:
            groups.setdefault((summary.variant.task, summary.variant.digest), []).append(summary)
        return groups

    def name(self, variant: Variant) -> str:
        """Name a variant, by algorithm and settings unless it has a name, and by its steps where these differ."""
        described = ", ".join([variant.algorithm, *filter(None, [variant.settings_label])])
        words = [self.names.get(variant, described)]
        if variant.steps and len({s.variant.steps for s in self.summaries if s.variant.steps}) > 1:
            words.append(f"{variant.steps:,} steps")
        return ", ".join(words)

    def dataset(self, variant: Variant) -> str:
        """Label a dataset; the digest's beginning follows where another dataset of the task has the same label."""
        same = {
            s.variant.digest
            for s in self.summaries
            if (s.variant.task, s.variant.dataset) == (variant.task, variant.dataset)
        }
        return variant.dataset if len(same) == 1 else f"{variant.dataset} ({variant.digest[:8]})"
