"""Methods over many datasets: aggregates, and duels of two of them.

A method's values on a dataset are those of its runs at its own best temperature, which other episodes chose. The
aggregates are rliable's (:mod:`omcda_deploy.report.statistics`). :mod:`omcda_deploy.report.judgement` judges claims
by them, :mod:`omcda_deploy.report.overview_report` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from omcda_deploy.formatting import number
from omcda_deploy.report.claims import Claim, fits
from omcda_deploy.report.comparison import Comparison, Summary
from omcda_deploy.report.statistics import (
    Interval,
    Values,
    bootstrap_interval,
    difference_p_value,
    improvement_interval,
    interquartile_mean,
    probability_of_improvement,
)

LEVEL = 0.05  # share of false verdicts, of all comparisons of a claim together
LEAST_RUNS = 5  # of each of two methods on each dataset, before one is called ahead


@dataclass(frozen=True)
class Entry:
    """A dataset: its comparison, or the ``reason`` why there is none. Numbers of runs are by method."""

    label: str  # TASK/TIER
    page: str  # its page's file, from the overview's folder
    comparison: Comparison | None
    reason: str = ""
    planned: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    missing: bool = False  # the dataset cannot be had

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.label.rpartition("/")[0]

    @property
    def tier(self) -> str:
        """Name of the tier."""
        return self.label.rpartition("/")[2]

    def summary(self, method: str) -> Summary | None:
        """Return a method's runs; None where none is finished."""
        if self.comparison is None:
            return None
        names = self.comparison.names
        found = (summary for summary in self.comparison.summaries if names.get(summary.variant) == method)
        return next(found, None)

    def runs(self, method: str) -> int:
        """Number of a method's finished runs."""
        summary = self.summary(method)
        return 0 if summary is None else summary.values.size


@dataclass(frozen=True)
class Duel:
    """One method against another on the datasets that count.

    A verdict is 1: ahead, -1: behind, 0: not told apart. On a single dataset it is by the exact test, on several by
    the interval of the probability of improvement; ``comparisons`` is how many are judged at the level together.
    """

    pairs: Mapping[str, tuple[Values, Values]]  # by dataset

    @property
    def probability(self) -> float:
        """Probability of improvement."""
        return probability_of_improvement(list(self.pairs.values()))

    @property
    def interval(self) -> Interval | None:
        """Its interval; None where a dataset has a single run."""
        return improvement_interval(list(self.pairs.values()))

    @property
    def enough(self) -> bool:
        """True with runs enough to call one ahead."""
        return _enough(list(self.pairs.values()))

    def verdict(self, comparisons: int = 1) -> int:
        """Tell the two apart on all datasets together."""
        return tell_apart(list(self.pairs.values()), comparisons)

    def datasets(self, verdict: int, comparisons: int = 1) -> list[str]:
        """List the single datasets with that verdict."""
        return [label for label, pair in self.pairs.items() if tell_apart([pair], comparisons) == verdict]

    @property
    def entirely_behind(self) -> list[str]:
        """List the single datasets on which every run is below every one of the other's.

        The exact test of few runs cannot say it at the level of many comparisons, whatever the runs are.
        """
        enough = {label: pair for label, pair in self.pairs.items() if _enough([pair])}
        return [label for label, (own, others) in enough.items() if own.max() < others.min()]

    def __str__(self) -> str:
        interval = (
            "no interval" if (i := self.interval) is None else f"{number(i.low, 2)} to {number(i.high, 2)}"
        )
        return f"{number(self.probability, 2)} ({interval})"


def _enough(pairs: Sequence[tuple[Values, Values]]) -> bool:
    # On every dataset: of two or three runs the interval is too narrow, however many datasets there are.
    return min((values.size for pair in pairs for values in pair), default=0) >= LEAST_RUNS


