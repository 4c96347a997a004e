"""Minari's datasets of teams, read; :mod:`omcda_deploy.datasets.minari_export` writes them.

A source is the folder of a dataset, ``…/NAME-v0``, or its ``data``. Each agent has an entry in the Dict of the
observation space and in that of the action space: observations a Box of one axis, or a Dict of ``observation`` and
``action_mask``; actions a Box of one axis or a Discrete. The reward is the team's. An entry ``state`` of the infos
[T+1, S] is the centralised state; without it the state is all observations joined. Agents are in the order of the
space, in which gymnasium sorts names; a team given with ``--team`` may order them otherwise. Files that this
package wrote hold the team's spec and need no more.

A step that terminates ends an episode, any other end is a cut by the time limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Claim, Episode, Recording
from omcda_deploy.datasets.episodes import all_available, whole
from omcda_deploy.datasets.minari_package import import_minari
from omcda_deploy.datasets.teams import EPISODE_LIMIT, Sizes, agents_of_spaces, team_of
from omcda_deploy.errors import ContractError, DatasetError
from omcda_deploy.spec import TeamSpec

SOURCE = "folder of a Minari dataset, such as NAME-v0"
SPEC = "omcda_spec"  # metadata entry of files that this package wrote

_METADATA = "metadata.json"


def recognizes(path: Path) -> bool:
    """True for a folder with the metadata of a Minari dataset."""
    try:
        return {"data_format", "total_episodes"} <= set(json.loads(_metadata_file(path).read_text()))
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def open_recording(path: Path, claim: Claim | None) -> Iterator[Recording]:
    """Open a dataset. Raises :class:`DatasetError` naming the space, array or episode that does not fit.

    Further errors are those of :func:`~omcda_deploy.datasets.teams.team_of`.
    """
    metadata = _metadata(path)
    with _naming(path):
        storage = import_minari().storage.read(_metadata_file(path).parent)
        count = int(metadata["total_episodes"])
        spaces = storage.observation_space, storage.action_space
        first = next(iter(storage.get_episodes([0])), None) if count > 0 else None
    if first is None:
        raise DatasetError(f"{path}: expected at least one episode, got none")
    spec = _spec(path, claim, metadata, spaces, first)
    yield Recording(spec, count, _episodes(storage, path, spec, count))


def _metadata_file(path: Path) -> Path:
    return next((f for f in (path / "data" / _METADATA, path / _METADATA) if f.is_file()), path / _METADATA)


def _metadata(path: Path) -> Mapping[str, Any]:
    """Read the metadata. Raises :class:`DatasetError` unless both spaces are in it: Minari would run other code."""
    file = _metadata_file(path)
    try:
        metadata = json.loads(file.read_text())
        missing = {"observation_space", "action_space", "total_episodes", "data_format"} - metadata.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise DatasetError(f"{file} is not the metadata of a Minari dataset: {error}") from error
    if missing:
        raise DatasetError(
            f"{file}: expected {', '.join(sorted(missing))}, found none: write the dataset again"
        )
    checked: Mapping[str, Any] = metadata
    return checked


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever Minari raises on a damaged file into a :class:`DatasetError`."""
    try:
        yield
    except ImportError as error:
        raise DatasetError(f"{path} needs another package of Minari's: {error}") from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        RuntimeError,  # NotImplementedError is one
    ) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DatasetError(
            f"{path} cannot be read as a Minari dataset ({type(error).__name__}: {reason}): download it again"
        ) from error


def _spec(
    path: Path,
    claim: Claim | None,
    metadata: Mapping[str, Any],
    spaces: tuple[Any, Any],
    first: Mapping[str, Any],
) -> TeamSpec:
    if SPEC in metadata and claim in (None, Claim()):
        try:
            return TeamSpec.from_json(json.loads(metadata[SPEC]))
        except (TypeError, ValueError, ContractError) as error:
            raise DatasetError(f"{path}: its team spec is damaged: {error}") from error
    by_agent = [getattr(space, "spaces", None) for space in spaces]
    observation_spaces, action_spaces = by_agent
    if not isinstance(observation_spaces, Mapping) or not isinstance(action_spaces, Mapping):
        raise DatasetError(
            f"{path}: expected Dict spaces with an entry for each agent, got {spaces[0]} and {spaces[1]}: write "
            "the dataset of a single agent as a team of one"
        )
    agents = agents_of_spaces(list(observation_spaces), observation_spaces, action_spaces, str(path))
    state = _state(first, f"{path}: episode 0")
    size = len(agents) * max(agent.observation_size for agent in agents) if state is None else state.shape[1]
    return team_of(path, claim, Sizes(agents, size, named=True, episode_limit=_episode_limit(metadata)))


