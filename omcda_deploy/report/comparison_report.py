"""A comparison on paper: report.html, results.md, and the data behind their figures as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from omcda_deploy.formatting import digits_of
from omcda_deploy.play.measurements import now, write_text
from omcda_deploy.report.comparison import Comparison, Overall, Summary
from omcda_deploy.report.figures import Bar, Curve, curves_figure, grouped_bars_figure
from omcda_deploy.report.html import Section, captioned, html_table, provenance_list, write_report
from omcda_deploy.report.statistics import (
    REFERENCES,
    Interval,
    Values,
    bootstrap_interval,
    interquartile_mean,
    std,
)

_DASH = "\u2013"
_VARIANT = "task dataset dataset_digest algorithm settings steps"
_SCORE = "score_mean score_std score_iqm score_iqm_low score_iqm_high"
_COLUMNS = {
    "returns.csv": f"{_VARIANT} seed run commit episode episode_seed return length ended_by",
    "summary.csv": f"{_VARIANT} datasets runs mean std iqm iqm_low iqm_high {_SCORE}",
    "influence.csv": f"{_VARIANT} seed step agent influence budget share kl contribution contribution_is",
    "d_tot.csv": f"{_VARIANT} allocation d_tot runs mean std",
}
_Row = dict[str, object]


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write into the folder ``out``, each file whole or not at all:

    * ``report.html`` and ``results.md``: the figures and tables;
    * ``returns.csv``: one row per run and episode;
    * ``summary.csv``: one row per variant, ``score`` being the normalised one; rows whose task is ``*`` are methods
      over several datasets, whose runs and datasets are joined;
    * ``influence.csv``: one row per run, logged step (at most 100, averaged in groups) and agent; ``contribution``
      is what :class:`omcda_deploy.report.comparison.Curves` says, and ``contribution_is`` which of the two;
    * ``d_tot.csv``: one row per variant that has a budget.

    What is not known is an empty cell. Raises :class:`ConfigError` where ``out`` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {
        "returns.csv": _returns_rows(comparison),
        "summary.csv": _summary_rows(comparison),
        "influence.csv": _influence_rows(comparison),
        "d_tot.csv": _d_tot_rows(comparison),
    }
    for name, columns in _COLUMNS.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, columns.split(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name])
        write_text(out / name, text.getvalue())
    write_text(out / "results.md", markdown(comparison, "Comparison", "omcda-deploy compare"))
    write_report(out / "report.html", "Comparison", _sections(comparison), _headline(comparison))


# -- data -------------------------------------------------------------------------------------------------------


def _variant_cells(summary: Summary) -> _Row:
    variant = summary.variant
    return {
        "task": variant.task,
        "dataset": variant.dataset,
        "dataset_digest": variant.digest,
        "algorithm": variant.algorithm,
        "settings": variant.settings_label,
        "steps": variant.steps,
    }


def _known(value: float) -> object:
    return "" if math.isnan(value) else value


def _interval_cells(interval: Interval | None, name: str) -> _Row:
    return {} if interval is None else {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _returns_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        for result in summary.results:
            played = result.evaluation
            for index, value in enumerate(played["returns"]):
                yield {
                    **_variant_cells(summary),
                    "seed": result.seed,
                    "run": result.run,
                    "commit": result.versions["git"],
                    "episode": index,
                    "episode_seed": played["episode_seeds"][index],
                    "return": value,
                    "length": played["lengths"][index],
                    "ended_by": played["ended_by"][index],
                }


def _summary_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        yield {
            **_variant_cells(summary),
            "datasets": 1,
            "runs": summary.values.size,
            "mean": summary.mean,
            "std": _known(summary.std),
            "iqm": summary.iqm,
            **_interval_cells(summary.interval, "iqm"),
            **_score_cells([] if summary.scores is None else [summary.scores]),
        }
    for overall in comparison.overall:
        yield {
            **_variant_cells(overall.summaries[0]),
            **dict.fromkeys(("task", "dataset", "dataset_digest"), "*"),
            "datasets": len(overall.scores),
            "runs": overall.runs,
            **_score_cells(overall.scores),
        }


def _score_cells(datasets: Sequence[Values]) -> _Row:
    if not datasets:
        return {}
    scores = np.concatenate(datasets)
    return {
        "score_mean": float(scores.mean()),
        "score_std": _known(std(scores)),
        "score_iqm": float(interquartile_mean(scores)),
        **_interval_cells(bootstrap_interval(datasets), "score_iqm"),
    }


def _influence_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        cells = _variant_cells(summary)
        for result in summary.results:
            if (curves := result.curves) is None:
                continue
            columns = {
                "influence": curves.influence,
                "budget": curves.budget,
                "share": curves.share,
                "kl": curves.kl,
                "contribution": curves.contribution,
            }
            values = {name: column.tolist() for name, column in columns.items()}
            source = "value/reward" if curves.measured else "influence * kl"
            for row, step in enumerate(curves.steps.tolist()):
                for index, agent in enumerate(curves.agents):
                    yield {
                        **cells,
                        **{"seed": result.seed, "step": step, "agent": agent, "contribution_is": source},
                        **{name: column[row][index] for name, column in values.items()},
                    }


def _d_tot_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        if summary.d_tot is not None:
            yield {
                **_variant_cells(summary),
                "allocation": summary.allocation,
                "d_tot": summary.d_tot,
                "runs": summary.values.size,
                "mean": summary.mean,
                "std": _known(summary.std),
            }


# -- for readers ------------------------------------------------------------------------------------------------

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
_NEVER_EMPTY = 5  # columns from the left; of the others those are shown that say something in some row


def _table(comparison: Comparison, summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    rows = [_cells(comparison, summary) for summary in summaries]
    shown = [
        index
        for index in range(len(_HEADER))
        if index < _NEVER_EMPTY or any(row[index] != _DASH for row in rows)
    ]
    return [_HEADER[index] for index in shown], [[row[index] for index in shown] for row in rows]


def _number(value: float, digits: int) -> str:
    return (
        _DASH if math.isnan(value) else f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "\u2212")
    )


def _interval_words(interval: Interval | None, runs: int, digits: int) -> str:
    if interval is None:
        return "one seed: none" if runs == 1 else "a dataset with one seed: none"
    return f"{_number(interval.low, digits)} to {_number(interval.high, digits)}"


def _cells(comparison: Comparison, summary: Summary) -> list[str]:
    digits = digits_of(summary.values)
    scores, won, seconds = summary.scores, summary.won, summary.seconds
    return [
        comparison.name(summary.variant),
        f"{summary.variant.steps:,}".replace(",", "\u202f"),
        ", ".join(str(result.seed) for result in summary.results),
        f"{_number(summary.mean, digits)} ± {_number(summary.std, digits)}",
        _number(summary.std_of_episodes, digits),
        _DASH if won is None else f"{_number(100 * float(won.mean()), 1)} ± {_number(100 * std(won), 1)} %",
        _number(summary.iqm, digits),
        _interval_words(summary.interval, summary.values.size, digits),
        _DASH if scores is None else f"{_number(float(scores.mean()), 1)} ± {_number(std(scores), 1)}",
        _DASH if seconds is None else _number(seconds / 60, 1),
    ]


def _overall_cells(comparison: Comparison, overall: Overall) -> list[str]:
    return [
        comparison.name(overall.summaries[0].variant),
        str(len(overall.scores)),
        str(overall.runs),
        _number(overall.iqm, 1),
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
            f"Dataset {comparison.dataset(own[0].variant)} of {task}": digest
            for (task, digest), own in comparison.datasets.items()
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
    """``note``, tables, conditions and provenance as Markdown; ``command`` makes them again."""
    lines = [f"# {title}", "", f"Written by `{command}`; do not edit.", ""]
    lines += [note.strip(), ""] if note else []

    def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines.extend(["| " + " | ".join(header) + " |", "|" + "---|" * len(header)])
        lines.extend("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        lines.append("")

    for own in comparison.datasets.values():
        variant = own[0].variant
        lines += [f"## {variant.task}, {comparison.dataset(variant)}", ""]
        table(*_table(comparison, own))
    if comparison.overall:
        lines += ["## All datasets", ""]
        table(_OVERALL, [_overall_cells(comparison, overall) for overall in comparison.overall])
    if comparison.left_out:
        lines += ["## Left out of every mean", ""]
        lines += [f"* `{left.run}` ({left.what}): {left.reason}" for left in comparison.left_out] + [""]
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
        _influence_section(comparison, summary)
        for summary in comparison.summaries
        if any(result.curves is not None for result in summary.results)
    ]
    if comparison.left_out:
        rows = [[left.run, left.what, left.reason] for left in comparison.left_out]
        sections.append(Section("Left out of every mean", html_table(["run", "what", "why"], rows)))
    return [*sections, Section("Notes", provenance_list({**_notes(comparison), **_origin(comparison)}))]


def _tasks(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(summary.variant.task for summary in comparison.summaries))


def _returns_section(comparison: Comparison, task: str) -> Section:
    own = {key: value for key, value in comparison.datasets.items() if key[0] == task}
    groups = {
        comparison.dataset(summaries[0].variant): {
            comparison.name(s.variant): Bar(s.mean, s.std, s.values) for s in summaries
        }
        for summaries in own.values()
    }
    methods = list(dict.fromkeys(comparison.name(summary.variant) for summary in comparison.summaries))
    parts = [
        captioned(
            grouped_bars_figure(groups, "mean return", methods),
            "Mean over seeds, whiskers one standard deviation to each side, a dot per seed.",
        )
    ]
    for summaries in own.values():
        label = comparison.dataset(summaries[0].variant)
        table = html_table(*_table(comparison, summaries))
        parts.append(captioned(table, f"Dataset {label}, {summaries[0].variant.digest}."))
    return Section(f"Returns on {task}", "".join(parts))


def _scan_sections(comparison: Comparison) -> list[Section]:
    """Return against d_tot, a figure per dataset and algorithm that has two budgets or more."""
    scans: dict[tuple[str, str, str, int], dict[str, list[Summary]]] = {}
    for summary in comparison.summaries:
        v = summary.variant
        if summary.d_tot is not None:
            lines = scans.setdefault((v.task, v.digest, v.algorithm, v.steps), {})
            lines.setdefault(summary.allocation, []).append(summary)
    sections = []
    for (task, _, algorithm, steps), lines in scans.items():
        if max(len(own) for own in lines.values()) < 2:
            continue
        curves = {}
        for allocation, own in lines.items():
            own.sort(key=lambda summary: summary.d_tot or 0.0)
            curves[allocation] = Curve(
                np.array([summary.d_tot for summary in own], np.float64),
                np.array([summary.mean for summary in own]),
                np.array([summary.std for summary in own]),
            )
        label = comparison.dataset(next(iter(lines.values()))[0].variant)
        figure = curves_figure(curves, "d_tot, nats (logarithmic)", "mean return", log_x=True, width=900.0)
        sections.append(
            Section(
                f"Budget scan of {algorithm} on {task}, {label}",
                captioned(
                    figure,
                    f"Mean ± std over seeds against the total budget, per allocation; {steps:,} steps. "
                    "A point without a whisker has one seed.",
                ),
            )
        )
    return sections


def _influence_section(comparison: Comparison, summary: Summary) -> Section:
    """The influence of each agent, its share of the budget, and what it contributes (the paper's Figure 3)."""
    curves = [result.curves for result in summary.results if result.curves is not None]
    agents = curves[0].agents
    measured = all(own.measured for own in curves)
    steps = curves[0].steps
    for own in curves[1:]:
        steps = np.intersect1d(steps, own.steps)

    def over_training(quantity: str) -> dict[str, Curve]:
        mean = np.mean([getattr(own, quantity)[np.isin(own.steps, steps)] for own in curves], axis=0)
        at = steps.astype(np.float64)
        return {agent: Curve(at, mean[:, index]) for index, agent in enumerate(agents)}

    what = "reward value w V" if measured else "contribution m · KL"
    last = {
        agent: Curve(
            np.array([own.contribution[-1, index] for own in curves]),
            np.array([own.influence[-1, index] for own in curves]),
        )
        for index, agent in enumerate(agents)
    }
    figures = [
        curves_figure(over_training("influence"), "step", "influence m"),
        curves_figure(over_training("share"), "step", "share of the budget, d / d_tot"),
        curves_figure(over_training("contribution"), "step", what),
        curves_figure(last, f"{what}, at the end", "influence m", joined=False),
    ]
    source = (
        "w V is agent i's weighted part of the team's reward value."
        if measured
        else "These runs did not log the agents' reward values: the contribution shown is the influence times the "
        "divergence spent, a first-order estimate of the reward value gained. It contains m, so the last panel is "
        "no evidence that influence follows reward."
    )
    caption = (
        f"What training logged, mean over seeds ({len(curves)} of them); in the last panel one point per agent and "
        f"seed, at the last step. {source}"
    )
    variant = summary.variant
    heading = (
        f"Influence and reward: {comparison.name(variant)} on {variant.task}, {comparison.dataset(variant)}"
    )
    return Section(heading, captioned(f'<div class="pairs">{"".join(figures)}</div>', caption))
