"""Comparisons of trained runs, by the scores of each (:mod:`omcda_deploy.experiments.scores`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError, NoSimulatorError, OmcdaError
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.scores import Conditions, recorded_score, score_clone, score_run
from omcda_deploy.plugins import curves_of, scan_of
from omcda_deploy.registry import load_algorithm

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset
    from omcda_deploy.report.comparison import Comparison, Curves, LeftOut, Result, Variant
    from omcda_deploy.report.scores import Score
    from omcda_deploy.training.run_folder import RunConfig

REWARD_VALUE = "value/reward_total"  # metric: batch mean of V^r_tot, or of what an algorithm has in its place
MARGIN = 0.1  # of the range of the data's returns


def compare_runs(
    folders: Sequence[Path], conditions: Conditions, *, observer: Observer | None = None
) -> Comparison:
    """Export and play the last policies of every run, as :func:`play_runs` does, and group the runs by variant."""
    from omcda_deploy.report.comparison import Comparison, summarise

    results, left_out = play_runs(folders, conditions, observer=observer)
    summaries, repeated = summarise(results)
    return Comparison(summaries, [*left_out, *repeated], {"Evaluation": str(conditions)})


def play_runs(
    folders: Sequence[Path],
    conditions: Conditions,
    *,
    observer: Observer | None = None,
    dataset: Dataset | None = None,
) -> tuple[list[Result], list[LeftOut]]:
    """Export and play the last policies of every run; return the results, and the runs that are left out.

    Where no run is of BC, the clone that the first run of a dataset began with stands beside its runs. A run that
    is unfinished or cannot be played is left out. With ``dataset``, the one that they all were trained on, each is
    judged by :class:`DataReturns`. Raises :class:`ConfigError` where none is left, unless it is for want of a
    simulator.
    """
    from omcda_deploy.report.comparison import LeftOut

    observer = observer or Observer()
    results: list[Result] = []
    left_out: list[LeftOut] = []
    unplayable: list[LeftOut] = []
    failures: list[OmcdaError] = []
    returns = None if dataset is None else DataReturns(dataset)
    for index, folder in enumerate(folders):
        label = "?"
        try:
            config, step = _last_step(folder)
            label = f"{config.algorithm}, seed {config.seed}"
            if step < config.steps:
                reason = f"unfinished: its last policy is of step {step:,} of {config.steps:,}"
                left_out.append(LeftOut(str(folder), label, reason))
                continue
            score = recorded_score(folder, config, conditions)
            if score is None:
                label_of = f"run {index + 1} of {len(folders)}: {folder}"
                with observer.progress(label_of, "episodes") as report:
                    score = score_run(folder, config, conditions, report)
            results.append(_result(folder, config, score, returns))
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
    return [*results, *_clones(results, conditions, observer)], [*unplayable, *left_out]


class DataReturns:
    """The discounted returns of a dataset, beyond which the value of a converged critic does not lie."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._ranges: dict[tuple[float, bool], tuple[float, float]] = {}

    def left_by(self, config: RunConfig, metrics: Sequence[Mapping[str, float]]) -> bool | None:
        """Test if a run's mean reward value, as training logged it, was outside their range in its second half.

        Before, it may be what untrained networks say. The range contains 0 and is wider by a tenth at both ends.
        None for an algorithm that logs no such value, and for a run on other data.
        """
        late = (line for line in metrics if line["step"] > config.steps / 2)
        values = [line[REWARD_VALUE] for line in late if REWARD_VALUE in line]
        if not values or "gamma" not in config.settings or not config.began_with(self._dataset.digests):
            return None
        low, high = self._range(config.settings["gamma"], config.time_limit_is_terminal)
        return not all(low <= value <= high for value in values)  # nan is outside, too

    def _range(self, gamma: float, time_limit_is_terminal: bool) -> tuple[float, float]:
        from omcda_deploy.training.batches import returns_to_go

        key = gamma, time_limit_is_terminal
        if key not in self._ranges:
            returns = returns_to_go(self._dataset, gamma, time_limit_is_terminal)
            low, high = min(float(returns.min()), 0.0), max(float(returns.max()), 0.0)
            self._ranges[key] = low - MARGIN * (high - low), high + MARGIN * (high - low)
        return self._ranges[key]


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
        with observer.progress(f"the clone of {folder}", "episodes") as report:
            score = score_clone(folder, config, conditions, report)
        clones.append(clone_result(runs[0].run, config, score))
    return clones


def clone_result(run: str, config: RunConfig, score: Score) -> Result:
    """Make the result of the clone that a run began with."""
    from omcda_deploy.report.comparison import CLONE, Result

    variant = replace(_variant(config), algorithm=CLONE, settings=(), steps=0)
    return Result(variant, run, config.seed, config.behavior, config.versions, score, None, None, 0.0)


def _result(folder: Path, config: RunConfig, score: Score, returns: DataReturns | None) -> Result:
    from omcda_deploy.report.comparison import Curves
    from omcda_deploy.training.run_folder import training_seconds

    metrics = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{metrics} cannot be read ({error}): train the run again") from error
    section = curves_of(load_algorithm(config.algorithm))
    curves = None if section is None else Curves.of(section, config.spec.names, lines)
    diverged = None if returns is None else returns.left_by(config, lines)
    return result_of(str(folder), config, score, curves, training_seconds(folder), diverged=diverged)


def result_of(
    run: str,
    config: RunConfig,
    score: Score,
    curves: Curves | None,
    seconds: float,
    *,
    diverged: bool | None,
) -> Result:
    """Make the result of a run from its configuration, its score and what its training logged."""
    from omcda_deploy.report.comparison import Result

    scan = scan_of(load_algorithm(config.algorithm))
    stated = (config.seed, config.settings, config.versions)
    return Result(_variant(config), run, *stated, score, curves, scan, seconds, diverged)


def _variant(config: RunConfig) -> Variant:
    from omcda_deploy.report.comparison import Variant

    task = config.spec.task
    # A run that began with a dataset in memory knows no file.
    label = Path(config.dataset).stem.removeprefix(task.replace("/", "-") + "-") or config.dataset_digest[:8]
    settings = tuple(_changed(config).items())
    return Variant(task, label, config.dataset_digest, config.algorithm, settings, config.steps)


def _changed(config: RunConfig) -> dict[str, Any]:
    """List what a run was asked for beside the task's recipe: settings, then those of cloning and of the data."""
    from omcda_deploy.training.behavior_model import BehaviorConfig
    from omcda_deploy.training.recipes import recipe
    from omcda_deploy.training.request import AUTO, RECIPE

    published = recipe(config.spec.task, config.algorithm, config.recipe or None)
    defaults = asdict(load_algorithm(config.algorithm).Config(**published))
    changed: dict[str, Any] = {RECIPE: config.recipe} if config.recipe else {}
    changed |= {
        name: value
        for name, value in config.settings.items()
        if name not in defaults or value != defaults[name]
    }
    if config.budget is not None:  # chosen from the dataset, perhaps the recipe's own
        changed["d_tot"] = AUTO
    # A clone has its run's seed unless it was asked for another.
    cloning = BehaviorConfig(hidden=config.settings["hidden"], seed=config.seed)
    for field in fields(BehaviorConfig):
        value = config.behavior.get(field.name, getattr(cloning, field.name))
        if value != getattr(cloning, field.name):
            changed[f"behavior.{field.name}"] = value
    if config.time_limit_is_terminal:
        changed["time_limit_is_terminal"] = True
    return changed
