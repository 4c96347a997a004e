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
without it an episode of exactly 1,000 transitions was ended by the time limit. The attribute `format_version` is 2;
files of version 1 differ in their digest alone, which covers neither states nor time limits, and keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import ContentDigest, Dataset, Float, RowIndex, Scalar, require_available
from omcda_deploy.datasets.behavior import PREFIX
from omcda_deploy.datasets.behavior import read_rows as read_behavior
from omcda_deploy.datasets.hdf5 import FORMAT_VERSION, GROUP, RESERVED_ATTRIBUTES, DamagedError, opened
from omcda_deploy.datasets.omiga_header import shape_of, spec_of, version_of
from omcda_deploy.datasets.omiga_rows import read_masks, read_rows, read_states
from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import TeamSpec

SUFFIXES = (".hdf5", ".h5")
PUBLISHED_LIMIT = 1000  # transitions


def holds_dataset(path: Path) -> bool:
    """Test if a file has this format's arrays; False for one that is damaged."""
    try:
        with _opened(path) as file:
            return all(name in file for name in "osard")
    except DamagedError:
        return False


class Header(NamedTuple):
    """A file's team and metadata, without its rows."""

    spec: TeamSpec
    metadata: dict[str, Scalar]
    exact_behavior: bool  # it has the distributions that acted


def read_header(path: Path) -> Header:
    """Read the team and the metadata of a file, and none of its rows. Errors are those of :func:`read`."""
    with _opened(path) as file:
        group = _group(file, path)
        spec = spec_of(group, None, path, shape_of(file, path))
        return Header(spec, _metadata(group), group is not None and f"{PREFIX}log_prob" in group)


def read(path: str | Path, task: TeamSpec | str | None = None) -> Dataset:
    """Read and check a file; one float32 copy of each array is held, whatever the file's types.

    ``task`` is the task that the data must fit, or its spec. Without it the file's own spec counts; a file without
    a spec is recognised by its name or shapes. Raises :class:`DatasetError` for a missing or damaged file, wrong
    shapes, NaN or infinity, numbers behind those of a short agent, a recorded choice that was not available, data
    that changed since they were written, or a task that the data do not fit.
    """
    path = Path(path)
    with _opened(path) as file:
        shape = shape_of(file, path)
        group = _group(file, path)
        spec = spec_of(group, task, path, shape)
        content = ContentDigest()
        rows = read_rows(file, shape, spec, content, path)
        states = read_states(file, rows, spec, group, path)
        if not np.shares_memory(states, rows.observations):
            content.update("s", states)
        index = _index(rows.final_flags, path)
        actions, masks = rows.actions, None
        if shape.discrete:
            masks = read_masks(file["avail"], spec, path)
            content.update("avail", masks)
            actions = actions[..., 0]
            require_available(actions, masks, index.transitions, str(path))
        episodes = _episode_arrays(group, index, path)
        timeouts = episodes.get("episode_timeouts", index.episode_length == PUBLISHED_LIMIT) != 0
        content.update("timeouts", timeouts.astype(np.uint8))
        behavior = read_behavior(group, len(rows.observations), spec, path)
        for name, values in (behavior or {}).items():
            content.update(PREFIX + name, values)
        digests = content.hexdigests()
        version = _unchanged_version(group, digests, path)
        metadata = _metadata(group)
        behaviors = _behaviors(group, episodes, path)
    terminal = np.zeros(index.transitions.size, np.bool_)
    timeout = np.zeros(index.transitions.size, np.bool_)
    timeout[index.last_transitions()] = timeouts
    terminal[index.last_transitions()] = ~timeouts
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
        digest=digests[version],
        action_masks=masks,
        digests=digests,
        behavior=behavior,
    )


def _index(final_flags: Float, path: Path) -> RowIndex:
    """Index the rows by their flags `d` [R]. Raises :class:`DatasetError` for other flags, or no closed episode."""
    final = final_flags == 1
    if (other := ~final & (final_flags != 0)).any():
        row = int(np.argmax(other))
        raise DatasetError(f"{path}: array d: expected 0 or 1, got {final_flags[row]} in row {row}")
    index = RowIndex.of(final)
    if not index.episode_start.size:
        found = "every row has d=1, so there is no transition" if final.all() else "no episode ends"
        raise DatasetError(
            f"{path}: {found}: expected d=1 on the row behind each episode's last transition, and d=0 before"
        )
    return index


def _unchanged_version(group: Any, digests: Mapping[int, str], path: Path) -> int:
    """Return the version of the digest that names a file's contents: the one that it carries, else the newest.

    Raises :class:`DatasetError` where the contents are no longer those of the stored digest.
    """
    if group is None or "digest" not in group.attrs:
        return FORMAT_VERSION
    version, stored = version_of(group, path), str(group.attrs["digest"])
    if stored != digests[version]:
        raise DatasetError(
            f"{path} was changed after it was written: expected digest {stored[:12]}…, found "
            f"{digests[version][:12]}…. Collect or download it again"
        )
    return version


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file for reading. Raises :class:`DatasetError` for one that is missing, truncated or no HDF5."""
    if not path.is_file():
        raise DatasetError(f"{path}: no such file. Make a dataset with  omcda-deploy collect")
    with opened(path, "copy or collect it again") as file:
        yield file


def _group(file: Any, path: Path) -> Any:
    """The group of a file that has one, else None."""
    group = file.get(GROUP)
    if group is not None and hasattr(group, "dtype"):
        raise DatasetError(
            f"{path}: {GROUP}: expected a group with the team's spec, got an array: collect again"
        )
    return group


def _episode_arrays(group: Any, index: RowIndex, path: Path) -> dict[str, NDArray[Any]]:
    """Arrays [E] of the group that it has. Raises :class:`DatasetError` for one of another length or type."""
    names = {
        "episode_returns": "fiu",
        "episode_timeouts": "iub",
        "episode_seeds": "iu",
        "episode_behaviors": "iu",
    }
    arrays = {name: np.asarray(group[name]) for name in names if group is not None and name in group}
    for name, values in arrays.items():
        if values.shape != index.episode_start.shape or values.dtype.kind not in names[name]:
            raise DatasetError(
                f"{path}: {GROUP}/{name}: expected one number for each of {index.episode_start.size} episodes, "
                f"got {values.dtype} of shape {list(values.shape)}"
            )
    return arrays


def _behaviors(group: Any, episodes: Mapping[str, NDArray[Any]], path: Path) -> tuple[str, ...]:
    """Labels of the policies that acted. Raises :class:`DatasetError` where an episode's is not among them."""
    if group is None or "behaviors" not in group:
        labels: tuple[str, ...] = ()
    else:
        labels = tuple(
            name.decode() if isinstance(name, bytes) else str(name)
            for name in np.atleast_1d(group["behaviors"])
        )
    numbers = episodes.get("episode_behaviors")
    if numbers is not None and not ((numbers >= 0) & (numbers < len(labels))).all():
        raise DatasetError(
            f"{path}: {GROUP}/episode_behaviors: expected numbers of the {len(labels)} labels in behaviors, got "
            f"{numbers.min()} to {numbers.max()}: collect again"
        )
    return labels


def _metadata(group: Any) -> dict[str, Scalar]:
    if group is None:
        return {}
    return {
        str(name): value.item() if isinstance(value, np.generic) else value
        for name, value in group.attrs.items()
        if name not in RESERVED_ATTRIBUTES
    }