def _episode_limit(metadata: Mapping[str, Any]) -> int:
    """The time limit of the environment that the metadata describe, where they do."""
    try:
        return int(json.loads(metadata["env_spec"])["max_episode_steps"])
    except (KeyError, TypeError, ValueError):
        return EPISODE_LIMIT


def _episodes(storage: Any, path: Path, spec: TeamSpec, count: int) -> Iterator[Episode]:
    with _naming(path):
        numbers = range(count)
        episodes = zip(storage.get_episodes(numbers), storage.get_episode_metadata(numbers), strict=True)
    for number in numbers:
        with _naming(path):
            data, about = next(episodes)
        yield _episode(data, spec, about.get("seed"), f"{path}: episode {number}")


def _episode(data: Mapping[str, Any], spec: TeamSpec, seed: Any, label: str) -> Episode:
    rows = _by_agent(data["observations"], spec, label, "observations")
    vectors = [value["observation"] if isinstance(value, Mapping) else value for value in rows]
    observations = _padded(vectors, [agent.observation_size for agent in spec.agents], label, "observations")
    actions = _by_agent(data["actions"], spec, label, "actions")
    sizes = [agent.action.size for agent in spec.agents]
    masks = None
    if spec.action_kind == "continuous":
        joined = _padded(actions, sizes, label, "actions")
    else:
        if any(np.ndim(choices) != 1 for choices in actions):
            raise DatasetError(f"{label}: actions: expected one choice for each step of each agent")
        joined = _padded(
            [np.asarray(choices)[:, None] for choices in actions], [1] * len(sizes), label, "actions"
        )
        joined = joined[..., 0].astype(np.int64) if whole(joined) else joined[..., 0]
        all_masks = all_available(spec, len(observations))
        given = [value.get("action_mask") if isinstance(value, Mapping) else None for value in rows]
        parts = [all_masks[:, i, : sizes[i]] if mask is None else mask for i, mask in enumerate(given)]
        masks = _padded(parts, sizes, label, "action_mask")
    state = _state(data, label)
    return Episode(
        observations,
        observations.reshape(len(observations), -1) if state is None else state,
        joined,
        np.asarray(data["rewards"]),
        timeout=_ended_by_limit(data, label),
        action_masks=masks,
        seed=None if seed is None else int(seed),
        label=label,
    )


def _by_agent(values: Any, spec: TeamSpec, label: str, what: str) -> list[Any]:
    """Values of the agents in team order."""
    if not isinstance(values, Mapping) or not set(spec.names) <= values.keys():
        names = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        raise DatasetError(f"{label}: {what}: expected those of {', '.join(spec.names)}, got {names}")
    return [values[name] for name in spec.names]


def _padded(values: Sequence[Any], sizes: Sequence[int], label: str, what: str) -> NDArray[Any]:
    """Stack the agents' [T, size] to [T, N, the largest size], with zeros behind the shorter ones."""
    arrays = [np.asarray(value) for value in values]
    wrong = [a.ndim != 2 or a.shape[1] != size for a, size in zip(arrays, sizes, strict=True)]
    if any(wrong) or len({len(array) for array in arrays}) != 1:
        raise DatasetError(
            f"{label}: {what}: expected vectors of {list(sizes)} numbers, one per agent, in equally many steps, "
            f"got shapes {[list(array.shape) for array in arrays]}"
        )
    return np.stack([np.pad(a, ((0, 0), (0, max(sizes) - a.shape[1]))) for a in arrays], axis=1)


def _state(data: Mapping[str, Any], label: str) -> NDArray[Any] | None:
    infos = data.get("infos")
    if not isinstance(infos, Mapping) or "state" not in infos:
        return None
    state = np.asarray(infos["state"])
    if state.ndim != 2 or state.dtype.kind not in "fiub":
        raise DatasetError(f"{label}: infos: state: expected shape [T+1, S], got {list(state.shape)}")
    return state


def _ended_by_limit(data: Mapping[str, Any], label: str) -> bool:
    terminations, truncations = (np.asarray(data[name]) for name in ("terminations", "truncations"))
    if any(flags.shape != np.shape(data["rewards"]) for flags in (terminations, truncations)):
        raise DatasetError(
            f"{label}: expected as many terminations and truncations as rewards, got shapes "
            f"{list(terminations.shape)}, {list(truncations.shape)} and {list(np.shape(data['rewards']))}"
        )
    terminations, truncations = terminations != 0, truncations != 0
    early = np.flatnonzero((terminations | truncations)[:-1])
    if early.size:
        raise DatasetError(
            f"{label}: expected its end in the last of {len(terminations)} steps, got one in step {early[0]}: "
            "write an episode for each end"
        )
    return not bool(terminations[-1:].any())
