"""Import foreign datasets into OMIGA's HDF5, the one format that training and replay read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets import Claim, Recording, Scalar, unnamed
from omcda_deploy.datasets.episodes import admitted
from omcda_deploy.datasets.formats.omiga_hdf5 import SUFFIXES, holds_dataset
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.errors import ConfigError, DatasetError, UnknownNameError
from omcda_deploy.files import sha256
from omcda_deploy.plugins import ForeignFormat
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
    team: TeamSpec | None = None,
    control_rate: float | None = None,
    episode_limit: int | None = None,
    reward_mode: RewardMode = "reward",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the episodes of ``source`` as HDF5 to ``out``, one at a time; returns a summary of the file.

    ``source`` is of a foreign format, or in our layout without a team (:mod:`omcda_deploy.datasets.unnamed`).
    ``format`` is recognised by the source's contents if omitted. The team of published SMAC data is recognised
    too; that of other data is a known ``task``'s, a whole ``team``, or that of a new ``task`` of this
    ``control_rate`` (Hz) and ``episode_limit`` (steps), whose sizes the source tells.
    ``reward_mode="return_to_go"`` replaces each reward by the undiscounted sum of it and all that follow in its
    episode, as OMIGA's and ComaDICE's published loaders do (docs/baselines.md#omiga); the recorded returns stay
    those of the rewards. The file appears when it is complete; an exception, Ctrl-C included, leaves nothing
    behind. Raises :class:`DatasetError`, UnknownNameError, :class:`ConfigError` for settings that contradict each
    other, and ContractError for data that are not of ``task``.
    """
    if reward_mode not in REWARD_MODES:
        raise ConfigError(f"reward_mode: expected {' or '.join(REWARD_MODES)}, got {reward_mode!r}")
    formats = registry.foreign_formats()
    if format is not None and format not in formats:
        raise UnknownNameError("format", format, formats)
    if not source.exists():
        raise DatasetError(f"{source}: no such file or folder: expected a dataset to import")
    claim = Claim(task, team, control_rate, episode_limit)
    opening: Callable[[Path, Claim], AbstractContextManager[Recording]]
    if (name := format or registry.foreign_format_of(source)) is not None:
        opening = formats[name].open_recording
    elif source.suffix in SUFFIXES and holds_dataset(source) and unnamed.needs_words(source, claim):
        name, opening = unnamed.NAME, unnamed.open_recording
    else:
        raise _not_imported(source, formats)
    metadata: dict[str, Scalar] = {
        "behavior": source.absolute().stem,
        "source": source.absolute().name,
        "source_format": name,
        "source_sha256": source_digest(source),
        "reward_mode": reward_mode,
    }
    with opening(source, claim) as recording:
        spec: TeamSpec = recording.spec
        with DatasetWriter(out, spec, metadata) as writer:
            _write(recording, writer, reward_mode, progress)
    return {
        "path": str(out),
        "task": spec.task,
        "format": name,
        "reward_mode": reward_mode,
        **writer.summary(),
    }


def _not_imported(source: Path, formats: Mapping[str, ForeignFormat]) -> DatasetError:
    """Say why a source is none that can be imported."""
    if source.is_file() and not source.stat().st_size:
        return DatasetError(f"{source} is empty: download it again")
    if source.suffix in SUFFIXES and holds_dataset(source):
        return DatasetError(f"{source} needs no import: train, replay and inspect read it as it is")
    if source.suffix in SUFFIXES and source.is_file():
        return DatasetError(
            f"{source}: expected HDF5 with the arrays of a known format, got others or a truncated file: look "
            "at it with h5ls, or download it again"
        )
    sources = "; ".join(f"{name}: {module.SOURCE}" for name, module in formats.items())
    return DatasetError(
        f"{source}: expected a source of one of these formats ({sources}), got something else"
    )


def return_to_go(rewards: NDArray[Any]) -> NDArray[np.float64]:
    """Undiscounted sums [T] of each of the rewards [T] and all that follow it."""
    return np.cumsum(rewards[::-1], dtype=np.float64)[::-1]  # as the sums that are recorded


def source_digest(source: Path) -> str:
    """sha256 of a file, or of the names and contents of all files in a folder."""
    if source.is_file():
        return sha256(source)
    files = sorted(file for file in source.rglob("*") if file.is_file())
    lines = (f"{sha256(file)}  {file.relative_to(source).as_posix()}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _write(
    recording: Recording, writer: DatasetWriter, reward_mode: RewardMode, progress: Progress | None
) -> None:
    for number, recorded in enumerate(recording.episodes, start=1):
        episode = admitted(recorded, recording.spec, f"episode {number - 1}")
        if reward_mode == "return_to_go":
            episode = replace(
                episode,
                rewards=return_to_go(episode.rewards),
                episode_return=episode.undiscounted_return,
            )
        writer.append(episode)
        if progress:
            progress(number, recording.episode_count)
