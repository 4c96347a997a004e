"""Multi-agent MuJoCo with decentralised observations (docs/simulators.md#ma-mujoco-k-hop).

Tasks: ``mamujoco-khop1/{hopper-3x1,ant-2x4,halfcheetah-6x1}``, Gymnasium-Robotics' ``mamujoco_v1`` with
``agent_obsk=1``. Every agent observes its own joints, the positions of the joints one hop away and the torso, as
Gymnasium-Robotics returns them: not normalised, and of a different length for each agent. The centralised state is
the raw observation of the single-agent environment (11, 105 and 17 numbers). Unlike in ``mamujoco/…``, Ant keeps
its contact forces: they are 42 of an agent's 63 numbers.

Agents have Gymnasium-Robotics' names and order; each drives the actuators (MuJoCo's indices) of its joints:

| task            | agents in order, each with its actuators                                     |
|-----------------|------------------------------------------------------------------------------|
| hopper-3x1      | 0 thigh; 1 leg; 2 foot                                                       |
| halfcheetah-6x1 | 0 bthigh; 1 bshin; 2 bfoot; 3 fthigh; 4 fshin; 5 ffoot                       |
| ant-2x4         | 2 hip_1, 3 ankle_1, 4 hip_2, 5 ankle_2; 6 hip_3, 7 ankle_3, 0 hip_4, 1 ankle_4 |

So Ant's agents drive other actuators than in ``mamujoco/ant-2x4`` (0 1 2 3 and 4 5 6 7): never mix data of the two.
Rewards and ends are those of ``mamujoco/…`` (+1 on the terminating step, no contact cost), so the same motion earns
the same return in both.

:func:`make` creates one environment over Gymnasium-Robotics' class, which is the definition; :func:`make_vector`
creates many over one model, equal to it to the bit and faster.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.entries import AgentEntries
from omcda_deploy.envs import Float, Observations, StepResult, joint_action
from omcda_deploy.envs.mamujoco import simulator
from omcda_deploy.envs.programs.mujoco_bodies import (
    BodyRules,
    MujocoVector,
    ant_is_healthy,
    hopper_is_healthy,
)
from omcda_deploy.envs.programs.mujoco_entries import action_entries, vector_entries
from omcda_deploy.envs.programs.mujoco_outcomes import OutcomeLog, single_outcomes
from omcda_deploy.errors import ConfigError, MissingExtraError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

EPISODE_LIMIT = 1000


@dataclass(frozen=True)
class _Body:
    """Arguments and sizes of one Gymnasium-Robotics environment."""

    scenario: str
    factorization: str
    state_size: int
    observation_sizes: tuple[int, ...]  # per agent
    joints_per_agent: int
    control_rate: float  # Hz, 1 / dt
    options: Mapping[str, Any]
    rules: BodyRules  # the same reward and end, for many environments at once


_BODIES = {
    "hopper-3x1": _Body(
        "Hopper",
        "3x1",
        11,
        (8, 9, 8),
        1,
        125.0,
        {},
        BodyRules(control_cost=1e-3, hidden_positions=1, velocity_limit=10.0, is_healthy=hopper_is_healthy),
    ),
    "ant-2x4": _Body(
        "Ant",
        "2x4",
        105,
        (63, 63),
        4,
        20.0,
        {"contact_cost_weight": 0.0},
        BodyRules(
            control_cost=0.5,
            hidden_positions=2,
            contact_forces=True,
            forward="torso",
            is_healthy=ant_is_healthy,
        ),
    ),
    "halfcheetah-6x1": _Body(
        "HalfCheetah",
        "6x1",
        17,
        (9, 9, 8, 9, 9, 8),
        1,
        20.0,
        {},
        BodyRules(control_cost=0.1, hidden_positions=1),
    ),
}
TASKS = tuple(f"mamujoco-khop1/{name}" for name in _BODIES)
PACKAGES = ("mujoco", "gymnasium", "gymnasium-robotics")


def make(task: str, render_mode: str | None = None) -> DecentralizedMujoco:
    """Make an environment; errors are those of :class:`DecentralizedMujoco`."""
    return DecentralizedMujoco(task, render_mode)


def make_vector(task: str, num_envs: int, render_mode: str | None = None) -> MujocoVector:
    """Create ``num_envs`` environments that are stepped together, in the calling process."""
    single = DecentralizedMujoco(task)  # knows which entries each agent sees, and which actuators it drives
    spec, body = single.spec, _BODIES[task.split("/")[1]]
    seen, actuators = single.factorization()
    single.close()

    def view(raw: NDArray[np.float64]) -> tuple[Float, Float]:
        observations = np.zeros((len(raw), len(spec.agents), spec.observation_size), np.float32)
        for index, entries in enumerate(seen):
            observations[:, index, : len(entries)] = raw[:, entries]
        return observations, raw.astype(np.float32)

    return MujocoVector(
        spec, num_envs, simulator(task.split("/")[1], render_mode), body.rules, view, actuators
    )


def entries(task: str) -> dict[str, AgentEntries]:
    """Name what each agent observes and does."""
    single = DecentralizedMujoco(task)
    (seen, actuators), spec, model = single.factorization(), single.spec, single.model
    single.close()
    state = vector_entries(model, _BODIES[task.split("/")[1]].rules)
    return {
        agent: AgentEntries(
            tuple(state[entry] for entry in observed), action_entries(model, actuators[driven])
        )
        for agent, observed, driven in zip(spec.names, seen, spec.action_slices, strict=True)
    }


class DecentralizedMujoco:
    """Environment of one k-hop task. ``render()`` needs ``render_mode="rgb_array"``.

    Raises :class:`UnknownNameError`, and :class:`MissingExtraError` without gymnasium-robotics.
    """

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        if task not in TASKS:
            raise UnknownNameError("task", task, TASKS)
        try:
            # gymnasium_robotics prints a notice about unrelated environments when it is imported.
            with contextlib.redirect_stderr(io.StringIO()):
                from gymnasium_robotics import mamujoco_v1
        except ImportError as error:
            raise MissingExtraError("gymnasium-robotics", "mujoco") from error
        body = _BODIES[task.split("/")[1]]
        self._render_mode = render_mode
        self._parallel = mamujoco_v1.parallel_env(
            body.scenario,
            body.factorization,
            agent_obsk=1,
            render_mode=render_mode,
            max_episode_steps=EPISODE_LIMIT,
            disable_env_checker=True,
            **body.options,
        )
        self.spec = TeamSpec(
            task=task,
            agents=tuple(
                AgentSpec(f"agent_{i}", size, ActionSpec("continuous", body.joints_per_agent))
                for i, size in enumerate(body.observation_sizes)
            ),
            state_size=body.state_size,
            control_rate=body.control_rate,
            episode_limit=EPISODE_LIMIT,
        )
        self._outcomes = OutcomeLog([self._parallel.single_agent_env.unwrapped.data], self.spec)
        self._steps = 0

    @property
    def model(self) -> Any:
        """MuJoCo's ``MjModel``."""
        return self._parallel.single_agent_env.unwrapped.model

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        self._steps = 0
        observations, _ = self._parallel.reset(seed=seed)
        return self._float32(observations), {name: {} for name in self.spec.names}

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        names = self.spec.names
        rows = joint_action(self.spec, actions).reshape(len(names), -1)
        observations, rewards, terminations, truncations, _ = self._parallel.step(
            dict(zip(names, rows, strict=True))
        )
        self._steps += 1
        terminated = bool(terminations[names[0]])
        truncated = bool(truncations[names[0]]) and not terminated
        infos: dict[str, dict[str, Any]] = {name: {} for name in names}
        infos[names[0]].update(single_outcomes(self._outcomes, self._steps, terminated, truncated))
        # v5 withholds the healthy reward on the terminating step; v2 pays it, and so does mamujoco/….
        reward = float(rewards[names[0]]) + terminated
        return (
            self._float32(observations),
            dict.fromkeys(names, reward),
            dict.fromkeys(names, terminated),
            dict.fromkeys(names, truncated),
            infos,
        )

    def state(self) -> Float:
        return np.asarray(self._parallel.state(), np.float32)

    def render(self) -> NDArray[np.uint8]:
        """The present frame. Raises :class:`ConfigError` for an environment without ``render_mode``."""
        if self._render_mode is None:
            raise ConfigError(f"{self.spec.task} was made without render_mode: use render_mode='rgb_array'")
        return np.asarray(self._parallel.render(), np.uint8)

    def close(self) -> None:
        self._parallel.close()

    def factorization(self) -> tuple[list[NDArray[np.int64]], list[int]]:
        """Return the entries of the state that each agent observes, and the actuators of the joined action."""
        parallel = self._parallel
        seen = [np.asarray(parallel.observation_factorization[name]) for name in self.spec.names]
        return seen, [node.act_ids for part in parallel.agent_action_partitions for node in part]

    def _float32(self, observations: Mapping[str, NDArray[np.float64]]) -> Observations:
        return {name: observations[name].astype(np.float32) for name in self.spec.names}
