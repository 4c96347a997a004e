"""Runs of behaviour policies: a folder with checkpoints, which are named arrays without pickles.

A run holds ``config.json``, one ``checkpoint-<steps>.npz`` per interval and ``progress.jsonl`` with the mean return
of the last 100 training episodes. Those episodes are stochastic, as recorded ones are, but while learning is fast
their mean lags behind the policy: tiers are chosen by ``omcda-deploy behavior measure`` instead. :func:`recording`
keeps the training episodes themselves, as a dataset.

Shapes: M rows, N agents, O observation, A actions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from omcda_deploy import registry
from omcda_deploy.datasets import Episode, Scalar
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.errors import ConfigError
from omcda_deploy.files import atomic
from omcda_deploy.policy import Float
from omcda_deploy.spec import TeamSpec

CONFIG = "config.json"
PROGRESS = "progress.jsonl"
REPLAY = "replay"  # the behaviour of a dataset of training episodes
RECORDED = "recorded"  # the info of a training environment that holds an episode that ended, an Episode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlayedPolicy:
    """A checkpoint's policy, ready for export, and observations that it met in its simulator."""

    spec: TeamSpec
    actor: nn.Module  # fits export.graph's ContinuousActor or DiscreteActor
    observations: Float  # [M, N, O]
    action_masks: NDArray[np.uint8] | None = None  # [M, N, A] where actions are discrete


class BehaviorModule(Protocol):
    """Functions of a module that trains the behaviour policies of one simulator."""

    def default_config(self, task: str) -> Any:
        """Return PPO's configuration, a frozen dataclass; :class:`UnknownNameError` for a task without one."""
        ...

    def train(
        self,
        task: str,
        out: Path,
        seed: int,
        config: Any,
        record: Path | None = None,
        until: int | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> None:
        """Train on ``task`` and write checkpoints to the new folder ``out``, and its episodes to ``record``.

        ``until``: stop at so many environment steps of the configured ones. ``progress`` is told of them.
        """
        ...

    def play_checkpoint(self, checkpoint: Path, task: str, rows: int, seed: int) -> PlayedPolicy:
        """Let a checkpoint's policy act stochastically in ``task`` for at least ``rows`` rows."""
        ...


def new_run(out: Path, task: str, seed: int, config: Any) -> None:
    """Create the run folder ``out`` with its ``config.json``.

    ``config``: a dataclass, PPO's configuration. Raises :class:`ConfigError` when ``out`` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another --out, or remove it first")
    out.mkdir(parents=True)
    (out / CONFIG).write_text(json.dumps({"task": task, "seed": seed, **asdict(config)}, indent=1))


def read_config(run: Path) -> dict[str, Any]:
    """Read a run's task, seed and PPO configuration. Raises :class:`ConfigError` when ``run`` is not a run."""
    file = run / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"{run}: expected a folder of  omcda-deploy behavior train, found no {file.name} there"
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        config["task"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} is not of  omcda-deploy behavior train, or damaged ({error!r}): name a folder that it made"
        ) from error
    return config


def find_checkpoints(run: Path) -> dict[int, Path]:
    """Find a run's checkpoints, by environment steps in ascending order."""
    checkpoints = {checkpoint_steps(path): path for path in run.glob("checkpoint-*.npz")}
    return dict(sorted(checkpoints.items()))


def checkpoint_path(run: Path, steps: int) -> Path:
    """Return the file of a run's checkpoint after ``steps`` environment steps."""
    return run / f"checkpoint-{steps:08d}.npz"


def checkpoint_steps(checkpoint: Path) -> int:
    """Return the environment steps that a checkpoint was trained for, from its file name."""
    return int(checkpoint.stem.removeprefix("checkpoint-"))


def write_checkpoint(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays to ``path``, all of them or none."""
    with atomic(path) as temporary:
        np.savez(temporary, **arrays)


def read_checkpoint(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays ``names`` of a checkpoint. Raises :class:`ConfigError` for a file without them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: expected a checkpoint-<steps>.npz") from None
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        raise ConfigError(
            f"{path} is not a behaviour policy's checkpoint ({error}): expected a .npz with {', '.join(names)}"
        ) from error


class Checkpoints(BaseCallback):
    """Callback that saves a checkpoint and logs the last episodes every ``every`` environment steps.

    ``save``: called with the checkpoint's path. ``rows_per_step``: the steps that SB3 counts for one step of an
    environment, for instance one per agent. ``until``: environment steps at which training stops, None for all.
    ``progress`` is called with (environment steps so far, in all).
    """

    def __init__(
        self,
        run: Path,
        every: int,
        save: Callable[[Path], None],
        rows_per_step: int = 1,
        until: int | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> None:
        super().__init__()
        self._progress = progress
        self._until = until
        self._run, self._every, self._save, self._next = run, every, save, every
        self._rows_per_step = rows_per_step

    def _on_step(self) -> bool:
        steps = self.num_timesteps // self._rows_per_step
        if steps >= self._next:
            self._next += self._every
            returns = [episode["r"] for episode in self.model.ep_info_buffer or []]
            wins = list(self.model.ep_success_buffer or [])  # empty for simulators without battles
            line = {
                "steps": steps,
                "return_mean": float(np.mean(returns)) if returns else None,
                "return_std": float(np.std(returns)) if returns else None,
                "episodes": len(returns),
                **({"win_rate": float(np.mean(wins))} if wins else {}),
            }
            self._save(checkpoint_path(self._run, steps))
            with (self._run / PROGRESS).open("a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("%s", line)
        if self._progress:
            configured = self.model._total_timesteps // self._rows_per_step
            total = configured if self._until is None else min(self._until, configured)
            self._progress(min(steps, total), total)  # SB3 finishes its last rollout
        return self._until is None or steps < self._until


class _EpisodeWriter(BaseCallback):
    """Callback that writes the episodes that end while a policy is trained."""

    def __init__(self, writer: DatasetWriter, every: int, rows_per_step: int) -> None:
        super().__init__()
        self._writer, self._every, self._rows_per_step = writer, every, rows_per_step

    def _on_step(self) -> bool:
        steps = self.num_timesteps // self._rows_per_step
        label = f"{REPLAY}/{-(-steps // self._every) * self._every:08d}"
        for info in self.locals["infos"]:
            if RECORDED in info:
                episode: Episode = info[RECORDED]
                self._writer.append(episode, label)
        return True


@contextmanager
def recording(
    path: Path | None, spec: TeamSpec, seed: int, every: int, rows_per_step: int = 1
) -> Iterator[list[BaseCallback]]:
    """Yield the callbacks that write a training's episodes to ``path``; none where it is None.

    The dataset holds whole episodes in the order in which they ended, each labelled ``replay/<steps>`` by the
    multiple of ``every`` steps that was reached next. Environments hand them over in the info :data:`RECORDED`.
    Episodes that run when training stops are left out. The file appears when the block succeeds.
    """
    if path is None:
        yield []
        return
    versions = {f"version_{name}": number for name, number in registry.simulator_versions(spec.task).items()}
    metadata: dict[str, Scalar] = {"behavior": REPLAY, "seed": seed, "temperature": 1.0, **versions}
    with DatasetWriter(path, spec, metadata) as writer:
        yield [_EpisodeWriter(writer, every, rows_per_step)]
