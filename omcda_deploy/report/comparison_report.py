"""The report of a comparison: report.html and results.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from omcda_deploy.files import write_text
from omcda_deploy.formatting import UNKNOWN, digits_of, number
from omcda_deploy.play.measurements import now
from omcda_deploy.plugins import Scan
from omcda_deploy.report.comparison import Comparison, Overall, Summary
from omcda_deploy.report.comparison_csv import write_tables
from omcda_deploy.report.figures import Bar, Curve, curves_figure, grouped_bars_figure
from omcda_deploy.report.html import Section, captioned, html_table, provenance_list, write_report
from omcda_deploy.report.statistics import REFERENCES, Interval, std


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write ``report.html``, ``results.md`` and CSV files into the folder ``out``, each file whole or not at all.

    :func:`~omcda_deploy.report.comparison_csv.write_tables` describes the CSV files. Raises :class:`ConfigError`
    where ``out`` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_tables(comparison, out)
    write_text(out / "results.md", markdown(comparison, "Comparison", "omcda-deploy compare"))
    write_report(out / "report.html", "Comparison", _sections(comparison), _headline(comparison))


_HEADER = (
    "",
    "steps",
    "seeds",
    "mean ± std",
    "std of episodes",
    "won",
    "IQM",
    "95 % interval",
    "score",
    "minutes",
)
_ALWAYS = 5  # so many columns are shown always, the others where some row has a value


def _table(comparison: Comparison, summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Make the header and the rows of a table."""
    rows = [_cells(comparison, summary) for summary in summaries]
    columns = [
        index
        for index in range(len(_HEADER))
        if index < _ALWAYS or any(row[index] != UNKNOWN for row in rows)
    ]
    return [_HEADER[index] for index in columns], [[row[index] for index in columns] for row in rows]


def _interval_words(interval: Interval | None, runs: int, digits: int) -> str:
    if interval is None:
        return "one seed: none" if runs == 1 else "a dataset with one seed: none"
    return f"{number(interval.low, digits)} to {number(interval.high, digits)}"


def _cells(comparison: Comparison, summary: Summary) -> list[str]:
    digits = digits_of(summary.values)
    scores, won, seconds = summary.scores, summary.won, summary.seconds
    return [
        comparison.name(summary.variant),
        f"{summary.variant.steps:,}".replace(",", "\u202f"),
        ", ".join(str(result.seed) for result in summary.results),
        f"{number(summary.mean, digits)} ± {number(summary.std, digits)}",
        number(summary.std_of_episodes, digits),
        UNKNOWN if won is None else f"{number(100 * float(won.mean()), 1)} ± {number(100 * std(won), 1)} %",
        number(summary.iqm, digits),
        _interval_words(summary.interval, summary.values.size, digits),
        UNKNOWN if scores is None else f"{number(float(scores.mean()), 1)} ± {number(std(scores), 1)}",
        UNKNOWN if seconds is None else number(seconds / 60, 1),
    ]


def _overall_cells(comparison: Comparison, overall: Overall) -> list[str]:
    return [
        comparison.name(overall.summaries[0].variant),
        str(len(overall.scores)),
        str(overall.runs),
        number(overall.iqm, 1),
        _interval_words(overall.interval, overall.runs, 1),
    ]


_OVERALL = ["", "datasets", "runs", "IQM of scores", "95 % interval"]


def _headline(comparison: Comparison) -> str:
    runs = sum(summary.values.size for summary in comparison.summaries)
    left = f", {len(comparison.left_out)} left out" if comparison.left_out else ""
    return f"{runs} runs{left}. {comparison.conditions['Evaluation']}"


def _notes(comparison: Comparison) -> dict[str, str]:
    notes = {
        "Values": "A run's value is its mean return over the evaluation episodes of its last policy; nothing was "
        "selected. Mean ± population std over seeds; std of episodes: within a run, mean over runs; won: share "
        "of episodes; IQM: mean of the middle half of the runs; interval: percentile bootstrap over runs, "
        "stratified by dataset (rliable's definitions). From few seeds intervals come out too narrow. Minutes: "
        "wall clock of one run's training, without cloning and evaluation."
    }
    for task in _tasks(comparison):
        reference = REFERENCES.get(task)
        source = "none, there is no reference" if reference is None else reference.source
        notes[f"Score of {task}"] = f"{source}."
    return notes


