"""OMIGA's HDF5 files (Wang et al., 2023), read; :mod:`omcda_deploy.datasets.writer` writes them.

OMIGA's own loader is described in docs/baselines.md#omiga-hdf5. The arrays of a file:

| array   | shape     | |
|---------|-----------|-|
| `o`     | [R, N, O] | observations |
| `s`     | [R, N, S] | each agent's state; equal to `o` in the published files |
| `a`     | [R, N, A] | actions; may exceed [-1, 1], and are kept so |
| `r`     | [R, 1]    | team reward |
| `d`     | [R, 1]    | 1 on the row behind each episode, at time limits too: its final observation |

OMIGA publishes no discrete actions as HDF5. This package stores them in the same layout, with

| array   | shape     | |
|---------|-----------|-|
| `a`     | [R, N, 1] | int64, the choice |
| `avail` | [R, N, A] | uint8, 1 where a choice is available, in final rows too; 0 behind an agent's own choices |

Rows are flat over time: row t with d=0 is a transition to row t+1, done where d[t+1]=1. A tail that no d=1 closes
keeps its transitions, as in OMIGA's loader, and is not among the episodes.

This package's files store `s` as a hard link to `o` where the state is all observations joined; a centralised state
of its own is stored as N equal copies, and the group's attribute `state` says `shared`; agents' own states, which
joined are the centralised one, are stored as they are (`agents`). The group `omcda` holds, as attributes, the task,
the team spec (JSON), the digest, the seed, the behaviour and the simulator's versions, and, as arrays of length E,
`episode_returns`, `episode_timeouts`, `episode_seeds` and `episode_behaviors` (indices into `behaviors`). In a file
without it an episode of exactly 1,000 transitions was ended by the time limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets import (
    ContentDigest,
    Dataset,
    Float,
    RowIndex,
    Scalar,
    blocks,
    require_available,
    require_finite,
    require_masks,
)
from omcda_deploy.datasets.hdf5 import FORMAT_VERSION, GROUP, RESERVED_ATTRIBUTES, import_h5py
from omcda_deploy.errors import ContractError, DatasetError, OmcdaError
from omcda_deploy.spec import TeamSpec, require_same_contract

SUFFIXES = (".hdf5", ".h5")
PUBLISHED_LIMIT = 1000  # transitions

# Tasks of the published files, by the start of their names and by (N, O, A, discrete).
_BY_NAME = {
    "Hopper-v2-3x1-": "mamujoco/hopper-3x1",
    "Ant-v2-2x4-": "mamujoco/ant-2x4",
    "HalfCheetah-v2-6x1-": "mamujoco/halfcheetah-6x1",
}
_BY_SHAPE = {
    (3, 14, 1, False): "mamujoco/hopper-3x1",
    (2, 113, 4, False): "mamujoco/ant-2x4",
    (6, 23, 1, False): "mamujoco/halfcheetah-6x1",
}


class Header(NamedTuple):
    """A file's team and metadata, without its rows."""

    spec: TeamSpec
    metadata: dict[str, Scalar]


def read_header(path: Path) -> Header:
    """Read the team and the metadata of a file, and none of its rows. Errors are those of :func:`read`."""
    with _opened(path) as file:
        group = file.get(GROUP)
        return Header(_spec(group, None, path, _shape(file, path)), _metadata(group))


