"""The overview page of a comparison over many datasets, as Markdown, and its figures."""

from __future__ import annotations

import math
from pathlib import Path

from omcda_deploy.files import write_text
from omcda_deploy.formatting import UNKNOWN, digits_of, number, percent
from omcda_deploy.play.measurements import now
from omcda_deploy.report.claims import COMPARING
from omcda_deploy.report.comparison import Summary
from omcda_deploy.report.comparison_report import link_to, markdown_table, page_figures
from omcda_deploy.report.figures import Bar, grouped_bars_figure
from omcda_deploy.report.html import svg_document
from omcda_deploy.report.judgement import TOLERANCE, hindsight, judge
from omcda_deploy.report.overview import LEAST_RUNS, Entry, Overview, relative_spread
from omcda_deploy.report.statistics import reference_of
from omcda_deploy.report.temperatures import interval_words, mean_words

_NOT_RUN = "not run"
_CLONE = 1e-6  # budget in nats that stands for none, which a setting cannot be
_NOTES = {
    "Values": "A run's value is its mean return over the episodes of its last policies, at the temperature T of "
    "play that other episodes chose for its method on its dataset. Mean ± population std over seeds.",
    "IQM": "interquartile mean of the normalised values of all runs of a method, its datasets together, with a "
    "percentile bootstrap interval over runs, stratified by dataset. Rows are of different datasets: beside each "
    "stands what the compared method has on the row's own.",
    "P": "probability of improvement, of a run over one of the row's on the same dataset, equal ones half: the "
    f"mean over the datasets with {LEAST_RUNS} runs or more of both (over all that both were run on, where none "
    "has them), with a stratified bootstrap interval (both as in Agarwal et al., Deep Reinforcement Learning at "
    "the Edge of the Statistical Precipice, NeurIPS 2021).",
    "Verdicts": "one method is ahead of another where the 95 % interval of P is above 1/2, behind where it is "
    "below (on a single dataset: where the exact Mann-Whitney test tells them apart at 5 %, as intervals from few "
    f"seeds are too narrow), and each has {LEAST_RUNS} runs or more on each dataset that counts; else they are not "
    "told apart. A claim about several rows is refuted by one of them at a level that is divided by their number. "
    "It holds in part where it holds on average and is refuted on a dataset, be it because every run of one is "
    "below every run of the other there. A verdict covers the datasets that are run, and is one so far while a "
    "run that it asks for is missing.",
    "Regret": "part of the return of the best fixed value that the choice gives away. A choice is as good where "
    f"the 95 % interval of its regret ends at {percent(TOLERANCE)} or below.",
    "Spread": "std between a run's last policies, mean over seeds, relative to the size of the mean return; the "
    "median over datasets.",
    "Out of range": "runs whose mean reward value, as training logged it, was outside the range of the data's "
    "discounted returns in the second half of their steps, of those that log one (BC and CFCQL do not). The range "
    "contains 0 and is wider by a tenth at both ends. Values that are out of it are no estimates of returns: a "
    "critic drifts, or a penalty shifts it, as CQL's and OMAR's do by design.",
    "Single agents": "a team's reward value is known, its agents' parts only up to constants that move between "
    "them.",
}


