"""Scores of runs: the last policies of a run, exported and played at every temperature (docs/evaluation.md).

For a run ``R`` the bundle ``R-bundle`` of its last policy and the episodes ``R-evaluation.json`` are written beside
it, so that scoring again takes no time; ``R-clone.json`` has the episodes of the clone that the run began with.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.bundle import read_bundle
from omcda_deploy.errors import ConfigError
from omcda_deploy.play.measurements import installed_versions, machine, now, require_at_least
from omcda_deploy.play.rollout import Plan
from omcda_deploy.policy import TeamPolicy, checked_temperatures
from omcda_deploy.references import is_reference, require_trusted
from omcda_deploy.registry import simulator_versions
from omcda_deploy.report.scores import Score, SnapshotScore

if TYPE_CHECKING:
    from omcda_deploy.play.episodes import Episodes
    from omcda_deploy.play.evaluate import Progress
    from omcda_deploy.training.run_folder import RunConfig

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
SNAPSHOTS = 5  # policies that a score is a mean over, at most
LAST_PART = 0.8  # share of the steps before which no policy counts: a run is scored by its end
SELECTION_SEED = 1_000_000  # added to the seed of the reported episodes


@dataclass(frozen=True)
class Conditions:
    """Conditions of play, the same for every run of a comparison.

    ``episodes`` are reported per policy and temperature, a quarter as many of another seed select the temperature.
    A run plays those of ``seed`` plus its own (:meth:`of`). Raises :class:`ConfigError` for numbers out of range,
    and for temperatures without 0 and 1, beside which every other one is shown.
    """

    episodes: int = 20
    seed: int = 0
    num_envs: int = 20  # episodes side by side, per temperature
    temperatures: Sequence[float] = TEMPERATURES
    workers: int = 0
    reward: str | None = None  # how agents' rewards join in environments of the user's own

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("seed", 0), ("num_envs", 1), ("workers", 0)):
            require_at_least(getattr(self, name), least, name)
        temperatures = checked_temperatures(self.temperatures)
        if not {0.0, 1.0} <= set(temperatures):
            listed = ", ".join(f"{temperature:g}" for temperature in temperatures)
            raise ConfigError(
                f"temperatures: expected 0 and 1 among those of a comparison, got {listed}: add them"
            )
        object.__setattr__(self, "temperatures", temperatures)

    def of(self, run_seed: int) -> Conditions:
        """Return the conditions of a run.

        Runs of one seed play the same episodes, whatever their method; runs of several seeds play others, so that
        a row's value is no matter of a few starts, and its interval covers what starts change.
        """
        return dataclasses.replace(self, seed=self.seed + run_seed)

    @property
    def plans(self) -> list[Plan]:
        """The episodes of one policy: those that are reported at each temperature, then those that select it."""
        parts = ((self.episodes, self.seed), (self.selection_episodes, self.selection_seed))
        return [
            Plan(episodes, min(self.num_envs, episodes), seed, temperature)
            for episodes, seed in parts
            for temperature in self.temperatures
        ]

    @property
    def selection_episodes(self) -> int:
        """Number of episodes per policy and temperature by which the temperature is selected."""
        return math.ceil(self.episodes / 4)

    @property
    def selection_seed(self) -> int:
        """Their seed."""
        return self.seed + SELECTION_SEED

    def to_json(self) -> dict[str, Any]:
        """All that returns depend on, but for the temperatures."""
        return {
            "episodes": self.episodes,
            "selection_episodes": self.selection_episodes,
            "seed": self.seed,
            "selection_seed": self.selection_seed,
            "num_envs": min(self.num_envs, self.episodes),
            **({} if self.reward is None else {"reward": self.reward}),
        }

    def __str__(self) -> str:
        listed = ", ".join(f"{temperature:g}" for temperature in self.temperatures)
        return (
            f"at most the last {SNAPSHOTS} policies of a run, each in {self.episodes} episodes of seed {self.seed} "
            f"plus the run's at every temperature of {listed}; the temperature of each row was selected by "
            f"{self.selection_episodes} other episodes per policy, of seed {self.selection_seed} plus the run's. "
            f"{min(self.num_envs, self.episodes)} environments in step per temperature."
            + (f" The team's reward: {self.reward}." if self.reward else "")
        )


def scored_steps(folder: Path, config: RunConfig) -> list[int]:
    """List the steps of the policies that a finished run is scored by: the last ones of its last part."""
    from omcda_deploy.training.run_folder import snapshot_steps

    return [step for step in snapshot_steps(folder) if step >= LAST_PART * config.steps][-SNAPSHOTS:]


def recorded_score(folder: Path, config: RunConfig, conditions: Conditions) -> Score | None:
    """Read ``<run>-evaluation.json``; None unless it is of the same policies, compared by their files' sha256."""
    run = folder.resolve()
    return _same(_read(_evaluation(run)), conditions.of(config.seed), _policies(run, config))


