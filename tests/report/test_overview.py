"""The overview of a comparison: duels, aggregates and verdicts follow the numbers, where there are some."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.report.claims import Claim
from omcda_deploy.report.comparison import Comparison, Curves, Result, summarise
from omcda_deploy.report.figures import Bar, grouped_bars_figure
from omcda_deploy.report.judgement import judge
from omcda_deploy.report.overview import Entry, Overview
from omcda_deploy.report.overview_report import write_overview
from omcda_deploy.report.scores import Score
from omcda_deploy.report.svg import side_by_side, svg, text
from tests.experiments.test_compare import AGENTS, episodes_of, result, score_of

GOOD, BAD = [10.0, 11.0, 12.0, 13.0, 14.0], [1.0, 2.0, 3.0, 4.0, 5.0]
APART_AT_95 = [7.1, 8.1, 9.2, 9.8, 11.5]  # from GOOD, p = 0.03; not at the level of one of several
HOPPER = "mamujoco/hopper-3x1"


def entry(
    values: Mapping[str, Sequence[float]], tier: str = "medium", task: str = HOPPER, **changes: object
) -> Entry:
    """A dataset on which methods have these values, one per seed, as runs of algorithms of these names."""
    runs = [
        replace(
            result(seed, [value], task=task, dataset=tier, digest=tier, algorithm=name), run=f"{name}/{seed}"
        )
        for name, returns in values.items()
        for seed, value in enumerate(returns)
    ]
    return made(runs, tier, task, dict.fromkeys(values, 5), **changes)


def made(
    runs: Sequence[Result],
    tier: str = "medium",
    task: str = HOPPER,
    planned: Mapping[str, int] | None = None,
    **changes: object,
) -> Entry:
    summaries, _ = summarise(runs)
    names = {summary.variant: summary.variant.algorithm for summary in summaries}
    comparison = Comparison(summaries, [], {"Evaluation": "none"}, names)
    whole = Entry(
        f"{task}/{tier}", f"{tier}.md", comparison, planned=planned or dict.fromkeys(names.values(), 5)
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def overview(*entries: Entry, claims: Sequence[Claim] = ()) -> Overview:
    methods = list(dict.fromkeys(name for e in entries for name in e.planned))
    return Overview("Title", methods[0], methods, entries, claims)


def better(*than: str, method: str = "a") -> Claim:
    return Claim("a is better", "better", method, than)


@pytest.mark.parametrize(
    ("values", "word", "evidence"),
    [
        (
            {"a": GOOD, "b": BAD},
            "holds",
            "ahead of b 1.00 (1.00 to 1.00) on 1; ahead in 1 and behind in 0 of 1",
        ),
        (
            {"a": BAD, "b": GOOD},
            "does not hold",
            "behind b 0.00 (0.00 to 0.00) on 1; ahead in 0 and behind in 1",
        ),
        ({"a": GOOD, "b": GOOD}, "cannot be told", "not told apart from b 0.50"),
        ({"a": GOOD[:4], "b": BAD}, "so far: cannot be told", "too few runs beside b 1.00"),
        (
            {"a": GOOD, "b": BAD, "c": GOOD},
            "cannot be told",
            "ahead of b 1.00 (1.00 to 1.00) on 1; not told apart from c",
        ),
        # One of two that is behind at 5 % alone: one in twenty would be.
        ({"a": APART_AT_95, "b": GOOD, "c": BAD}, "cannot be told", "ahead of c; behind b 0.08"),
        ({"a": APART_AT_95, "b": GOOD}, "does not hold", "behind b 0.08"),
        ({"a": BAD, "b": GOOD, "c": BAD}, "does not hold", "behind b"),
        ({"a": GOOD, "b": [1.0]}, "so far: cannot be told", "too few runs beside b 1.00 (no interval)"),
    ],
)
def test_a_method_is_ahead_only_where_the_interval_says_so(
    values: Mapping[str, Sequence[float]], word: str, evidence: str
) -> None:
    judged = judge(overview(entry(values)), better(*(set(values) - {"a"})))
    assert judged[0] == word
    for part in evidence.split("; "):
        assert part in judged[1]


def test_what_is_not_run_is_never_judged() -> None:
    some = entry({"a": GOOD, "b": BAD})
    missing = replace(some, label=f"{HOPPER}/expert", comparison=None, reason="no dataset")
    assert judge(overview(some, missing), better("b"))[0] == "so far: holds"
    assert (
        judge(overview(some, replace(missing, missing=True)), better("b"))[0] == "holds"
    )  # it never will be run
    assert judge(overview(missing), better("b")) == ("not run", "no run of a is finished")
    partly = replace(some, planned={"a": 5, "b": 5, "c": 5})
    word, evidence = judge(overview(partly), better("b", "c"))
    assert word == "so far: cannot be told"
    assert "not run: c" in evidence
    # A rival that lacks a dataset, or a seed.
    other = entry({"a": GOOD, "b": BAD}, "poor")
    assert judge(overview(some, other), better("b"))[0] == "holds"
    for less in ({"a": GOOD}, {"a": GOOD, "b": BAD[:4]}):
        lacking = replace(entry(less, "poor"), planned={"a": 5, "b": 5})
        word, evidence = judge(overview(some, lacking), better("b"))
        assert word == "so far: holds"
        assert evidence.endswith("1 of 2 datasets")  # a few runs do not count


@pytest.mark.parametrize("runs", [2, 3, 4])
def test_few_runs_on_many_datasets_tell_nothing(runs: int) -> None:
    """The interval of two runs on each of three datasets leaves out 1/2 for one in six pairs that are alike."""
    tiers = ("medium", "poor", "expert")
    few = [entry({"a": GOOD[:runs], "b": BAD[:runs]}, tier) for tier in tiers]
    assert overview(*few).duel("a", "b").verdict() == 0
    word, evidence = judge(overview(*few), better("b"))
    assert word == "so far: cannot be told"
    assert "too few runs beside b 1.00 (1.00 to 1.00) on 3" in evidence
    # Beside datasets that have enough they do not count, neither for nor against.
    for other in ({"a": GOOD, "b": BAD}, {"a": BAD, "b": GOOD}):
        duel = overview(*few, entry(other, "replay")).duel("a", "b")
        assert duel.verdict() == (1 if other["a"] is GOOD else -1)
        assert list(duel.pairs) == [f"{HOPPER}/replay"]


def test_a_method_that_is_refuted_on_one_dataset_is_better_in_part() -> None:
    several = [entry({"a": GOOD, "b": BAD}, tier) for tier in ("medium", "poor", "expert")]
    assert judge(overview(*several), better("b"))[0] == "holds"
    word, evidence = judge(overview(*several, entry({"a": BAD, "b": GOOD}, "replay")), better("b"))
    assert word == "holds in part"
    assert "ahead of b 0.75 (0.75 to 0.75) on 4" in evidence
    assert "on single datasets ahead in 3 and behind in 1 of 4 comparisons" in evidence


@pytest.mark.parametrize(("last", "word"), [(GOOD, "holds in part"), (APART_AT_95, "holds")])
def test_many_datasets_hide_none_on_which_every_run_is_behind(last: Sequence[float], word: str) -> None:
    """From seven comparisons on, the exact test of five runs and five cannot reach the level of one of them."""
    tiers = [f"tier{number}" for number in range(12)]
    many = [entry({"a": GOOD, "b": BAD}, tier) for tier in tiers]
    own = BAD if word == "holds in part" else GOOD
    assert judge(overview(*many, entry({"a": own, "b": last}, "last")), better("b"))[0] == word


def test_a_rival_that_is_ahead_in_every_run_of_the_only_dataset_refutes() -> None:
    """Seven comparisons of five runs and five: the exact test cannot reach the level of one of them."""
    names = [f"b{number}" for number in range(7)]
    best = {"a": GOOD, **dict.fromkeys(names, BAD)}
    assert judge(overview(entry(best)), better(*names))[0] == "holds"
    worst, one = {"a": BAD, **dict.fromkeys(names, GOOD)}, {**best, "b3": [value + 10.0 for value in GOOD]}
    for values, behind in ((worst, 7), (one, 1)):
        word, evidence = judge(overview(entry(values)), better(*names))
        assert word == "does not hold"
        assert f"behind in {behind} of 7 comparisons" in evidence


def test_datasets_are_compared_one_by_one_and_both_count_alike() -> None:
    """On one dataset a is always better, on the other always worse: no more likely to be better than not."""
    both = overview(entry({"a": GOOD, "b": BAD}), entry({"a": BAD, "b": GOOD}, "expert"))
    duel = both.duel("a", "b")
    labels = ["mamujoco/hopper-3x1/medium", "mamujoco/hopper-3x1/expert"]
    assert duel.probability == 0.5
    assert (duel.datasets(1), duel.datasets(-1), duel.verdict()) == (labels[:1], labels[1:], 0)
    assert both.duel("a", "b", ["*/medium"]).verdict() == 1


def test_scores_of_all_datasets_are_joined() -> None:
    """SMAX is normalised by 2; a task without a reference counts in duels alone."""
    smax = "smax/corridor"
    whole = overview(
        entry({"a": [0.0, 1.0, 2.0, 2.0]}, task=smax),
        entry({"a": [0.5, 1.0, 1.5, 2.0]}, "poor", task=smax),
        entry({"a": GOOD}, task="toy/chain"),
    )
    iqm, interval, datasets = whole.iqm("a")
    assert datasets == 2
    assert iqm == pytest.approx(np.mean([50, 50, 75, 100]))
    assert interval is not None
    assert interval.low < iqm < interval.high


def of_policies(name: str, seed: int, means: Sequence[float]) -> Result:
    """A run whose last policies return these means."""
    score = score_of([0.0])
    [snapshot] = score.snapshots
    snapshots = tuple(
        replace(snapshot, step=step, reported=(episodes_of([mean]),) * 2) for step, mean in enumerate(means)
    )
    played: Score = replace(score, snapshots=snapshots)
    return replace(result(seed, [0.0], task=HOPPER, algorithm=name), score=played)


def test_the_spread_is_relative_and_its_median_is_over_datasets() -> None:
    runs = [of_policies("a", seed, [90.0, 110.0]) for seed in range(5)]
    runs += [of_policies("b", seed, [-80.0, -120.0]) for seed in range(5)]
    more = [replace(r, variant=replace(r.variant, digest="e")) for r in runs]
    wide = [of_policies("a", seed, [50.0, 150.0]) for seed in range(5)]
    wide += [run for run in more if run.variant.algorithm == "b"]
    whole = overview(made(runs), made(wide, "expert"), made(more, "poor"))
    assert whole.spread("a") == pytest.approx(0.1)  # of 10 %, 50 % and 10 %
    assert whole.spread("b") == pytest.approx(0.2)
    claim = Claim("a is steady", "steady", "a", ("b",))
    word, evidence = judge(whole, claim)
    assert word == "holds in part"
    assert "median 10.0 % against 20.0 % of b, larger on 1 of 3 datasets" in evidence
    assert judge(whole, Claim("b is", "steady", "b", ("a",)))[0] == "does not hold"
    # What only one of them was run on does not count, and few runs tell nothing, neither for nor against.
    few = overview(made([run for run in runs if run.seed < 4]))
    for claimed in (claim, Claim("b is", "steady", "b", ("a",))):
        assert judge(few, claimed)[0] == "so far: cannot be told"
    alone = [of_policies("a", seed, [50.0, 150.0]) for seed in range(5)]
    steady = overview(made(runs), made(more, "poor"), made(alone, "expert"))
    assert "10.0 % against 20.0 % of b, larger on 0 of 2 datasets" in judge(steady, claim)[1]


@pytest.mark.parametrize(
    ("left", "failed", "word"),
    [
        ([False] * 5, 0, "holds"),
        ([False, True], 0, "so far: does not hold"),
        ([False], 1, "so far: does not hold"),
        ([False] * 4, 0, "so far: cannot be told"),
        ([None] * 5, 0, "cannot be told"),
    ],
)
def test_runs_that_leave_the_data_or_fail_are_counted(
    left: Sequence[bool | None], failed: int, word: str
) -> None:
    runs = [
        replace(result(seed, [1.0], algorithm="a", task=HOPPER), diverged=flag)
        for seed, flag in enumerate(left)
    ]
    whole = overview(made(runs, failed={"a": failed}))
    assert judge(whole, Claim("a converges", "converges", "a"))[0] == word
    assert whole.flags("a") == (left.count(True), len(left) - left.count(None), failed)


@pytest.mark.parametrize(("slope", "word"), [(1.0, "holds"), (-1.0, "does not hold")])
def test_influence_follows_reward_where_the_ranks_of_agents_do(slope: float, word: str) -> None:
    runs = []
    for seed in range(5):
        one = result(seed, [1.0], algorithm="a", task=HOPPER)
        assert one.curves is not None
        influence = np.random.default_rng(seed).normal(size=(4, len(AGENTS)))
        values = {**one.curves.values, "influence": influence, "contribution": slope * np.exp(influence)}
        curves: Curves = replace(one.curves, values=values, estimated=frozenset())
        runs.append(replace(one, curves=curves))
    claim = Claim("m follows V", "correlated", "a")
    assert judge(overview(made(runs)), claim)[0] == word
    assert judge(overview(made(runs[:4])), claim)[0] == "so far: cannot be told"
    few = [made([replace(r, variant=replace(r.variant, digest=t)) for r in runs[:2]], t) for t in "abc"]
    assert judge(overview(*few), claim)[0] == "so far: cannot be told"
    assert "1 of 2 datasets" in judge(overview(made(runs), few[0]), claim)[1]
    estimated = [
        replace(run, curves=replace(run.curves, estimated=frozenset({"contribution"})))
        for run in runs
        if run.curves is not None
    ]
    assert judge(overview(made(estimated)), claim) == (
        "cannot be told",
        "no run logged both curves; 0 of 1 dataset",
    )


@pytest.mark.parametrize(
    ("worst", "word"),
    [(BAD, "holds"), ([g + 0.1 for g in GOOD], "cannot be told"), (APART_AT_95, "cannot be told")],
)
def test_a_setting_matters_where_its_best_and_worst_value_differ(worst: Sequence[float], word: str) -> None:
    assert overview(entry({"a": GOOD, "b": APART_AT_95})).duel("a", "b").verdict() == 1
    scans: dict[float, Sequence[float]] = {0.3: GOOD, 1.2: GOOD, 3.0: worst}
    runs = [
        replace(result(seed, [value], task=HOPPER, settings=(("d_tot", d_tot),)), run=f"{d_tot}/{seed}")
        for d_tot, values in scans.items()
        for seed, value in enumerate(values)
    ]
    whole = made(runs)
    assert whole.comparison is not None
    names = {summary.variant: str(summary.scan_value) for summary in whole.comparison.summaries}
    whole = replace(
        whole, comparison=replace(whole.comparison, names=names), planned=dict.fromkeys(names.values(), 5)
    )
    judged, evidence = judge(overview(whole), Claim("d_tot matters", "sensitive", "0.3"))
    assert judged == word
    assert "best at 1.2, worst at 3" in evidence if word == "holds" else "on 0 of 1 scans" in evidence
    assert judge(overview(entry({"a": GOOD})), Claim("d_tot matters", "sensitive", "a"))[0] == "not run"


@pytest.mark.parametrize(
    ("best", "word", "regret"),
    [
        (BAD, "holds", "\u2212300.0 %"),
        (GOOD, "cannot be told", "0.0 %"),  # as wide as its interval is
        ([g / 2 + 4 for g in GOOD], "holds", "\u221220.0 %"),
        ([g + 20 for g in GOOD], "does not hold", "62.5 %"),
    ],
)
def test_a_choice_from_the_data_is_held_against_the_best_fixed_value(
    best: Sequence[float], word: str, regret: str, tmp_path: Path
) -> None:
    rows: dict[str | float, Sequence[float]] = {
        "auto": GOOD,
        0.1: best,
        0.3: BAD,
        1.0: [0.1 * g for g in BAD],
    }
    runs = [
        replace(
            run, run=f"{d_tot}/{seed}", settings={**run.settings, "d_tot": 0.3 if d_tot == "auto" else d_tot}
        )
        for d_tot, values in rows.items()
        for seed, value in enumerate(values)
        for run in [result(seed, [value], task=HOPPER, settings=(("d_tot", d_tot),))]
    ]
    # Another line of the scan is no fixed value of this one.
    runs += [
        replace(result(seed, [1e6], task=HOPPER, settings=(("allocation", "uniform"),)), run=f"other/{seed}")
        for seed in range(5)
    ]
    whole = made(runs)
    assert whole.comparison is not None
    names = {
        v: str(dict(v.settings).get("d_tot", "other"))
        for s in whole.comparison.summaries
        for v in [s.variant]
    }
    whole = replace(
        whole, comparison=replace(whole.comparison, names=names), planned=dict.fromkeys(names.values(), 5)
    )
    claim = Claim("The choice is right", "hindsight", "auto")
    judged, evidence = judge(overview(whole), claim)
    assert judged == word
    behind, close = int(word == "does not hold"), int(word == "holds")
    assert f"behind the best fixed value on {behind} of 1 dataset that have some" in evidence
    assert f"within 10.0 % of it, by the interval of the regret, on {close}" in evidence
    assert f"regret {regret} in the median" in evidence
    write_overview(overview(whole, claims=[claim]), tmp_path / "page.md", "the command")
    table = (tmp_path / "page.md").read_text().split("## The choice is right?")[1].split("##")[0]
    assert re.search(rf"\| 0.3: 12.000 ± 1.414 \| 0.1: .* \| 0.1, 0.3, 1 \| {regret} \| (yes|no) \|", table)
    assert judge(overview(entry({"a": GOOD})), Claim("a", "hindsight", "a"))[0] == "not run"


def test_the_page_says_what_is_not_run_and_its_bars_are_intervals(tmp_path: Path) -> None:
    some = entry({"a": GOOD, "b": BAD[:3]}, failed={"b": 2})
    none = Entry(f"{HOPPER}/expert", "expert.md", None, "no simulator", planned={"a": 5, "b": 5})
    write_overview(overview(some, none, claims=[better("b")]), tmp_path / "page.md", "the command")
    text = (tmp_path / "page.md").read_text()
    assert "Written by `the command`; do not edit." in text
    assert "| a | 12.000 ± 1.414 (T 0) | not run |" in text
    assert "| b | 2.000 ± 0.816 (T 0), 2 of 5 seeds not run | not run |" in text
    assert f"* {HOPPER}/expert: not run: no simulator." in text
    assert "* **So far: cannot be told** (the paper): a is better. Too few runs beside b 1.00" in text
    assert re.search(r"\| b \| 1 of 2 \| 3 \|.* 1.00 \(1.00 to 1.00\) \|.* 2 \|", text)
    figure = (tmp_path / "page-mamujoco-hopper-3x1.svg").read_text()
    assert re.search(r"<title>medium, a: 12, \S+ to \S+</title>", figure)


# -- figures ----------------------------------------------------------------------------------------------------


def test_a_bar_has_the_ends_of_its_interval() -> None:
    bar = Bar(2.0, float("nan"), np.array([1.0, 4.0]), (1.5, 4.0))
    assert bar.whisker == (1.5, 4.0)
    assert "<title>x, a: 2, 1.5 to 4</title>" in grouped_bars_figure({"x": {"a": bar}}, "return", ["a"])
    unknown = replace(bar, interval=(float("nan"), float("nan")))
    assert "<title>x, a: 2</title>" in grouped_bars_figure({"x": {"a": unknown}}, "return", ["a"])


def test_figures_side_by_side_keep_their_sizes() -> None:
    figures = [svg(100, 50, f"<{index}>", [text(1, 2, str(index))]) for index in range(3)]
    joined = side_by_side(figures, gap=10)
    assert joined.startswith('<svg viewBox="0 0 210 110"')
    assert re.findall(r"translate\((\S+) (\S+)\)", joined) == [("0", "0"), ("110", "0"), ("0", "60")]
    assert 'aria-label="&lt;0&gt;; &lt;1&gt;; &lt;2&gt;"' in joined
    assert side_by_side(figures[:1]) == figures[0]
