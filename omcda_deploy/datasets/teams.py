"""The team of a source: what the user says about it, against the sizes that the source tells.

:mod:`omcda_deploy.datasets.smac_teams` recognises the published SMAC data, which say it all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omcda_deploy import registry
from omcda_deploy.datasets import Claim
from omcda_deploy.errors import ConfigError, ContractError, DatasetError, OmcdaError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

HOW_TO_SAY = (
    "name a known task with --task, or describe the team with --team FILE, or name a new task with --task NAME "
    "--control-rate HZ"
)
EPISODE_LIMIT = 1000  # steps, where nobody says
_OPTIONAL = {
    "normalizer": {"kind": "none"},
    "episode_limit": EPISODE_LIMIT,
}  # fields that a file may leave out
_OPTIONAL_OF_AGENT = {"action_low": -1.0, "action_high": 1.0}
# A team as it is written, whose fields a file may have.
_WRITTEN = TeamSpec("any", (AgentSpec("any", 1, ActionSpec("continuous", 1)),), 1, 1.0).to_json()


@dataclass(frozen=True)
class Sizes:
    """A team as far as its source tells it."""

    agents: tuple[AgentSpec, ...]
    state_size: int
    named: bool = (
        False  # the source names the agents; else they are numbered, and all are as large as the largest
    )
    episode_limit: int = EPISODE_LIMIT  # that of the source where it tells one

    @classmethod
    def of_arrays(
        cls,
        agents: int,
        observation_size: int,
        action: ActionSpec,
        state_size: int,
        episode_limit: int = EPISODE_LIMIT,
    ) -> Sizes:
        """Sizes of agents in numbered arrays, who get the names ``agent_0`` and so on."""
        numbered = tuple(AgentSpec(f"agent_{index}", observation_size, action) for index in range(agents))
        return cls(numbered, state_size, episode_limit=episode_limit)


def read_team(path: Path) -> TeamSpec:
    """Read a team from a JSON file (docs/datasets.md#the-team). Raises :class:`ConfigError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): expected a team (JSON)") from error
    except ValueError as error:  # also for bytes that are not text
        raise ConfigError(f"{path} is not JSON: {error}: expected a team (docs/datasets.md)") from error
    try:
        agents = [{**_OPTIONAL_OF_AGENT, **agent} for agent in data["agents"]]
        _require_known(data, _WRITTEN, "field of a team")
        _require_known(data.get("normalizer"), _WRITTEN["normalizer"], "field of a normalizer")
        for agent in agents:
            _require_known(agent, _WRITTEN["agents"][0], f"field of agent {agent.get('name')}")
        return TeamSpec.from_json({**_OPTIONAL, **data, "agents": agents})
    except (KeyError, TypeError, ContractError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path}: expected a team with task, control_rate, state_size and agents, each with name, "
            f"observation_size, action_kind and action_size (docs/datasets.md): {reason}"
        ) from error
    except OmcdaError as error:
        raise ConfigError(f"{path}: {error}") from error


def _require_known(values: Any, written: Mapping[str, Any], what: str) -> None:
    """Raise UnknownNameError for an entry of ``values`` that is not among ``written``: nobody would read it."""
    if isinstance(values, Mapping) and (unknown := sorted(values.keys() - written.keys())):
        raise UnknownNameError(what, unknown[0], written)


def claimed_team(claim: Claim | None) -> TeamSpec | None:
    """Return the spec that ``claim`` states, by itself or by the name of a known task; None for a new task.

    Raises :class:`ConfigError` for a claim that contradicts itself, UnknownNameError for an unknown task without a
    rate, and :class:`DatasetError` where too little is said.
    """
    if claim is None:
        return None
    new = claim.control_rate is not None or claim.episode_limit is not None
    if claim.team is not None:
        if claim.task is not None or new:
            raise ConfigError(
                "--team states the whole team: leave --task, --control-rate and --episode-limit out"
            )
        return claim.team
    if claim.task in registry.tasks():
        if new:
            raise ConfigError(f"{claim.task} is a known task: leave --control-rate and --episode-limit out")
        return registry.team_spec(claim.task)
    if claim.task is not None and not new:
        raise UnknownNameError(
            "task", claim.task, registry.tasks(), ". A new one needs --control-rate HZ too"
        )
    return None


