"""Verdicts on claims about methods: a word or two, and the numbers behind them.

:mod:`omcda_deploy.report.claims` says what each rule asks for. A claim that needs several comparisons is refuted by
one of them only at a level that is divided by their number, as one in twenty would be false otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omcda_deploy.formatting import count, number, percent
from omcda_deploy.report.claims import Claim, fits
from omcda_deploy.report.comparison import Result, Summary
from omcda_deploy.report.overview import LEAST_RUNS, Duel, Entry, Overview, relative_spread, tell_apart
from omcda_deploy.report.statistics import Interval, mean_interval, rank_correlation, regret_interval
from omcda_deploy.report.temperatures import interval_words

HOLDS, PARTLY, FAILS, OPEN, NOT_RUN = "holds", "holds in part", "does not hold", "cannot be told", "not run"
TOLERANCE = 0.1  # part of the best fixed value's return that a choice from the data may give away


@dataclass(frozen=True)
class Judgement:
    """A verdict in ``word``, the ``evidence``, and the ``datasets`` that it rests on."""

    word: str
    evidence: str
    datasets: Collection[str] = ()


def judge(overview: Overview, claim: Claim) -> tuple[str, str]:
    """Judge a claim: in a word or two, which say where runs are still missing, and by what numbers."""
    if not overview.summaries(claim.method, claim.on):
        return NOT_RUN, f"no run of {claim.method} is finished"
    judged = _RULES[claim.rule](overview, claim)
    if judged.word == NOT_RUN:
        return judged.word, judged.evidence
    rows = (claim.method, *claim.than) if claim.rule not in SCANNING else overview.methods
    coverage = f"{len(judged.datasets)} of {count(overview.planned(claim.method, claim.on), 'dataset')}"
    whole = overview.complete(rows, claim.on)
    return judged.word if whole else f"so far: {judged.word}", f"{judged.evidence}; {coverage}"


# -- by rule ------------------------------------------------------------------------------------------------------


def _better(overview: Overview, claim: Claim) -> Judgement:
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
            word = verdicts[duel.verdict()] if duel.enough else "too few runs beside"
            groups[word].append(f"{other} {duel} on {len(duel.pairs)}")
    evidence = [f"{group} {', '.join(names)}" for group, names in groups.items() if names]
    pairs = sum(len(duel.pairs) for duel in duels.values())
    better, worse = (sum(len(duel.datasets(side)) for duel in duels.values()) for side in (1, -1))
    evidence.append(
        f"on single datasets ahead in {better} and behind in {worse} of {count(pairs, 'comparison')}"
    )
    word = OPEN
    if any(
        duel.verdict(len(duels)) == -1 or (len(duel.pairs) == 1 and duel.entirely_behind)
        for duel in duels.values()
    ):
        word = FAILS
    elif len(groups["ahead of"]) == len(duels):
        behind = any(duel.datasets(-1, pairs) or duel.entirely_behind for duel in duels.values())
        word = PARTLY if behind else HOLDS
    return Judgement(word, "; ".join(evidence), _labels(duels.values()))


def _labels(duels: Collection[Duel]) -> set[str]:
    return {label for duel in duels for label in duel.pairs}


def _correlated(overview: Overview, claim: Claim) -> Judgement:
    groups: dict[str, list[float]] = {}
    for label, summary in overview.summaries(claim.method, claim.on).items():
        if found := [c for result in summary.results if (c := _correlation(result)) is not None]:
            groups[label] = found
    if not groups:
        return Judgement(OPEN, "no run logged both curves")
    enough = {label: found for label, found in groups.items() if len(found) >= LEAST_RUNS}
    groups = enough or groups  # as in a duel
    mean, interval = float(np.mean([np.mean(g) for g in groups.values()])), mean_interval([*groups.values()])
    if interval is None:
        return Judgement(OPEN, f"mean rank correlation {number(mean, 2)}, from single runs", groups)
    word = HOLDS if interval.low > 0 else FAILS if interval.high < 0 else OPEN
    if not enough:
        word = OPEN
    return Judgement(word, f"mean rank correlation {number(mean, 2)} ({interval_words(interval, 2)})", groups)


def _correlation(result: Result) -> float | None:
    """Rank correlation over agents, at the last step, of the first pair of curves that are drawn together."""
    if (curves := result.curves) is None:
        return None
    pair = next(((c.name, c.against) for c in curves.section.curves if c.against), None)
    if pair is None or curves.estimated & set(pair):
        return None
    value = rank_correlation(curves.values[pair[0]][-1], curves.values[pair[1]][-1])
    return None if math.isnan(value) else value


def _sensitive(overview: Overview, claim: Claim) -> Judgement:
    differing, words = {}, []
    for entry in overview.entries:
        method = entry.summary(claim.method) if fits(entry.label, claim.on) else None
        line = _fixed_values(entry, method)
        if len(line) < 2:
            continue
        line.sort(key=lambda summary: summary.mean)
        worst, best = line[0], line[-1]
        # The two were picked for being apart, so the level is divided by the number of pairs.
        pairs = math.comb(len(line), 2)
        differing[entry.label] = tell_apart([(best.values, worst.values)], pairs) == 1
        words.append(f"{entry.label} best at {best.scan_value:g}, worst at {worst.scan_value:g}")
    if not differing:
        return Judgement(NOT_RUN, "no dataset has two values of the scanned setting")
    number_of = sum(differing.values())
    word = HOLDS if number_of == len(differing) else PARTLY if number_of else OPEN
    evidence = f"best and worst value differ on {number_of} of {len(differing)} scans ({'; '.join(words)})"
    return Judgement(word, evidence, differing)


def _fixed_values(entry: Entry, method: Summary | None) -> list[Summary]:
    """Rows of a dataset that differ from ``method`` in the scanned setting alone, and chose it from no data."""
    if method is None or method.scan is None or entry.comparison is None:
        return []
    rows = [s for s in entry.comparison.summaries if s.scan == method.scan and not s.scan_word]
    return [s for s in rows if (s.scan_line, s.variant.steps) == (method.scan_line, method.variant.steps)]


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
    def interval(self) -> Interval | None:
        """The interval of the regret; None with fewer than :data:`LEAST_RUNS` runs of either."""
        runs = min(self.chosen.values.size, self.best.values.size)
        return regret_interval(self.chosen.values, self.best.values) if runs >= LEAST_RUNS else None

    @property
    def behind(self) -> bool:
        """True where the choice is behind, at a level for the best of so many."""
        return tell_apart([(self.chosen.values, self.best.values)], len(self.fixed)) == -1


def hindsight(overview: Overview, claim: Claim) -> list[Hindsight]:
    """Compare a method's choices with fixed values on every dataset of ``claim`` that has two of these."""
    compared = []
    for entry in overview.entries:
        chosen = entry.summary(claim.method) if fits(entry.label, claim.on) else None
        fixed = _fixed_values(entry, chosen)
        if chosen is not None and len(fixed) > 1:
            compared.append(Hindsight(entry.label, chosen, fixed))
    return compared