def write_overview(overview: Overview, path: Path, command: str) -> None:
    """Write the page to ``path``, and its figures beside the pages of its datasets; ``command`` makes it again.

    Raises :class:`ConfigError` where a file cannot be written.
    """
    figures = {}
    for task, entries in _by_task(overview).items():
        if any(entry.comparison is not None for entry in entries):
            file = Path(entries[0].page).with_name(f"{path.stem}-{task.replace('/', '-')}.svg")
            figures[task] = str(file)
            (path.parent / file).parent.mkdir(parents=True, exist_ok=True)
            write_text(path.parent / file, svg_document(_bars(overview, entries)))
    lines = [f"# {overview.title}", "", f"Written by `{command}`; do not edit.", ""]
    lines += [overview.note.strip(), ""] if overview.note else []
    lines += _claims(overview)
    lines += _together(overview)
    for task, entries in _by_task(overview).items():
        lines += [f"## {task}", ""]
        lines += (
            [f"![Returns on {task}]({link_to(figures[task])})", "", _CAPTION, ""] if task in figures else []
        )
        lines += _returns(overview, entries)
    lines += _duels(overview)
    lines += _choices(overview)
    lines += _declared(overview, path)
    lines += _spreads(overview)
    lines += [
        "## Notes",
        "",
        *(f"* {name}: {text}" for name, text in _NOTES.items()),
        *_references(overview),
        "",
    ]
    lines += ["## Provenance", "", "* Of each dataset: on its page.", f"* Written: {now()}", ""]
    write_text(path, "\n".join(lines))


_CAPTION = (
    "Interquartile mean over seeds at each method's own temperature of play, whiskers from end to end of its 95 % "
    "interval, a dot per seed."
)


def _by_task(overview: Overview) -> dict[str, list[Entry]]:
    tasks: dict[str, list[Entry]] = {}
    for entry in overview.entries:
        tasks.setdefault(entry.task, []).append(entry)
    return tasks


def _claims(overview: Overview) -> list[str]:
    if not overview.claims:
        return []
    lines = []
    for claim in overview.claims:
        word, evidence = judge(overview, claim)
        lines.append(
            f"* **{word.capitalize()}** ({claim.by}): {claim.says}. {evidence[0].upper()}{evidence[1:]}."
        )
    return ["## What holds and what does not", "", *lines, ""]


def _together(overview: Overview) -> list[str]:
    """Aggregates of every method over all of its datasets."""
    compared = overview.method
    header = [
        *("", "datasets", "runs", "IQM of scores", "95 % interval"),
        *(f"{compared} there", f"P({compared} > row)"),
    ]
    rows = []
    for method in overview.methods:
        summaries = overview.summaries(method)
        iqm, interval, _ = overview.iqm(method)
        left, known, failed = overview.flags(method)
        duel = overview.duel(compared, method)
        there, _, _ = overview.iqm(compared, summaries)
        rows.append(
            [
                method,
                f"{len(summaries)} of {overview.planned(method)}",
                str(overview.runs(method)),
                number(iqm, 1),
                interval_words(interval, 1),
                UNKNOWN if method == compared else number(there, 1),
                UNKNOWN if method == compared or not duel.pairs else str(duel),
                percent(overview.spread(method)),
                f"{left} of {known}" if known else UNKNOWN,
                str(failed),
            ]
        )
    return [
        "## All datasets together",
        "",
        *markdown_table([*header, "spread", "out of range", "failed"], rows),
    ]


def _returns(overview: Overview, entries: list[Entry]) -> list[str]:
    header = [
        "",
        *(f"[{e.tier}]({link_to(e.page)})" if e.comparison is not None else e.tier for e in entries),
    ]
    rows = [
        [method, *(_value(entry, method) for entry in entries)]
        for method in overview.methods
        if any(method in entry.planned for entry in entries)
    ]
    reasons = [
        f"* {entry.label}: {_NOT_RUN}: {entry.reason}." for entry in entries if entry.comparison is None
    ]
    return [*markdown_table(header, rows), *([*reasons, ""] if reasons else [])]


def _value(entry: Entry, method: str) -> str:
    if method not in entry.planned:
        return ""
    if (summary := entry.summary(method)) is None:
        failed = entry.failed.get(method, 0)
        return f"{failed} failed" if failed else _NOT_RUN
    words = (
        f"{mean_words(summary.values, digits_of(summary.curve))} (T {summary.temperatures[summary.best]:g})"
    )
    missing = entry.planned[method] - summary.values.size
    return f"{words}, {missing} of {entry.planned[method]} seeds {_NOT_RUN}" if missing > 0 else words