def team_of(path: Path, claim: Claim | None, sizes: Sizes) -> TeamSpec:
    """Return the spec that ``claim`` states, or makes of ``sizes``; the two must fit.

    Raises :class:`DatasetError` where they do not, and what :func:`claimed_team` raises.
    """
    team = claimed_team(claim)
    if team is not None:
        return _fitting(path, team, sizes)
    if claim is None or not claim.task or claim.control_rate is None:
        raise DatasetError(f"{path} does not say of which team it is: {HOW_TO_SAY}")
    return TeamSpec(
        task=claim.task,
        agents=sizes.agents,
        state_size=sizes.state_size,
        control_rate=claim.control_rate,
        episode_limit=sizes.episode_limit if claim.episode_limit is None else claim.episode_limit,
    )


def agents_of_spaces(
    names: Sequence[str], observation_spaces: Mapping[str, Any], action_spaces: Mapping[str, Any], where: str
) -> tuple[AgentSpec, ...]:
    """Return the agents of gymnasium's spaces, in the order of ``names``; gymnasium itself is not needed.

    Raises :class:`DatasetError` naming the agent and the space: observations must be a Box of one axis, or a Dict
    of ``observation`` and ``action_mask``; actions a Box of one axis with one pair of finite bounds, or a Discrete
    from 0 on.
    """
    if not names or set(names) != set(observation_spaces) or set(names) != set(action_spaces):
        raise DatasetError(
            f"{where}: expected an observation space and an action space for each agent, got "
            f"{sorted(observation_spaces)} and {sorted(action_spaces)}"
        )
    agents = []
    for name in names:
        space = observation_spaces[name]
        inner = getattr(space, "spaces", None)
        if isinstance(inner, Mapping):
            space = inner.get("observation")
        shape = getattr(space, "shape", None)
        if shape is None or len(shape) != 1 or hasattr(space, "n"):
            raise DatasetError(
                f"{where}: observation space of {name}: expected a Box of one axis, or a Dict of observation and "
                f"action_mask, got {observation_spaces[name]}: flatten it first"
            )
        agents.append(AgentSpec(name, int(shape[0]), _action_spec(name, action_spaces[name], where)))
    return tuple(agents)


def _action_spec(name: str, space: Any, where: str) -> ActionSpec:
    if hasattr(space, "n") and getattr(space, "shape", ()) == () and getattr(space, "start", 0) == 0:
        return ActionSpec("discrete", int(space.n))
    shape, low, high = (getattr(space, part, None) for part in ("shape", "low", "high"))
    if shape is None or low is None or high is None or len(shape) != 1 or hasattr(space, "n"):
        raise DatasetError(
            f"{where}: action space of {name}: expected a Box of one axis or a Discrete from 0 on, got {space}"
        )
    bounds = np.unique(low), np.unique(high)
    if any(bound.size != 1 or not np.isfinite(bound).all() for bound in bounds):
        raise DatasetError(
            f"{where}: action space of {name}: expected one pair of finite bounds for all numbers, got {space}: "
            "scale the actions, to [-1, 1] for instance"
        )
    return ActionSpec("continuous", int(shape[0]), float(bounds[0][0]), float(bounds[1][0]))


def _fitting(path: Path, team: TeamSpec, sizes: Sizes) -> TeamSpec:
    """Return ``team``. Raises :class:`DatasetError` where the source has other sizes."""
    said: Any
    told: Any
    if sizes.named:
        what = "agents of (observation size, action kind, action size)"
        said = {agent.name: _numbers(agent) for agent in team.agents}
        told = {agent.name: _numbers(agent) for agent in sizes.agents}
    else:
        what = "(agents, observation size, action kind, action size)"
        said = len(team.agents), team.observation_size, team.action_kind, team.action_size
        told = len(sizes.agents), *_numbers(sizes.agents[0])
    if said != told:
        raise DatasetError(
            f"{path}: {team.task} has {what} {said}, the data {told}: name the data's own task, or describe its "
            "team with --team FILE"
        )
    if team.state_size != sizes.state_size:
        raise DatasetError(
            f"{path}: {team.task} has a state of {team.state_size} numbers, the data one of {sizes.state_size}: "
            "describe the data's team with --team FILE"
        )
    return team


def _numbers(agent: AgentSpec) -> tuple[int, str, int]:
    return agent.observation_size, agent.action.kind, agent.action.size
