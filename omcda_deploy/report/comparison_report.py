"""The report of a comparison: report.html, results.md and its figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from rich.table import Table

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.files import write_text
from omcda_deploy.formatting import UNKNOWN, digits_of, number
from omcda_deploy.play.measurements import now
from omcda_deploy.report.comparison import CLONE, Comparison, Overall, Summary
from omcda_deploy.report.comparison_csv import write_tables
from omcda_deploy.report.comparison_figures import Figure, curve_figures, scan_figures
from omcda_deploy.report.figures import Bar, grouped_bars_figure
from omcda_deploy.report.html import (
    Section,
    captioned,
    folded,
    html_table,
    provenance_list,
    svg_document,
    write_report,
)
from omcda_deploy.report.statistics import Interval, reference_of, std
from omcda_deploy.report.svg import side_by_side
from omcda_deploy.report.temperatures import (
    CAPTION,
    interval_words,
    mean_words,
    share_words,
    shown,
    temperature_figure,
    temperature_table,
)
from omcda_deploy.report.terminal import terminal_table


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write ``report.html``, ``results.md`` with its figures, and CSV files into the folder ``out``, each whole.

    :func:`~omcda_deploy.report.comparison_csv.write_tables` describes the CSV files. Raises :class:`ConfigError`
    where ``out`` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_tables(comparison, out)
    write_markdown(comparison, out / "results.md", "Comparison", "omcda-deploy compare")
    write_report(out / "report.html", "Comparison", _sections(comparison), _headline(comparison))


def write_markdown(comparison: Comparison, path: Path, title: str, command: str, note: str = "") -> None:
    """Write tables, conditions and provenance as Markdown to ``path``, and the figures as SVG files beside it.

    ``note`` is Markdown above the tables; ``command`` makes the page again. Raises :class:`ConfigError` where a
    file cannot be written.
    """
    names = {}
    for index, (key, summaries) in enumerate(comparison.datasets.items()):
        number_of = f"-{index + 1}" if len(comparison.datasets) > 1 else ""
        names[key] = f"{path.stem}-temperatures{number_of}.svg"
        write_text(path.with_name(names[key]), svg_document(temperature_figure(comparison, summaries)))
    figures = page_figures(comparison, path)
    for name, figure in figures.items():
        write_text(path.with_name(name), svg_document(side_by_side(figure.panels)))
    write_text(path, _markdown(comparison, title, command, note, names, figures))


def page_figures(comparison: Comparison, path: Path) -> dict[str, Figure]:
    """Return a page's scans and training curves by file name: the curves of the first row that has them alone."""
    figures = [*scan_figures(comparison), *curve_figures(comparison)[:1]]
    kinds = [figure.kind for figure in figures]
    return {
        f"{path.stem}-{kind}{f'-{kinds[:index].count(kind) + 1}' if kinds.count(kind) > 1 else ''}.svg": figure
        for index, (kind, figure) in enumerate(zip(kinds, figures, strict=True))
    }


def terminal_tables(comparison: Comparison) -> list[Table]:
    """Make a table of each dataset for the terminal, with fewer columns."""
    columns = [_HEADER.index(name) for name in _PRINTED]
    tables = []
    for (task, _), summaries in comparison.datasets.items():
        rows = [[_cells(comparison, summary)[index] for index in columns] for summary in summaries]
        header, cells = shown(_PRINTED, rows, len(_PRINTED) - len(OUTCOMES))
        table = terminal_table(f"{task}, {comparison.dataset(summaries[0].variant)}", header[0], header[1:])
        for row in cells:
            table.add_row(*row)
        tables.append(table)
    return tables


_PRINTED = ("", "seeds", "snapshots", "selected T", "mean ± std", "T 0", "T 1", "std of snapshots", *OUTCOMES)
_HEADER = (
    *("", "steps", "seeds", "snapshots", "selected T", "mean ± std", "T 0", "T 1"),
    *("std of snapshots", "std of episodes", *OUTCOMES, "IQM", "95 % interval", "score", "minutes"),
)
_ALWAYS = 10  # so many columns are shown always, the others where some row has a value


