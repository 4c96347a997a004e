"""Environments of the user's own as teams: PettingZoo's parallel API, with spaces or with a team spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import Float, Observations, StepResult
from omcda_deploy.envs.adapters.border import Answer, Border, Parts, Reward
from omcda_deploy.envs.adapters.spaces import MASK, AgentSpaces, flat_size
from omcda_deploy.errors import ConfigError, ContractError, PluginError, SimulatorError
from omcda_deploy.references import user_code
from omcda_deploy.spec import TeamSpec

EPISODE_LIMIT = 1000  # steps, where neither the user nor the environment says
_LIMITS = ("episode_limit", "max_cycles", "max_steps")  # attributes that say it


def from_parallel(
    source: Any,
    *,
    task: str = "own/parallel",
    control_rate: float | None = None,
    episode_limit: int | None = None,
    reward: Reward = "shared",
) -> OwnTeam:
    """Adapt a PettingZoo ``ParallelEnv``, or anything of its shape, to a team's environment.

    Observations are flattened to float32 vectors; a dictionary of ``observation`` and ``action_mask`` is
    understood, and so is ``action_mask`` in an agent's info. Actions are those of the agent's Box where it has one
    pair of bounds; else they are in [-1, 1], and each entry is scaled to its own bounds. The centralised state is
    ``state()`` where the environment has a ``state_space``, else all observations joined.

    ``control_rate`` is in Hz; None takes ``metadata["render_fps"]``, else 1. An episode is truncated after
    ``episode_limit`` steps; None takes the environment's ``episode_limit``, ``max_cycles`` or ``max_steps``, else
    1000. ``reward`` joins the agents' rewards: ``shared`` requires them to be equal, ``sum`` and ``mean`` do not.

    Raises :class:`PluginError` for an object of another shape or with other spaces, :class:`ConfigError` for a
    setting out of range. What an episode then does wrong is a :class:`ContractError`, and an exception in the
    environment's own code a :class:`SimulatorError`.
    """
    require_parallel(source, task)
    with user_code(f"{task}: reading its agents and spaces", PluginError):
        agents = list(source.possible_agents)
        if strange := [agent for agent in agents if not isinstance(agent, str)]:
            raise PluginError(f"{task}: expected agents named by strings, got {strange[0]!r}")
        spaces = [AgentSpaces.of(source, agent, task) for agent in agents]
        observed = sum(agent.spec.observation_size for agent in spaces)
        state_space = getattr(source, "state_space", None)
        state_size = observed if state_space is None else flat_size(state_space, f"{task}: state space")
    rate = _control_rate(source) if control_rate is None else control_rate
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0.0 < float(rate) < np.inf:
        raise ConfigError(f"{task}: expected a control_rate above 0, got {rate!r}")
    limit = (
        _episode_limit(source, task)
        if episode_limit is None
        else _steps(episode_limit, "episode_limit", task)
    )
    spec = TeamSpec(
        task=task,
        agents=tuple(agent.spec for agent in spaces),
        state_size=state_size,
        control_rate=float(rate),
        episode_limit=limit,
    )
    return OwnTeam(source, spec, reward, spaces)


def _control_rate(source: Any) -> Any:
    metadata = getattr(source, "metadata", None)
    rate = metadata.get("render_fps") if isinstance(metadata, Mapping) else None
    return 1.0 if rate is None else rate


def _episode_limit(source: Any, task: str) -> int:
    """Return the environment's own limit, the first of its attributes that there is."""
    limits = ((name, getattr(source, name, None)) for name in _LIMITS)
    return next((_steps(limit, name, task) for name, limit in limits if limit is not None), EPISODE_LIMIT)


def _steps(limit: Any, name: str, task: str) -> int:
    """Read a number of steps, an integer of any type or a whole float."""
    try:
        steps = int(limit) if isinstance(limit, float | np.floating) and limit == int(limit) else index(limit)
    except (TypeError, ValueError, OverflowError):  # no number, nan, infinite
        steps = 0
    if isinstance(limit, bool | np.bool_) or steps < 1:
        raise ConfigError(
            f"{task}: {name}: expected a whole number of steps, at least 1, got {limit!r}: correct it, or give "
            "from_parallel an episode_limit"
        )
    return steps


def require_parallel(source: Any, label: str) -> None:
    """Raise :class:`PluginError` for an object that lacks what PettingZoo's parallel API requires."""
    if hasattr(source, "agent_iter"):
        raise PluginError(
            f"{label}: expected a ParallelEnv, got an AECEnv, whose agents take turns: use its parallel_env(), or "
            "pettingzoo.utils.aec_to_parallel"
        )
    spaces = ("observation_space", "action_space")
    required = ("possible_agents", "reset", "step")
    missing = [name for name in required if not hasattr(source, name)]
    missing += [name for name in spaces if not (hasattr(source, name) or hasattr(source, f"{name}s"))]
    if missing:
        raise PluginError(
            f"{label}: expected a PettingZoo ParallelEnv, or an environment with `spec` (a TeamSpec), reset and "
            f"step; got {source!r:.60}, which lacks {', '.join(missing)}: return an environment that has them"
        )


