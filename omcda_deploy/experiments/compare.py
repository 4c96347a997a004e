"""Comparisons of trained runs, by the scores of each (:mod:`omcda_deploy.experiments.scores`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError, NoSimulatorError, OmcdaError
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.scores import Conditions, score_clone, score_run
from omcda_deploy.plugins import curves_of, scan_of
from omcda_deploy.registry import load_algorithm

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison, LeftOut, Result, Variant
    from omcda_deploy.report.scores import Score
    from omcda_deploy.training.run_folder import RunConfig


def compare_runs(
    folders: Sequence[Path], conditions: Conditions, *, observer: Observer | None = None
) -> Comparison:
    """Export and play the last policies of every run, and group the runs by variant.

    Where no run is of BC, the clone that the first run of a dataset began with stands beside its runs. A run that
    is unfinished or cannot be played is left out, and the comparison lists it. Raises :class:`ConfigError` where
    none is left, unless it is for want of a simulator: then the list is the comparison.
    """
    from omcda_deploy.report.comparison import Comparison, LeftOut, summarise

    observer = observer or Observer()
    results: list[Result] = []
    left_out: list[LeftOut] = []
    unplayable: list[LeftOut] = []
    failures: list[OmcdaError] = []
    for index, folder in enumerate(folders):
        label = "?"
        try:
            config, step = _last_step(folder)
            label = f"{config.algorithm}, seed {config.seed}"
            if step < config.steps:
                reason = f"unfinished: its last policy is of step {step:,} of {config.steps:,}"
                left_out.append(LeftOut(str(folder), label, reason))
                continue
            with observer.progress(f"run {index + 1} of {len(folders)}: {folder}") as report:
                score = score_run(folder, config, conditions, report)
            results.append(_result(folder, config, score))
        except NoSimulatorError as error:
            unplayable.append(LeftOut(str(folder), label, str(error)))
            observer.left_out(folder, error)
        except OmcdaError as error:
            failures.append(error)
            left_out.append(LeftOut(str(folder), label, f"failed: {error}"))
            observer.left_out(folder, error)
    if not results and not unplayable:
        first = (
            f"the first failed: {failures[0]}" if failures else f"{left_out[0].run} is {left_out[0].reason}"
        )
        raise ConfigError(f"none of {len(folders)} runs can be compared; {first}")
    results += _clones(results, conditions, observer)
    summaries, repeated = summarise(results)
    return Comparison(summaries, [*unplayable, *left_out, *repeated], {"Evaluation": str(conditions)})


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Find all run folders at and below ``places``, each once.

    Raises :class:`ConfigError` for a place without any.
    """
    runs: dict[Path, Path] = {}
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place} is not a folder: expected a run folder, or a folder with runs in it")
        folders = []
        for at, below, _ in os.walk(place):
            if _is_run(Path(at)):
                folders.append(Path(at))
                below.clear()
            # The scratch folder of a run that is being made is hidden.
            below[:] = sorted(name for name in below if not name.startswith("."))
        if not folders:
            raise ConfigError(f"no run folder in {place}: expected {place}/…/config.json beside policies/")
        for folder in folders:
            runs.setdefault(folder.resolve(), folder)
    return list(runs.values())


def _is_run(folder: Path) -> bool:
    from omcda_deploy.training.run_folder import CONFIG, POLICIES

    return (folder / CONFIG).is_file() and (folder / POLICIES).is_dir()


def _last_step(folder: Path) -> tuple[RunConfig, int]:
    """Read a run's configuration and the step of its last policy, 0 where there is none."""
    from omcda_deploy.training.run_folder import read_config, snapshot_steps

    return read_config(folder), max(snapshot_steps(folder), default=0)


def _clones(results: Sequence[Result], conditions: Conditions, observer: Observer) -> list[Result]:
    """Play the clone of every dataset on which no run is of BC."""
    from omcda_deploy.report.comparison import CLONE, Result
    from omcda_deploy.training.run_folder import read_config

    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.variant.digest, []).append(result)
    clones = []
    for runs in by_dataset.values():
        if any(result.variant.algorithm == "bc" for result in runs):
            continue
        folder = Path(runs[0].run)
        config = read_config(folder)
        with observer.progress(f"the clone of {folder}") as report:
            score = score_clone(folder, config, conditions, report)
        variant = replace(runs[0].variant, algorithm=CLONE, settings=(), steps=0)
        clones.append(
            Result(
                variant, runs[0].run, config.seed, config.behavior, config.versions, score, None, None, 0.0
            )
        )
    return clones


def _result(folder: Path, config: RunConfig, score: Score) -> Result:
    from omcda_deploy.report.comparison import Curves, Result
    from omcda_deploy.training.run_folder import training_seconds

    metrics = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{metrics} cannot be read ({error}): train the run again") from error
    algorithm = load_algorithm(config.algorithm)
    section = curves_of(algorithm)
    curves = None if section is None else Curves.of(section, config.spec.names, lines)
    return Result(
        _variant(config),
        str(folder),
        config.seed,
        config.settings,
        config.versions,
        score,
        curves,
        scan_of(algorithm),
        training_seconds(folder),
    )


def _variant(config: RunConfig) -> Variant:
    from omcda_deploy.report.comparison import Variant

    task = config.spec.task
    # A run that began with a dataset in memory knows no file.
    label = Path(config.dataset).stem.removeprefix(task.replace("/", "-") + "-") or config.dataset_digest[:8]
    settings = tuple(_changed(config).items())
    return Variant(task, label, config.dataset_digest, config.algorithm, settings, config.steps)


def _changed(config: RunConfig) -> dict[str, Any]:
    """List settings that differ from the task's recipe, then changed settings of cloning and of the data."""
    from omcda_deploy.training.behavior_model import BehaviorConfig
    from omcda_deploy.training.recipes import recipe

    published = recipe(config.spec.task, config.algorithm)
    defaults = asdict(load_algorithm(config.algorithm).Config(**published))
    changed = {
        name: value
        for name, value in config.settings.items()
        if name not in defaults or value != defaults[name]
    }
    cloning = BehaviorConfig(hidden=config.settings["hidden"])
    for field in fields(BehaviorConfig):
        value = config.behavior.get(field.name, getattr(cloning, field.name))
        if value != getattr(cloning, field.name):
            changed[f"behavior.{field.name}"] = value
    if config.time_limit_is_terminal:
        changed["time_limit_is_terminal"] = True
    return changed
