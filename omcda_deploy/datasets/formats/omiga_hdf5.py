"""OMIGA's HDF5 files, read and written (Wang et al., 2023; its loader is described in baselines.md 10.1).

| array   | shape     | |
|---------|-----------|-|
| `o`     | [R, N, O] | observations |
| `s`     | [R, N, S] | each agent's state; equal to `o` in the published files |
| `a`     | [R, N, A] | actions; may exceed [-1, 1], and are kept so |
| `r`     | [R, 1]    | team reward |
| `d`     | [R, 1]    | 1 on the row behind each episode, at time limits too: its final observation |

Discrete actions, which OMIGA publishes in no HDF5, are ours: the same file with

| array   | shape     | |
|---------|-----------|-|
| `a`     | [R, N, 1] | int64, the choice |
| `avail` | [R, N, A] | uint8, 1 where a choice is available, in final rows too; 0 behind an agent's own choices |

Rows are flat over time: row t with d=0 is a transition to row t+1, done where d[t+1]=1. A tail that no d=1 closes
keeps its transitions, as in OMIGA's loader, and is not among the episodes.

Files of ours store `s` as a hard link to `o` where the state is all observations joined; a centralised state of its
own is stored as N equal copies, and the group's attribute `state` says `shared`; agents' own states, which joined
are the centralised one, are stored as they are (`agents`). The group `omcda` holds, as
attributes, the task, the team spec (JSON), the digest, the seed, the behaviour and the simulator's versions, and,
as arrays of length E, `episode_returns`, `episode_timeouts`, `episode_seeds` and `episode_behaviors` (indices
into `behaviors`). In a file without it an episode of exactly 1,000 transitions was ended by the time limit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets import (
    BLOCK,
    ContentDigest,
    Dataset,
    Float,
    RowIndex,
    Scalar,
    blocks,
    require_available,
    require_finite,
)
from omcda_deploy.errors import ContractError, DatasetError, MissingExtraError, OmcdaError
from omcda_deploy.spec import TeamSpec, require_same_contract

SUFFIXES = (".hdf5", ".h5")
GROUP = "omcda"
FORMAT_VERSION = 1
PUBLISHED_LIMIT = 1000  # transitions

# Published files by the start of their names, and by (N, O, A, discrete).
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
_OWN_ATTRIBUTES = {"spec", "digest", "format_version", "state"}


def read(path: str | Path, task: str | None = None) -> Dataset:
    """Read and check a file; one float32 copy of each array is held, whatever the file's types.

    ``task`` is what the data must fit. Without it the file's own spec counts, or the task is told from the file's
    name or shapes. Raises :class:`DatasetError` for a missing or damaged file, wrong shapes, NaN or infinity, a
    recorded choice that was not available, data that changed since it was written, or a task that the data do not
    fit.
    """
    path = Path(path)
    with _opened(path) as file:
        shape = _shape(file, path)
        rows = len(file["o"])
        group = file.get(GROUP)
        spec = _spec(group, task, path, shape)
        digest = ContentDigest()
        observations = np.empty((rows, *shape.observation), np.float32)
        actions = np.empty((rows, *shape.action), np.int64 if shape.discrete else np.float32)
        rewards, final_flags = np.empty((rows, 1), np.float32), np.empty((rows, 1), np.float32)
        for name, target in (("o", observations), ("a", actions), ("r", rewards), ("d", final_flags)):
            for block in blocks(rows):
                _fill(target, file[name], block)
                require_finite(target[block], block.start, name, str(path))
                digest.update(name, target[block])
        states = _states(file["s"], file["o"], observations, spec, group, path)
        final = final_flags[:, 0] == 1
        if (neither := ~final & (final_flags[:, 0] != 0)).any():
            row = int(np.argmax(neither))
            raise DatasetError(f"{path}: array d: expected 0 or 1, got {final_flags[row, 0]} in row {row}")
        index = RowIndex.of(final)
        if not index.episode_start.size:
            raise DatasetError(
                f"{path}: no episode ends: expected d=1 on the row behind each episode's last transition"
            )
        masks = None
        if shape.discrete:
            masks = _masks(file["avail"], spec, path)
            digest.update("avail", masks)
            actions = actions[..., 0]
            require_available(actions, masks, index.transitions, str(path))
        stored = str(group.attrs["digest"]) if group and "digest" in group.attrs else None
        if stored not in (None, digest.hexdigest()):
            raise DatasetError(
                f"{path} was changed after it was written: expected digest {str(stored)[:12]}…, found "
                f"{digest.hexdigest()[:12]}…. Collect or download it again"
            )
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
        sums = np.concatenate([[0.0], np.cumsum(rewards[:, 0], dtype=np.float64)])
        returns = sums[index.episode_start + index.episode_length] - sums[index.episode_start]
    return Dataset(
        spec=spec,
        observations=observations,
        states=states,
        actions=actions,
        rewards=rewards[:, 0],
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


def write(path: str | Path, dataset: Dataset) -> str:
    """Write the closed episodes of ``dataset`` as :class:`Writer` does; returns their digest."""
    with Writer(path, dataset.spec, dataset.metadata) as writer:
        _append(writer, dataset, [writer.behavior(label) for label in dataset.behaviors])
    return writer.digest


def concatenate(paths: Sequence[str | Path], out: str | Path, behavior: str | None = None) -> str:
    """Write the closed episodes of several files of one task into one; returns its digest.

    Holds one input at a time in memory. ``behavior`` labels the result (default: the inputs' labels joined by +);
    episodes keep the labels of the policies that made them, or else the name of the file they came from. Metadata
    are kept where all inputs agree. Raises :class:`DatasetError`, also when the inputs do not fit together.
    """
    if not paths:
        raise DatasetError("expected at least one dataset to concatenate, got none")
    files = [Path(path) for path in paths]
    if Path(out).resolve() in [path.resolve() for path in files]:
        raise DatasetError(f"{out} is one of the inputs: expected another file for the result")
    specs, heads = [], []
    for path in files:
        with _opened(path) as file:
            group = file.get(GROUP)
            specs.append(_spec(group, None, path, _shape(file, path)))
            heads.append(_metadata(group))
        try:
            require_same_contract(specs[0], specs[-1], str(files[0]), str(path))
        except ContractError as error:
            raise DatasetError(str(error)) from error
    agreed = {
        name: value
        for name, value in heads[0].items()
        if all(name in head and head[name] == value for head in heads)
    }
    labels = [str(head.get("behavior", path.stem)) for head, path in zip(heads, files, strict=True)]
    with Writer(out, specs[0], {**agreed, "behavior": behavior or "+".join(labels)}) as writer:
        for path, label in zip(files, labels, strict=True):
            dataset = read(path)
            known = (label,) if dataset.episode_behaviors is None else dataset.behaviors
            _append(writer, dataset, [writer.behavior(name) for name in known])
            del dataset  # before the next one is read
    return writer.digest


class Writer:
    """Writes a file episode by episode, so that a long recording never has to fit into memory.

    A context manager: leaving it puts the finished file in place of ``path`` in one step; leaving it by an
    exception, Ctrl-C included, leaves nothing behind and an older file as it was. ``metadata`` become attributes.
    """

    def __init__(self, path: str | Path, spec: TeamSpec, metadata: Mapping[str, Scalar]) -> None:
        self.path = Path(path)
        self.spec = spec
        self.digest = ""
        self._metadata = {**metadata, "task": spec.task}
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._digest = ContentDigest()
        self._rows = 0
        self._waiting: dict[str, list[NDArray[Any]]] = {}  # appended, not yet in the file
        self._written = 0  # rows in the file
        self._joined, self._shared = True, False
        self._discrete = spec.action_kind == "discrete"
        self._behaviors: list[str] = []
        self._episodes: dict[str, list[Any]] = {
            name: [] for name in ("returns", "timeouts", "seeds", "behaviors")
        }

    def behavior(self, label: str) -> int:
        """The index under which episodes refer to the policy ``label``."""
        if label not in self._behaviors:
            self._behaviors.append(label)
        return self._behaviors.index(label)

    def __enter__(self) -> Self:
        h5py = _h5py()
        count, observation_size, action_size = (
            len(self.spec.agents),
            self.spec.observation_size,
            self.spec.action_size,
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise IsADirectoryError("it is a folder")
            self._file = h5py.File(self._partial, "w")
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be written: {error}") from error
        self._create("o", (count, observation_size))
        self._create("a", (count, 1) if self._discrete else (count, action_size), self._action_type)
        self._create("r", (1,))
        self._create("d", (1,))
        if self._discrete:
            self._create("avail", (count, action_size), "u1")
        return self

    def append(
        self,
        observations: Float,
        states: Float,
        actions: NDArray[Any],
        rewards: NDArray[Any],
        *,
        action_masks: NDArray[np.uint8] | None = None,
        timeout: bool,
        episode_return: float,
        seed: int | None = None,
        behavior: int | None = None,
    ) -> None:
        """One whole episode of T transitions.

        ``observations`` [T+1, N, O] and ``states`` [T+1, S], or [T+1, N, S / N] where the state is those of all
        agents joined (all episodes of a file alike), end with the final ones; ``actions`` [T, N, A] and
        ``rewards`` [T]; ``behavior`` as :meth:`behavior` gave it. A discrete task has ``actions`` int64 [T, N] and
        ``action_masks`` [T+1, N, A]. Raises :class:`DatasetError` for NaN or infinity, and for choices that were
        not available.
        """
        steps = len(actions)
        if self._discrete != (action_masks is not None):
            raise DatasetError(
                f"{self.path}: {self.spec.task} has {self.spec.action_kind} actions: expected action masks with "
                "discrete ones, and with no others"
            )
        joined = states.size == observations.size and np.array_equal(
            states.reshape(observations.shape), observations
        )
        if self._rows == 0 and not joined:
            self._joined, self._shared = False, states.ndim == 2
            count = len(self.spec.agents)
            self._create("s", (count, self.spec.state_size // (1 if self._shared else count)))
        if self._joined and not joined:
            raise DatasetError(
                f"{self.path}: the state was all observations joined before row {self._rows}, and no longer is"
            )
        if action_masks is not None:
            _require_masks(action_masks, self._rows, self.spec, self.path)
            require_available(actions, action_masks, np.arange(steps), str(self.path), self._rows)
            actions = actions[..., None]
        final = np.zeros((1, *actions.shape[1:]), self._action_type)
        ends = np.zeros((steps + 1, 1), np.float32)
        ends[-1] = 1
        parts: dict[str, NDArray[Any]] = {
            "o": observations,
            "a": np.concatenate([actions, final]),
            "r": np.append(rewards, 0).astype(np.float32)[:, None],
            "d": ends,
        }
        if action_masks is not None:
            parts["avail"] = action_masks
        if not self._joined:
            parts["s"] = np.repeat(states[:, None], len(self.spec.agents), axis=1) if self._shared else states
        for name, part in parts.items():
            require_finite(part, self._rows, name, str(self.path))
            if name != "s":
                self._digest.update(name, part)
            self._waiting.setdefault(name, []).append(np.array(part))  # the caller may reuse its own
        self._rows += steps + 1
        if self._rows - self._written >= BLOCK:
            self._flush()
        for key, value in (
            ("returns", episode_return),
            ("timeouts", timeout),
            ("seeds", seed),
            ("behaviors", behavior),
        ):
            self._episodes[key].append(value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            self._file.close()
            if kind is None:
                self._partial.replace(self.path)
        except OSError as failure:
            raise DatasetError(f"{self.path} cannot be written: {failure}") from failure
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    @property
    def _action_type(self) -> str:
        return "<i8" if self._discrete else "<f4"

    def _create(self, name: str, shape: tuple[int, ...], kind: str = "<f4") -> None:
        self._file.create_dataset(
            name, (0, *shape), kind, maxshape=(None, *shape), chunks=(1024, *shape), fillvalue=None
        )

    def _flush(self) -> None:
        # Writes of a few rows would take most of the time where episodes are short.
        for name, parts in self._waiting.items():
            target = self._file[name]
            target.resize(self._rows, axis=0)
            target[self._written :] = np.concatenate(parts)
        self._waiting.clear()
        self._written = self._rows

    def _finish(self) -> None:
        if not self._rows:
            raise DatasetError(f"{self.path}: expected at least one episode to write, got none")
        self._flush()
        if self._joined:
            self._file["s"] = self._file["o"]
        self.digest = self._digest.hexdigest()
        group = self._file.create_group(GROUP)
        group.attrs.update(self._metadata)
        group.attrs.update(
            {
                "format_version": FORMAT_VERSION,
                "spec": json.dumps(self.spec.to_json(), sort_keys=True),
                "digest": self.digest,
                "state": "observations" if self._joined else "shared" if self._shared else "agents",
            }
        )
        group["episode_returns"] = np.asarray(self._episodes["returns"], np.float64)
        group["episode_timeouts"] = np.asarray(self._episodes["timeouts"], np.uint8)
        for name in ("seeds", "behaviors"):
            if None not in self._episodes[name]:
                group[f"episode_{name}"] = np.asarray(self._episodes[name], np.int64)
        if self._behaviors:
            group["behaviors"] = [label.encode() for label in self._behaviors]


def _append(writer: Writer, dataset: Dataset, behaviors: Sequence[int]) -> None:
    """Append all closed episodes; ``behaviors`` are the writer's indices for the dataset's."""
    timeouts = dataset.timeout[RowIndex.last_transitions(_index(dataset))]
    for episode, (start, length) in enumerate(
        zip(dataset.episode_start.tolist(), dataset.episode_length.tolist(), strict=True)
    ):
        rows = slice(start, start + length + 1)
        steps = slice(start, start + length)
        behavior = 0 if dataset.episode_behaviors is None else int(dataset.episode_behaviors[episode])
        writer.append(
            dataset.observations[rows],
            dataset.states[rows],
            dataset.actions[steps],
            dataset.rewards[steps],
            action_masks=None if dataset.action_masks is None else dataset.action_masks[rows],
            timeout=bool(timeouts[episode]),
            episode_return=float(dataset.episode_returns[episode]),
            seed=None if dataset.episode_seeds is None else int(dataset.episode_seeds[episode]),
            behavior=behaviors[behavior] if behaviors else None,
        )


def _index(dataset: Dataset) -> RowIndex:
    return RowIndex(dataset.transitions, dataset.episode_start, dataset.episode_length)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "data") from error
    return h5py


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    h5py = _h5py()
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
    agents: int
    observation_size: int
    action_size: int
    discrete: bool

    @property
    def observation(self) -> tuple[int, int]:
        """Of a row of `o`."""
        return self.agents, self.observation_size

    @property
    def action(self) -> tuple[int, int]:
        """Of a row of `a`."""
        return self.agents, 1 if self.discrete else self.action_size


def _shape(file: Any, path: Path) -> _Shape:
    """Raises :class:`DatasetError` for the first array that is missing or does not fit the others."""
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
    """The spec of ``task``, of the file itself, or of the published file that it is, held against ``shape``."""
    stored = _stored_spec(group, path)
    if task is None and stored is None:
        named = (_BY_NAME[start] for start in _BY_NAME if path.name.startswith(start))
        task = next(named, None) or _BY_SHAPE.get(shape)
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
    """[R, N, A]; errors as :func:`_require_masks`."""
    masks = np.empty(source.shape, np.uint8)
    for block in blocks(len(masks)):
        part = source[block]  # in the file's own type: HDF5 would clip what is neither 0 nor 1
        _require_masks(part, block.start, spec, path)
        masks[block] = part
    return masks


def _require_masks(block: NDArray[Any], first_row: int, spec: TeamSpec, path: Path) -> None:
    """Raise :class:`DatasetError` for other values than 0 and 1, and for choices that an agent does not have."""
    own = np.arange(spec.action_size) < np.array([[agent.action.size] for agent in spec.agents])
    if (wrong := (block != 0) & ((block != 1) | ~own)).any():
        row, agent, choice = np.argwhere(wrong)[0].tolist()
        raise DatasetError(
            f"{path}: array avail: expected 0 or 1 for the {spec.agents[agent].action.size} choices of "
            f"{spec.names[agent]} and 0 behind them, got {block[row, agent, choice]} for choice {choice} in row "
            f"{first_row + row}"
        )


def _fill(target: NDArray[Any], source: Any, block: slice) -> None:
    """Read rows straight into ``target``; HDF5 converts other number types on the way."""
    if source.ndim == target.ndim - 1:  # r and d of shape [R]
        target = target[:, 0]
    source.read_direct(target, block, block)


def _states(source: Any, observed: Any, observations: Float, spec: TeamSpec, group: Any, path: Path) -> Float:
    """[R, S]: a view of ``observations`` where `s` equals `o`, one of N equal copies, or agents' states joined."""
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
    names = ("episode_returns", "episode_timeouts", "episode_seeds", "episode_behaviors")
    found = {name: group[name][:] for name in names if group is not None and name in group}
    for name, values in found.items():
        if values.shape != index.episode_start.shape:
            raise DatasetError(
                f"{path}: {GROUP}/{name}: expected one value for each of {index.episode_start.size} episodes, "
                f"got shape {list(values.shape)}"
            )
    return found


def _metadata(group: Any) -> dict[str, Scalar]:
    if group is None:
        return {}
    return {
        str(name): value.item() if isinstance(value, np.generic) else value
        for name, value in group.attrs.items()
        if name not in _OWN_ATTRIBUTES
    }
