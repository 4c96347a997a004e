"""Recognise the team of a published SMAC dataset, and check its episodes; all formats of SMAC data share this.

Two simulators are called SMAC, and their observations do not fit together
(docs/simulators.md#two-simulators-of-one-name). Data of oxwhirl's SMAC get the task ``smac/<map>``. Data of its
MAPPO variant, in which each of n agents with A choices also sees every agent's last action, its own id and the
centre of the map, n (A + 1) + 4 numbers more, are a team of their own under ``smac-mappo/<map>``; no simulator of
this package serves it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets import Claim, Episode, require_available, require_finite, teams
from omcda_deploy.datasets.episodes import repeat_last, team_reward, whole
from omcda_deploy.datasets.teams import Sizes
from omcda_deploy.errors import DatasetError, UnknownNameError
from omcda_deploy.spec import TeamSpec, require_same_contract

_STOCK, _MAPPO = "smac/", "smac-mappo/"


def team_of(path: Path, claim: Claim | None, sizes: Sizes) -> TeamSpec:
    """Spec of a SMAC team as :func:`team_spec` returns it, unless ``claim`` names or describes another team.

    Raises what :func:`team_spec` and :func:`omcda_deploy.datasets.teams.team_of` raise.
    """
    task = None if claim is None else claim.task
    smac = task is None or task.startswith((_STOCK, _MAPPO))
    if not smac or claim not in (None, Claim(task)):
        return teams.team_of(path, claim, sizes)
    (agent, *_) = sizes.agents
    return team_spec(
        path,
        agents=len(sizes.agents),
        observation_size=agent.observation_size,
        choices=agent.action.size,
        state_size=sizes.state_size,
        task=task,
    )


def team_spec(
    path: Path, *, agents: int, observation_size: int, choices: int, state_size: int, task: str | None
) -> TeamSpec:
    """Spec of a team of these sizes on the map that ``task``, or else ``path``, names.

    Raises :class:`DatasetError` where no map is named or the sizes are neither variant's, UnknownNameError for
    another task, and ContractError, naming both sizes, where ``task`` is the other variant's.
    """
    maps = [name.removeprefix(_STOCK) for name in registry.tasks() if name.startswith(_STOCK)]
    tasks = [variant + name for name in maps for variant in (_STOCK, _MAPPO)]
    if task is not None and task not in tasks:
        raise UnknownNameError("SMAC task", task, tasks)
    name = task.split("/")[1] if task else _named_map(path, maps)
    if name is None:
        raise DatasetError(
            f"{path}: expected one of the maps {', '.join(maps)} in the path: name it with --task {_STOCK}<map>; "
            f"for other data {teams.HOW_TO_SAY}"
        )
    stock = replace(registry.team_spec(_STOCK + name), state_size=state_size)
    extra = len(stock.agents) * (stock.action_size + 1) + 4
    mappo = replace(
        stock,
        task=_MAPPO + name,
        agents=tuple(
            replace(agent, observation_size=agent.observation_size + extra) for agent in stock.agents
        ),
    )
    sizes = (agents, observation_size, choices)
    for variant_spec in (stock, mappo):
        if sizes == _sizes(variant_spec):
            requested = {stock.task: stock, mappo.task: mappo}.get(task or variant_spec.task, variant_spec)
            require_same_contract(variant_spec, requested, str(path), "the task asked for")
            return variant_spec
    raise DatasetError(
        f"{path}: expected (agents, observation size, choices) {_sizes(stock)} of {stock.task} or "
        f"{_sizes(mappo)} of {mappo.task}, got {sizes}: name the data's own map with --task"
    )


def _sizes(spec: TeamSpec) -> tuple[int, int, int]:
    return len(spec.agents), spec.observation_size, spec.action_size


def _named_map(path: Path, maps: list[str]) -> str | None:
    """The map in the innermost part of the path that holds one."""
    for part in reversed(path.absolute().parts):
        for name in sorted(maps, key=len, reverse=True):
            if re.search(rf"(?<![a-z0-9]){name.lower()}(?![a-z0-9])", part.lower()):
                return name
    return None


def checked_episode(
    label: str,
    observations: NDArray[Any],
    states: NDArray[Any],
    actions: NDArray[Any],
    action_masks: NDArray[Any],
    rewards: NDArray[Any],
    timeout: bool,
) -> Episode:
    """Check arrays of any number types and make an :class:`Episode` of them; shapes are those stated there.

    ``rewards`` are [T] or [T, N], and then equal for all agents. Where ``observations``, ``states`` and
    ``action_masks`` have T rows only, the last one stands in for the final one that was not recorded. Raises
    :class:`DatasetError`, which begins with ``label``, for values that cannot be trained on.
    """
    if not observations.shape[1] == action_masks.shape[1] == actions.shape[1]:
        raise DatasetError(
            f"{label}: expected observations, availability and actions of equally many agents, got "
            f"{observations.shape[1]}, {action_masks.shape[1]} and {actions.shape[1]}"
        )
    rewards = team_reward(rewards, label)
    if len(observations) == len(actions):
        observations, states, action_masks = map(repeat_last, (observations, states, action_masks))
    if ((action_masks != 0) & (action_masks != 1)).any():
        raise DatasetError(f"{label}: availability of actions: expected 0 or 1, got other numbers")
    if not whole(actions):
        raise DatasetError(f"{label}: actions: expected whole numbers, the choices, got others")
    masks = action_masks.astype(np.uint8)
    episode = Episode(
        observations.astype(np.float32),
        states.astype(np.float32),
        actions.astype(np.int64),
        rewards.astype(np.float64),
        timeout=timeout,
        action_masks=masks,
        label=label,
    )
    for name, values in (
        ("obs", episode.observations),
        ("state", episode.states),
        ("reward", episode.rewards),
    ):
        require_finite(values, 0, name, label)
    require_available(episode.actions, masks, np.arange(len(episode)), label)
    return episode
