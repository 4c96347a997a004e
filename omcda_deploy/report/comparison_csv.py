"""The data behind a comparison's tables and figures, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.files import write_text
from omcda_deploy.play.episodes import Episodes
from omcda_deploy.plugins import Scan
from omcda_deploy.report.comparison import Comparison, Summary
from omcda_deploy.report.statistics import Interval, Values, bootstrap_interval, interquartile_mean, std

_VARIANT = "task dataset dataset_digest algorithm settings steps"
_SCORE = "score_mean score_std score_iqm score_iqm_low score_iqm_high"
_OUTCOMES = " ".join(OUTCOMES)
_RETURNS = (
    f"{_VARIANT} seed run commit snapshot temperature use episode episode_seed return length ended_by {_OUTCOMES}"
).split()
_SUMMARY = (
    f"{_VARIANT} datasets runs snapshots temperature mean std t0_mean t0_std t1_mean t1_std "
    f"snapshot_std episode_std {_OUTCOMES} iqm iqm_low iqm_high {_SCORE}"
).split()
_TEMPERATURES = (
    f"{_VARIANT} temperature selected selection_mean runs mean std iqm iqm_low iqm_high snapshot_std episode_std "
    f"length {_OUTCOMES}"
).split()
_Row = dict[str, object]


def write_tables(comparison: Comparison, out: Path) -> None:
    """Write the CSV files into the folder ``out``:

    * ``returns.csv``: one row per run, snapshot, temperature and episode; ``use`` says whether the episode is
      reported or selects the temperature;
    * ``summary.csv``: one row per variant at its selected temperature, ``score`` being the normalised one; rows
      whose task is ``*`` are methods over several datasets, whose runs and datasets are joined;
    * ``temperatures.csv``: one row per variant and temperature;
    * for algorithms that declare curves, such as ``influence.csv``: one row per run, logged step (at most 100,
      averaged in groups) and agent; ``<curve>_is`` names the metric behind a curve that may be an estimate;
    * for algorithms that declare a scan, such as ``d_tot.csv``: one row per variant.

    Unknown values are empty cells.
    """
    _write(out / "returns.csv", _RETURNS, _returns_rows(comparison))
    _write(out / "summary.csv", _SUMMARY, _summary_rows(comparison))
    _write(out / "temperatures.csv", _TEMPERATURES, _temperature_rows(comparison))
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
            run = {
                **_variant_cells(summary),
                "seed": result.seed,
                "run": result.run,
                "commit": result.versions.get("git", ""),
            }
            for snapshot in result.score.snapshots:
                for use, tables in (("reported", snapshot.reported), ("selection", snapshot.selection)):
                    for temperature, episodes in zip(result.score.temperatures, tables, strict=True):
                        played = {"snapshot": snapshot.step, "temperature": temperature, "use": use}
                        for row in _episode_rows(episodes):
                            yield {**run, **played, **row}


def _episode_rows(episodes: Episodes) -> Iterator[_Row]:
    columns = episodes.columns()
    for index, value in enumerate(columns["returns"]):
        yield {
            "episode": index,
            "episode_seed": columns["episode_seeds"][index],
            "return": value,
            "length": columns["lengths"][index],
            "ended_by": columns["ended_by"][index],
            **{name: columns[name][index] for name in OUTCOMES if columns[name] is not None},
        }


def _summary_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        yield {
            **_variant_cells(summary),
            "datasets": 1,
            "runs": summary.values.size,
            "snapshots": summary.snapshots[0],
            "temperature": summary.temperatures[summary.best],
            **_value_cells(summary.values),
            **_value_cells(summary.at(0.0), "t0_"),
            **_value_cells(summary.at(1.0), "t1_"),
            **_spread_cells(summary, summary.best),
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


def _value_cells(values: Values, prefix: str = "") -> _Row:
    return {f"{prefix}mean": float(values.mean()), f"{prefix}std": _cell(std(values))}


def _spread_cells(summary: Summary, index: int) -> _Row:
    """Spreads and shares of outcomes at a temperature."""
    shares = {name: values for name, values in summary.shares.items() if values is not None}
    return {
        "snapshot_std": _cell(float(summary.std_of_snapshots[index])),
        "episode_std": float(summary.std_of_episodes[index]),
        **{name: float(values[:, index].mean()) for name, values in shares.items()},
    }


def _temperature_rows(comparison: Comparison) -> Iterator[_Row]:
    for summary in comparison.summaries:
        for index, temperature in enumerate(summary.temperatures):
            values = summary.curve[:, index]
            yield {
                **_variant_cells(summary),
                "temperature": temperature,
                "selected": index == summary.best,
                "selection_mean": float(summary.selection[index]),
                "runs": values.size,
                **_value_cells(values),
                "iqm": float(interquartile_mean(values)),
                **_interval_cells(bootstrap_interval([values]), "iqm"),
                **_spread_cells(summary, index),
                "length": float(summary.lengths[index]),
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
        "temperature": summary.temperatures[summary.best],
        **_value_cells(summary.values),
    }
