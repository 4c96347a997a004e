"""Multi-agent MuJoCo as OMIGA's data were recorded: ``mamujoco/{hopper-3x1,ant-2x4,halfcheetah-6x1}``.

Every agent observes the full vector of the v2 environment followed by its one-hot id, standardised over the entries
of that vector, ``(x - mean(x)) / std(x)`` (docs/simulators.md#observations). The centralised state is these vectors
joined (docs/simulators.md#state). Agent k of n drives the k-th of n equal groups of actuators in MuJoCo's order.

The v2 environments are rebuilt from Gymnasium's v5 ones: Ant without contact cost and with 84 zeros in place of the
contact forces, and +1 on the step that terminates Hopper or Ant, which v5 withholds
(docs/simulators.md#rewards-and-ends). The physics is that of the installed mujoco; of the releases compared, 3.3.7
is the closest to the one behind the published data (docs/simulators.md#versions).

:func:`make` creates one environment over Gymnasium's class, which is the definition; :func:`make_vector` creates
many over one model, equal to it to the bit and faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import Float, Observations, StepResult, joint_action
from omcda_deploy.envs.programs.mujoco_bodies import (
    BodyRules,
    MujocoVector,
    ant_is_healthy,
    hopper_is_healthy,
    render_frame,
)
from omcda_deploy.errors import MissingExtraError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, Normalizer, TeamSpec

EPISODE_LIMIT = 1000


@dataclass(frozen=True)
class _Body:
    """A v5 environment and its differences from the v2 environment of the same body."""

    gymnasium_id: str
    agents: int
    joints_per_agent: int
    observation: int  # length of v5's observation under `options`
    zeros: int  # entries that v2 appends, always zero
    control_rate: float  # Hz, 1 / dt
    options: Mapping[str, Any]  # of the v5 class
    rules: BodyRules  # the same reward and end, for many environments at once


_BODIES = {
    "hopper-3x1": _Body(
        "Hopper-v5",
        3,
        1,
        11,
        0,
        125.0,
        {},
        BodyRules(control_cost=1e-3, hidden_positions=1, velocity_limit=10.0, is_healthy=hopper_is_healthy),
    ),
    "ant-2x4": _Body(
        "Ant-v5",
        2,
        4,
        27,
        84,
        20.0,
        {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0},
        BodyRules(control_cost=0.5, hidden_positions=2, by_torso=True, is_healthy=ant_is_healthy),
    ),
    "halfcheetah-6x1": _Body(
        "HalfCheetah-v5", 6, 1, 17, 0, 20.0, {}, BodyRules(control_cost=0.1, hidden_positions=1)
    ),
}
NORMALIZER = Normalizer("per-vector-standardize")
TASKS = tuple(f"mamujoco/{name}" for name in _BODIES)
PACKAGES = ("mujoco", "gymnasium")


def standardize(vectors: NDArray[Any]) -> Float:
    """Standardise each vector over its own entries: ``[..., O] -> float32 [..., O]``. Idempotent."""
    standardized: Float = NORMALIZER.apply(vectors).astype(np.float32)
    return standardized


class JointBody:
    """Single-agent v2 environment: one action vector drives all joints, and no time limit ends an episode.

    Behaviour policies are trained on it; :class:`MultiAgentMujoco` divides it among a team. Raises
    :class:`MissingExtraError` without gymnasium and :class:`UnknownNameError` for an unknown body.
    """

    def __init__(self, name: str, render_mode: str | None = None) -> None:
        self._env = _simulator(name, render_mode)
        self.body = _BODIES[name]
        self.observation_size = self.body.observation
        self.action_size = self.body.agents * self.body.joints_per_agent

    def reset(self, seed: int | None = None) -> NDArray[np.float64]:
        """Start an episode and return v5's observation."""
        observation, _ = self._env.reset(seed=seed)
        return np.asarray(observation, np.float64)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], float, bool]:
        """Apply ``action`` [joints] in [-1, 1]; return v5's observation, v2's reward and the terminal flag."""
        observation, reward, terminated, _, _ = self._env.step(action)
        if terminated:
            reward += 1.0  # v2 pays the healthy reward on the terminating step too; v5 does not
        return np.asarray(observation, np.float64), float(reward), bool(terminated)

    def render(self) -> NDArray[np.uint8]:
        """The present frame. Raises :class:`ConfigError` for an environment without ``render_mode``."""
        return render_frame(self._env)

    def close(self) -> None:
        self._env.close()


