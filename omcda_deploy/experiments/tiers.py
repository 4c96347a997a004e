"""Tiers of behaviour policies: checkpoints of a PPO run become the bundles that datasets are recorded with.

``train_policies`` writes a run (:mod:`omcda_deploy.training.behavior.checkpoint`), ``measure_run`` plays its
checkpoints and notes their returns (:mod:`omcda_deploy.experiments.behavior_returns`), and ``ship_run`` exports the
chosen ones to ``<task>/<tier>/`` in a folder of shipped policies (:mod:`omcda_deploy.play.shipped`).
:mod:`omcda_deploy.experiments.tier_index` writes that folder's README.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omcda_deploy.bundle import MANIFEST, Bundle, read_bundle
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments.behavior_returns import (
    PUBLISHED_RETURNS,
    Moments,
    PolicyReturns,
    measure_bundle,
    mixture,
    simulator_of,
)
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.tier_index import write_index
from omcda_deploy.files import sha256, write_text

if TYPE_CHECKING:
    from omcda_deploy.training.behavior.checkpoint import BehaviorModule

RETURNS = "returns.jsonl"  # measurements of a run, one per line
REPLAY = "medium-replay"
REPLAY_CHECKPOINTS = 8  # the most that medium-replay consists of


@dataclass(frozen=True)
class Tier:
    """A checkpoint to ship."""

    name: str
    folder: str  # in the folder of shipped policies
    steps: int
    checkpoint: Path
    published: Moments | None = None  # the returns that the checkpoint was chosen by


def train_policies(
    task: str,
    out: Path,
    seed: int,
    steps: int | None = None,
    record: Path | None = None,
    until: int | None = None,
    observer: Observer | None = None,
) -> None:
    """Train on ``task`` with PPO and write checkpoints to the new folder ``out``.

    ``steps``: environment steps of the schedule, None for the task's default; ``until``: where to stop in it.
    ``record``: a dataset of the training's own episodes. What fails before its first checkpoint leaves nothing.
    Raises :class:`UnknownNameError` for a task without PPO settings, :class:`ConfigError` when ``out`` exists and
    for numbers below 1.
    """
    from omcda_deploy.training.behavior.checkpoint import find_checkpoints

    module = _behavior_module(task)
    config = module.default_config(task)
    for name, value in (("steps", steps), ("until", until)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1 environment step, got {value}")
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    new = not out.exists()
    try:
        with (observer or Observer()).progress(f"training on {task}", "environment steps") as progress:
            module.train(task, out, seed, config, record, until, progress)
    except BaseException:
        if new and not find_checkpoints(out):
            shutil.rmtree(out, ignore_errors=True)
        raise


def export_checkpoint(
    checkpoint: Path,
    task: str,
    out: Path,
    *,
    tier: str,
    provenance: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Bundle:
    """Export ``checkpoint`` as a bundle for ``task`` at the new folder ``out``.

    Policy and behaviour policy are the same module, so the divergence is zero. The manifest records ``tier``, the
    checkpoint's file name and sha256, and ``provenance``. ``seed`` seeds the episodes that the policy plays for
    the parity check. Raises :class:`ConfigError` for a file that is not a checkpoint or does not fit the task, and
    whatever :func:`omcda_deploy.export.bundle.export_bundle` raises.
    """
    from omcda_deploy.export.bundle import export_bundle
    from omcda_deploy.export.parity import PARITY_ROWS

    played = _behavior_module(task).play_checkpoint(checkpoint, task, PARITY_ROWS, seed)
    nothing: dict[str, float | None] = dict.fromkeys(played.spec.names)
    return export_bundle(
        out,
        played.spec,
        played.actor,
        played.actor,
        observations=played.observations,
        action_masks=played.action_masks,
        divergence_kind="kl",
        budgets=nothing,
        alphas=nothing,
        provenance={
            "tier": tier,
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": sha256(checkpoint),
            **(provenance or {}),
        },
    )


def measure_checkpoint(
    checkpoint: Path, task: str, label: str, workers: int = 2, observer: Observer | None = None
) -> PolicyReturns:
    """Export a checkpoint to a temporary bundle and play sampled and greedy episodes with it.

    ``label`` names it to the observer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_checkpoint(checkpoint, task, Path(scratch) / "bundle", tier="candidate")
        return measure_bundle(bundle, label, workers, observer)


def measure_run(
    run: Path, first: int, last: int, workers: int = 2, observer: Observer | None = None
) -> Iterator[tuple[int, PolicyReturns]]:
    """Measure the checkpoints of ``first`` to ``last`` steps; yield each one's steps and returns.

    A measurement is in the run's ``returns.jsonl`` when it is yielded, and is not made twice. Raises
    :class:`ConfigError` for a folder that is not a run of PPO.
    """
    from omcda_deploy.training.behavior.checkpoint import find_checkpoints, read_config

    task = read_config(run)["task"]
    measured = read_measurements(run)
    chosen = [
        (steps, checkpoint) for steps, checkpoint in find_checkpoints(run).items() if first <= steps <= last
    ]
    for index, (steps, checkpoint) in enumerate(chosen):
        if steps not in measured:
            label = f"checkpoint {index + 1} of {len(chosen)}"
            measured[steps] = measure_checkpoint(checkpoint, task, label, workers, observer)
            with (run / RETURNS).open("a") as file:
                file.write(json.dumps({"steps": steps, **measured[steps].to_json()}) + "\n")
        yield steps, measured[steps]


