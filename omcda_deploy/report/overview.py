"""Methods over many datasets: aggregates, duels, and verdicts on claims.

A method's values on a dataset are those of its runs at its own best temperature, which other episodes chose. The
aggregates are rliable's (:mod:`omcda_deploy.report.statistics`); :mod:`omcda_deploy.report.overview_report` writes
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from omcda_deploy.formatting import count, number, percent
from omcda_deploy.report.claims import Claim, fits
from omcda_deploy.report.comparison import Comparison, Result, Summary
from omcda_deploy.report.statistics import (
    Interval,
    Values,
    bootstrap_interval,
    improvement_interval,
    interquartile_mean,
    mean_interval,
    probability_of_improvement,
    rank_correlation,
)

LEAST_RUNS = 5  # of each of two methods, all datasets together, before one is called ahead


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


@dataclass(frozen=True)
class Duel:
    """One method against another on the datasets that both have runs of."""

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

    @property
    def verdict(self) -> int:
        """1: ahead, -1: behind, 0: not told apart."""
        return _verdict(list(self.pairs.values()))

    def datasets(self, verdict: int) -> list[str]:
        """List the single datasets with that verdict."""
        return [label for label, pair in self.pairs.items() if _verdict([pair]) == verdict]

    def __str__(self) -> str:
        interval = (
            "no interval" if (i := self.interval) is None else f"{number(i.low, 2)} to {number(i.high, 2)}"
        )
        return f"{number(self.probability, 2)} ({interval})"


def _enough(pairs: Sequence[tuple[Values, Values]]) -> bool:
    return (
        min((sum(values.size for values in side) for side in zip(*pairs, strict=True)), default=0)
        >= LEAST_RUNS
    )


def _verdict(pairs: Sequence[tuple[Values, Values]], confidence: float = 0.95) -> int:
    interval = improvement_interval(pairs, confidence=confidence)
    if interval is None or not _enough(pairs):
        return 0
    return int(interval.low > 0.5) - int(interval.high < 0.5)


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
        """Compare two methods."""
        first, second = self.summaries(method, on), self.summaries(other, on)
        return Duel(
            {label: (first[label].values, second[label].values) for label in first if label in second}
        )

    def iqm(self, method: str) -> tuple[float, Interval | None, int]:
        """Interquartile mean of a method's normalised scores, its interval, and the number of datasets.

        nan where no dataset has a reference.
        """
        scores = [s.scores for s in self.summaries(method).values() if s.scores is not None]
        if not scores:
            return math.nan, None, 0
        return float(interquartile_mean(np.concatenate(scores))), bootstrap_interval(scores), len(scores)

    def spread(self, method: str, on: Iterable[str] = ("*",)) -> float:
        """Median over datasets of :func:`relative_spread`; nan where no run has two policies."""
        spreads = [relative_spread(summary) for summary in self.summaries(method, on).values()]
        known = [spread for spread in spreads if not math.isnan(spread)]
        return float(np.median(known)) if known else math.nan

    def flags(self, method: str, on: Iterable[str] = ("*",)) -> tuple[int, int, int]:
        """Numbers of runs whose values left the data's range, of those that are known, and of those that failed."""
        results = [result for s in self.summaries(method, on).values() for result in s.results]
        known = [result.diverged for result in results if result.diverged is not None]
        failed = sum(entry.failed.get(method, 0) for entry in self.entries if fits(entry.label, on))
        return sum(known), len(known), failed

    def verdict(self, claim: Claim) -> tuple[str, str]:
        """Judge a claim: in a word or two, and by what numbers."""
        have, planned = len(self.summaries(claim.method, claim.on)), self.planned(claim.method, claim.on)
        if not have:
            return "not run", f"no run of {claim.method} is finished"
        word, evidence = _RULES[claim.rule](self, claim)
        coverage = f"{have} of {count(planned, 'dataset')}"
        return (word if have == planned else f"so far: {word}"), f"{evidence}; {coverage}"


@dataclass(frozen=True)
class Hindsight:
    """A value of a scanned setting that was chosen from the data, beside the best fixed one."""

    label: str  # of the dataset
    chosen: Summary
    fixed: Sequence[Summary]

    @property
    def best(self) -> Summary:
        """The fixed value with the largest mean."""
        return max(self.fixed, key=lambda summary: summary.mean)

    @property
    def regret(self) -> float:
        """The part of the best mean that the choice gives away; below 0 where it earned more."""
        return (self.best.mean - self.chosen.mean) / abs(self.best.mean) if self.best.mean else math.nan

    @property
    def behind(self) -> bool:
        """True where the choice is behind, at a level for the best of so many."""
        pair = (self.chosen.values, self.best.values)
        return _verdict([pair], confidence=1 - 0.05 / len(self.fixed)) == -1


def hindsight(overview: Overview, claim: Claim) -> list[Hindsight]:
    """Compare a method's choices with fixed values on every dataset of ``claim`` that has two of these."""
    compared = []
    for entry in overview.entries:
        chosen = entry.summary(claim.method) if fits(entry.label, claim.on) else None
        fixed = _fixed_values(entry, chosen)
        if chosen is not None and len(fixed) > 1:
            compared.append(Hindsight(entry.label, chosen, fixed))
    return compared


def _fixed_values(entry: Entry, method: Summary | None) -> list[Summary]:
    """Rows of a dataset that differ from ``method`` in the scanned setting alone, and chose it from no data."""
    if method is None or method.scan is None or entry.comparison is None:
        return []
    rows = [s for s in entry.comparison.summaries if s.scan == method.scan and not s.scan_word]
    return [s for s in rows if (s.scan_line, s.variant.steps) == (method.scan_line, method.variant.steps)]


