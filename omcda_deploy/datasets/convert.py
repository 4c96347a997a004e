"""Foreign datasets into OMIGA's HDF5, which is all that training and replay read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets import Episode, Recording, Scalar
from omcda_deploy.datasets.formats.omiga_hdf5 import SUFFIXES, Writer
from omcda_deploy.errors import ConfigError, DatasetError, UnknownNameError
from omcda_deploy.spec import TeamSpec

RewardMode = Literal["reward", "return_to_go"]
REWARD_MODES: tuple[RewardMode, ...] = ("reward", "return_to_go")
Progress = Callable[[int, int], None]  # (episodes written, episodes in all)


def convert(
    source: Path,
    out: Path,
    *,
    format: str | None = None,
    task: str | None = None,
    reward_mode: RewardMode = "reward",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the episodes of ``source`` as HDF5 to ``out``, one at a time; returns what was written.

    ``format`` is told from the source if omitted, the task from its path. ``reward_mode="return_to_go"``
    replaces each reward by the undiscounted sum of it and all that follow in its episode, as OMIGA's and
    ComaDICE's published loaders do; the recorded returns stay what they were. The file appears when it is
    complete; an exception, Ctrl-C included, leaves nothing behind. Raises :class:`DatasetError`,
    UnknownNameError, and ContractError for data that are not of ``task``.
    """
    if reward_mode not in REWARD_MODES:
        raise ConfigError(f"reward_mode: expected {' or '.join(REWARD_MODES)}, got {reward_mode!r}")
    known = registry.foreign_formats()
    if format is not None and format not in known:
        raise UnknownNameError("format", format, known)
    if not source.exists():
        raise DatasetError(f"{source}: no such file or folder: expected a dataset to convert")
    if (name := format or registry.foreign_format_of(source)) is None:
        if source.is_file() and not source.stat().st_size:
            raise DatasetError(f"{source} is empty: download it again")
        if source.suffix in SUFFIXES and source.is_file():
            raise DatasetError(
                f"{source}: expected HDF5 with the arrays of a known format, got others or a truncated file: look "
                "at it with h5ls, or download it again"
            )
        sources = "; ".join(f"{name}: {module.SOURCE}" for name, module in known.items())
        raise DatasetError(
            f"{source}: expected a source of one of these formats ({sources}), got something else"
        )
    metadata: dict[str, Scalar] = {
        "behavior": source.absolute().stem,
        "source": source.absolute().name,
        "source_format": name,
        "source_sha256": source_digest(source),
        "reward_mode": reward_mode,
    }
    with known[name].open_recording(source, task) as recording:
        spec: TeamSpec = recording.spec
        with Writer(out, spec, metadata) as writer:
            returns, transitions = _write(recording, writer, reward_mode, progress)
    return {
        "path": str(out),
        "task": spec.task,
        "format": name,
        "reward_mode": reward_mode,
        "episodes": len(returns),
        "transitions": transitions,
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "digest": writer.digest,
    }


def return_to_go(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T] -> [T]: the undiscounted sum of each reward and those behind it."""
    return np.cumsum(rewards[::-1])[::-1]


def source_digest(source: Path) -> str:
    """sha256 of a file, or of the names and contents of all files in a folder."""
    if source.is_file():
        return _sha256(source)
    files = sorted(file for file in source.rglob("*") if file.is_file())
    lines = (f"{_sha256(file)}  {file.relative_to(source).as_posix()}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write(
    recording: Recording, writer: Writer, reward_mode: RewardMode, progress: Progress | None
) -> tuple[list[float], int]:
    returns: list[float] = []
    transitions = 0
    for episode in recording.episodes:
        _require_fit(episode, recording.spec)
        returns.append(float(episode.rewards.sum()))
        transitions += len(episode.actions)
        writer.append(
            episode.observations,
            episode.states,
            episode.actions,
            episode.rewards if reward_mode == "reward" else return_to_go(episode.rewards),
            action_masks=episode.action_masks,
            timeout=episode.timeout,
            episode_return=returns[-1],
        )
        if progress:
            progress(len(returns), recording.episode_count)
    return returns, transitions


def _require_fit(episode: Episode, spec: TeamSpec) -> None:
    steps, agents = len(episode.actions), len(spec.agents)
    if not 1 <= steps <= spec.episode_limit:
        raise DatasetError(
            f"{episode.label}: expected 1 to {spec.episode_limit} steps, the episode limit of {spec.task}, got "
            f"{steps}: name the data's own map with --task, or cut the episode out"
        )
    state = (agents, spec.state_size // agents) if episode.states.ndim == 3 else (spec.state_size,)
    for name, values, expected in (
        ("observations", episode.observations, (steps + 1, agents, spec.observation_size)),
        ("states", episode.states, (steps + 1, *state)),
        ("actions", episode.actions, (steps, agents)),
        ("action masks", episode.action_masks, (steps + 1, agents, spec.action_size)),
        ("rewards", episode.rewards, (steps,)),
    ):
        if values.shape != expected:
            raise DatasetError(
                f"{episode.label}: {name}: expected shape {list(expected)}, as in the episodes before it, got "
                f"{list(values.shape)}: take the episode out"
            )
