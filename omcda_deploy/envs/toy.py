"""Tabular team games as simulators: ``toy/…``.

Every agent walks a chain of its own, ``x' ~ P_i(.|x, a)``, observes only its own local state (one-hot) and adds
``r_i(x_i, a_i)`` to the reward that all receive. So the optimum under any conservatism is known agent by agent
(docs/simulators.md#toy-games). The centralised state is all one-hots joined.

* ``toy/one-step``: 3 agents, 5 actions, reward scales 3 : 1 : 0.1; the episode ends after one action.
* ``toy/one-step-hidden``: another such game with two states that no agent sees; each scales the reward.
* ``toy/chain``: 2 agents, 4 states, 3 actions, stochastic transitions.
* ``toy/chain-single``: the first of these chains alone.
* ``toy/chain-mixed``: 3 agents whose observation and action sizes all differ.
* ``toy/masked``: 3 agents, 3 states, 4 actions, some of them unavailable, depending on the agent and its state.

A task name fixes the seed of its game: a task is one MDP. The games and their exact solutions are in
:mod:`omcda_deploy.envs.tabular`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.entries import AgentEntries, Entry
from omcda_deploy.envs import Float, Observations, StepResult, joint_choice
from omcda_deploy.envs.tabular import GAMES, Table, central_state, game, require_policies, team_spec
from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.policy import Decision

TASKS = tuple(GAMES)

_CELL = 24  # pixels


def make(task: str, render_mode: str | None = None) -> TabularTeam:
    """Make an environment. Raises UnknownNameError, and :class:`ConfigError` for another ``render_mode``."""
    return TabularTeam(task, render_mode)


def entries(task: str) -> dict[str, AgentEntries]:
    """Name what each agent observes and may choose."""
    spec = team_spec(task, game(task))
    return {
        agent.name: AgentEntries(
            tuple(Entry("", f"local state is {x}", "0 or 1") for x in range(agent.observation_size)),
            tuple(Entry("", f"choice {a}") for a in range(agent.action.size)),
        )
        for agent in spec.agents
    }


def behavior_team(task: str) -> TabularPolicies:
    """Behaviour policies that the task is defined with; ``collect --tier behavior`` records them."""
    return TabularPolicies(task)


class TabularTeam:
    """Environment of one game. ``render()`` needs ``render_mode="rgb_array"``."""

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode: expected 'rgb_array' or None, got {render_mode!r}")
        self.game = game(task)
        self.spec = team_spec(task, self.game)
        self._chains = self.game.chains
        self._render_mode = render_mode
        self._generator = np.random.default_rng()
        self._positions: NDArray[np.int64] | None = None  # [N]
        self._context = 0
        self._steps = 0

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        self._steps = 0
        self._context = int(self._generator.integers(len(self.game.state_scales)))
        self._positions = np.array([self._draw(chain.start) for chain in self._chains])
        return self._observe(), self._infos()

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        positions = self._local_states()
        choices = joint_choice(self.spec, actions)
        for name, mask, a in zip(self.spec.names, self._available(), choices, strict=True):
            if not mask[a]:
                raise ContractError(
                    f"action of {name}: expected one of the available {np.flatnonzero(mask).tolist()}, got {a}"
                )
        reward = float(self.game.state_scales[self._context]) * sum(
            float(chain.rewards[x, a]) for chain, x, a in zip(self._chains, positions, choices, strict=True)
        )
        self._positions = np.array(
            [
                self._draw(chain.transitions[x, a])
                for chain, x, a in zip(self._chains, positions, choices, strict=True)
            ]
        )
        self._steps += 1
        terminated = bool(self._generator.random() < self.game.stop)
        truncated = not terminated and self._steps >= self.spec.episode_limit
        names = self.spec.names
        return (
            self._observe(),
            dict.fromkeys(names, reward),
            dict.fromkeys(names, terminated),
            dict.fromkeys(names, truncated),
            self._infos(),
        )

    def state(self) -> Float:
        state: Float = central_state(self.game, self._local_states()[None], np.array([self._context]))[0]
        return state

    def render(self) -> NDArray[np.uint8]:
        """Draw one row of cells per agent and one cell per local state; the present state is lit."""
        if self._render_mode is None:
            raise ConfigError(f"{self.spec.task} was made without render_mode: use render_mode='rgb_array'")
        cells = np.zeros((len(self._chains), self.spec.observation_size), np.uint8)
        for i, x in enumerate(self._local_states()):
            cells[i, : len(self._chains[i].start)] = 64
            cells[i, x] = 255
        pixels = np.kron(cells, np.ones((_CELL, _CELL), np.uint8))
        return np.repeat(pixels[:, :, None], 3, axis=2)

    def close(self) -> None:
        pass

    def _draw(self, distribution: Table) -> int:
        # Generator.choice would take most of the time of a step.
        return int(np.searchsorted(distribution.cumsum()[:-1], self._generator.random(), side="right"))

    def _local_states(self) -> NDArray[np.int64]:
        """Present local state of each agent [N]. Raises :class:`ContractError` before the first reset."""
        if self._positions is None:
            raise ContractError(f"{self.spec.task}: no episode has started, call reset() first")
        return self._positions

    def _observe(self) -> Observations:
        return {
            agent.name: np.eye(agent.observation_size, dtype=np.float32)[x]
            for agent, x in zip(self.spec.agents, self._local_states(), strict=True)
        }

    def _infos(self) -> dict[str, dict[str, Any]]:
        masks = zip(self.spec.names, self._available(), strict=True)
        return {name: {"action_mask": mask.astype(np.uint8)} for name, mask in masks}

    def _available(self) -> list[NDArray[np.bool_]]:
        """Available actions of each agent in its present state, bool [K_i]."""
        return [chain.available[x] for chain, x in zip(self._chains, self._local_states(), strict=True)]


class TabularPolicies:
    """Team policy given by tables ``pi_i`` [X, K], for one-hot observations.

    ``divergence`` is KL(pi_i || pi_b^i) in nats at the observed state.
    """

    def __init__(self, task: str, policies: Sequence[Table] | None = None) -> None:
        """``policies``: one table per agent, None for the task's behaviour policies.

        Raises :class:`ContractError` for other tables than the game's.
        """
        task_game = game(task)
        self.spec = team_spec(task, task_game)
        behavior = [chain.behavior for chain in task_game.chains]
        tables = behavior if policies is None else policies
        require_policies(task_game, tables)
        with np.errstate(divide="ignore"):
            self._logits = [np.log(table) for table in tables]
            self._behavior_logits = [np.log(table) for table in behavior]

    def reset(self) -> None:
        pass

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        decisions = {}
        for i, name in enumerate(self.spec.names):
            x = np.argmax(observations[name], axis=-1)
            logits, behavior = self._logits[i][x], self._behavior_logits[i][x]
            scores = logits if noise is None else logits + noise[name]
            possible = np.isfinite(logits)
            ratio = np.subtract(logits, behavior, where=possible, out=np.zeros_like(logits))
            decisions[name] = Decision(
                action=np.argmax(scores, axis=-1),
                divergence=np.asarray((np.exp(logits) * ratio).sum(-1), np.float32),
                parameters={
                    "behavior_action": np.argmax(behavior, axis=-1),
                    "logits": logits.astype(np.float32),
                    "behavior_logits": behavior.astype(np.float32),
                },
            )
        return decisions