def ship_run(
    run: Path,
    out: Path,
    steps_by_tier: Mapping[str, int] | None = None,
    workers: int = 2,
    observer: Observer | None = None,
) -> Iterator[tuple[Tier, PolicyReturns]]:
    """Measure and export a run's tiers to ``out``, yield each, and write the index at the end.

    ``steps_by_tier``: the tiers' checkpoints, the last one for medium-replay; None or empty for
    :func:`choose_tiers`. Raises :class:`ConfigError` for a run that cannot be shipped, :class:`UnknownNameError`
    for steps without a checkpoint, and :class:`BundleError` for a tier that ``out`` already has.
    """
    from omcda_deploy.training.behavior.checkpoint import find_checkpoints, read_config

    config = read_config(run)
    task = config["task"]
    checkpoints = find_checkpoints(run)
    tiers = []
    for name, steps in (steps_by_tier or choose_tiers(run, task)).items():
        if steps not in checkpoints:
            raise UnknownNameError(f"checkpoint of {run}, in steps,", str(steps), map(str, checkpoints))
        published = PUBLISHED_RETURNS.get(task, {}).get(name)
        if name == REPLAY:  # its parts come near what is published together, not each
            tiers += [
                Tier(name, f"{task}/{name}/{index:02d}", part, checkpoints[part])
                for index, part in enumerate(replayed(checkpoints, steps))
            ]
        else:
            tiers.append(Tier(name, f"{task}/{name}", steps, checkpoints[steps], published))
    measured = read_measurements(run)
    for tier in tiers:
        returns = measured.get(tier.steps) or measure_checkpoint(
            tier.checkpoint, task, tier.folder, workers, observer
        )
        provenance = {
            "ppo": config,
            "ppo_steps": tier.steps,
            "returns": returns.to_json(),
            "evaluation_seed": 0,
        }
        export_checkpoint(tier.checkpoint, task, out / tier.folder, tier=tier.name, provenance=provenance)
        yield tier, returns
    write_index(out)


def choose_tiers(run: Path, task: str) -> dict[str, int]:
    """Choose the measured checkpoints, in steps, whose returns are nearest to each published tier's.

    Near means mean and spread of sampled play (:meth:`Moments.distance`). For medium-replay it is the checkpoint at
    which the mixture of :func:`replayed` is nearest. Raises :class:`ConfigError` for a task without published
    returns and a run without measurements.
    """
    from omcda_deploy.training.behavior.checkpoint import find_checkpoints

    if task not in PUBLISHED_RETURNS:
        raise ConfigError(
            f"{task} has no published returns to choose by: give each tier's checkpoint, as --tier medium=2500000"
        )
    measured = {steps: returns.sampled for steps, returns in read_measurements(run).items()}
    if not measured:
        raise ConfigError(f"{run} has not been measured: run  omcda-deploy behavior measure {run}  first")
    checkpoints = find_checkpoints(run)
    chosen = {}
    for name, published in PUBLISHED_RETURNS[task].items():
        parts = {steps: replayed(checkpoints, steps) if name == REPLAY else [steps] for steps in measured}
        distances = {
            steps: published.distance(mixture([measured[part] for part in parts[steps]]))
            for steps in measured
            if set(parts[steps]) <= set(measured)
        }
        if distances:
            chosen[name] = min(distances, key=distances.__getitem__)
    return chosen


def replayed(checkpoints: Collection[int], last: int) -> list[int]:
    """Return up to :data:`REPLAY_CHECKPOINTS` checkpoints, evenly spread, for a training up to ``last`` steps."""
    earlier = sorted(steps for steps in checkpoints if steps <= last)
    count = min(REPLAY_CHECKPOINTS, len(earlier))
    return [earlier[(index + 1) * len(earlier) // count - 1] for index in range(count)]


def read_measurements(run: Path) -> dict[int, PolicyReturns]:
    """Read the returns of a run's measured checkpoints by steps, in the order in which they were measured.

    Raises :class:`ConfigError` for measurements of an earlier version.
    """
    file = run / RETURNS
    if not file.is_file():
        return {}
    lines = map(json.loads, file.read_text().splitlines())
    try:
        return {line["steps"]: PolicyReturns.from_json(line) for line in lines}
    except ConfigError as error:
        raise ConfigError(
            f"{file}: {error}: remove it, and run  omcda-deploy behavior measure {run}  again"
        ) from error


def measure_shipped(
    out: Path, workers: int = 2, observer: Observer | None = None
) -> Iterator[tuple[str, PolicyReturns]]:
    """Play the bundles of a folder of shipped policies, and write the index at the end.

    A bundle's returns are in its manifest when its folder's name and they are yielded.
    """
    for manifest in sorted(out.rglob(MANIFEST)):
        folder = str(manifest.parent.relative_to(out))
        returns = measure_bundle(read_bundle(manifest.parent), folder, workers, observer)
        data = json.loads(manifest.read_text())
        data["training"]["returns"] = returns.to_json()
        write_text(manifest, json.dumps(data, indent=1))
        yield folder, returns
    write_index(out)


def _behavior_module(task: str) -> BehaviorModule:
    return cast("BehaviorModule", importlib.import_module(simulator_of(task).module))
