"""PyMARL's episode batches as HDF5: the SMAC data of CFCQL (Shao et al., 2023) and ICQ (Yang et al., 2021).

The layout and the use of its flags are in docs/baselines.md#pymarl-hdf5.

| array           | shape        | |
|-----------------|--------------|-|
| `obs`           | [E, T, N, O] | padded to T, one more than the episode limit |
| `state`         | [E, T, S]    | centralised |
| `actions`       | [E, T, N, 1] | |
| `avail_actions` | [E, T, N, A] | all zeros in padding |
| `reward`        | [E, T, 1]    | of the team |
| `terminated`    | [E, T, 1]    | 1 in an episode's last transition, unless the time limit ended it |
| `filled`        | [E, T, 1]    | 1 in recorded rows |

PyMARL's runners mark the row behind the last transition as filled too: it holds the final observation, and a random
action. So `terminated`, not `filled`, tells where an episode ends; one that never terminates ran into the limit.
The final row is taken where it was recorded, which its availability shows, since even the dead can choose no-op;
else the row before stands in for it. Other arrays (`probs`, `actions_onehot`) are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Episode, Recording
from omcda_deploy.datasets.hdf5 import import_h5py
from omcda_deploy.datasets.smac_teams import checked_episode, team_spec
from omcda_deploy.errors import DatasetError

SOURCE = "file of PyMARL's episodes (CFCQL, ICQ)"

_DIMENSIONS = {
    "obs": 4,
    "state": 3,
    "actions": 4,
    "avail_actions": 4,
    "reward": 3,
    "terminated": 3,
    "filled": 3,
}
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_EPISODES_PER_READ = 16  # a chunk of a compressed file holds many


def recognizes(path: Path) -> bool:
    """True for an HDF5 file with the arrays ``filled`` and ``terminated``."""
    if not path.is_file():
        return False
    with path.open("rb") as head:
        if head.read(len(_SIGNATURE)) != _SIGNATURE:
            return False
    try:
        with import_h5py().File(path, "r") as file:
            return "filled" in file and "terminated" in file
    except OSError:  # truncated, which the reader of files with this ending reports better
        return False


@contextmanager
def open_recording(path: Path, task: str | None) -> Iterator[Recording]:
    """Open a file of episodes. Raises :class:`DatasetError` naming the array or episode that does not fit.

    Further errors are those of :func:`~omcda_deploy.datasets.smac_teams.team_spec`.
    """
    try:
        file = import_h5py().File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} is truncated or not HDF5: download it again") from error
    with file:
        rows = getattr(file.get("filled"), "shape", ())[:2]
        for name, dimensions in _DIMENSIONS.items():
            shape = getattr(file.get(name), "shape", None)
            if shape is None or len(shape) != dimensions or shape[:2] != rows:
                raise DatasetError(
                    f"{path}: array {name}: expected {dimensions} dimensions, the first two as those of filled, "
                    f"got {'no such array' if shape is None else list(shape)}"
                )
        count, _, agents, observation_size = file["obs"].shape
        spec = team_spec(
            path,
            agents=agents,
            observation_size=observation_size,
            choices=file["avail_actions"].shape[3],
            state_size=file["state"].shape[2],
            task=task,
        )
        yield Recording(spec, count, _episodes(file, path, count, spec.episode_limit))


def _episodes(file: Any, path: Path, count: int, limit: int) -> Iterator[Episode]:
    for start in range(0, count, _EPISODES_PER_READ):
        batch = {name: file[name][start : start + _EPISODES_PER_READ] for name in _DIMENSIONS}
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
        timeout=not ends.size,
    )
