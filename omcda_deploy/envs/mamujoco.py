"""Multi-agent MuJoCo as OMIGA's data were recorded: ``mamujoco/{hopper-3x1,ant-2x4,halfcheetah-6x1,humanoid-9-8}``.

Every agent observes the full vector of the v2 environment followed by its one-hot id, standardised over the entries
of that vector, ``(x - mean(x)) / std(x)`` (docs/simulators.md#observations). The centralised state is these vectors
joined (docs/simulators.md#state). Agent k of n drives the k-th of n equal groups of actuators in MuJoCo's order;
Humanoid's two agents drive the upper and the lower body, as in Gymnasium-Robotics' factorisation ``9|8``.

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

from omcda_deploy.entries import AgentEntries, Entry
from omcda_deploy.envs import Float, Observations, StepResult, joint_action
from omcda_deploy.envs.programs.mujoco_bodies import (
    BodyRules,
    MujocoVector,
    ant_is_healthy,
    hopper_is_healthy,
    humanoid_is_healthy,
    render_frame,
)
from omcda_deploy.envs.programs.mujoco_entries import action_entries, vector_entries
from omcda_deploy.envs.programs.mujoco_outcomes import OutcomeLog, single_outcomes
from omcda_deploy.errors import MissingExtraError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, Normalizer, TeamSpec

EPISODE_LIMIT = 1000


@dataclass(frozen=True)
class _Body:
    """A v5 environment and its differences from the v2 environment of the same body."""

    gymnasium_id: str
    actuators: tuple[tuple[int, ...], ...]  # that each agent drives, MuJoCo's indices
    observation: int  # length of v5's observation under `options`
    zeros: int  # entries that v2 appends, always zero
    control_rate: float  # Hz, 1 / dt
    options: Mapping[str, Any]  # of the v5 class
    rules: BodyRules  # the same reward and end, for many environments at once
    control_limit: float = 1.0  # controls are clamped to [-limit, limit]

    @property
    def joints(self) -> tuple[int, ...]:
        """Actuators of the entries of the joined action."""
        return tuple(actuator for agent in self.actuators for actuator in agent)


_BODIES = {
    "hopper-3x1": _Body(
        "Hopper-v5",
        ((0,), (1,), (2,)),
        11,
        0,
        125.0,
        {},
        BodyRules(control_cost=1e-3, hidden_positions=1, velocity_limit=10.0, is_healthy=hopper_is_healthy),
    ),
    "ant-2x4": _Body(
        "Ant-v5",
        ((0, 1, 2, 3), (4, 5, 6, 7)),
        27,
        84,
        20.0,
        {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0},
        BodyRules(control_cost=0.5, hidden_positions=2, forward="torso", is_healthy=ant_is_healthy),
    ),
    "halfcheetah-6x1": _Body(
        "HalfCheetah-v5",
        ((0,), (1,), (2,), (3,), (4,), (5,)),
        17,
        0,
        20.0,
        {},
        BodyRules(control_cost=0.1, hidden_positions=1),
    ),
    "humanoid-9-8": _Body(
        "Humanoid-v5",
        ((2, 0, 1, 11, 12, 13, 14, 15, 16), (3, 5, 4, 6, 7, 9, 8, 10)),
        270,
        0,
        1000.0 / 15.0,
        {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0},
        BodyRules(
            control_cost=0.1,
            hidden_positions=2,
            more=(("cinert", 1), ("cvel", 1), ("qfrc_actuator", 6)),
            forward="mass",
            forward_weight=1.25,
            healthy_reward=5.0,
            is_healthy=humanoid_is_healthy,
        ),
        control_limit=0.4,
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
        self._env = simulator(name, render_mode)
        self.body = _BODIES[name]
        self.observation_size = self.body.observation
        self.action_size = len(self.body.joints)

    @property
    def data(self) -> Any:
        """MuJoCo's ``MjData``."""
        return self._env.data

    def reset(self, seed: int | None = None) -> NDArray[np.float64]:
        """Start an episode and return v5's observation."""
        observation, _ = self._env.reset(seed=seed)
        return np.asarray(observation, np.float64)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], float, bool]:
        """Apply ``action`` [joints], by actuator; return v5's observation, v2's reward and the terminal flag."""
        observation, reward, terminated, _, _ = self._env.step(action)
        if terminated:
            # v2 pays the healthy reward on the terminating step too; v5 does not.
            reward += self.body.rules.healthy_reward
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
    spec, name = team_spec(task), task.split("/")[1]

    def view(raw: NDArray[np.float64]) -> tuple[Float, Float]:
        vectors = team_vectors(spec, raw)
        return vectors, vectors.reshape(len(raw), -1)

    body = _BODIES[name]
    return MujocoVector(spec, num_envs, simulator(name, render_mode), body.rules, view, body.joints)


