"""PyMARL's episode batches as HDF5: the SMAC data of CFCQL (Shao et al., 2023), ICQ (Yang et al., 2021) and ODIS.

A source is one file, or a folder of files ``part_0.h5``, ``part_1.h5`` and so on. The layout and the use of its
flags are in docs/baselines.md#pymarl-hdf5.

| array           | shape        | |
|-----------------|--------------|-|
| `obs`           | [E, T, N, O] | padded to T, one more than the episode limit |
| `state`         | [E, T, S]    | centralised |
| `actions`       | [E, T, N, 1] | |
| `avail_actions` | [E, T, N, A] | all zeros in padding |
| `reward`        | [E, T, 1]    | of the team |
| `terminated`    | [E, T, 1]    | 1 in an episode's last transition; at the time limit only in some recordings |
| `filled`        | [E, T, 1]    | 1 in recorded rows |

PyMARL's runners mark the row behind the last transition as filled too: it holds the final observation, and a
random action. So `terminated`, not `filled`, tells where an episode ends, and one that never terminates ran into
the limit. Whether `terminated` is set there depends on SMAC's option `continuing_episode`, so an episode as long
as the limit was ended by it, whatever the flag says. The final row is taken where it was recorded, which its
availability shows, since even the dead can choose no-op; else the row before stands in for it. Other arrays
(`probs`, `actions_onehot`) are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Claim, Episode, Recording
from omcda_deploy.datasets.hdf5 import DamagedError, opened
from omcda_deploy.datasets.smac_teams import checked_episode, team_of
from omcda_deploy.datasets.teams import Sizes
from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import ActionSpec

SOURCE = "file of PyMARL's episodes or folder of its part_N.h5 (CFCQL, ICQ, ODIS)"

_DIMENSIONS = {
    "obs": 4,
    "state": 3,
    "actions": 4,
    "avail_actions": 4,
    "reward": 3,
    "terminated": 3,
    "filled": 3,
}
_PART = re.compile(r"part_(\d+)\.(?:h5|hdf5)")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_AGAIN = "download it again"
_BYTES_PER_READ = 64 << 20  # a chunk of a compressed file holds many episodes: few reads decompress it once


def recognizes(path: Path) -> bool:
    """True for an HDF5 file with the arrays ``filled`` and ``terminated``, and for a folder of such parts."""
    if path.is_dir():
        parts = _numbered_parts(path)
        return bool(parts) and recognizes(next(iter(parts.values())))
    if not path.is_file():
        return False
    with path.open("rb") as head:
        if head.read(len(_SIGNATURE)) != _SIGNATURE:
            return False
    try:
        with opened(path, _AGAIN) as file:
            return "filled" in file and "terminated" in file
    except DamagedError:  # truncated, which the reader of files with this ending reports better
        return False


@contextmanager
def open_recording(path: Path, claim: Claim | None) -> Iterator[Recording]:
    """Open a source of episodes. Raises :class:`DatasetError` naming the part, array or episode that does not fit.

    Further errors are those of :func:`~omcda_deploy.datasets.smac_teams.team_of`.
    """
    with ExitStack() as stack:
        files = {part: stack.enter_context(opened(part, _AGAIN)) for part in _parts(path)}
        shapes = {part: _row_shapes(part, file) for part, file in files.items()}
        first = next(iter(shapes))
        for part, shape in shapes.items():
            if different := [name for name in _DIMENSIONS if shape[name] != shapes[first][name]]:
                (name, *_) = different
                raise DatasetError(
                    f"{part}: array {name}: expected episodes of shape {list(shapes[first][name])}, as in "
                    f"{first.name}, got {list(shape[name])}: put the parts of one recording alone into a folder"
                )
        rows, agents, observation_size = shapes[first]["obs"]
        sizes = Sizes.of_arrays(
            agents,
            observation_size,
            ActionSpec("discrete", shapes[first]["avail_actions"][-1]),
            state_size=shapes[first]["state"][-1],
            episode_limit=rows - 1,
        )
        spec = team_of(path, claim, sizes)
        count = sum(len(file["filled"]) for file in files.values())
        yield Recording(
            spec,
            count,
            (e for part, file in files.items() for e in _episodes(file, part, spec.episode_limit)),
        )


def _numbered_parts(folder: Path) -> dict[int, Path]:
    """Parts by number, in order."""
    parts = {int(match[1]): path for path in folder.iterdir() if (match := _PART.fullmatch(path.name))}
    return dict(sorted(parts.items()))


def _parts(path: Path) -> list[Path]:
    """The file itself, or the parts of a folder. Raises :class:`DatasetError` where one in between is missing."""
    if not path.is_dir():
        return [path]
    parts = _numbered_parts(path)
    if not parts:
        raise DatasetError(f"{path}: expected files part_0.h5, part_1.h5, …, found none: name a file instead")
    if missing := sorted(set(range(min(parts), max(parts))) - parts.keys()):
        raise DatasetError(
            f"{path}: expected part_{missing[0]}.h5 between part_{min(parts)} and part_{max(parts)}, found none: "
            "download it, or rename the others"
        )
    return list(parts.values())


def _row_shapes(path: Path, file: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of one episode's arrays. Raises :class:`DatasetError` for arrays that do not fit each other."""
    rows = getattr(file.get("filled"), "shape", ())[:2]
    for name, dimensions in _DIMENSIONS.items():
        array = file.get(name)
        shape = getattr(array, "shape", None)
        if shape is None or len(shape) != dimensions or shape[:2] != rows or 0 in shape[2:]:
            raise DatasetError(
                f"{path}: array {name}: expected {dimensions} dimensions, the first two as those of filled, "
                f"got {'no such array' if shape is None else list(shape)}"
            )
        if array.dtype.kind not in "fiub":
            raise DatasetError(f"{path}: array {name}: expected numbers, got type {array.dtype}")
    if file["filled"].shape[1] < 2:
        raise DatasetError(f"{path}: array filled: expected episodes of at least 2 rows, got {list(rows)}")
    return {name: file[name].shape[1:] for name in _DIMENSIONS}


def _episodes(file: Any, path: Path, limit: int) -> Iterator[Episode]:
    count = len(file["filled"])
    size = sum(int(np.prod(file[name].shape[1:])) * file[name].dtype.itemsize for name in _DIMENSIONS)
    together = max(1, _BYTES_PER_READ // size)
    for start in range(0, count, together):
        batch = {name: file[name][start : start + together] for name in _DIMENSIONS}
        for index in range(len(batch["filled"])):
            rows = {name: values[index] for name, values in batch.items()}
            yield _episode(f"{path}: episode {start + index}", rows, limit)


def _episode(label: str, rows: dict[str, NDArray[Any]], limit: int) -> Episode:
    ends = np.flatnonzero(rows["terminated"][:, 0])
    steps = int(ends[0]) + 1 if ends.size else limit
    filled = rows["filled"][:, 0] != 0
    if len(filled) < steps or not filled[:steps].all():
        raise DatasetError(
            f"{label}: expected {steps} filled rows, up to {'its end' if ends.size else 'the time limit'}, got "
            f"{int(np.argmin([*filled, False]))}: cut it out, or download the file again"
        )
    masks = rows["avail_actions"]
    rows_recorded = steps + int(len(masks) > steps and masks[steps].any())
    return checked_episode(
        label,
        rows["obs"][:rows_recorded],
        rows["state"][:rows_recorded],
        rows["actions"][:steps, :, 0],
        masks[:rows_recorded],
        rows["reward"][:steps, 0],
        timeout=steps >= limit,
    )