def _bars(overview: Overview, entries: list[Entry]) -> str:
    groups = {
        entry.tier: {
            method: _bar(summary)
            for method in overview.methods
            if (summary := entry.summary(method)) is not None
        }
        for entry in entries
        if entry.comparison is not None
    }
    return grouped_bars_figure(groups, "return", overview.methods)


def _bar(summary: Summary) -> Bar:
    interval = summary.interval
    ends = (math.nan, math.nan) if interval is None else (interval.low, interval.high)
    return Bar(summary.iqm, math.nan, summary.values, ends)


def _duels(overview: Overview) -> list[str]:
    """Write a table per claim that compares rows: the ablations', for instance."""
    lines = []
    for claim in overview.claims:
        if claim.rule != COMPARING[0]:
            continue
        rows = []
        for other in claim.than:
            duel = overview.duel(claim.method, other, claim.on)
            differences = [float(x.mean() - y.mean()) for x, y in duel.pairs.values()]
            rows.append(
                [
                    other,
                    f"{len(duel.pairs)} of {overview.planned(other, claim.on)}",
                    str(duel) if duel.pairs else _NOT_RUN,
                    str(len(duel.datasets(1))) if duel.pairs else UNKNOWN,
                    _named(duel.datasets(-1)) if duel.pairs else UNKNOWN,
                    f"{sum(d > 0 for d in differences)} of {len(differences)}" if differences else UNKNOWN,
                ]
            )
        header = [f"{claim.method} against", "datasets", "P", "ahead on", "behind on", "larger mean on"]
        lines += [f"## {claim.says}?", "", *markdown_table(header, rows)]
    return lines


def _named(labels: list[str]) -> str:
    """Count datasets, and name them."""
    return f"{len(labels)}: {', '.join(labels)}" if labels else "0"


def _choices(overview: Overview) -> list[str]:
    """Write a table per claim about values that were chosen from the data."""
    lines = []
    for claim in overview.claims:
        compared = hindsight(overview, claim) if claim.rule == "hindsight" else []
        rows = [
            [
                each.label,
                _with_value(each.chosen),
                _with_value(each.best),
                ", ".join(f"{summary.scan_value:g}" for summary in each.fixed),
                percent(each.regret),
                "yes" if each.behind else "no",
            ]
            for each in compared
        ]
        header = ["", claim.method, "best fixed value", "of", "regret", "behind"]
        lines += [f"## {claim.says}?", "", *markdown_table(header, rows)] if rows else []
    return lines


def _with_value(summary: Summary) -> str:
    value = "clone" if summary.scan_value <= _CLONE else f"{summary.scan_value:g}"
    return f"{value}: {mean_words(summary.values, digits_of(summary.curve))}"


def _declared(overview: Overview, path: Path) -> list[str]:
    """Show the figures of pages that algorithms declare: scans, and curves of training."""
    lines = []
    for entry in overview.entries:
        if entry.comparison is None:
            continue
        page = Path(entry.page)
        for name, figure in page_figures(entry.comparison, page).items():
            file = page.with_name(name)
            if (path.parent / file).is_file():
                lines += [f"### {figure.title}", "", f"![{figure.title}]({link_to(file)})", ""]
    return ["## Budgets and influence", "", *lines] if lines else []


def _spreads(overview: Overview) -> list[str]:
    entries = [entry for entry in overview.entries if entry.comparison is not None]
    if not entries:
        return []
    rows = [
        [
            entry.label,
            *(percent(relative_spread(s)) if (s := entry.summary(m)) else "" for m in overview.methods),
        ]
        for entry in entries
    ]
    medians = [percent(overview.spread(method)) for method in overview.methods]
    table = markdown_table(["", *overview.methods], [*rows, ["median", *medians]])
    return ["## Spread between a run's policies", "", *table]


def _references(overview: Overview) -> list[str]:
    lines = []
    for task in _by_task(overview):
        reference = reference_of(task)
        source = "none, so it counts in P and not in IQM" if reference is None else reference.source
        lines.append(f"* Score of {task}: {source}.")
    return lines