def read(path: str | Path, task: str | None = None) -> Dataset:
    """Read and check a file; one float32 copy of each array is held, whatever the file's types.

    ``task`` is the task that the data must fit. Without it the file's own spec counts; a file without a spec is
    recognised by its name or shapes. Raises :class:`DatasetError` for a missing or damaged file, wrong shapes, NaN
    or infinity, a recorded choice that was not available, data that changed since they were written, or a task
    that the data do not fit.
    """
    path = Path(path)
    with _opened(path) as file:
        shape = _shape(file, path)
        group = file.get(GROUP)
        spec = _spec(group, task, path, shape)
        digest = ContentDigest()
        rows = _read_rows(file, shape, digest, path)
        states = _states(file["s"], file["o"], rows.observations, spec, group, path)
        index = _index(rows.final_flags, path)
        actions, masks = rows.actions, None
        if shape.discrete:
            masks = _masks(file["avail"], spec, path)
            digest.update("avail", masks)
            actions = actions[..., 0]
            require_available(actions, masks, index.transitions, str(path))
        _require_unchanged(group, digest.hexdigest(), path)
        episodes = _episode_arrays(group, index, path)
        metadata = _metadata(group)
        behaviors = (
            tuple(name.decode() for name in group["behaviors"][:]) if group and "behaviors" in group else ()
        )
    timeouts = episodes.get("episode_timeouts", index.episode_length == PUBLISHED_LIMIT)
    terminal = np.zeros(index.transitions.size, np.bool_)
    timeout = np.zeros(index.transitions.size, np.bool_)
    timeout[index.last_transitions()] = timeouts
    terminal[index.last_transitions()] = timeouts == 0
    returns = episodes.get("episode_returns")
    if returns is None:
        sums = np.concatenate([[0.0], np.cumsum(rows.rewards, dtype=np.float64)])
        returns = sums[index.episode_start + index.episode_length] - sums[index.episode_start]
    return Dataset(
        spec=spec,
        observations=rows.observations,
        states=states,
        actions=actions,
        rewards=rows.rewards,
        transitions=index.transitions,
        terminal=terminal,
        timeout=timeout,
        episode_start=index.episode_start,
        episode_length=index.episode_length,
        episode_returns=returns,
        episode_seeds=episodes.get("episode_seeds"),
        episode_behaviors=episodes.get("episode_behaviors"),
        behaviors=behaviors,
        metadata=metadata,
        digest=digest.hexdigest(),
        action_masks=masks,
    )


class _Rows(NamedTuple):
    """Arrays of a file as they are stored, but in this package's number types."""

    observations: Float  # [R, N, O]
    actions: NDArray[Any]  # float32 [R, N, A], or int64 [R, N, 1]
    rewards: Float  # [R]
    final_flags: Float  # [R]


def _read_rows(file: Any, shape: _Shape, digest: ContentDigest, path: Path) -> _Rows:
    """Read `o`, `a`, `r` and `d` block by block, check that they are finite, and add them to ``digest``."""
    count = len(file["o"])
    observations = np.empty((count, *shape.observation), np.float32)
    actions = np.empty((count, *shape.action), np.int64 if shape.discrete else np.float32)
    rewards, final_flags = np.empty((count, 1), np.float32), np.empty((count, 1), np.float32)
    for name, target in (("o", observations), ("a", actions), ("r", rewards), ("d", final_flags)):
        for block in blocks(count):
            _fill(target, file[name], block)
            require_finite(target[block], block.start, name, str(path))
            digest.update(name, target[block])
    return _Rows(observations, actions, rewards[:, 0], final_flags[:, 0])


def _index(final_flags: Float, path: Path) -> RowIndex:
    """Index the rows by their flags `d` [R]. Raises :class:`DatasetError` for other flags, or no closed episode."""
    final = final_flags == 1
    if (other := ~final & (final_flags != 0)).any():
        row = int(np.argmax(other))
        raise DatasetError(f"{path}: array d: expected 0 or 1, got {final_flags[row]} in row {row}")
    index = RowIndex.of(final)
    if not index.episode_start.size:
        raise DatasetError(
            f"{path}: no episode ends: expected d=1 on the row behind each episode's last transition"
        )
    return index


