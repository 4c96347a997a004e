"""Rows of OMIGA's HDF5 files, read block by block; the layout is in :mod:`.formats.omiga_hdf5`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import ContentDigest, Float, blocks, require_finite, require_masks, require_own
from omcda_deploy.datasets.omiga_header import Shape
from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import TeamSpec


class Rows(NamedTuple):
    """Arrays of a file as they are stored, but in this package's number types."""

    observations: Float  # [R, N, O]
    actions: NDArray[Any]  # float32 [R, N, A], or int64 [R, N, 1]
    rewards: Float  # [R]
    final_flags: Float  # [R]
    final: NDArray[np.bool_]  # [R] rows in which nobody acts


def read_rows(file: Any, shape: Shape, spec: TeamSpec, digest: ContentDigest, path: Path) -> Rows:
    """Read `o`, `a`, `r` and `d` block by block, check them, and add them to ``digest``.

    They are finite, with zeros behind the numbers of agents that observe or do less than others.

    NaN is allowed where nobody acts, in the last row of an episode and of the file, and where its observation was
    not recorded; see :func:`_settle`.
    """
    count = len(file["o"])
    observations = np.empty((count, *shape.observation), np.float32)
    actions = np.empty((count, *shape.action), np.int64 if shape.discrete else np.float32)
    rewards, final_flags = np.empty((count, 1), np.float32), np.empty((count, 1), np.float32)
    final = np.zeros(count, np.bool_)
    sizes = {"o": [agent.observation_size for agent in spec.agents]}
    if not shape.discrete:
        sizes["a"] = [agent.action.size for agent in spec.agents]
    for name, target in (("d", final_flags), ("o", observations), ("a", actions), ("r", rewards)):
        for block in blocks(count):
            _fill(target, file[name], block)
            before = target[max(block.start - 1, 0)] if name == "o" else None
            _settle(target[block], final[block], before)
            require_finite(target[block], block.start, name, str(path))
            if name in sizes:
                require_own(target[block], sizes[name], spec, str(path), name, block.start)
            digest.update(name, target[block])
        if name == "d":
            final = final_flags[:, 0] == 1
            final[-1] = True
    return Rows(observations, actions, rewards[:, 0], final_flags[:, 0], final)


def read_masks(source: Any, spec: TeamSpec, path: Path) -> NDArray[np.uint8]:
    """Read `avail` [R, N, A]. Raises :class:`DatasetError` as :func:`require_masks` does."""
    masks = np.empty(source.shape, np.uint8)
    for block in blocks(len(masks)):
        part = source[block]  # in the file's own type, as HDF5 would clip other values than 0 and 1
        require_masks(part, spec, str(path), block.start)
        masks[block] = part
    return masks


def _fill(target: NDArray[Any], source: Any, block: slice) -> None:
    """Read rows straight into ``target``; HDF5 converts other number types on the way."""
    if source.ndim == target.ndim - 1:  # r and d of shape [R]
        target = target[:, 0]
    source.read_direct(target, block, block)


def _settle(block: NDArray[Any], final: NDArray[np.bool_], before: NDArray[Any] | None) -> None:
    """Replace NaN in the ``final`` rows [R] of a block, in place.

    An observation or state that is all NaN becomes that of the row before; ``before`` is the one before the block,
    and None for actions and rewards, whose NaN becomes zero.
    """
    if block.dtype.kind != "f" or not final.any():
        return
    missing = np.isnan(block).reshape(len(block), -1)
    for row in np.flatnonzero(final & missing.any(axis=1)):
        if before is None:
            block[row][np.isnan(block[row])] = 0
        elif missing[row].all():
            block[row] = block[row - 1] if row else before


def read_states(file: Any, rows: Rows, spec: TeamSpec, group: Any, path: Path) -> Float:
    """Read `s` as centralised states [R, S].

    They are a view of the observations where `s` equals `o`; else one of N equal copies, or the agents' states
    joined.
    """
    source, observations = file["s"], rows.observations
    count, agents, size = source.shape
    shared = group is not None and group.attrs.get("state") == "shared"
    if not shared and agents * size != spec.state_size:
        shared = size == spec.state_size
    if (size if shared else agents * size) != spec.state_size:
        raise DatasetError(
            f"{path}: array s: {spec.task} has a state of {spec.state_size} numbers, got {list(source.shape)}"
        )
    joined = observations.reshape(count, -1)
    if not shared and (source == file["o"] or _equal(source, rows)):
        return joined
    states = np.empty((count, spec.state_size), np.float32)
    before = np.empty((agents, size), np.float32)
    for block in blocks(count):
        part = _state_block(source, block, rows.final, before)
        before = part[-1]
        require_finite(part, block.start, "s", str(path))
        if shared and (part != part[:, :1]).any():
            raise DatasetError(
                f"{path}: array s: expected {agents} equal copies of one state, not so from row {block.start} on"
            )
        states[block] = part[:, 0] if shared else part.reshape(len(part), -1)
    return states


def _equal(source: Any, rows: Rows) -> bool:
    target = rows.observations
    if source.shape != target.shape:
        return False
    for block in blocks(len(target)):
        part = _state_block(source, block, rows.final, target[max(block.start - 1, 0)])
        if not np.array_equal(part, target[block]):
            return False
    return True


def _state_block(source: Any, block: slice, final: NDArray[np.bool_], before: NDArray[Any]) -> Float:
    part = np.empty((block.stop - block.start, *source.shape[1:]), np.float32)
    source.read_direct(part, block)
    _settle(part, final[block], before)
    return part