def entries(task: str) -> dict[str, AgentEntries]:
    """Name what each agent observes, before it is standardised, and does."""
    spec, name = team_spec(task), task.split("/")[1]
    body, single = _BODIES[name], simulator(name, None)
    model = single.model
    observation = (
        *vector_entries(model, body.rules),
        *(Entry("", "always zero, where v2 has contact forces") for _ in range(body.zeros)),
        *(Entry(agent, "is this agent", "0 or 1") for agent in spec.names),
    )
    described = {
        agent: AgentEntries(observation, action_entries(model, driven))
        for agent, driven in zip(spec.names, body.actuators, strict=True)
    }
    single.close()
    return described


class MultiAgentMujoco:
    """OMIGA's team of agents on one :class:`JointBody`. ``render()`` needs ``render_mode="rgb_array"``."""

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        self.spec = team_spec(task)
        self._joint = JointBody(task.split("/")[1], render_mode)
        agents = len(self.spec.agents)
        self._observation: Float = np.zeros((agents, self.spec.observation_size), np.float32)
        self._controls = np.zeros(self._joint.action_size)
        self._steps = 0
        self._outcomes = OutcomeLog([self._joint.data], self.spec)

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
        self._controls[list(self._joint.body.joints)] = joint_action(self.spec, actions)
        observation, reward, terminated = self._joint.step(self._controls)
        self._steps += 1
        truncated = not terminated and self._steps >= EPISODE_LIMIT
        infos: dict[str, dict[str, Any]] = {name: {} for name in names}
        infos[names[0]].update(single_outcomes(self._outcomes, self._steps, terminated, truncated))
        return (
            self._observe(observation),
            dict.fromkeys(names, reward),
            dict.fromkeys(names, terminated),
            dict.fromkeys(names, truncated),
            infos,
        )

    def state(self) -> Float:
        return self._observation.reshape(-1).copy()

    def render(self) -> NDArray[np.uint8]:
        return self._joint.render()

    def close(self) -> None:
        self._joint.close()

    def _observe(self, observation: NDArray[np.float64]) -> Observations:
        self._observation = team_vectors(self.spec, observation[None])[0]
        return {name: self._observation[i].copy() for i, name in enumerate(self.spec.names)}


def team_vectors(spec: TeamSpec, raw: NDArray[Any]) -> Float:
    """Turn v5's observations into what a team observes: ``[M, R] -> float32 [M, N, O]``."""
    agents = len(spec.agents)
    vectors = np.zeros((len(raw), agents, spec.observation_size))
    vectors[:, :, -agents:] = np.eye(agents)
    vectors[:, :, : raw.shape[-1]] = raw[:, None]
    return standardize(vectors)


def team_spec(task: str) -> TeamSpec:
    """Describe the team of a task. Raises :class:`UnknownNameError` for an unknown one."""
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    body = _BODIES[task.split("/")[1]]
    width, limit = body.observation + body.zeros + len(body.actuators), body.control_limit
    return TeamSpec(
        task=task,
        agents=tuple(
            AgentSpec(f"agent_{i}", width, ActionSpec("continuous", len(driven), -limit, limit))
            for i, driven in enumerate(body.actuators)
        ),
        state_size=width * len(body.actuators),
        control_rate=body.control_rate,
        normalizer=NORMALIZER,
        episode_limit=EPISODE_LIMIT,
    )


def simulator(name: str, render_mode: str | None) -> Any:
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
