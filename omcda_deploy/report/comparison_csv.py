"""The data behind a comparison's tables and figures, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from omcda_deploy.files import write_text
from omcda_deploy.plugins import Scan
from omcda_deploy.report.comparison import Comparison, Summary
from omcda_deploy.report.statistics import Interval, Values, bootstrap_interval, interquartile_mean, std

_VARIANT = "task dataset dataset_digest algorithm settings steps"
_SCORE = "score_mean score_std score_iqm score_iqm_low score_iqm_high"
_RETURNS = f"{_VARIANT} seed run commit episode episode_seed return length ended_by".split()
_SUMMARY = f"{_VARIANT} datasets runs mean std iqm iqm_low iqm_high {_SCORE}".split()
_Row = dict[str, object]


def write_tables(comparison: Comparison, out: Path) -> None:
    """Write the CSV files into the folder ``out``:

    * ``returns.csv``: one row per run and episode;
    * ``summary.csv``: one row per variant, ``score`` being the normalised one; rows whose task is ``*`` are methods
      over several datasets, whose runs and datasets are joined;
    * for algorithms that declare curves, such as ``influence.csv``: one row per run, logged step (at most 100,
      averaged in groups) and agent; ``<curve>_is`` names the metric behind a curve that may be an estimate;
    * for algorithms that declare a scan, such as ``d_tot.csv``: one row per variant.

    Unknown values are empty cells.
    """
    _write(out / "returns.csv", _RETURNS, _returns_rows(comparison))
    _write(out / "summary.csv", _SUMMARY, _summary_rows(comparison))
    tables: dict[str, list[_Row]] = {}
    for summary in comparison.summaries:
        for file, row in _curve_rows(summary):
            tables.setdefault(file, []).append(row)
        if summary.scan:
            tables.setdefault(summary.scan.file, []).append(_scan_row(summary, summary.scan))
    for file, rows in tables.items():
        _write(out / file, list(dict.fromkeys(name for row in rows for name in row)), rows)


def _write(path: Path, columns: Sequence[str], rows: Iterable[_Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


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


def _cell(value: float) -> object:
    return "" if math.isnan(value) else value


def _interval_cells(interval: Interval | None, name: str) -> _Row:
    return {} if interval is None else {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _returns_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        for result in summary.results:
            evaluation = result.evaluation
            for index, value in enumerate(evaluation["returns"]):
                yield {
                    **_variant_cells(summary),
                    "seed": result.seed,
                    "run": result.run,
                    "commit": result.versions["git"],
                    "episode": index,
                    "episode_seed": evaluation["episode_seeds"][index],
                    "return": value,
                    "length": evaluation["lengths"][index],
                    "ended_by": evaluation["ended_by"][index],
                }


def _summary_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        yield {
            **_variant_cells(summary),
            "datasets": 1,
            "runs": summary.values.size,
            "mean": summary.mean,
            "std": _cell(summary.std),
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
        "score_std": _cell(std(scores)),
        "score_iqm": float(interquartile_mean(scores)),
        **_interval_cells(bootstrap_interval(datasets), "score_iqm"),
    }


def _curve_rows(summary: Summary) -> Iterator[tuple[str, _Row]]:
    """Give each row with the name of its file."""
    for result in summary.results:
        if (curves := result.curves) is None:
            continue
        values = {name: value.tolist() for name, value in curves.values.items()}
        sources = {
            f"{curve.name}_is": " * ".join(curve.estimate.factors)
            if curve.name in curves.estimated
            else curve.metric
            for curve in curves.section.curves
            if curve.estimate
        }
        for row, step in enumerate(curves.steps.tolist()):
            for index, agent in enumerate(curves.agents):
                yield (
                    curves.section.file,
                    {
                        **_variant_cells(summary),
                        **{"seed": result.seed, "step": step, "agent": agent},
                        **{name: value[row][index] for name, value in values.items()},
                        **sources,
                    },
                )


def _scan_row(summary: Summary, scan: Scan) -> _Row:
    return {
        **_variant_cells(summary),
        scan.group: summary.scan_group,
        scan.setting: summary.scan_value,
        "runs": summary.values.size,
        "mean": summary.mean,
        "std": _cell(summary.std),
    }