def tell_apart(pairs: Sequence[tuple[Values, Values]], comparisons: int = 1) -> int:
    """Return the verdict of a :class:`Duel` over pairs of values, one pair per dataset."""
    level = LEVEL / comparisons
    if not _enough(pairs):
        return 0
    if len(pairs) == 1:
        side = int(np.sign(probability_of_improvement(pairs) - 0.5))
        return side if difference_p_value(*pairs[0]) <= level else 0
    interval = improvement_interval(pairs, confidence=1 - level)
    return 0 if interval is None else int(interval.low > 0.5) - int(interval.high < 0.5)


@dataclass(frozen=True)
class Overview:
    """All datasets of a comparison; ``methods`` are the names of its rows, ``method`` the one that is compared."""

    title: str
    method: str
    methods: Sequence[str]
    entries: Sequence[Entry]
    claims: Sequence[Claim] = ()
    note: str = ""

    def summaries(self, method: str, on: Iterable[str] = ("*",)) -> dict[str, Summary]:
        """A method's runs by dataset, where there are any."""
        found = {entry.label: entry.summary(method) for entry in self.entries if fits(entry.label, on)}
        return {label: summary for label, summary in found.items() if summary is not None}

    def planned(self, method: str, on: Iterable[str] = ("*",)) -> int:
        """Number of datasets that the method is to be run on, without those that cannot be had."""
        return sum(method in e.planned and not e.missing for e in self.entries if fits(e.label, on))

    def duel(self, method: str, other: str, on: Iterable[str] = ("*",)) -> Duel:
        """Compare two methods on the datasets with runs enough of both; on all, where none has them."""
        first, second = self.summaries(method, on), self.summaries(other, on)
        pairs = {label: (first[label].values, second[label].values) for label in first if label in second}
        return Duel({label: pair for label, pair in pairs.items() if _enough([pair])} or pairs)

    def iqm(self, method: str, on: Iterable[str] = ("*",)) -> tuple[float, Interval | None, int]:
        """Interquartile mean of a method's normalised scores, its interval, and the number of datasets.

        nan where no dataset has a reference.
        """
        scores = [s.scores for s in self.summaries(method, on).values() if s.scores is not None]
        if not scores:
            return math.nan, None, 0
        return float(interquartile_mean(np.concatenate(scores))), bootstrap_interval(scores), len(scores)

    def spread(self, method: str, on: Iterable[str] = ("*",)) -> float:
        """Median over datasets of :func:`relative_spread`; nan where no run has two policies."""
        spreads = [relative_spread(summary) for summary in self.summaries(method, on).values()]
        known = [spread for spread in spreads if not math.isnan(spread)]
        return float(np.median(known)) if known else math.nan

    def complete(self, methods: Iterable[str], on: Iterable[str] = ("*",)) -> bool:
        """Test if every run of these methods was made, or failed, but for datasets that cannot be had."""
        return all(
            entry.runs(method) + entry.failed.get(method, 0) >= entry.planned[method]
            for entry in self.entries
            if fits(entry.label, on) and not entry.missing
            for method in methods
            if method in entry.planned
        )

    def runs(self, method: str, on: Iterable[str] = ("*",)) -> int:
        """Number of a method's runs."""
        return sum(summary.values.size for summary in self.summaries(method, on).values())

    def flags(self, method: str, on: Iterable[str] = ("*",)) -> tuple[int, int, int]:
        """Numbers of runs whose values left the data's range, of those that are known, and of those that failed."""
        results = [result for s in self.summaries(method, on).values() for result in s.results]
        known = [result.diverged for result in results if result.diverged is not None]
        failed = sum(entry.failed.get(method, 0) for entry in self.entries if fits(entry.label, on))
        return sum(known), len(known), failed


def relative_spread(summary: Summary) -> float:
    """Mean over runs of the std between a run's policies, relative to the size of the mean return."""
    spread = float(summary.std_of_snapshots[summary.best])
    return spread / abs(summary.mean) if summary.mean else math.nan
