"""Recorded episodes of a team in memory: one :class:`Episode`, and a whole :class:`Dataset`.

:mod:`omcda_deploy.datasets.formats` has one module per file format, which the registry finds by listing that folder
or through the entry-point group ``omcda_deploy.datasets``. :func:`omcda_deploy.registry.read_dataset` reads a file
and :func:`omcda_deploy.datasets.writer.write_dataset` writes one.

Shapes: R rows (transitions plus one final observation per episode), M transitions, E episodes, T transitions of one
episode, N agents, O observation size, A action size (continuous) or number of actions (discrete), S state size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import TeamSpec

Float: TypeAlias = NDArray[np.float32]
Scalar: TypeAlias = str | int | float | bool

BLOCK = 4096  # rows looked at together: a few megabytes, so that checks and digests stay in the cache
DIGEST_VERSION = 2
DIGEST_CONTENTS = {  # by version, as files and run folders of older versions of this package carry the older one
    1: "observations, actions, rewards, episode ends and masks (version 1: neither states nor time limits)",
    2: "observations, states, actions, rewards, episode ends, time limits, masks and exact behaviour",
}


@dataclass(frozen=True, eq=False)
class Episode:
    """One whole episode of T transitions.

    Transition t leads from row t to row t+1 of ``observations``, ``states`` and ``action_masks``, so these have one
    row more than ``actions`` and ``rewards``: the last row shows the team after its last action. Training looks at
    it only where ``timeout`` is True, to bootstrap. Where it was not recorded, repeat the row before.

    Observations and states are in the units of the task's simulator, actions within the bounds of the team's spec,
    rewards are those of the whole team. An agent that observes or does less than others has zeros behind its own
    numbers.
    """

    observations: Float  # [T+1, N, O]
    states: (
        Float  # [T+1, S], or [T+1, N, S / N] where the centralised state is the agents' own states, joined
    )
    actions: NDArray[Any]  # float32 [T, N, A], or int64 [T, N] for discrete actions
    rewards: NDArray[Any]  # [T]
    timeout: bool  # True: the time limit cut the episode; False: the task ended
    action_masks: NDArray[np.uint8] | None = None  # [T+1, N, A] in discrete tasks, 1 where available
    seed: int | None = None  # the environment was reset with it; None where that is not on record
    label: str = ""  # the episode's place in its source, with which error messages begin
    episode_return: float | None = None  # undiscounted; None: the sum of `rewards`
    # Exact distributions that acted, [T, …] by name (omcda_deploy.datasets.behavior); None where not known.
    behavior: Mapping[str, NDArray[Any]] | None = None

    def __len__(self) -> int:
        """The number of transitions T."""
        return len(self.actions)

    @property
    def undiscounted_return(self) -> float:
        """``episode_return``, or the sum of the rewards where it is None."""
        return (
            float(np.sum(self.rewards, dtype=np.float64))
            if self.episode_return is None
            else self.episode_return
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows in time order, and the places of transitions and episodes among them.

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
    episode_seeds: NDArray[np.int64] | None  # [E] seeds of the environment, where they are on record
    episode_behaviors: NDArray[np.int64] | None  # [E] indices into `behaviors`, where they are on record
    behaviors: tuple[str, ...]  # labels of the policies that acted
    metadata: Mapping[str, Scalar]
    digest: str  # by which runs and bundles name the data: that of the file's format version
    action_masks: NDArray[np.uint8] | None = None  # [R, N, A] in discrete tasks, 1 where available
    digests: Mapping[int, str] = field(default_factory=dict)  # by version, all computed from the contents
    behavior: Mapping[str, NDArray[Any]] | None = None  # as an episode's, [R, …]

    def __post_init__(self) -> None:
        if self.digest not in self.digests.values():  # made in memory, under a digest of its maker's
            object.__setattr__(self, "digests", {DIGEST_VERSION: self.digest})

    @property
    def digest_version(self) -> int:
        """The version of ``digest``; :data:`DIGEST_CONTENTS` says what it covers."""
        return next(version for version, digest in self.digests.items() if digest == self.digest)

    def done(self, time_limit_is_terminal: bool) -> NDArray[np.bool_]:
        """[M] transitions that are not bootstrapped from; True is the convention of OMIGA's published code."""
        return self.terminal | self.timeout if time_limit_is_terminal else self.terminal

    def episode(self, number: int) -> Episode:
        """Recorded episode ``number``, counted from 0; its arrays are views of the dataset's.

        Raises :class:`DatasetError` for a number that no closed episode has.
        """
        count = len(self.episode_length)
        if not 0 <= number < count:
            raise DatasetError(
                f"episode {number}: expected a number from 0 to {count - 1}, as there are {count} closed episodes"
            )
        start, length = int(self.episode_start[number]), int(self.episode_length[number])
        rows, steps = slice(start, start + length + 1), slice(start, start + length)
        return Episode(
            self.observations[rows],
            self.states[rows],
            self.actions[steps],
            self.rewards[steps],
            timeout=bool(self.timeout[np.searchsorted(self.transitions, start + length - 1)]),
            action_masks=None if self.action_masks is None else self.action_masks[rows],
            seed=None if self.episode_seeds is None else int(self.episode_seeds[number]),
            label=f"episode {number}",
            episode_return=float(self.episode_returns[number]),
            behavior=None if self.behavior is None else {k: v[steps] for k, v in self.behavior.items()},
        )


@dataclass(frozen=True)
class Claim:
    """The user's words about the team of a source that does not say it all.

    A whole ``team``; or the name of a known ``task``; or that of a new one, whose sizes the source tells, with its
    ``control_rate`` in Hz and, if not 1,000, its ``episode_limit`` in steps.
    """

    task: str | None = None
    team: TeamSpec | None = None
    control_rate: float | None = None
    episode_limit: int | None = None