def _hindsight(overview: Overview, claim: Claim) -> Judgement:
    compared = hindsight(overview, claim)
    if not compared:
        return Judgement(NOT_RUN, "no dataset has two fixed values beside it")
    behind = sum(each.behind for each in compared)
    close = sum((i := each.interval) is not None and i.high <= TOLERANCE for each in compared)
    word = FAILS if behind else HOLDS if close == len(compared) else OPEN
    regrets = [each.regret for each in compared]
    evidence = (
        f"behind the best fixed value on {behind} of {count(len(compared), 'dataset')} that have some, and within "
        f"{percent(TOLERANCE)} of it, by the interval of the regret, on {close}; regret "
        f"{percent(float(np.median(regrets)))} in the median and {percent(max(regrets))} at most"
    )
    return Judgement(word, evidence, [each.label for each in compared])


def _converges(overview: Overview, claim: Claim) -> Judgement:
    left, known, failed = overview.flags(claim.method, claim.on)
    word = FAILS if left or failed else HOLDS if known >= LEAST_RUNS else OPEN
    evidence = (
        f"values left the range of the data's returns in {left} of {count(known, 'run')}, {failed} failed"
    )
    return Judgement(word, evidence, overview.summaries(claim.method, claim.on))


def _steady(overview: Overview, claim: Claim) -> Judgement:
    own = overview.summaries(claim.method, claim.on)
    words, evidence, labels = [], [], set()
    for other in claim.than:
        both = {
            label: (relative_spread(own[label]), relative_spread(rival))
            for label, rival in overview.summaries(other, claim.on).items()
            if label in own
        }
        known = {label: pair for label, pair in both.items() if not any(map(math.isnan, pair))}
        enough = {
            label: pair
            for label, pair in known.items()
            if min(overview.runs(method, [label]) for method in (claim.method, other)) >= LEAST_RUNS
        }
        spreads = enough or known  # as in a duel
        if not spreads:
            words.append(OPEN)
            evidence.append(f"no dataset has several policies of each run of both it and {other}")
            continue
        labels |= set(spreads)
        mine, theirs = (float(np.median(side)) for side in zip(*spreads.values(), strict=True))
        larger = sum(a > b for a, b in spreads.values())
        words.append(OPEN if not enough else FAILS if mine > theirs else PARTLY if larger else HOLDS)
        evidence.append(
            f"median {percent(mine)} against {percent(theirs)} of {other}, larger on {larger} of "
            f"{count(len(spreads), 'dataset')}"
        )
    worst = next(word for word in (FAILS, OPEN, PARTLY, HOLDS) if word in words)
    return Judgement(worst, "; ".join(evidence), labels)


SCANNING = ("sensitive", "hindsight")  # rules that look at rows which the claim does not name
_RULES: Mapping[str, Callable[[Overview, Claim], Judgement]] = {
    "better": _better,
    "correlated": _correlated,
    "sensitive": _sensitive,
    "hindsight": _hindsight,
    "converges": _converges,
    "steady": _steady,
}
