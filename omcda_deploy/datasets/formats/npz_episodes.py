"""Folders of ``.npz`` files, one per episode, as ``numpy.savez`` writes them: the format for logs of one's own.

docs/datasets.md#your-own-logs describes it with an example. Files are taken in the order of their names.

| key            | shape                  | |
|----------------|------------------------|-|
| `observations` | [T+1, N, O]            | the last row is the final observation |
| `actions`      | [T, N, A], or [T, N]   | numbers, or whole numbers: choices |
| `rewards`      | [T], or [T, N]         | of the team; of agents only where equal |
| `timeout`      | one value              | 1 where a time limit cut the episode, 0 where the task ended |
| `states`       | [T+1, S]               | optional; else all observations joined |
| `action_masks` | [T+1, N, A]            | optional, choices only; else all are available |
| `seed`         | one value              | optional |

`actions` and `rewards` may have T+1 rows, where the last is all NaN. No pickles: numpy refuses to load any here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Claim, Episode, Recording
from omcda_deploy.datasets.episodes import all_available, team_reward, whole
from omcda_deploy.datasets.teams import Sizes, claimed_team, team_of
from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import ActionSpec, TeamSpec

SOURCE = "folder of .npz episodes, one per file"

_REQUIRED = ("observations", "actions", "rewards", "timeout")
_OPTIONAL = ("states", "action_masks", "seed")
_Arrays = Mapping[str, NDArray[Any]]


def recognizes(path: Path) -> bool:
    """True for a folder with at least one ``.npz`` file."""
    return bool(_files(path))


@contextmanager
def open_recording(path: Path, claim: Claim | None) -> Iterator[Recording]:
    """Open a folder of episodes. Raises :class:`DatasetError` naming the file and the array that does not fit.

    Further errors are those of :func:`~omcda_deploy.datasets.teams.team_of`.
    """
    files = _files(path)
    if not files:
        raise DatasetError(f"{path}: expected a {SOURCE}, found no .npz files in it")
    claimed = claimed_team(claim)
    first = _load(files[0])
    discrete = first["actions"].ndim == 2 if claimed is None else claimed.action_kind == "discrete"
    _require_axes(first, files[0], discrete)
    spec = team_of(path, claim, _sizes(first, files[0], claimed))
    loaded = chain([(files[0], first)], ((file, _load(file)) for file in files[1:]))
    yield Recording(spec, len(files), (_episode(file, arrays, spec) for file, arrays in loaded))


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("[!.]*.npz")) if path.is_dir() else []


def _load(file: Path) -> _Arrays:
    """Read the arrays of an episode. Raises :class:`DatasetError` for other keys, and for what are no numbers."""
    try:
        with file.open("rb") as stream:  # numpy would leave it open where it is no archive
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            arrays = {str(name): np.asarray(archive[name]) for name in archive}
    except Exception as error:  # a damaged or encrypted archive makes zipfile and numpy raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"{file} cannot be read as numpy's .npz without pickles ({reason}): write it again with numpy.savez"
        ) from error
    keys = f"{', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}"
    if missing := [name for name in _REQUIRED if name not in arrays]:
        raise DatasetError(f"{file}: expected the keys {keys}, missing is {', '.join(missing)}: add it")
    if unknown := sorted(arrays.keys() - {*_REQUIRED, *_OPTIONAL}):
        raise DatasetError(
            f"{file}: expected the keys {keys}, got {', '.join(unknown)} too: rename or drop it"
        )
    for name, values in arrays.items():
        if values.dtype.kind not in "fiub":
            raise DatasetError(
                f"{file}: {name}: expected numbers, got {values.dtype}: convert the array first"
            )
    return arrays


def _require_axes(arrays: _Arrays, file: Path, discrete: bool) -> None:
    """Raise :class:`DatasetError` for arrays of other axes than the module's table says, or of unequal agents."""
    axes = {
        "observations": ("[T+1, N, O]", (3,)),
        "actions": ("[T, N] of choices", (2,)) if discrete else ("[T, N, A] of numbers", (3,)),
        "rewards": ("[T], or [T, N]", (1, 2)),
        "states": ("[T+1, S]", (2,)),
        "action_masks": ("[T+1, N, A]", (3,)),
    }
    for name, (shape, dimensions) in axes.items():
        values = arrays.get(name)
        if values is not None and (values.ndim not in dimensions or 0 in values.shape):
            raise DatasetError(
                f"{file}: {name}: expected shape {shape}, got {list(values.shape)}: T steps of N agents, one axis "
                "each (docs/datasets.md)"
            )
    counts = {
        name: arrays[name].shape[1] for name in ("observations", "actions", "action_masks") if name in arrays
    }
    if len(set(counts.values())) != 1:
        raise DatasetError(f"{file}: expected equally many agents in all arrays, got {counts}")


def _sizes(arrays: _Arrays, file: Path, claimed: TeamSpec | None) -> Sizes:
    _, agents, size = arrays["observations"].shape
    if arrays["actions"].ndim == 3:
        action = ActionSpec("continuous", arrays["actions"].shape[2])
    elif "action_masks" in arrays:
        action = ActionSpec("discrete", arrays["action_masks"].shape[2])
    elif claimed is not None:
        action = ActionSpec("discrete", claimed.action_size)
    else:
        raise DatasetError(
            f"{file}: expected action_masks [T+1, N, A] beside actions that are choices, or --team FILE, to say "
            "how many choices there are"
        )
    state_size = arrays["states"].shape[1] if "states" in arrays else agents * size
    return Sizes.of_arrays(agents, size, action, state_size)


def _episode(file: Path, arrays: _Arrays, spec: TeamSpec) -> Episode:
    discrete = spec.action_kind == "discrete"
    _require_axes(arrays, file, discrete)
    observations, actions = arrays["observations"], arrays["actions"]
    masks = arrays.get("action_masks")
    if discrete and masks is None:
        masks = all_available(spec, len(observations))
    if discrete and whole(actions):
        actions = actions.astype(np.int64)
    return Episode(
        observations,
        arrays.get("states", observations.reshape(len(observations), -1)),
        actions,
        team_reward(arrays["rewards"], str(file)),
        timeout=bool(_single(arrays, file, "timeout", 2)),
        action_masks=masks,
        seed=_single(arrays, file, "seed", 2**63) if "seed" in arrays else None,
        label=str(file),
    )


def _single(arrays: _Arrays, file: Path, name: str, end: int) -> int:
    """Read one whole number from 0 to below ``end``."""
    values = arrays[name]
    if values.size != 1 or not 0 <= values.item() < end or not whole(values * 1):
        raise DatasetError(
            f"{file}: {name}: expected one whole number from 0 to {end - 1}, got {str(values.tolist())[:60]}: give "
            "one for the whole episode"
        )
    return int(values.item())