COVERED_BY_VERSION_1 = frozenset({"o", "a", "r", "d", "avail"})


@dataclass(frozen=True, eq=False)
class Recording:
    """An open source of a foreign format; ``episodes`` come one at a time, so that it need not fit into memory."""

    spec: TeamSpec
    episode_count: int
    episodes: Iterator[Episode]


class ContentDigest:
    """sha256 of the contents of named arrays, independent of any file's layout; the arrays come in blocks.

    Floating numbers count as little-endian float32, integers as they are. The arrays: `o`, `a`, `r`, `d` and, in
    discrete tasks, `avail` as in a file; `s` [R, S] where the state is not all observations joined; `timeouts`
    uint8 [E]; `behavior_mean` and so on where they are known.
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

    def hexdigests(self) -> dict[int, str]:
        """By version, the digest of all arrays that it covers: their names, shapes and contents."""
        return {
            1: self._of(self._hashes.keys() & COVERED_BY_VERSION_1),
            DIGEST_VERSION: self._of(self._hashes),
        }

    def _of(self, names: Iterable[str]) -> str:
        lines = (f"{name} {self._shapes[name]} {self._hashes[name].hexdigest()}" for name in sorted(names))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class RowIndex:
    """Transitions and closed episodes among rows; see :class:`Dataset` for the fields."""

    transitions: NDArray[np.int64]  # [M]
    episode_start: NDArray[np.int64]  # [E]
    episode_length: NDArray[np.int64]  # [E]

    @classmethod
    def of(cls, final: NDArray[np.bool_]) -> RowIndex:
        """Index rows by ``final`` [R], which marks each episode's last row: its observation has no successor.

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
    """Slices of at most :data:`BLOCK` rows each, which together cover ``rows`` rows."""
    for start in range(0, rows, BLOCK):
        yield slice(start, min(start + BLOCK, rows))


def require_finite(block: NDArray[Any], first_row: int, array: str, where: str) -> None:
    """Raise :class:`DatasetError` naming the first row of ``block`` that holds NaN or infinity."""
    finite = np.isfinite(block)
    if not finite.all():
        row = first_row + int(np.argmin(finite.reshape(len(block), -1).all(axis=1)))
        raise DatasetError(
            f"{where}: array {array} holds NaN or infinity, first in row {row}, where only an episode's last row "
            "may be all NaN: record the data again, or cut out the episode"
        )


def reward_mode(metadata: Mapping[str, Scalar]) -> str:
    """Return what stands for rewards in a dataset of these metadata: ``reward``, or ``return_to_go``."""
    return str(metadata.get("reward_mode", "reward"))


def require_rewards(dataset: Dataset, where: str) -> None:
    """Raise :class:`DatasetError` for a dataset that has returns-to-go in place of rewards."""
    if (mode := reward_mode(dataset.metadata)) != "reward":
        raise DatasetError(
            f"{where}: expected the rewards of steps, got a dataset of reward mode {mode}: import its source with  "
            "--reward-mode reward"
        )


def require_available(
    actions: NDArray[Any], masks: NDArray[Any], rows: NDArray[np.int64], where: str, first_row: int = 0
) -> None:
    """Raise :class:`DatasetError` naming the first of ``rows`` in which an agent's choice was not available.

    ``actions`` [R, N] are choices among the A of ``masks`` [R, N, A]; ``first_row`` is the number of their row 0.
    """
    for block in blocks(len(rows)):
        choices, mask = actions[rows[block]], masks[rows[block]]
        inside = (choices >= 0) & (choices < mask.shape[-1])
        available = np.take_along_axis(mask, np.where(inside, choices, 0)[..., None], -1)[..., 0]
        if (wrong := ~inside | (available == 0)).any():
            at, agent = np.argwhere(wrong)[0].tolist()
            raise DatasetError(
                f"{where}: row {first_row + int(rows[block][at])}: expected one of the actions "
                f"{np.flatnonzero(mask[at, agent]).tolist()} that are available to agent number {agent}, got "
                f"{choices[at, agent]}: record the data again"
            )


def require_masks(masks: NDArray[Any], spec: TeamSpec, where: str, first_row: int = 0) -> None:
    """Raise :class:`DatasetError` for ``masks`` [R, N, A] other than 0 and 1, or 1 behind an agent's choices."""
    choices = np.array([[agent.action.size] for agent in spec.agents])
    if (wrong := (masks != 0) & ((masks != 1) | (np.arange(spec.action_size) >= choices))).any():
        row, agent, choice = np.argwhere(wrong)[0].tolist()
        raise DatasetError(
            f"{where}: array avail: expected 0 or 1 for the {spec.agents[agent].action.size} choices of "
            f"{spec.names[agent]} and 0 behind them, got {masks[row, agent, choice]} for choice {choice} in row "
            f"{first_row + row}"
        )


def require_own(
    values: NDArray[Any], sizes: Sequence[int], spec: TeamSpec, where: str, array: str, first_row: int = 0
) -> None:
    """Raise :class:`DatasetError` for ``values`` [R, N, …] other than 0 behind the ``sizes`` numbers of an agent.

    Training would see them, and the policy that is served would not.
    """
    if min(sizes) == values.shape[-1]:  # all agents are as large as the largest
        return
    behind = np.arange(values.shape[-1]) >= np.reshape(sizes, (-1, 1))
    if (wrong := (values != 0) & behind).any():
        row, agent, column = np.argwhere(wrong)[0].tolist()
        raise DatasetError(
            f"{where}: {array}: expected 0 behind the {sizes[agent]} numbers of {spec.names[agent]}, got "
            f"{values[row, agent, column]:g} in row {first_row + row}, column {column}: clear it, or give the "
            "agent more numbers in its team"
        )
