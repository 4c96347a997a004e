"""Simulators behind one small protocol, shaped like PettingZoo's parallel API (docs/simulators.md#the-contract).

One file per simulator, which defines the names of :class:`omcda_deploy.plugins.Simulator`. The registry finds it by
listing this folder, or through the entry-point group ``omcda_deploy.envs``. The folders inside this one hold code
that is no simulator by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ContractError
from omcda_deploy.spec import TeamSpec

Float: TypeAlias = NDArray[np.float32]
Observations: TypeAlias = dict[str, Float]
StepResult: TypeAlias = tuple[
    Observations, dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]
]

# How an episode went, as booleans that a simulator may put into the first agent's info of its last step; each
# simulator defines its own (docs/simulators.md#outcomes).
OUTCOMES = ("stalled", "fell", "won")
# Beside them: the simulator lost the episode, which it ends by a truncation with reward 0.
DISCARDED = "discarded"


class Environment(Protocol):
    """Environment of a cooperative team, one episode at a time; every agent receives the same reward.

    As in PettingZoo, dictionaries are keyed by agent name. A discrete task puts ``action_mask`` (uint8 [A], 1 where
    an action is available) into each agent's info. ``terminations`` are ends of the task, ``truncations`` are time
    limits; both are equal for all agents, and the keys of observations never change during an episode.
    """

    spec: TeamSpec

    @property
    def possible_agents(self) -> list[str]:
        """Names of the agents in team order."""
        ...

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        """Start an episode and return observations and infos; the same seed starts the same episode."""
        ...

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        """Apply one action per agent, float32 [A] in [-1, 1] or an int.

        Returns observations, rewards, terminations, truncations and infos. Raises :class:`ContractError` for
        actions that do not fit.
        """
        ...

    def state(self) -> Float:
        """Centralised state [S] of the present step, on which mixers are trained."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """The present frame, uint8 [height, width, 3]."""
        ...

    def close(self) -> None:
        """Free what the simulator holds."""
        ...


def joint_action(spec: TeamSpec, actions: Mapping[str, Any]) -> NDArray[np.float64]:
    """Join the continuous actions of all agents in team order: float64 [sum of A_i].

    Raises :class:`ContractError` for a missing or unknown agent, a wrong size, or a number that is not finite.
    """
    _require_team(spec, actions)
    vectors = []
    for agent in spec.agents:
        vector = np.asarray(actions[agent.name], np.float64)
        if vector.shape != (agent.action.size,):
            raise ContractError(
                f"action of {agent.name}: expected shape [{agent.action.size}], got {list(vector.shape)}"
            )
        vectors.append(vector)
    joint = np.concatenate(vectors)
    if not np.isfinite(joint).all():
        raise ContractError(f"actions: expected finite numbers, got {joint.tolist()}")
    return joint


def joint_choice(spec: TeamSpec, actions: Mapping[str, Any]) -> list[int]:
    """List the discrete actions of all agents in team order.

    Raises :class:`ContractError` for a missing or unknown agent, and for anything but an integer from 0 to A_i - 1.
    """
    _require_team(spec, actions)
    choices = []
    for agent in spec.agents:
        choice = np.asarray(actions[agent.name])
        if choice.shape != () or choice.dtype.kind not in "iu" or not 0 <= choice < agent.action.size:
            raise ContractError(
                f"action of {agent.name}: expected an integer from 0 to {agent.action.size - 1}, "
                f"got {actions[agent.name]!r}"
            )
        choices.append(int(choice))
    return choices


def _require_team(spec: TeamSpec, actions: Mapping[str, Any]) -> None:
    if actions.keys() != set(spec.names):
        raise ContractError(f"expected one action for each of {', '.join(spec.names)}, got {sorted(actions)}")
