"""Comparisons of trained runs, by the last policy of each.

Every finished run is exported and played once; for a run ``R`` the bundle ``R-bundle`` and the measurements
``R-evaluation.json`` are written beside it, so that comparing again takes no time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.plugins import curves_of, scan_of
from omcda_deploy.registry import load_algorithm

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison, LeftOut, Result, Variant
    from omcda_deploy.training.run_folder import RunConfig


def compare_runs(
    folders: Sequence[Path],
    episodes: int,
    seed: int,
    num_envs: int,
    workers: int = 0,
    *,
    observer: Observer | None = None,
) -> Comparison:
    """Export and play the last policy of every run, and group the runs by variant.

    A run that is unfinished or cannot be played is left out, and the comparison lists it. Raises
    :class:`ConfigError` where none is left.
    """
    from omcda_deploy.report.comparison import Comparison, LeftOut, summarise

    observer = observer or Observer()
    results: list[Result] = []
    left_out: list[LeftOut] = []
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
                evaluation = evaluate_run(
                    folder, config, step, episodes, seed, num_envs, workers, progress=report
                )
            results.append(_result(folder, config, evaluation))
        except OmcdaError as error:
            failures.append(error)
            left_out.append(LeftOut(str(folder), label, f"failed: {error}"))
            observer.left_out(folder, error)
    if not results:
        first = (
            f"the first failed: {failures[0]}" if failures else f"{left_out[0].run} is {left_out[0].reason}"
        )
        raise ConfigError(f"none of {len(folders)} runs can be compared; {first}")
    summaries, repeated = summarise(results)
    conditions = {
        "Evaluation": f"{episodes} deterministic episodes per run, seed {seed}, "
        f"{min(num_envs, episodes)} environments in step."
    }
    return Comparison(summaries, [*left_out, *repeated], conditions)


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


def evaluate_run(
    folder: Path,
    config: RunConfig,
    step: int,
    episodes: int,
    seed: int,
    num_envs: int,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a run's policy as ``omcda-deploy evaluate`` does, or read ``<run>-evaluation.json``.

    The file is used where it is of this policy (by its sha256) and of the same episodes, seed and number of
    environments. Raises :class:`OmcdaError` where the run cannot be exported or played.
    """
    from omcda_deploy.files import sha256, write_json
    from omcda_deploy.local import LocalTeam
    from omcda_deploy.play.evaluate import evaluate
    from omcda_deploy.training.run_folder import snapshot_path

    run = folder.resolve()
    measurements = run.with_name(f"{run.name}-evaluation.json")
    conditions = {
        "policy": {"step": step, "sha256": sha256(snapshot_path(run, step))},
        "episodes": episodes,
        "seed": seed,
        "num_envs": min(num_envs, episodes),
    }
    previous = _read(measurements)
    if all(previous.get(name) == value for name, value in conditions.items()):
        return previous
    bundle = _export(run, step, previous.get("team", {}).get("bundle_digest"))
    evaluation = evaluate(
        LocalTeam(bundle),
        config.spec.task,
        episodes=episodes,
        seed=seed,
        num_envs=num_envs,
        workers=workers,
        progress=progress,
    )
    result = {"policy": conditions["policy"], **evaluation.to_json()}
    write_json(measurements, result)
    return result


def _read(measurements: Path) -> dict[str, Any]:
    try:
        previous = json.loads(measurements.read_text())
    except (OSError, ValueError):  # missing or damaged: the run is played again
        return {}
    return previous if isinstance(previous, dict) else {}


def _export(run: Path, step: int, previous_digest: str | None) -> Path:
    """Export to ``<run>-bundle`` unless it holds the same graphs; return the bundle's folder.

    The bundle of ``previous_digest`` was made here and is replaced. Any other may be the user's and raises
    :class:`ConfigError`.
    """
    from omcda_deploy.bundle import read_bundle
    from omcda_deploy.experiments.export import export

    bundle = run.with_name(f"{run.name}-bundle")
    with tempfile.TemporaryDirectory(prefix=f".{bundle.name}.", dir=run.parent) as scratch:
        exported = export(run, Path(scratch) / bundle.name, step)
        if os.path.lexists(bundle):
            present = read_bundle(bundle)
            if present.manifest["files"] == exported.manifest["files"]:
                return bundle
            if present.digest != previous_digest:
                raise ConfigError(
                    f"{bundle} is not what step {step} of {run.name} exports to: move it away and compare again"
                )
            bundle.rename(Path(scratch) / "before")
        exported.path.rename(bundle)
    return bundle


def _result(folder: Path, config: RunConfig, evaluation: Mapping[str, Any]) -> Result:
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
        evaluation,
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