class OwnTeam:
    """An environment of the user's own, whose answers are checked (:mod:`omcda_deploy.envs.adapters.border`).

    ``source`` follows PettingZoo's parallel API. Without ``spaces`` its values are those of ``spec`` already.
    """

    def __init__(
        self, source: Any, spec: TeamSpec, reward: Reward = "shared", spaces: list[AgentSpaces] | None = None
    ) -> None:
        self.spec, self.source = spec, source
        self._spaces = None if spaces is None else {agent.spec.name: agent for agent in spaces}
        self._reward: Reward = reward
        self._border = Border(spec, reward, None if spaces is None else self._translated)
        self._answer: Answer | None = None

    def relabeled(self, task: str, reward: Reward | None) -> OwnTeam:
        """Return the same environment under the name ``task``, and with another ``reward`` unless it is None."""
        spaces = None if self._spaces is None else list(self._spaces.values())
        return OwnTeam(self.source, replace(self.spec, task=task), reward or self._reward, spaces)

    @property
    def unwrapped(self) -> Any:
        """The environment that is adapted."""
        return self.source

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        with self._user_code("reset()"):
            answer = self.source.reset(seed=seed)
        self._answer = self._border.reset(answer, self._state())
        return self._observations(), self._infos()

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        """Apply one action per agent. Raises :class:`ContractError` for actions or answers that do not fit."""
        if self._answer is None:
            raise ContractError(f"{self.spec.task}: no episode has started, call reset() first")
        checked = self._border.actions(actions, self._answer.action_mask)
        if self._spaces is not None:
            checked = {name: self._spaces[name].action(action) for name, action in checked.items()}
        with self._user_code(f"step() {self._border.steps + 1}"):
            answer = self.source.step(checked)
        self._answer = answer = self._border.step(answer, self._state())
        names = self.spec.names
        limited = self._spaces is not None and self._border.steps >= self.spec.episode_limit
        return (
            self._observations(),
            dict.fromkeys(names, answer.reward),
            dict.fromkeys(names, answer.terminated),
            dict.fromkeys(names, (answer.truncated or limited) and not answer.terminated),
            self._infos(),
        )

    def state(self) -> Float:
        """Centralised state of the present step. Raises :class:`ContractError` before the first reset."""
        if self._answer is None:
            raise ContractError(f"{self.spec.task}: no episode has started, call reset() first")
        return self._answer.state.copy()

    def render(self) -> NDArray[np.uint8]:
        """The present frame. Raises :class:`ConfigError` where the environment renders none."""
        if not hasattr(self.source, "render"):
            raise ConfigError(f"{self.spec.task} has no render(): leave the video out")
        with self._user_code("render()"):
            frame = np.asarray(self.source.render())
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ConfigError(
                f"{self.spec.task}: render() gave {frame.dtype} {list(frame.shape)}, expected uint8 "
                "[height, width, 3]: make it with render_mode='rgb_array', or leave the video out"
            )
        return frame

    def close(self) -> None:
        if hasattr(self.source, "close"):
            with self._user_code("close()"):
                self.source.close()

    def _user_code(self, call: str) -> Any:
        return user_code(f"{self.spec.task}: {call}", SimulatorError)

    def _translated(self, observations: Mapping[str, Any], infos: Mapping[str, Any]) -> Parts:
        """Flatten observations, and move the masks that come with them to the infos."""
        flat, told = {}, dict(infos)
        for name, spaces in (self._spaces or {}).items():
            flat[name], mask = spaces.observation(observations[name])
            if mask is not None:
                told[name] = {**(told.get(name) or {}), MASK: mask}
        return flat, told

    def _state(self) -> Any:
        """The environment's own state; None, for all observations joined, where it has none."""
        declared = self._spaces is None or getattr(self.source, "state_space", None) is not None
        if not declared or not hasattr(self.source, "state"):
            return None
        with self._user_code("state()"):
            state = self.source.state()
        return state if self._spaces is None else np.ravel(state)

    def _observations(self) -> Observations:
        assert self._answer is not None  # every caller has just read one
        joined = self._answer.observation
        slices = zip(self.spec.names, self.spec.observation_slices, strict=True)
        return {name: joined[columns].copy() for name, columns in slices}

    def _infos(self) -> dict[str, dict[str, Any]]:
        assert self._answer is not None
        infos: dict[str, dict[str, Any]] = {name: {} for name in self.spec.names}
        infos[self.spec.names[0]] |= self._answer.info
        if (mask := self._answer.action_mask) is not None:
            for name, columns in zip(self.spec.names, self.spec.action_slices, strict=True):
                infos[name][MASK] = mask[columns].copy()
        return infos
