"""Recorded episodes of a team in memory. One file of this folder per file format.

A format's module defines ``SUFFIXES``, the ends of its files' names, and ``read(path, task) -> Dataset``; the
registry finds it by listing this folder, or through the entry-point group ``omcda_deploy.datasets``. A format that
is converted once instead of read defines ``SOURCE``, ``recognizes`` and ``open_recording``; see registry.py.

Shapes: R rows (transitions plus one final observation per episode), M transitions, E episodes, N agents,
O observation size, A action size, S state size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import TeamSpec

Float: TypeAlias = NDArray[np.float32]
Scalar: TypeAlias = str | int | float | bool

BLOCK = 4096  # rows looked at together: a few megabytes, so that checks and digests stay in the cache


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows in time order, and where among them the transitions and episodes are.

    The next observation of the transition at row t is row t+1, so nothing is held twice. Actions, which may lie
    outside [-1, 1] in published files, are kept as they were recorded; the action and reward of an episode's final
    row mean nothing. Rows that no closed episode covers (a file that ends in the middle of one) have transitions
    but no entry among the episodes.
    """

    spec: TeamSpec
    observations: Float  # [R, N, O], zeros behind the observations of agents that see less
    states: Float  # [R, S], a view of `observations` where the state is all of them joined
    actions: NDArray[Any]  # float32 [R, N, A], or int64 [R, N] for discrete actions
    rewards: Float  # [R]
    transitions: NDArray[np.int64]  # [M] rows
    terminal: NDArray[np.bool_]  # [M] the task ended with this transition
    timeout: NDArray[np.bool_]  # [M] the time limit ended the episode with this transition
    episode_start: NDArray[np.int64]  # [E] rows
    episode_length: NDArray[np.int64]  # [E] transitions
    episode_returns: NDArray[np.float64]  # [E]
    episode_seeds: NDArray[np.int64] | None  # [E] seeds of the environment, where known
    episode_behaviors: NDArray[np.int64] | None  # [E] indices into `behaviors`, where known
    behaviors: tuple[str, ...]  # labels of the policies that acted
    metadata: Mapping[str, Scalar]
    digest: str  # ContentDigest of observations, actions, rewards, episode ends and masks
    action_masks: NDArray[np.uint8] | None = None  # [R, N, A] in discrete tasks, 1 where available

    def done(self, time_limit_is_terminal: bool) -> NDArray[np.bool_]:
        """[M] transitions that are not bootstrapped from; True is the convention of OMIGA's published code."""
        return self.terminal | self.timeout if time_limit_is_terminal else self.terminal


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode of T transitions, as a foreign format recorded it."""

    label: str  # where it stands: a file, or a number within one
    observations: Float  # [T+1, N, O], the final one behind the last transition
    states: Float  # [T+1, S], or [T+1, N, S / N] where the state is what all agents know, joined
    actions: NDArray[np.int64]  # [T, N]
    action_masks: NDArray[np.uint8]  # [T+1, N, A]
    rewards: NDArray[np.float64]  # [T]
    timeout: bool  # the time limit ended it


@dataclass(frozen=True, eq=False)
class Recording:
    """An open source of a foreign format; ``episodes`` come one at a time, so that it need not fit into memory."""

    spec: TeamSpec
    episode_count: int
    episodes: Iterator[Episode]


class ContentDigest:
    """sha256 of named arrays that come in blocks: of contents, not of any file's bytes.

    Floating numbers count as little-endian float32, integers as they are.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def update(self, name: str, block: NDArray[Any]) -> None:
        """Append rows to the array ``name``."""
        kind = np.dtype("<f4") if block.dtype.kind == "f" else block.dtype.newbyteorder("<")
        flat = np.ascontiguousarray(block, kind).reshape(-1)
        self._hashes.setdefault(name, hashlib.sha256()).update(flat.data)
        rows = self._shapes.get(name, (0,))[0]
        self._shapes[name] = (rows + block.shape[0], *block.shape[1:])

    def hexdigest(self) -> str:
        lines = (
            f"{name} {self._shapes[name]} {self._hashes[name].hexdigest()}" for name in sorted(self._hashes)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class RowIndex:
    """Transitions and closed episodes among rows; see :class:`Dataset` for the fields."""

    transitions: NDArray[np.int64]  # [M]
    episode_start: NDArray[np.int64]  # [E]
    episode_length: NDArray[np.int64]  # [E]

    @classmethod
    def of(cls, final: NDArray[np.bool_]) -> RowIndex:
        """``final`` [R] marks each episode's last row, whose observation nothing follows.

        Every other row but the very last is a transition. That includes the rows of a tail that is never closed,
        as in OMIGA's own loader; the tail is no episode, because how it would have ended is unknown.
        """
        ends = np.flatnonzero(final)
        starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
        lengths = ends - starts
        return cls(np.flatnonzero(~final[:-1]), starts[lengths > 0], lengths[lengths > 0])

    def last_transitions(self) -> NDArray[np.int64]:
        """[E] index among the transitions of each episode's last one."""
        return np.searchsorted(self.transitions, self.episode_start + self.episode_length - 1)


def blocks(rows: int) -> Iterator[slice]:
    """Slices of at most :data:`BLOCK` rows that cover all of them."""
    for start in range(0, rows, BLOCK):
        yield slice(start, min(start + BLOCK, rows))


def require_finite(block: NDArray[Any], first_row: int, array: str, where: str) -> None:
    """Raise :class:`DatasetError` naming the first row of ``block`` that holds NaN or infinity."""
    finite = np.isfinite(block)
    if not finite.all():
        row = first_row + int(np.argmin(finite.reshape(len(block), -1).all(axis=1)))
        raise DatasetError(
            f"{where}: array {array} holds NaN or infinity, first in row {row}: record the data again, or cut out "
            "the episode"
        )


def require_available(
    actions: NDArray[Any], masks: NDArray[Any], rows: NDArray[np.int64], where: str, first_row: int = 0
) -> None:
    """Raise :class:`DatasetError` naming the first of ``rows`` in which an agent did what it could not do.

    ``actions`` [R, N] are choices among the A of ``masks`` [R, N, A]; ``first_row`` is the number of their row 0.
    """
    for block in blocks(len(rows)):
        chosen, mask = actions[rows[block]], masks[rows[block]]
        inside = (chosen >= 0) & (chosen < mask.shape[-1])
        picked = np.take_along_axis(mask, np.where(inside, chosen, 0)[..., None], -1)[..., 0]
        if (wrong := ~inside | (picked == 0)).any():
            at, agent = np.argwhere(wrong)[0].tolist()
            raise DatasetError(
                f"{where}: row {first_row + int(rows[block][at])}: expected one of the actions "
                f"{np.flatnonzero(mask[at, agent]).tolist()} that are available to agent number {agent}, got "
                f"{chosen[at, agent]}: record the data again"
            )