def _table(comparison: Comparison, summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Make the header and the rows of a table."""
    return shown(_HEADER, [_cells(comparison, summary) for summary in summaries], _ALWAYS)


def _interval_words(interval: Interval | None, runs: int, digits: int) -> str:
    if interval is None:
        return "one seed: none" if runs == 1 else "a dataset with one seed: none"
    return interval_words(interval, digits)


def _cells(comparison: Comparison, summary: Summary) -> list[str]:
    digits, best = digits_of(summary.curve), summary.best
    scores, seconds, (fewest, most) = summary.scores, summary.seconds, summary.snapshots
    trained = summary.variant.algorithm != CLONE
    return [
        comparison.name(summary.variant),
        f"{summary.variant.steps:,}".replace(",", "\u202f") if trained else UNKNOWN,
        ", ".join(str(result.seed) for result in summary.results) if trained else UNKNOWN,
        f"{fewest}" if fewest == most else f"{fewest}\u2013{most}",
        f"{summary.temperatures[best]:g}",
        mean_words(summary.values, digits),
        mean_words(summary.at(0.0), digits),
        mean_words(summary.at(1.0), digits),
        number(float(summary.std_of_snapshots[best]), digits),
        number(float(summary.std_of_episodes[best]), digits),
        *(share_words(summary.shares[outcome], best) for outcome in OUTCOMES),
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
        "Values": "A run's value at a temperature T of play is its mean return over the episodes of its last "
        "policies (snapshots). A row's value, from mean to score, is that at its selected T, which other episodes "
        "than those shown chose for all its runs together; T 0 (deterministic) and T 1 (sampled) always stand "
        "beside it. Mean ± population std over seeds; std of snapshots: between the policies of a run, std of "
        "episodes: within a policy, means over runs; stalled, fell, won: shares of episodes, as the simulator "
        "defines them; IQM: mean of the middle half of the runs; interval: percentile bootstrap over runs, "
        "stratified by dataset (rliable's definitions). From few seeds intervals come out too narrow. Minutes: "
        "wall clock of one run's training, without cloning and evaluation.",
        "Clone": "BC played below T 1 is the sharpened clone of the behaviour policy, without any critic: compare "
        "other rows with it at its own T. Where no run is of BC, the row clone is the behaviour model that the "
        "first run of the dataset began with.",
    }
    for task in _tasks(comparison):
        reference = reference_of(task)
        source = "none, there is no reference" if reference is None else reference.source
        notes[f"Score of {task}"] = f"{source}."
    return notes


def _origin(comparison: Comparison) -> dict[str, str]:
    results = [result for summary in comparison.summaries for result in summary.results]

    def distinct(values: Iterable[str]) -> str:
        return "; ".join(sorted(set(values)))

    def packages(versions: Mapping[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items() if name != "git")

    origin = {
        **{
            f"Dataset {comparison.dataset(summaries[0].variant)} of {task}": digest
            for (task, digest), summaries in comparison.datasets.items()
        },
        "Trained at commit": distinct(result.versions["git"] for result in results),
        "Trained with": distinct(packages(result.versions) for result in results),
        "Training seeds": ", ".join(map(str, sorted({result.seed for result in results}))),
        **comparison.conditions,
        "Evaluated with": distinct(packages(result.score.versions) for result in results),
        "Machine": distinct(result.score.machine for result in results),
        "Evaluated": distinct(result.score.date[:10] for result in results),
        "Written": now(),
    }
    return {name: text for name, text in origin.items() if text}  # where no run was played, much is unknown


def _markdown(
    comparison: Comparison,
    title: str,
    command: str,
    note: str,
    temperatures: Mapping[tuple[str, str], str],
    figures: Mapping[str, Figure],
) -> str:
    """Return the page; ``temperatures`` has the file of each dataset's figure, ``figures`` the others by file."""
    lines = [f"# {title}", "", f"Written by `{command}`; do not edit.", ""]
    lines += [note.strip(), ""] if note else []

    for key, summaries in comparison.datasets.items():
        variant = summaries[0].variant
        lines += [f"## {variant.task}, {comparison.dataset(variant)}", ""]
        lines += markdown_table(*_table(comparison, summaries))
        lines += [f"![Return over the temperature of play]({link_to(temperatures[key])})", "", CAPTION, ""]
        lines += markdown_table(*temperature_table(comparison, summaries))
    for file, figure in figures.items():
        lines += [f"## {figure.title}", "", f"![{figure.title}]({link_to(file)})", "", figure.caption, ""]
    if comparison.card:
        lines += ["## The data", ""]
        lines += markdown_table(["", ""], [*comparison.card, *_clone_lines(comparison)])
    if comparison.overall:
        lines += ["## All datasets", ""]
        lines += markdown_table(
            _OVERALL, [_overall_cells(comparison, overall) for overall in comparison.overall]
        )
    if comparison.left_out:
        lines += ["## Left out of every mean", ""]
        lines += [f"* `{left.run}` ({left.label}): {left.reason}" for left in comparison.left_out] + [""]
    for heading, entries in (("Notes", _notes(comparison)), ("Provenance", _origin(comparison))):
        lines += [f"## {heading}", "", *(f"* {name}: {text}" for name, text in entries.items()), ""]
    return "\n".join(lines)


def _clone_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """Say what the clone of the data's behaviour earns, and how its episodes end, at each temperature of play."""
    clone = next((s for s in comparison.summaries if s.variant.algorithm in ("bc", CLONE)), None)
    if clone is None:
        return []
    lines = []
    for index, temperature in enumerate(clone.temperatures):
        ends = [
            f"{outcome} {share_words(shares, index)}"
            for outcome, shares in clone.shares.items()
            if shares is not None
        ]
        words = mean_words(clone.curve[:, index], digits_of(clone.curve))
        lines.append((f"return of the clone, T {temperature:g}", ", ".join([words, *ends])))
    return lines


def link_to(file: str | Path) -> str:
    """Return the target of a Markdown link to a file, in which blanks and brackets would end it."""
    return quote(str(file))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one behind it."""
    first, *others = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    ruled = ["| " + " | ".join(first) + " |", "|" + "---|" * len(first)]
    return [*ruled, *("| " + " | ".join(row) + " |" for row in others), ""]


def _section(figure: Figure) -> Section:
    panels = "".join(figure.panels)
    content = f'<div class="pairs">{panels}</div>' if len(figure.panels) > 1 else panels
    return Section(figure.title, captioned(content, figure.caption))


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
    sections += [_section(figure) for figure in [*scan_figures(comparison), *curve_figures(comparison)]]
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
            "Mean over seeds at the selected temperature of play, whiskers one standard deviation to each side, a "
            "dot per seed.",
        )
    ]
    for summaries in datasets:
        label = comparison.dataset(summaries[0].variant)
        table = html_table(*_table(comparison, summaries))
        parts += [
            captioned(table, f"Dataset {label}, {summaries[0].variant.digest}."),
            captioned(temperature_figure(comparison, summaries), CAPTION),
            folded("Every temperature", html_table(*temperature_table(comparison, summaries))),
        ]
    return Section(f"Returns on {task}", "".join(parts))