def make(task: str, render_mode: str | None = None) -> MultiAgentMujoco:
    """Make an environment. Raises :class:`UnknownNameError`, and :class:`MissingExtraError` without gymnasium."""
    return MultiAgentMujoco(task, render_mode)


def make_vector(task: str, num_envs: int, render_mode: str | None = None) -> MujocoVector:
    """Create ``num_envs`` environments that are stepped together, in the calling process."""
    spec, name = _team_spec(task), task.split("/")[1]
    return MujocoVector(spec, num_envs, _simulator(name, render_mode), _BODIES[name].rules)


class MultiAgentMujoco:
    """OMIGA's team of agents on one :class:`JointBody`. ``render()`` needs ``render_mode="rgb_array"``."""

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        self.spec = _team_spec(task)
        self._joint = JointBody(task.split("/")[1], render_mode)
        agents = len(self.spec.agents)
        self._vectors = np.zeros((agents, self.spec.observation_size))
        self._vectors[:, -agents:] = np.eye(agents)
        self._observation: Float = np.zeros(self._vectors.shape, np.float32)
        self._steps = 0

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        self._steps = 0
        observations = self._observe(self._joint.reset(seed))
        return observations, {name: {} for name in self.spec.names}

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        names = self.spec.names
        # Unclipped, as OMIGA passes them; MuJoCo clamps the controls itself, the control cost does not.
        observation, reward, terminated = self._joint.step(joint_action(self.spec, actions))
        self._steps += 1
        truncated = not terminated and self._steps >= EPISODE_LIMIT
        return (
            self._observe(observation),
            dict.fromkeys(names, reward),
            dict.fromkeys(names, terminated),
            dict.fromkeys(names, truncated),
            {name: {} for name in names},
        )

    def state(self) -> Float:
        return self._observation.reshape(-1).copy()

    def render(self) -> NDArray[np.uint8]:
        return self._joint.render()

    def close(self) -> None:
        self._joint.close()

    def _observe(self, observation: NDArray[np.float64]) -> Observations:
        self._vectors[:, : observation.size] = observation
        self._observation = standardize(self._vectors)
        return {name: self._observation[i].copy() for i, name in enumerate(self.spec.names)}


def _team_spec(task: str) -> TeamSpec:
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    body = _BODIES[task.split("/")[1]]
    width = body.observation + body.zeros + body.agents
    return TeamSpec(
        task=task,
        agents=tuple(
            AgentSpec(f"agent_{i}", width, ActionSpec("continuous", body.joints_per_agent))
            for i in range(body.agents)
        ),
        state_size=width * body.agents,
        control_rate=body.control_rate,
        normalizer=NORMALIZER,
        episode_limit=EPISODE_LIMIT,
    )


def _simulator(name: str, render_mode: str | None) -> Any:
    """Create Gymnasium's v5 environment of a body, without wrappers or a time limit.

    Raises :class:`UnknownNameError`, and :class:`MissingExtraError` without gymnasium.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise MissingExtraError("gymnasium with MuJoCo", "mujoco") from error
    if name not in _BODIES:
        raise UnknownNameError("MuJoCo body", name, _BODIES)
    body = _BODIES[name]
    entry = gymnasium.spec(body.gymnasium_id).entry_point
    create: Callable[..., Any] = gymnasium.envs.registration.load_env_creator(str(entry))
    # Created without gymnasium.make: its wrappers add a third of the step time, and the time limit is counted here.
    # Its default camera stands still, and the body leaves its view; "track" follows.
    return create(render_mode=render_mode, camera_name="track", **body.options)
