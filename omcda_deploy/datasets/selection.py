"""Parts of a dataset, by episode: a part to train on and one that is held out, or a selection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset, Scalar
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.registry import read_dataset


def split(
    path: str | Path, train: str | Path, held_out: str | Path, *, share: float = 0.1, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Write the closed episodes of a dataset as two: ``share`` of them, drawn by ``seed``, are held out.

    Both files appear when both are complete; episodes keep their order. Returns the summaries of the files under
    ``train`` and ``held_out``. Raises :class:`ConfigError` for a share outside 0 to 1, and :class:`DatasetError`
    where a part would be empty or a file cannot be written.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share: expected a number between 0 and 1, got {share}")
    if Path(train).resolve() == Path(held_out).resolve():
        raise ConfigError(f"expected two files for the two parts, got {train} for both")
    dataset = read_dataset(path)
    count = len(dataset.episode_length)
    size = min(max(round(share * count), 1), count - 1)
    if size < 1:
        raise DatasetError(f"{path} holds one closed episode: expected at least two to split")
    drawn = np.zeros(count, np.bool_)
    drawn[_draw(count, size, seed)] = True
    label, metadata = _label(dataset, path), _metadata(dataset)
    with (
        DatasetWriter(train, dataset.spec, metadata) as kept,
        DatasetWriter(held_out, dataset.spec, metadata) as other,
    ):
        kept.copy(dataset, np.flatnonzero(~drawn).tolist(), label)
        other.copy(dataset, np.flatnonzero(drawn).tolist(), label)
        kept.complete()
        other.complete()
    return {"train": kept.summary(), "held_out": other.summary()}


def subset(
    path: str | Path,
    out: str | Path,
    *,
    episodes: Sequence[int] | None = None,
    least_return: float = -np.inf,
    largest_return: float = np.inf,
    count: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the episodes that meet every condition: these numbers, a return in the range; then ``count``, drawn.

    Episodes keep their order. Returns a summary of the file. Raises :class:`DatasetError` where no episode, or
    fewer than ``count``, are left, for numbers that no closed episode has, and where the file cannot be written;
    :class:`ConfigError` for a range without a number and a count below 1.
    """
    if not least_return <= largest_return:
        raise ConfigError(f"returns: expected the lower bound first, got {least_return} and {largest_return}")
    if count is not None and count < 1:
        raise ConfigError(f"count: expected at least 1 episode, got {count}")
    dataset = read_dataset(path)
    returns = dataset.episode_returns
    chosen = (returns >= least_return) & (returns <= largest_return)
    if episodes is not None:
        if wrong := [number for number in episodes if not 0 <= number < len(returns)]:
            raise DatasetError(
                f"{path}: episode {wrong[0]}: expected numbers from 0 to {len(returns) - 1}, as there are "
                f"{len(returns)} closed episodes"
            )
        chosen &= np.isin(np.arange(len(returns)), list(episodes))
    numbers = np.flatnonzero(chosen)
    if len(numbers) < (count or 1):
        raise DatasetError(
            f"{path}: expected at least {count or 1} episodes that meet the conditions, got {len(numbers)} of "
            f"{len(returns)}, whose returns go from {returns.min():.6g} to {returns.max():.6g}"
        )
    if count is not None:
        numbers = numbers[np.sort(_draw(len(numbers), count, seed))]
    with DatasetWriter(out, dataset.spec, _metadata(dataset)) as writer:
        writer.copy(dataset, numbers.tolist(), _label(dataset, path))
    return writer.summary()


def _draw(count: int, size: int, seed: int) -> NDArray[np.int64]:
    """Draw ``size`` of ``count`` numbers. Raises :class:`ConfigError` for a negative seed."""
    if seed < 0:
        raise ConfigError(f"seed: expected at least 0, got {seed}")
    return np.random.default_rng(seed).choice(count, size, replace=False)


def _metadata(dataset: Dataset) -> dict[str, Scalar]:
    return {**dataset.metadata, "part_of": dataset.digest}


def _label(dataset: Dataset, path: str | Path) -> str:
    return str(dataset.metadata.get("behavior", Path(path).stem))