def _require_unchanged(group: Any, digest: str, path: Path) -> None:
    """Raise :class:`DatasetError` where a file's contents are no longer those that its stored digest names."""
    stored = str(group.attrs["digest"]) if group and "digest" in group.attrs else None
    if stored not in (None, digest):
        raise DatasetError(
            f"{path} was changed after it was written: expected digest {str(stored)[:12]}…, found "
            f"{digest[:12]}…. Collect or download it again"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file for reading. Raises :class:`DatasetError` for one that is missing, truncated or no HDF5."""
    h5py = import_h5py()
    if not path.is_file():
        raise DatasetError(f"{path}: no such file. Make a dataset with  omcda-deploy collect")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OmcdaError:
        raise
    except OSError as error:
        raise DatasetError(
            f"{path} is truncated or not HDF5: copy or collect it again ({str(error).splitlines()[0]})"
        ) from error


class _Shape(NamedTuple):
    """Sizes of a file's arrays."""

    agents: int
    observation_size: int
    action_size: int
    discrete: bool

    @property
    def observation(self) -> tuple[int, int]:
        """Shape of a row of `o`."""
        return self.agents, self.observation_size

    @property
    def action(self) -> tuple[int, int]:
        """Shape of a row of `a`."""
        return self.agents, 1 if self.discrete else self.action_size


def _shape(file: Any, path: Path) -> _Shape:
    """Sizes of the arrays. Raises :class:`DatasetError` for one that is missing or does not fit the others."""
    for name in "osard":
        if not hasattr(file.get(name), "dtype"):
            raise DatasetError(f"{path}: expected arrays o, s, a, r, d, found no {name} among {sorted(file)}")
        if file[name].dtype.kind not in "fiub":
            raise DatasetError(f"{path}: array {name}: expected numbers, got type {file[name].dtype}")
    observations = file["o"].shape
    if len(observations) != 3 or observations[0] < 2:
        raise DatasetError(
            f"{path}: array o: expected shape [R, N, O] of at least 2 rows, got {list(observations)}"
        )
    rows, agents, size = observations
    for name in "sa":
        shape = file[name].shape
        if len(shape) != 3 or shape[:2] != (rows, agents):
            raise DatasetError(
                f"{path}: array {name}: expected shape [{rows}, {agents}, …], got {list(shape)}"
            )
    for name in "rd":
        shape = file[name].shape
        if shape not in ((rows,), (rows, 1)):
            raise DatasetError(f"{path}: array {name}: expected shape [{rows}, 1], got {list(shape)}")
    if "avail" not in file:
        return _Shape(agents, size, file["a"].shape[2], discrete=False)
    choices, masks = file["a"], file["avail"]
    if choices.dtype.kind not in "iu" or choices.shape[2] != 1:
        raise DatasetError(
            f"{path}: array a: expected integers of shape [{rows}, {agents}, 1] beside an array avail, got "
            f"{choices.dtype} of shape {list(choices.shape)}"
        )
    if not hasattr(masks, "dtype") or masks.dtype.kind not in "iub" or masks.shape[:-1] != (rows, agents):
        raise DatasetError(
            f"{path}: array avail: expected integers of shape [{rows}, {agents}, …], got "
            f"{getattr(masks, 'dtype', 'a group')} of shape {list(getattr(masks, 'shape', ()))}"
        )
    return _Shape(agents, size, masks.shape[2], discrete=True)


def _spec(group: Any, task: str | None, path: Path, shape: _Shape) -> TeamSpec:
    """The spec of ``task``, else the file's own, else that of a published file; it must fit ``shape``."""
    stored = _stored_spec(group, path)
    if task is None and stored is None:
        by_name = (_BY_NAME[start] for start in _BY_NAME if path.name.startswith(start))
        task = next(by_name, None) or _BY_SHAPE.get(shape)
        if task is None:
            raise DatasetError(
                f"{path} does not say of which task it is, and {shape.agents} agents with observations of "
                f"{shape.observation_size} and {_actions(shape)} fit none of OMIGA's: name the task"
            )
    spec = cast(TeamSpec, stored) if task is None else registry.team_spec(task)
    if stored is not None:
        try:
            require_same_contract(stored, spec, str(path), "the task asked for")
        except ContractError as error:
            raise DatasetError(str(error)) from error
    discrete = spec.action_kind == "discrete"
    expected = _Shape(len(spec.agents), spec.observation_size, spec.action_size, discrete)
    if expected != shape:
        raise DatasetError(
            f"{path}: {spec.task} has {expected.agents} agents with observations of {expected.observation_size} "
            f"and {_actions(expected)}, the file {shape.agents} with {shape.observation_size} and "
            f"{_actions(shape)}: name the data's own task"
        )
    return spec


def _actions(shape: _Shape) -> str:
    if shape.discrete:
        return f"{shape.action_size} choices (arrays a and avail)"
    return f"actions of {shape.action_size} numbers"


def _stored_spec(group: Any, path: Path) -> TeamSpec | None:
    if group is None or "spec" not in group.attrs:
        return None
    if (version := group.attrs.get("format_version")) != FORMAT_VERSION:
        raise DatasetError(f"{path} has format version {version}, expected {FORMAT_VERSION}: collect again")
    try:
        return TeamSpec.from_json(json.loads(group.attrs["spec"]))
    except (ValueError, ContractError) as error:
        raise DatasetError(f"{path}: its team spec is damaged: {error}") from error


def _masks(source: Any, spec: TeamSpec, path: Path) -> NDArray[np.uint8]:
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


def _states(source: Any, observed: Any, observations: Float, spec: TeamSpec, group: Any, path: Path) -> Float:
    """Read `s` (``source``) as centralised states [R, S].

    They are a view of ``observations``, read from `o` (``observed``), where `s` equals `o`; else one of N equal
    copies, or the agents' states joined.
    """
    rows, agents, size = source.shape
    shared = group is not None and group.attrs.get("state") == "shared"
    if not shared and agents * size != spec.state_size:
        shared = size == spec.state_size
    if (size if shared else agents * size) != spec.state_size:
        raise DatasetError(
            f"{path}: array s: {spec.task} has a state of {spec.state_size} numbers, got {list(source.shape)}"
        )
    joined = observations.reshape(rows, -1)
    if not shared and (source == observed or _equal(source, observations)):
        return joined
    states = np.empty((rows, spec.state_size), np.float32)
    for block in blocks(rows):
        part = np.empty((block.stop - block.start, agents, size), np.float32)
        source.read_direct(part, block)
        require_finite(part, block.start, "s", str(path))
        if shared and (part != part[:, :1]).any():
            raise DatasetError(
                f"{path}: array s: expected {agents} equal copies of one state, not so from row {block.start} on"
            )
        states[block] = part[:, 0] if shared else part.reshape(len(part), -1)
    return states


def _equal(source: Any, target: Float) -> bool:
    if source.shape != target.shape:
        return False
    for block in blocks(len(target)):
        part = np.empty_like(target[block])
        source.read_direct(part, block)
        if not np.array_equal(part, target[block]):
            return False
    return True


def _episode_arrays(group: Any, index: RowIndex, path: Path) -> dict[str, NDArray[Any]]:
    """Arrays [E] of the group that it has. Raises :class:`DatasetError` for one of another length."""
    names = ("episode_returns", "episode_timeouts", "episode_seeds", "episode_behaviors")
    arrays = {name: group[name][:] for name in names if group is not None and name in group}
    for name, values in arrays.items():
        if values.shape != index.episode_start.shape:
            raise DatasetError(
                f"{path}: {GROUP}/{name}: expected one value for each of {index.episode_start.size} episodes, "
                f"got shape {list(values.shape)}"
            )
    return arrays


def _metadata(group: Any) -> dict[str, Scalar]:
    if group is None:
        return {}
    return {
        str(name): value.item() if isinstance(value, np.generic) else value
        for name, value in group.attrs.items()
        if name not in RESERVED_ATTRIBUTES
    }
