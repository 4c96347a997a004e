"""Keep the rows of episodes while they are played, for datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Episode
from omcda_deploy.envs.vector import VectorStep
from omcda_deploy.play.episodes import PlayedStep
from omcda_deploy.spec import TeamSpec


class EpisodeRecorder:
    """Rows of the running episodes of ``num_envs`` environments; each is copied out when it ends."""

    def __init__(self, spec: TeamSpec, num_envs: int) -> None:
        agents, limit = len(spec.agents), spec.episode_limit
        self._spec = spec
        self._discrete = spec.action_kind == "discrete"
        self._observations = np.zeros((num_envs, limit + 1, agents, spec.observation_size), np.float32)
        self._states = np.zeros((num_envs, limit + 1, spec.state_size), np.float32)
        self._actions: NDArray[Any] = (
            np.zeros((num_envs, limit, agents), np.int64)
            if self._discrete
            else np.zeros((num_envs, limit, agents, spec.action_size), np.float32)
        )
        self._masks = (
            np.zeros((num_envs, limit + 1, agents, spec.action_size), np.uint8) if self._discrete else None
        )
        self._rewards = np.zeros((num_envs, limit), np.float64)

    def add(self, step: PlayedStep) -> dict[int, Episode]:
        """Keep a step's rows; returns the episodes that ended with it, by environment.

        Episodes that the simulator lost are not among them.
        """
        indices = np.flatnonzero(step.active)
        rows = step.age[indices] - 1
        self._keep(indices, rows, step.previous)
        for number, agent in enumerate(self._spec.agents):
            action = step.decisions[agent.name].action[indices]
            if self._discrete:
                self._actions[indices, rows, number] = action
            else:
                self._actions[indices, rows, number, : agent.action.size] = action
        self._rewards[indices, rows] = step.result.reward[indices]
        ended = np.flatnonzero(step.ended)
        self._keep(ended, step.age[ended], step.result)
        return {index: self._copy(index, step) for index in ended.tolist() if not step.discarded[index]}

    def _keep(self, indices: NDArray[np.int64], rows: NDArray[np.int64], step: VectorStep) -> None:
        """Store the observations, states and masks of environments ``indices`` in ``rows`` of their episodes."""
        for number, agent in enumerate(self._spec.agents):
            observations = step.observations[agent.name][indices]
            self._observations[indices, rows, number, : agent.observation_size] = observations
            if self._masks is not None and step.action_masks is not None:
                masks = step.action_masks[agent.name][indices]
                self._masks[indices, rows, number, : agent.action.size] = masks
        self._states[indices, rows] = step.state[indices]

    def _copy(self, index: int, step: PlayedStep) -> Episode:
        steps = int(step.age[index])
        return Episode(
            self._observations[index, : steps + 1].copy(),
            self._states[index, : steps + 1].copy(),
            self._actions[index, :steps].copy(),
            self._rewards[index, :steps].copy(),
            timeout=bool(step.result.truncated[index] and not step.result.terminated[index]),
            action_masks=None if self._masks is None else self._masks[index, : steps + 1].copy(),
            seed=step.seeds[index],
        )
