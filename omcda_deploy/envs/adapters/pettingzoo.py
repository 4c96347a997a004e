"""This package's environments as PettingZoo ``ParallelEnv``, for libraries that take those."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import Environment, Float, StepResult
from omcda_deploy.envs.adapters.spaces import MASK
from omcda_deploy.errors import MissingExtraError


def to_parallel(environment: Environment) -> Any:
    """Wrap a team's environment as a PettingZoo ``ParallelEnv``, which TorchRL, EPyMARL and others take.

    Spaces are those of the spec: a Box of the agent's observations, and a Box of its actions or a Discrete, whose
    mask is in the agent's info under ``action_mask``; its ``sample()`` draws available actions. Episodes and
    numbers are the environment's own. Raises MissingExtraError without pettingzoo.
    """
    return _classes().team(environment)


class _Classes(NamedTuple):
    box: Any
    choices: Any
    team: Any


class _Team:
    """The methods of a ``ParallelEnv``."""

    agents: list[str]

    def __init__(self, environment: Environment) -> None:
        classes, spec = _classes(), environment.spec
        self.environment = environment
        self.metadata = {
            "name": spec.task,
            "render_modes": ["rgb_array"],
            "render_fps": spec.control_rate,
            "is_parallelizable": True,
        }
        self.render_mode = "rgb_array"
        self.possible_agents, self.agents = list(spec.names), []

        def unbounded(size: int) -> Any:
            return classes.box(-np.inf, np.inf, (size,), np.float32)

        self.observation_spaces = {agent.name: unbounded(agent.observation_size) for agent in spec.agents}
        self.action_spaces = {
            agent.name: classes.choices(agent.action.size)
            if agent.action.kind == "discrete"
            else classes.box(agent.action.low, agent.action.high, (agent.action.size,), np.float32)
            for agent in spec.agents
        }
        self.state_space = unbounded(spec.state_size)

    def observation_space(self, agent: str) -> Any:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Any:
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Float], dict[str, dict[str, Any]]]:
        """Start an episode; ``options`` have no effect."""
        observations, infos = self.environment.reset(seed=seed)
        self.agents = list(self.possible_agents)
        self._keep_masks(infos)
        return observations, infos

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        answer = self.environment.step(actions)
        _, _, terminations, truncations, infos = answer
        self._keep_masks(infos)
        if any(terminations.values()) or any(truncations.values()):
            self.agents = []
        return answer

    def state(self) -> Float:
        return self.environment.state()

    def render(self) -> NDArray[np.uint8]:
        return self.environment.render()

    def close(self) -> None:
        self.environment.close()

    def _keep_masks(self, infos: Mapping[str, Mapping[str, Any]]) -> None:
        if self.environment.spec.action_kind == "discrete":
            for name, space in self.action_spaces.items():
                space.available = np.asarray(infos[name][MASK], np.int8)


@cache
def _classes() -> _Classes:
    """Make the classes that derive from those of optional packages."""
    try:
        from gymnasium import spaces
        from pettingzoo import ParallelEnv
    except ImportError as error:
        raise MissingExtraError("pettingzoo", "pettingzoo") from error

    class AvailableActions(spaces.Discrete):
        """Choices of one agent, of which ``sample()`` draws an available one.

        Callers that know masks give theirs; those that do not would draw actions that the environment refuses.
        """

        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.available = np.ones(size, np.int8)

        def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
            if probability is not None:
                return super().sample(probability=probability)
            return super().sample(self.available if mask is None else np.asarray(mask, np.int8))

    class ParallelTeam(_Team, ParallelEnv):  # type: ignore[misc]
        """A team's environment in PettingZoo's classes."""

    return _Classes(spaces.Box, AvailableActions, ParallelTeam)
