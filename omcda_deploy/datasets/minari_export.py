"""Write a dataset as one of Minari's, for tools that read those; the layout is in :mod:`.formats.minari_folder`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from omcda_deploy.claims import claimed
from omcda_deploy.datasets import Dataset, Episode, require_rewards
from omcda_deploy.datasets.formats.minari_folder import SPEC
from omcda_deploy.datasets.minari_package import import_minari
from omcda_deploy.errors import DatasetError
from omcda_deploy.files import atomic_folder, folder_of, probe, refusal
from omcda_deploy.spec import AgentSpec, TeamSpec


def write_minari(dataset: Dataset, folder: str | Path) -> dict[str, Any]:
    """Write the closed episodes of ``dataset`` as a Minari dataset at ``folder``, which must not exist.

    Its last part is the dataset's name with a version, such as ``reach-v0``; below Minari's own folder
    (``$MINARI_DATASETS_PATH``, else ``~/.minari/datasets``) the parts in between are its namespace, and
    ``minari.load_dataset`` finds it. The folder appears when it is complete. Returns its id, path and numbers of
    episodes and steps. Raises :class:`DatasetError` for a folder that exists, cannot be written or has another
    name, and for returns-to-go in place of rewards; MissingExtraError without the package.
    """
    folder = Path(folder)
    require_rewards(dataset, str(folder))  # a reader would take anything for rewards
    minari = import_minari()
    identity = _identity(folder)
    match = minari.identity.fullmatch(identity)
    if match is None or match.group("version") is None:
        raise DatasetError(f"{folder}: expected a name and a version, such as reach-v0, got {folder.name}")
    if folder.exists():
        raise DatasetError(f"{folder} exists already: choose another name or version")
    spec, count = dataset.spec, len(dataset.episode_length)
    spaces = _spaces(spec, minari.spaces)
    try:
        probe(folder, _size(dataset))  # HDF5, which Minari writes, crashes the process on a full disk
        with folder_of(folder), claimed(folder), atomic_folder(folder) as whole:
            data = whole / "data"  # Minari's own sums of sizes need that
            data.mkdir()
            storage = minari.storage.new(data, *spaces, data_format="hdf5")
            storage.update_metadata(
                {
                    "dataset_id": identity,
                    "minari_version": minari.version,
                    "algorithm_name": str(dataset.metadata.get("behavior", "unknown")),
                    SPEC: json.dumps(spec.to_json(), sort_keys=True),
                }
            )
            episodes = (dataset.episode(number) for number in range(count))
            storage.update_episodes(minari.episode(**_buffer(episode, spec)) for episode in episodes)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be written {refusal(error)}") from error
    return {
        "id": identity,
        "path": str(folder),
        "episodes": count,
        "steps": int(dataset.episode_length.sum()),
    }


def _size(dataset: Dataset) -> int:
    """Bytes that the dataset will have on the disk, or a few more."""
    arrays = (dataset.observations, dataset.actions, dataset.rewards, dataset.states, dataset.action_masks)
    content = sum(array.nbytes for array in arrays if array is not None)
    groups = len(dataset.episode_length) * (5 + 3 * len(dataset.spec.agents))
    return content + content // 10 + 4096 * groups


def _identity(folder: Path) -> str:
    """The id by which Minari finds the folder, if it is below Minari's own; else the folder's name."""
    own = Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser().absolute()
    absolute = folder.absolute()
    return absolute.relative_to(own).as_posix() if absolute.is_relative_to(own) else folder.name


def _spaces(spec: TeamSpec, spaces: Any) -> tuple[Any, Any]:
    def observation(agent: AgentSpec) -> Any:
        vector = spaces.Box(-np.inf, np.inf, (agent.observation_size,), np.float32)
        if agent.action.kind == "continuous":
            return vector
        return spaces.Dict({"observation": vector, "action_mask": spaces.MultiBinary(agent.action.size)})

    def action(agent: AgentSpec) -> Any:
        if agent.action.kind == "discrete":
            return spaces.Discrete(agent.action.size)
        return spaces.Box(agent.action.low, agent.action.high, (agent.action.size,), np.float32)

    return (
        spaces.Dict({agent.name: observation(agent) for agent in spec.agents}),
        spaces.Dict({agent.name: action(agent) for agent in spec.agents}),
    )


def _buffer(episode: Episode, spec: TeamSpec) -> dict[str, Any]:
    """An episode as Minari's buffers hold it: Dicts of arrays over time."""
    steps, masks = len(episode), episode.action_masks
    observations: dict[str, Any] = {}
    actions: dict[str, Any] = {}
    for index, agent in enumerate(spec.agents):
        vectors = episode.observations[:, index, : agent.observation_size]
        if masks is None:
            observations[agent.name] = vectors
            actions[agent.name] = episode.actions[:, index, : agent.action.size]
        else:
            mask = masks[:, index, : agent.action.size].astype(np.int8)
            observations[agent.name] = {"observation": vectors, "action_mask": mask}
            actions[agent.name] = episode.actions[:, index]
    joined = np.array_equal(episode.states, episode.observations.reshape(steps + 1, -1))
    ends = np.arange(steps) == steps - 1
    return {
        "seed": episode.seed,
        "observations": observations,
        "actions": actions,
        "rewards": episode.rewards,
        "terminations": ends & (not episode.timeout),
        "truncations": ends & episode.timeout,
        "infos": None if joined else {"state": episode.states},
    }