def _origin(comparison: Comparison) -> dict[str, str]:
    results = [result for summary in comparison.summaries for result in summary.results]

    def distinct(values: Iterable[str]) -> str:
        return "; ".join(sorted(set(values)))

    def packages(versions: Mapping[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items() if name != "git")

    return {
        **{
            f"Dataset {comparison.dataset(summaries[0].variant)} of {task}": digest
            for (task, digest), summaries in comparison.datasets.items()
        },
        "Trained at commit": distinct(result.versions["git"] for result in results),
        "Trained with": distinct(packages(result.versions) for result in results),
        "Training seeds": ", ".join(map(str, sorted({result.seed for result in results}))),
        **comparison.conditions,
        "Evaluated with": distinct(packages(result.evaluation["versions"]) for result in results),
        "Machine": distinct(result.evaluation["machine"] for result in results),
        "Evaluated": distinct(result.evaluation["date"][:10] for result in results),
        "Written": now(),
    }


def markdown(comparison: Comparison, title: str, command: str, note: str = "") -> str:
    """Write ``note``, tables, conditions and provenance as Markdown; ``command`` makes the page again."""
    lines = [f"# {title}", "", f"Written by `{command}`; do not edit.", ""]
    lines += [note.strip(), ""] if note else []

    def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines.extend(["| " + " | ".join(header) + " |", "|" + "---|" * len(header)])
        lines.extend("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        lines.append("")

    for summaries in comparison.datasets.values():
        variant = summaries[0].variant
        lines += [f"## {variant.task}, {comparison.dataset(variant)}", ""]
        table(*_table(comparison, summaries))
    if comparison.overall:
        lines += ["## All datasets", ""]
        table(_OVERALL, [_overall_cells(comparison, overall) for overall in comparison.overall])
    if comparison.left_out:
        lines += ["## Left out of every mean", ""]
        lines += [f"* `{left.run}` ({left.label}): {left.reason}" for left in comparison.left_out] + [""]
    for heading, entries in (("Notes", _notes(comparison)), ("Provenance", _origin(comparison))):
        lines += [f"## {heading}", "", *(f"* {name}: {text}" for name, text in entries.items()), ""]
    return "\n".join(lines)


def _sections(comparison: Comparison) -> list[Section]:
    sections = [_returns_section(comparison, task) for task in _tasks(comparison)]
    if comparison.overall:
        rows = [_overall_cells(comparison, overall) for overall in comparison.overall]
        table = captioned(
            html_table(_OVERALL, rows),
            "Interquartile mean of the normalised scores, runs and datasets together; compare only methods that "
            "were run on the same datasets.",
        )
        sections.append(Section("All datasets", table))
    sections += _scan_sections(comparison)
    sections += [
        _curve_section(comparison, summary)
        for summary in comparison.summaries
        if any(result.curves is not None for result in summary.results)
    ]
    if comparison.left_out:
        rows = [[left.run, left.label, left.reason] for left in comparison.left_out]
        sections.append(Section("Left out of every mean", html_table(["run", "what", "why"], rows)))
    return [*sections, Section("Notes", provenance_list({**_notes(comparison), **_origin(comparison)}))]


def _tasks(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(summary.variant.task for summary in comparison.summaries))


def _returns_section(comparison: Comparison, task: str) -> Section:
    datasets = [summaries for key, summaries in comparison.datasets.items() if key[0] == task]
    groups = {
        comparison.dataset(summaries[0].variant): {
            comparison.name(s.variant): Bar(s.mean, s.std, s.values) for s in summaries
        }
        for summaries in datasets
    }
    methods = list(dict.fromkeys(comparison.name(summary.variant) for summary in comparison.summaries))
    parts = [
        captioned(
            grouped_bars_figure(groups, "mean return", methods),
            "Mean over seeds, whiskers one standard deviation to each side, a dot per seed.",
        )
    ]
    for summaries in datasets:
        label = comparison.dataset(summaries[0].variant)
        table = html_table(*_table(comparison, summaries))
        parts.append(captioned(table, f"Dataset {label}, {summaries[0].variant.digest}."))
    return Section(f"Returns on {task}", "".join(parts))


def _scan_sections(comparison: Comparison) -> list[Section]:
    """Draw returns over a setting, a figure per dataset and algorithm that has two values of it or more."""
    scans: dict[tuple[Scan, str, str, str, int], dict[str, list[Summary]]] = {}
    for summary in comparison.summaries:
        v = summary.variant
        if summary.scan is not None:
            lines = scans.setdefault((summary.scan, v.task, v.digest, v.algorithm, v.steps), {})
            lines.setdefault(summary.scan_group, []).append(summary)
    sections = []
    for (scan, task, _, algorithm, steps), lines in scans.items():
        if max(len(summaries) for summaries in lines.values()) < 2:
            continue
        curves = {}
        for group, summaries in lines.items():
            summaries.sort(key=lambda summary: summary.scan_value)
            curves[group] = Curve(
                np.array([summary.scan_value for summary in summaries], np.float64),
                np.array([summary.mean for summary in summaries]),
                np.array([summary.std for summary in summaries]),
            )
        label = comparison.dataset(next(iter(lines.values()))[0].variant)
        figure = curves_figure(curves, scan.axis, "mean return", log_x=True, width=900.0)
        sections.append(
            Section(
                f"{scan.title} of {algorithm} on {task}, {label}",
                captioned(
                    figure,
                    f"Mean ± std over seeds against {scan.caption}; {steps:,} steps. "
                    "A point without a whisker has one seed.",
                ),
            )
        )
    return sections


def _curve_section(comparison: Comparison, summary: Summary) -> Section:
    """Draw the curves that the algorithm declares: over training, then one against another at the end."""
    runs = [result.curves for result in summary.results if result.curves is not None]
    section, agents = runs[0].section, runs[0].agents
    estimated = frozenset[str]().union(*(curves.estimated for curves in runs))
    steps = runs[0].steps
    for curves in runs[1:]:
        steps = np.intersect1d(steps, curves.steps)
    titles, notes = {}, []
    for curve in section.curves:
        estimate = curve.estimate if curve.name in estimated else None
        titles[curve.name] = estimate.title if estimate else curve.title
        notes += [note] if (note := estimate.note if estimate else curve.note) else []

    def over_training(name: str) -> dict[str, Curve]:
        mean = np.mean([curves.values[name][np.isin(curves.steps, steps)] for curves in runs], axis=0)
        return {agent: Curve(steps.astype(np.float64), mean[:, i]) for i, agent in enumerate(agents)}

    def at_the_end(name: str, against: str) -> dict[str, Curve]:
        x, y = (np.array([curves.values[key][-1] for curves in runs]) for key in (name, against))
        return {agent: Curve(x[:, i], y[:, i]) for i, agent in enumerate(agents)}

    figures = [curves_figure(over_training(name), "step", title) for name, title in titles.items() if title]
    pairs = [(curve.name, curve.against) for curve in section.curves if curve.against]
    figures += [
        curves_figure(at_the_end(name, against), f"{titles[name]}, at the end", titles[against], joined=False)
        for name, against in pairs
    ]
    caption = f"What training logged, mean over seeds ({len(runs)} of them)"
    caption += "; in the last panel one point per agent and seed, at the last step." if pairs else "."
    variant = summary.variant
    heading = f"{section.title}: {comparison.name(variant)} on {variant.task}, {comparison.dataset(variant)}"
    return Section(
        heading, captioned(f'<div class="pairs">{"".join(figures)}</div>', " ".join([caption, *notes]))
    )
