"""Tiers of behaviour policies: checkpoints of a PPO run become the bundles that datasets are recorded with.

``train_policies`` writes a run (:mod:`omcda_deploy.training.behavior.checkpoint`), ``measure_run`` plays its
checkpoints and notes their returns, ``ship_run`` exports the chosen ones to ``<task>/<tier>/`` in a folder of
shipped policies (:mod:`omcda_deploy.play.shipped`), and ``write_index`` writes the folder's README.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omcda_deploy.bundle import MANIFEST, Bundle
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.files import sha256, write_text
from omcda_deploy.local import JointTeam
from omcda_deploy.play.evaluate import evaluate

if TYPE_CHECKING:
    from omcda_deploy.training.behavior.checkpoint import BehaviorModule

RETURNS = "returns.jsonl"  # measurements of a run, one per line
REPLAY_CHECKPOINTS = 8  # the most that medium-replay consists of


@dataclass(frozen=True)
class Simulator:
    """Settings of the behaviour policies of one simulator."""

    module: str  # a BehaviorModule
    episodes: int  # played to measure a checkpoint
    digits: int  # of a return's fraction in the index


SIMULATORS = {  # by the first part of a task's name
    "mamujoco": Simulator("omcda_deploy.training.behavior.mujoco", episodes=20, digits=0),
    # SMAX's episodes are short, and the share of them that is won needs many.
    "smax": Simulator("omcda_deploy.training.behavior.smax", episodes=200, digits=2),
}

# Mean returns of the published OMIGA datasets (docs/baselines.md#published-data), the targets of our tiers.
PUBLISHED_RETURNS = {
    "mamujoco/halfcheetah-6x1": {"medium": 1425.66, "expert": 2785.10},
    "mamujoco/hopper-3x1": {"medium": 723.57, "expert": 2452.02},
    "mamujoco/ant-2x4": {"medium": 1418.70, "expert": 2055.07},
}


@dataclass(frozen=True)
class Returns:
    """Undiscounted returns of stochastic episodes, and the share of battles won where there are battles."""

    episodes: int
    return_mean: float
    return_std: float
    win_rate: float | None = None

    def __str__(self) -> str:
        won = "" if self.win_rate is None else f", {self.win_rate:.1%} won"
        return f"return {self.return_mean:g} ± {self.return_std:g}{won}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Tier:
    """A checkpoint to ship."""

    name: str
    folder: str  # in the folder of shipped policies
    steps: int
    checkpoint: Path
    published: float | None = None  # the return that the checkpoint was chosen by


def simulator_of(task: str) -> Simulator:
    """Return the simulator of a task. Raises :class:`UnknownNameError` for one without behaviour policies."""
    name = task.partition("/")[0]
    if name not in SIMULATORS:
        raise UnknownNameError("simulator with behaviour policies", name, SIMULATORS)
    return SIMULATORS[name]


def train_policies(task: str, out: Path, seed: int, steps: int | None = None) -> None:
    """Train on ``task`` with PPO and write checkpoints to the new folder ``out``.

    ``steps``: environment steps, None for the task's default. Raises :class:`UnknownNameError` for a task without
    PPO settings, :class:`ConfigError` when ``out`` exists.
    """
    module = _behavior_module(task)
    config = module.default_config(task)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    module.train(task, out, seed, config)


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
    checkpoint: Path, task: str, workers: int = 2, observer: Observer | None = None
) -> Returns:
    """Export a checkpoint to a temporary bundle and play stochastic episodes with it, as recording does."""
    observer = observer or Observer()
    episodes = simulator_of(task).episodes
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_checkpoint(checkpoint, task, Path(scratch) / "bundle", tier="candidate")
        with observer.progress(f"playing {checkpoint.name}") as progress:
            result = evaluate(
                JointTeam(bundle),
                task,
                episodes=episodes,
                num_envs=episodes,
                stochastic=True,
                workers=workers,
                progress=progress,
            )
    win_rate = None if result.won is None else round(float(result.won.mean()), 4)
    return Returns(episodes, round(result.mean, 3), round(result.std, 3), win_rate)


def measure_run(
    run: Path, first: int, last: int, workers: int = 2, observer: Observer | None = None
) -> Iterator[tuple[int, Returns]]:
    """Measure the checkpoints of ``first`` to ``last`` steps; yield each one's steps and returns.

    A measurement is in the run's ``returns.jsonl`` when it is yielded. Raises :class:`ConfigError` for a folder
    that is not a run of PPO.
    """
    from omcda_deploy.training.behavior.checkpoint import find_checkpoints, read_config

    task = read_config(run)["task"]
    for steps, checkpoint in find_checkpoints(run).items():
        if first <= steps <= last:
            returns = measure_checkpoint(checkpoint, task, workers, observer)
            with (run / RETURNS).open("a") as file:
                file.write(json.dumps({"steps": steps, **returns.to_json()}) + "\n")
            yield steps, returns


def ship_run(
    run: Path,
    out: Path,
    steps_by_tier: Mapping[str, int] | None = None,
    workers: int = 2,
    observer: Observer | None = None,
) -> Iterator[tuple[Tier, Returns]]:
    """Measure and export a run's tiers to ``out``, yield each, and write the index at the end.

    ``steps_by_tier``: the tiers' checkpoints; None or empty for :func:`choose_tiers`. Raises :class:`ConfigError`
    for a run that cannot be shipped, :class:`UnknownNameError` for steps without a checkpoint, and
    :class:`BundleError` for a tier that ``out`` already has.
    """
    from omcda_deploy.training.behavior.checkpoint import find_checkpoints, read_config

    config = read_config(run)
    task = config["task"]
    if steps_by_tier:
        checkpoints = find_checkpoints(run)
        for steps in steps_by_tier.values():
            if steps not in checkpoints:
                raise UnknownNameError(f"checkpoint of {run}, in steps,", str(steps), map(str, checkpoints))
        tiers = [
            Tier(name, f"{task}/{name}", steps, checkpoints[steps]) for name, steps in steps_by_tier.items()
        ]
    else:
        tiers = choose_tiers(run, task)
    for tier in tiers:
        returns = measure_checkpoint(tier.checkpoint, task, workers, observer)
        provenance = {
            "ppo": config,
            "ppo_steps": tier.steps,
            "returns": returns.to_json(),
            "evaluation_seed": 0,
        }
        export_checkpoint(tier.checkpoint, task, out / tier.folder, tier=tier.name, provenance=provenance)
        yield tier, returns
    write_index(out)


def choose_tiers(run: Path, task: str) -> list[Tier]:
    """Choose the measured checkpoints nearest to the published returns, and those of medium-replay.

    medium-replay takes up to :data:`REPLAY_CHECKPOINTS` checkpoints, evenly spread up to medium. Raises
    :class:`ConfigError` for a task without published returns and a run without measurements.
    """
    from omcda_deploy.training.behavior.checkpoint import checkpoint_path, find_checkpoints

    if task not in PUBLISHED_RETURNS:
        raise ConfigError(
            f"{task} has no published returns to choose by: give each tier's checkpoint, as --tier medium=2500000"
        )
    if not (run / RETURNS).is_file():
        raise ConfigError(f"{run} has not been measured: run  omcda-deploy behavior measure {run}  first")
    lines = map(json.loads, (run / RETURNS).read_text().splitlines())
    measured: dict[int, float] = {line["steps"]: line["return_mean"] for line in lines}
    tiers = {}
    for name, published in PUBLISHED_RETURNS[task].items():
        steps = _nearest(measured, published)
        tiers[name] = Tier(name, f"{task}/{name}", steps, checkpoint_path(run, steps), published)
    checkpoints = find_checkpoints(run)
    earlier = [steps for steps in checkpoints if steps <= tiers["medium"].steps]
    count = min(REPLAY_CHECKPOINTS, len(earlier))
    replayed = [earlier[(index + 1) * len(earlier) // count - 1] for index in range(count)]
    return [
        *tiers.values(),
        *(
            Tier("medium-replay", f"{task}/medium-replay/{index:02d}", steps, checkpoints[steps])
            for index, steps in enumerate(replayed)
        ),
    ]


def _nearest(measured: Mapping[int, float], target: float) -> int:
    """Return the steps whose mean return is nearest to ``target``."""
    return min(measured, key=lambda steps: abs(measured[steps] - target))


def write_index(out: Path) -> None:
    """Write README.md of a folder of shipped policies from the bundles' manifests."""
    lines = [
        "# Behaviour policies",
        "",
        "Written by `omcda-deploy behavior ship`; do not edit. Each folder is a bundle. Returns are of 20",
        "stochastic episodes (mean ± standard deviation, evaluation seed 0), as in recording, and of 200 in SMAX,",
        "with the share of battles won. Published is the mean return of OMIGA's dataset of that name, to which",
        "`ship` chooses the nearest checkpoint; SMAX is not SMAC, and nothing published compares with it.",
        "",
        "| bundle | PPO steps | seed | return | won | published |",
        "|---|---|---|---|---|---|",
    ]
    seeds: dict[str, int] = {}
    tier_options: dict[str, str] = {}
    for manifest in sorted(out.rglob(MANIFEST)):
        data = json.loads(manifest.read_text())
        training, task = data["training"], data["team"]["task"]
        seeds[task] = training["ppo"]["seed"]
        lines.append(_index_row(str(manifest.parent.relative_to(out)), task, training))
        if task not in PUBLISHED_RETURNS:
            option = f" --tier {training['tier']}={training['ppo_steps']}"
            tier_options[task] = tier_options.get(task, "") + option
    lines += ["", "The commands that made them:", "", "```bash"]
    for task, seed in seeds.items():
        run = f"runs/{task.split('/')[1]}"
        lines += [
            f"omcda-deploy behavior train {task} --out {run} --seed {seed}",
            f"omcda-deploy behavior measure {run}",
            f"omcda-deploy behavior ship {run}{tier_options.get(task, '')}",
        ]
    lines += [
        "```",
        "",
        "`measure --from … --to …` limits the checkpoints that are played. Training of the shipped policies was",
        "stopped once the expert's return had been passed.",
        "",
    ]
    write_text(out / "README.md", "\n".join(lines))


def _index_row(bundle: str, task: str, training: Mapping[str, Any]) -> str:
    returns = training["returns"]
    digits = simulator_of(task).digits
    published = PUBLISHED_RETURNS.get(task, {}).get(training["tier"])
    cells = (
        f"`{bundle}`",
        f"{training['ppo_steps']:,}",
        str(training["ppo"]["seed"]),
        f"{returns['return_mean']:.{digits}f} ± {returns['return_std']:.{digits}f}",
        f"{returns['win_rate']:.1%}" if "win_rate" in returns else "",
        "" if published is None else f"{published:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _behavior_module(task: str) -> BehaviorModule:
    return cast("BehaviorModule", importlib.import_module(simulator_of(task).module))
