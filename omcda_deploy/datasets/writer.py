"""Writing datasets as OMIGA's HDF5, in the layout of :mod:`omcda_deploy.datasets.formats.omiga_hdf5`.

:func:`write_dataset` writes episodes that are at hand, :class:`DatasetWriter` one after another as they are played.
A file appears under its name when it is complete, never before.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.claims import claimed
from omcda_deploy.datasets import (
    BLOCK,
    ContentDigest,
    Dataset,
    Episode,
    Scalar,
    require_available,
    require_finite,
    require_masks,
    require_own,
)
from omcda_deploy.datasets.behavior import PREFIX, require_rows, row_shapes, type_of
from omcda_deploy.datasets.episodes import admitted, require_shapes
from omcda_deploy.datasets.formats.omiga_hdf5 import SUFFIXES
from omcda_deploy.datasets.hdf5 import FORMAT_VERSION, GROUP, RESERVED_ATTRIBUTES, Sink, import_h5py
from omcda_deploy.errors import DatasetError
from omcda_deploy.files import atomic, folder_of, probe, refusal
from omcda_deploy.processes import postponing_signals
from omcda_deploy.spec import TeamSpec

StateLayout: TypeAlias = Literal["observations", "shared", "agents"]


def write_dataset(
    path: str | Path,
    spec: TeamSpec,
    episodes: Iterable[Episode],
    *,
    metadata: Mapping[str, Scalar] | None = None,
    behavior: str = "unknown",
) -> dict[str, Any]:
    """Write ``episodes`` of the team ``spec`` as an HDF5 dataset that train, replay and inspect read.

    ``episodes`` may be a generator: one is held in memory at a time. :class:`Episode` says which arrays it has, in
    which units, and the meaning of the last row; actions and rewards may have that row too, if it is all NaN.
    Floating numbers are stored as float32. ``behavior`` names the
    policy that acted, ``metadata`` are strings and numbers to keep with the data. The file is complete or absent:
    an exception, Ctrl-C included, leaves nothing behind, and an older file as it was.

    Returns a summary: path, task, behavior, episodes, transitions, the mean and standard deviation of the
    undiscounted returns, and the digest. Raises :class:`DatasetError` for arrays of other shapes or types, an
    episode beyond the spec's time limit, NaN or infinity, numbers behind those of a short agent, actions beyond
    their bounds, choices that were not available, other metadata, and a ``path`` that does not end in ``.hdf5`` or
    ``.h5``, by which it is read.
    """
    require_suffix(path)
    with DatasetWriter(path, spec, {**(metadata or {}), "behavior": behavior}) as writer:
        for number, episode in enumerate(episodes):
            writer.append(admitted(episode, spec, f"{path}: episode {number}"), behavior)
    return {"path": str(path), "task": spec.task, "behavior": behavior, **writer.summary()}


def require_suffix(path: str | Path) -> None:
    """Raise :class:`DatasetError` for a name by which a written dataset would not be read again."""
    if Path(path).suffix not in SUFFIXES:
        raise DatasetError(f"{path}: expected a name ending in {' or '.join(SUFFIXES)}: choose another name")


def require_new_file(path: str | Path, option: str = "--out") -> None:
    """Raise :class:`DatasetError` where something exists, and as :func:`require_suffix`."""
    require_suffix(path)
    if Path(path).exists():
        raise DatasetError(f"{path} exists already: choose another {option}, or remove it first")


class DatasetWriter:
    """Writes a file episode by episode, so that a long recording never has to fit into memory.

    A context manager: leaving it puts the finished file in place of ``path`` in one step; leaving it by an
    exception, Ctrl-C included, leaves nothing behind and an older file as it was. ``metadata`` become attributes.
    Afterwards :attr:`digest` is that of the contents. Raises :class:`DatasetError` for metadata that are neither
    strings nor numbers and for a path that cannot be written, :class:`ConfigError` while another process writes it.
    """

    def __init__(self, path: str | Path, spec: TeamSpec, metadata: Mapping[str, Scalar]) -> None:
        for name, value in metadata.items():
            if name in RESERVED_ATTRIBUTES or not isinstance(value, str | int | float | np.generic):
                raise DatasetError(
                    f"metadata {name!r}: expected a string or a number under a name other than "
                    f"{', '.join(sorted(RESERVED_ATTRIBUTES))}, got {value!r}: rename or convert it"
                )
        self.path = Path(path)
        self.spec = spec
        self.digest = ""
        self._metadata = {**metadata, "task": spec.task}
        self._files = ExitStack()  # the claim, the temporary file and its HDF5 handle
        self._completed = False
        self._content = ContentDigest()
        self._rows = 0  # appended
        self._rows_in_file = 0
        self._pending: dict[str, list[NDArray[Any]]] = {}  # appended, not yet in the file
        self._state_layout: StateLayout | None = None  # set by the first episode
        self._knows_behavior: bool | None = None  # exactly; set by the first episode
        self._discrete = spec.action_kind == "discrete"
        self._labels: list[str] = []
        self._returns: list[float] = []
        self._timeouts: list[bool] = []
        self._seeds: list[int | None] = []
        self._behaviors: list[int | None] = []

    @property
    def episodes(self) -> int:
        """Episodes that were appended."""
        return len(self._returns)

    def declare_behaviors(self, labels: Iterable[str]) -> None:
        """Number the policies ``labels`` in this order, also those that no episode will be of."""
        for label in labels:
            if label not in self._labels:
                self._labels.append(label)

    def append(self, episode: Episode, behavior: str | None = None) -> None:
        """Add one whole episode, recorded by the policy ``behavior``.

        The arrays are copied. Raises :class:`DatasetError` for arrays of other shapes or types than
        :class:`Episode` states, NaN or infinity, numbers behind those of a short agent, choices that were not
        available, and a state that is laid out unlike the first episode's.
        """
        # An episode with a label of its own is named by it, and its rows are counted in it.
        where, first_row = (episode.label, 0) if episode.label else (str(self.path), self._rows)
        require_shapes(episode, self.spec, episode.label or f"{self.path}: episode {self.episodes}")
        masks, steps = episode.action_masks, len(episode)
        with np.errstate(over="ignore"):  # infinity, which is refused with the row it is in
            observations, states, rewards = (
                np.asarray(rows, np.float32)
                for rows in (episode.observations, episode.states, episode.rewards)
            )
            actions = np.asarray(episode.actions, self._action_type)
        names = ("observations", "actions", "rewards", "states") if episode.label else "oars"
        for name, rows in zip(names, (observations, actions, rewards, states), strict=True):
            require_finite(rows, first_row, name, where)
        agents = self.spec.agents
        require_own(observations, [a.observation_size for a in agents], self.spec, where, names[0], first_row)
        if masks is not None:
            require_masks(masks, self.spec, where, first_row)
            require_available(actions, masks, np.arange(steps), where, first_row)
            actions = actions[..., None]
        else:
            require_own(actions, [a.action.size for a in agents], self.spec, where, names[1], first_row)
        self._agree_on_state(observations, states)
        parts: dict[str, NDArray[Any]] = {
            "o": observations,
            "a": np.concatenate([actions, np.zeros((1, *actions.shape[1:]), self._action_type)]),
            "r": np.append(rewards, np.float32(0))[:, None],
            "d": (np.arange(steps + 1) == steps).astype(np.float32)[:, None],
        }
        if masks is not None:
            parts["avail"] = np.asarray(masks, np.uint8)
        parts |= self._behavior_rows(episode)
        if self._state_layout == "shared":
            parts["s"] = np.repeat(states[:, None], len(self.spec.agents), axis=1)
        elif self._state_layout == "agents":
            parts["s"] = states
        self._hold(parts)
        for name, part in parts.items():
            self._content.update(
                name.rpartition("/")[2], states.reshape(steps + 1, -1) if name == "s" else part
            )
        self._content.update("timeouts", np.array([episode.timeout], np.uint8))
        self.declare_behaviors([] if behavior is None else [behavior])
        self._returns.append(episode.undiscounted_return)
        self._timeouts.append(episode.timeout)
        self._seeds.append(episode.seed)
        self._behaviors.append(None if behavior is None else self._labels.index(behavior))

    def copy(
        self, dataset: Dataset, numbers: Iterable[int], label: str, *, with_behavior: bool = True
    ) -> None:
        """Add the closed episodes ``numbers`` of ``dataset``, under the labels of the policies that acted.

        Those of a dataset that does not record them get ``label``. ``with_behavior``: and the exact distributions
        that acted, where it has them.
        """
        behaviors = dataset.episode_behaviors
        if behaviors is not None:
            self.declare_behaviors(dataset.behaviors)
        for number in numbers:
            name = label if behaviors is None else dataset.behaviors[behaviors[number]]
            episode = dataset.episode(number)
            self.append(episode if with_behavior else replace(episode, behavior=None), name)

    def complete(self) -> None:
        """Write what is left and close the file; leaving the block then only gives it its name.

        Raises :class:`DatasetError` for a file without episodes, and where it cannot be written.
        """
        if self._completed:
            return
        self._completed = True
        with self._refusing():
            self._finish()
            self._file.close()
            self._sink.close()
            self._sink.check()

    def summary(self) -> dict[str, Any]:
        """Count what was written, as JSON values, once the file is complete."""
        returns = np.asarray(self._returns)
        return {
            "episodes": returns.size,
            "transitions": self._rows - returns.size,
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "digest": self.digest,
        }

    def __enter__(self) -> Self:
        h5py = import_h5py()
        count, spec = len(self.spec.agents), self.spec
        with ExitStack() as files, self._refusing():
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            files.enter_context(folder_of(self.path))
            probe(self.path)
            files.enter_context(claimed(self.path))
            partial = files.enter_context(atomic(self.path))
            with postponing_signals():  # HDF5 would go on with a file of which nothing here knows
                self._sink = files.enter_context(Sink(partial))
                self._file = files.enter_context(h5py.File(self._sink, "w"))
            self._create("o", (count, spec.observation_size))
            self._create("a", (count, 1) if self._discrete else (count, spec.action_size), self._action_type)
            self._create("r", (1,))
            self._create("d", (1,))
            if self._discrete:
                self._create("avail", (count, spec.action_size), "u1")
            self._files = files.pop_all()  # last: what is interrupted before leaves nothing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._refusing(), self._files:
            self.complete()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn what the system refuses into a :class:`DatasetError`."""
        try:
            yield
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be written {refusal(error)}") from error

    @property
    def _action_type(self) -> str:
        return "<i8" if self._discrete else "<f4"

    def _agree_on_state(self, observations: NDArray[np.float32], states: NDArray[np.float32]) -> None:
        """Choose the layout of `s` by the first episode. Raises :class:`DatasetError` where a later one differs."""
        joined = states.size == observations.size and np.array_equal(
            states.reshape(observations.shape), observations
        )
        if self._state_layout is None:
            self._state_layout = "observations" if joined else "shared" if states.ndim == 2 else "agents"
            if not joined:
                count = len(self.spec.agents)
                shared = self._state_layout == "shared"
                self._create("s", (count, self.spec.state_size // (1 if shared else count)))
        elif self._state_layout == "observations" and not joined:
            raise DatasetError(
                f"{self.path}: the state was all observations joined before row {self._rows}, and no longer is: "
                "write such episodes to a file of their own"
            )
        elif self._state_layout != "observations" and (states.ndim == 2) != (self._state_layout == "shared"):
            expected = "[T+1, S]" if self._state_layout == "shared" else "[T+1, N, S / N]"
            raise DatasetError(
                f"{self.path}: states: expected shape {expected}, as in the episodes before row {self._rows}, got "
                f"{list(states.shape)}: give all of them alike"
            )

    def _behavior_rows(self, episode: Episode) -> dict[str, NDArray[Any]]:
        """Return the exact distributions that acted, with a row of zeros for the final observation.

        Raises :class:`DatasetError` where this episode has them and the first one did not, or the other way round.
        """
        rows = episode.behavior
        if self._knows_behavior is None:
            self._knows_behavior = rows is not None
            for name, shape in row_shapes(self.spec).items() if rows is not None else ():
                self._create(f"{GROUP}/{PREFIX}{name}", shape, type_of(name))
        if self._knows_behavior != (rows is not None):
            raise DatasetError(
                f"{self.path}: expected behavior of all episodes, or of none, but only some have it: give all alike"
            )
        if rows is None:
            return {}
        require_rows(rows, len(episode), self.spec, episode.label or str(self.path))
        return {
            f"{GROUP}/{PREFIX}{name}": np.concatenate([values, np.zeros((1, *values.shape[1:]))]).astype(
                type_of(name)
            )
            for name, values in rows.items()
        }

    def _create(self, name: str, shape: tuple[int, ...], kind: str = "<f4") -> None:
        self._file.create_dataset(
            name, (0, *shape), kind, maxshape=(None, *shape), chunks=(1024, *shape), fillvalue=None
        )

    def _hold(self, parts: Mapping[str, NDArray[Any]]) -> None:
        """Keep copies of an episode's rows until a block of rows is together."""
        for name, part in parts.items():
            self._pending.setdefault(name, []).append(np.array(part))  # the caller may reuse its buffers
        self._rows += len(parts["o"])
        if self._rows - self._rows_in_file >= BLOCK:
            self._flush()

    def _flush(self) -> None:
        """Write the pending rows. Writing each episode by itself would take most of the time of short ones."""
        for name, parts in self._pending.items():
            target = self._file[name]
            target.resize(self._rows, axis=0)
            target[self._rows_in_file :] = np.concatenate(parts)
        self._pending.clear()
        self._rows_in_file = self._rows
        with self._refusing():
            self._sink.check()

    def _finish(self) -> None:
        if not self._rows:
            raise DatasetError(f"{self.path}: expected at least one episode to write, got none")
        self._flush()
        if self._state_layout == "observations":
            self._file["s"] = self._file["o"]
        self.digest = self._content.hexdigests()[FORMAT_VERSION]
        group = self._file.require_group(GROUP)
        group.attrs.update(self._metadata)
        group.attrs.update(
            {
                "format_version": FORMAT_VERSION,
                "spec": json.dumps(self.spec.to_json(), sort_keys=True),
                "digest": self.digest,
                "state": self._state_layout,
            }
        )
        group["episode_returns"] = np.asarray(self._returns, np.float64)
        group["episode_timeouts"] = np.asarray(self._timeouts, np.uint8)
        for name, values in (("seeds", self._seeds), ("behaviors", self._behaviors)):
            if None not in values:
                group[f"episode_{name}"] = np.asarray(values, np.int64)
        if self._labels:
            group["behaviors"] = [label.encode() for label in self._labels]