def relative_spread(summary: Summary) -> float:
    """Mean over runs of the std between a run's policies, relative to the size of the mean return."""
    spread = float(summary.std_of_snapshots[summary.best])
    return spread / abs(summary.mean) if summary.mean else math.nan


def _better(overview: Overview, claim: Claim) -> tuple[str, str]:
    duels = {other: overview.duel(claim.method, other, claim.on) for other in claim.than}
    verdicts = {1: "ahead of", -1: "behind", 0: "not told apart from"}
    groups: dict[str, list[str]] = {
        **{word: [] for word in verdicts.values()},
        "too few runs beside": [],
        "not run:": [],
    }
    for other, duel in duels.items():
        if not duel.pairs:
            groups["not run:"].append(other)
        else:
            groups[verdicts[duel.verdict] if duel.enough else "too few runs beside"].append(f"{other} {duel}")
    evidence = [f"{group} {', '.join(names)}" for group, names in groups.items() if names]
    single = sum(len(duel.datasets(1)) for duel in duels.values())
    pairs = sum(len(duel.pairs) for duel in duels.values())
    evidence.append(f"ahead in {single} of {count(pairs, 'comparison')} on single datasets")
    if groups["behind"]:
        return "does not hold", "; ".join(evidence)
    return "holds" if len(groups["ahead of"]) == len(duels) else "cannot be told", "; ".join(evidence)


def _correlated(overview: Overview, claim: Claim) -> tuple[str, str]:
    groups = []
    for summary in overview.summaries(claim.method, claim.on).values():
        values = [c for result in summary.results if (c := _correlation(result)) is not None]
        groups += [values] if values else []
    if not groups:
        return "cannot be told", "no run logged both curves"
    mean, interval = float(np.mean([np.mean(values) for values in groups])), mean_interval(groups)
    if interval is None:
        return "cannot be told", f"mean rank correlation {number(mean, 2)}, from single runs"
    word = "holds" if interval.low > 0 else "does not hold" if interval.high < 0 else "cannot be told"
    if sum(map(len, groups)) < LEAST_RUNS:
        word = "cannot be told"
    return (
        word,
        f"mean rank correlation {number(mean, 2)} ({number(interval.low, 2)} to {number(interval.high, 2)})",
    )


def _correlation(result: Result) -> float | None:
    """Rank correlation over agents, at the last step, of the first pair of curves that are drawn together."""
    if (curves := result.curves) is None:
        return None
    pair = next(((c.name, c.against) for c in curves.section.curves if c.against), None)
    if pair is None or curves.estimated & set(pair):
        return None
    value = rank_correlation(curves.values[pair[0]][-1], curves.values[pair[1]][-1])
    return None if math.isnan(value) else value


def _sensitive(overview: Overview, claim: Claim) -> tuple[str, str]:
    differing, words = [], []
    for entry in overview.entries:
        method = entry.summary(claim.method) if fits(entry.label, claim.on) else None
        line = _fixed_values(entry, method)
        if len(line) < 2:
            continue
        line.sort(key=lambda summary: summary.mean)
        worst, best = line[0], line[-1]
        # The two were picked for being apart, so the level is divided by the number of pairs.
        pairs = len(list(combinations(line, 2)))
        differing.append(_verdict([(best.values, worst.values)], confidence=1 - 0.05 / pairs) == 1)
        words.append(f"{entry.label} best at {best.scan_value:g}, worst at {worst.scan_value:g}")
    if not differing:
        return "not run", "no dataset has two values of the scanned setting"
    word = "holds" if all(differing) else "cannot be told" if not any(differing) else "holds in part"
    return (
        word,
        f"best and worst value differ on {sum(differing)} of {len(differing)} scans ({'; '.join(words)})",
    )


def _hindsight(overview: Overview, claim: Claim) -> tuple[str, str]:
    compared = hindsight(overview, claim)
    if not compared:
        return "not run", "no dataset has two fixed values beside it"
    behind = sum(each.behind for each in compared)
    regrets = [each.regret for each in compared]
    return (
        "does not hold" if behind else "holds",
        f"behind the best of the fixed values on {behind} of {count(len(compared), 'dataset')} that have some, "
        f"regret {percent(float(np.median(regrets)))} in the median and {percent(max(regrets))} at most",
    )


def _converges(overview: Overview, claim: Claim) -> tuple[str, str]:
    left, known, failed = overview.flags(claim.method, claim.on)
    word = "does not hold" if left or failed else "holds" if known else "cannot be told"
    return (
        word,
        f"reward values left the range of the data's returns in {left} of {count(known, 'run')}, {failed} failed",
    )


def _steady(overview: Overview, claim: Claim) -> tuple[str, str]:
    own = overview.spread(claim.method, claim.on)
    others = {other: overview.spread(other, claim.on) for other in claim.than}
    evidence = f"median {percent(own)} against " + ", ".join(
        f"{percent(s)} of {o}" for o, s in others.items()
    )
    if any(math.isnan(spread) for spread in (own, *others.values())):
        return "cannot be told", evidence
    return ("holds" if all(own <= spread for spread in others.values()) else "does not hold"), evidence


_RULES: Mapping[str, Callable[[Overview, Claim], tuple[str, str]]] = {
    "better": _better,
    "correlated": _correlated,
    "sensitive": _sensitive,
    "hindsight": _hindsight,
    "converges": _converges,
    "steady": _steady,
}