def score_run(
    folder: Path, config: RunConfig, conditions: Conditions, progress: Progress | None = None
) -> Score:
    """Export and play a run's last policies, or return their :func:`recorded_score`.

    Raises :class:`OmcdaError` where one cannot be exported or played.
    """
    from omcda_deploy.experiments.export import export
    from omcda_deploy.files import write_json
    from omcda_deploy.local import LocalTeam
    from omcda_deploy.play.evaluate import part_of

    require_trusted(config.spec.task)
    conditions = conditions.of(config.seed)
    run = folder.resolve()
    policies = _policies(run, config)
    file = _evaluation(run)
    previous = _read(file)
    if (score := _same(previous, conditions, policies)) is not None:
        return score
    last = max(policies)
    bundle = _export(run, last, previous.get("team", {}).get("bundle_digest"))
    snapshots = []
    episodes = sum(plan.episodes for plan in conditions.plans)
    for index, (step, digest) in enumerate(policies.items()):
        part = part_of(progress, index * episodes, len(policies) * episodes)
        with tempfile.TemporaryDirectory(prefix=f".{run.name}-bundle.", dir=run.parent) as scratch:
            exported = bundle if step == last else export(run, Path(scratch) / "bundle", step).path
            team = LocalTeam(exported)
        snapshots.append(_played(team, config.spec.task, step, digest, conditions, part))
    score = _score(conditions, snapshots, bundle, config.spec.task)
    write_json(file, score.to_json())
    return score


def _evaluation(run: Path) -> Path:
    return run.with_name(f"{run.name}-evaluation.json")


def _policies(run: Path, config: RunConfig) -> dict[int, str]:
    """The sha256 of each policy that a run is scored by, by its step."""
    from omcda_deploy.files import sha256
    from omcda_deploy.training.run_folder import snapshot_path

    return {step: sha256(snapshot_path(run, step)) for step in scored_steps(run, config)}


def score_clone(
    folder: Path, config: RunConfig, conditions: Conditions, progress: Progress | None = None
) -> Score:
    """Play the clone that a scored run began with, the behaviour policy in its bundle, as its policies were played.

    Reads ``<run>-clone.json`` where it is of the same.
    """
    from omcda_deploy.client.fallback import BehaviorTeam
    from omcda_deploy.files import sha256, write_json
    from omcda_deploy.training.run_folder import BEHAVIOR

    conditions = conditions.of(config.seed)
    run = folder.resolve()
    digest = sha256(run / BEHAVIOR)
    file = run.with_name(f"{run.name}-clone.json")
    if (score := _same(_read(file), conditions, {0: digest})) is not None:
        return score
    bundle, task = run.with_name(f"{run.name}-bundle"), config.spec.task
    snapshot = _played(BehaviorTeam(bundle), task, 0, digest, conditions, progress)
    score = _score(conditions, [snapshot], bundle, task)
    write_json(file, score.to_json())
    return score


def _same(values: dict[str, Any], conditions: Conditions, policies: dict[int, str]) -> Score | None:
    """Read a score of the same policies and conditions; None for any other, and for a file that is damaged."""
    try:
        score = Score.read(values, conditions.to_json())
    except (KeyError, TypeError, ValueError):
        return None
    same = (
        score.conditions == conditions.to_json()
        and values.get("reward") == conditions.reward
        and score.temperatures == tuple(conditions.temperatures)
        and {snapshot.step: snapshot.sha256 for snapshot in score.snapshots} == policies
    )
    return score if same else None


def _played(
    team: TeamPolicy,
    task: str,
    step: int,
    digest: str,
    conditions: Conditions,
    progress: Progress | None,
) -> SnapshotScore:
    from omcda_deploy.play.evaluate import play_plans

    options = {"reward": conditions.reward} if conditions.reward and is_reference(task) else {}
    tables: list[Episodes] = play_plans(
        team, task, conditions.plans, workers=conditions.workers, progress=progress, options=options
    )
    half = len(conditions.temperatures)
    return SnapshotScore(step, digest, tuple(tables[:half]), tuple(tables[half:]))


def _score(conditions: Conditions, snapshots: Sequence[SnapshotScore], bundle: Path, task: str) -> Score:
    return Score(
        tuple(conditions.temperatures),
        tuple(snapshots),
        conditions.to_json(),
        read_bundle(bundle).digest,
        {**installed_versions(), **simulator_versions(task)},
        machine(),
        now(),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        previous = json.loads(file.read_text())
    except (OSError, ValueError):  # missing or damaged: the run is played again
        return {}
    return previous if isinstance(previous, dict) else {}


def _export(run: Path, step: int, previous_digest: str | None) -> Path:
    """Export to ``<run>-bundle`` unless it holds the same graphs; return the bundle's folder.

    The bundle of ``previous_digest`` was made here and is replaced. Any other may be the user's and raises
    :class:`ConfigError`.
    """
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
