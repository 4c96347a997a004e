"""OG-MARL's vaults (Formanek et al., 2023) of SMAC data: folders that flashbax writes, read without it and JAX.

A vault (docs/baselines.md#og-marl-vaults) is one zarr array per field in an OCDBT key-value store, and
``metadata.json``; rows are flat over time:

| array          | shape        | |
|----------------|--------------|-|
| `observations` | [1, R, N, O] | |
| `actions`      | [1, R, N]    | |
| `rewards`      | [1, R, N]    | equal for all agents |
| `terminals`    | [1, R, N]    | 1 in an episode's last row, at time limits too: SMAC's own `terminated` |
| `truncations`  | [1, R, N]    | 0 throughout in published SMAC vaults; 1 ends an episode at its time limit |
| `infos.state`  | [1, R, S]    | centralised; of the MAPPO variant, all agents' states joined |
| `infos.legals` | [1, R, N, A] | |

Every row is a transition, and the observation behind an episode's last one was not recorded: the last one stands in
for it. An episode as long as the map's limit was ended by it, whichever flag says so. (OG-MARL's own loader
bootstraps a truncated row from the next episode's first one, which would be wrong here.) Rows behind the last end
are no whole episode and are left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Claim, Episode, Recording
from omcda_deploy.datasets.smac_teams import checked_episode, team_of
from omcda_deploy.datasets.teams import Sizes
from omcda_deploy.errors import DatasetError, MissingExtraError
from omcda_deploy.spec import ActionSpec

SOURCE = "folder of an OG-MARL vault, such as 5m_vs_6m.vlt/Good"

_DIMENSIONS = {
    "observations": 4,
    "actions": 3,
    "rewards": 3,
    "terminals": 3,
    "truncations": 3,
    "infos.state": 3,
    "infos.legals": 4,
}
_CACHE_BYTES = 256 << 20  # for decoded chunks: one holds many episodes
_METADATA, _STORE = "metadata.json", "manifest.ocdbt"
_Read = Callable[[str, int, int], NDArray[Any]]

logger = logging.getLogger(__name__)


def recognizes(path: Path) -> bool:
    """True for a folder that holds a vault's two fixed files."""
    return (path / _METADATA).is_file() and (path / _STORE).is_file()


@contextmanager
def open_recording(path: Path, claim: Claim | None) -> Iterator[Recording]:
    """Open a vault. Raises :class:`DatasetError` naming the array or rows that do not fit.

    Further errors are those of :func:`~omcda_deploy.datasets.smac_teams.team_of`. A vault of continuous actions,
    and one of several seeds side by side, is refused.
    """
    shapes = _shapes(path)
    read, rows = _opened(path)
    _, _, agents, observation_size = shapes["observations"]
    sizes = Sizes.of_arrays(
        agents,
        observation_size,
        ActionSpec("discrete", shapes["infos.legals"][3]),
        state_size=shapes["infos.state"][2],
    )
    spec = team_of(path, claim, sizes)
    truncated = np.asarray(read("truncations", 0, rows).all(axis=1))
    ends = np.flatnonzero(read("terminals", 0, rows).all(axis=1) | truncated) + 1
    if not ends.size:
        raise DatasetError(f"{path}: expected terminals or truncations, found none among {rows} rows")
    if ends[-1] != rows:
        logger.warning("%s: the last %d rows are no whole episode and are left out", path, rows - ends[-1])
    bounds = list(pairwise([0, *ends.tolist()]))
    joined = spec.task.startswith("smac-mappo/")

    def episode(start: int, end: int) -> Episode:
        states = read("infos.state", start, end)
        return checked_episode(
            f"{path}: rows {start} to {end - 1}",
            read("observations", start, end),
            states.reshape(end - start, agents, -1) if joined else states,
            read("actions", start, end),
            read("infos.legals", start, end),
            read("rewards", start, end),
            timeout=bool(truncated[end - 1]) or end - start == spec.episode_limit,
        )

    yield Recording(spec, len(bounds), (episode(start, end) for start, end in bounds))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The arrays' shapes as the vault states them; their second entry means nothing."""
    try:
        structure = json.loads((path / _METADATA).read_text())["structure_shape"]
        stated = {
            name: tuple(int(size) for size in text.strip("()").split(",") if size.strip())
            for name, text in _flat(structure).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path / _METADATA}: expected a vault's structure, got {error!r}") from error
    if "infos.legals" not in stated:
        raise DatasetError(
            f"{path}: expected discrete actions with infos.legals, got a vault of {', '.join(sorted(stated))}. "
            "OMIGA publishes its MuJoCo data as HDF5 as well, which needs no conversion"
        )
    for name, dimensions in _DIMENSIONS.items():
        shape = stated.get(name, ())
        agents = shape[2:3] if name != "infos.state" else stated["infos.legals"][2:3]
        if len(shape) != dimensions or shape[0] != 1 or agents != stated["infos.legals"][2:3]:
            raise DatasetError(
                f"{path}: array {name}: expected {dimensions} dimensions, the first of length 1, and the agents of "
                f"infos.legals, got {list(shape) or 'no such array'}"
            )
    return stated


def _flat(structure: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested entries to ``outer.inner`` names."""
    flat: dict[str, str] = {}
    for name, value in structure.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _opened(path: Path) -> tuple[_Read, int]:
    """Open a vault: a function that reads rows of an array, [rows, …], and the number of rows."""
    try:
        import tensorstore
    except ImportError as error:
        raise MissingExtraError("tensorstore", "vault") from error
    base = {"driver": "file", "path": str(path.absolute())}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def open_array(name: str) -> Any:
        kvstore = {"driver": "ocdbt", "base": base, "path": name}
        try:
            return tensorstore.open(
                {"driver": "zarr", "kvstore": kvstore, "recheck_cached_data": "open"},
                context=context,
                read=True,
            ).result()
        except ValueError as error:
            raise DatasetError(f"{path}: array {name} cannot be opened: download the vault again") from error

    arrays = {name: open_array(f"{name}.") for name in _DIMENSIONS}

    def read(name: str, start: int, end: int) -> NDArray[Any]:
        try:
            return np.asarray(arrays[name][0, start:end].read().result())
        except ValueError as error:
            raise DatasetError(
                f"{path}: array {name} cannot be read from row {start} to {end - 1}: download the vault again"
            ) from error

    return read, int(open_array("vault_index").read().result()[0])
