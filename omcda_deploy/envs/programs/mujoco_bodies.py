"""Many MuJoCo bodies stepped together, for :mod:`omcda_deploy.envs.mamujoco` and ``mamujoco_khop``.

E environments are E ``MjData`` of one ``MjModel``. MuJoCo's own step runs once per environment; observations,
rewards, ends and standardisation are computed for all of them at once. All numbers equal, to the bit, those of the
single environments, which step Gymnasium's classes one by one: as there, every sum runs over the entries of one row
in their order, and no expression changes its order.

Rules of reward and end: docs/simulators.md#rewards-and-ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import Float
from omcda_deploy.envs.programs.mujoco_outcomes import OutcomeLog
from omcda_deploy.envs.vector import VectorStep, checked_actions, require_counts, require_indices
from omcda_deploy.errors import ConfigError, ContractError, MissingExtraError
from omcda_deploy.spec import TeamSpec

_Array: TypeAlias = NDArray[np.float64]
_TORSO = 1  # body 0 is the world


def hopper_is_healthy(qpos: _Array, qvel: _Array) -> NDArray[np.bool_]:
    """Check Hopper-v5's height, angle and range of states: ``[R, 6], [R, 6] -> [R]``."""
    height, angle = qpos[:, 1], qpos[:, 2]
    states = np.concatenate([qpos, qvel], axis=1)[:, 2:]
    in_range = ((states > -100.0) & (states < 100.0)).all(axis=1)
    healthy: NDArray[np.bool_] = (
        in_range & (height > 0.7) & (height < np.inf) & (angle > -0.2) & (angle < 0.2)
    )
    return healthy


def ant_is_healthy(qpos: _Array, qvel: _Array) -> NDArray[np.bool_]:
    """Check that Ant-v5's height is in its range and all is finite: ``[R, 15], [R, 14] -> [R]``."""
    height = qpos[:, 2]
    finite = np.isfinite(qpos).all(axis=1) & np.isfinite(qvel).all(axis=1)
    healthy: NDArray[np.bool_] = finite & (height >= 0.2) & (height <= 1.0)
    return healthy


def humanoid_is_healthy(qpos: _Array, qvel: _Array) -> NDArray[np.bool_]:
    """Check that Humanoid-v5's height is in its range: ``[R, 24], [R, 23] -> [R]``."""
    healthy: NDArray[np.bool_] = (qpos[:, 2] > 1.0) & (qpos[:, 2] < 2.0)
    return healthy


@dataclass(frozen=True)
class BodyRules:
    """Observation, reward and end of a body, those of Gymnasium's v5 class but for v2's last reward.

    The observation is ``qpos`` without its leading entries, ``qvel``, ``more`` and contact forces. With x the
    forward position, in metres, and a_j the action of joint j, the reward of a control step of dt seconds is

        forward_weight (x' - x) / dt - control_cost * sum_j a_j^2     and healthy_reward more if the body can fall.

    v5 withholds the last term on the terminating step, and v2 does not.
    """

    control_cost: float
    hidden_positions: int  # leading entries of qpos that are not observed
    velocity_limit: float | None = None  # observed velocities are clipped to [-limit, limit]
    more: tuple[tuple[str, int], ...] = ()  # arrays of MjData, with the leading rows that are not observed
    contact_forces: bool = False  # observed as well, clipped to [-1, 1]; they cost a call after each step
    # x is qpos[0], the torso's xpos or the centre of mass. MuJoCo computes the last two before the last substep, so
    # they lag behind qpos.
    forward: Literal["joint", "torso", "mass"] = "joint"
    forward_weight: float = 1.0
    healthy_reward: float = 1.0
    # [R, qpos], [R, qvel] -> [R]; an episode terminates when it is False. None: only the time limit ends one.
    is_healthy: Callable[[_Array, _Array], NDArray[np.bool_]] | None = None


def render_frame(simulator: Any) -> NDArray[np.uint8]:
    """Render a Gymnasium environment: uint8 [480, 480, 3]. Raises :class:`ConfigError` without a render_mode."""
    if simulator.render_mode is None:
        raise ConfigError("MuJoCo was made without render_mode: use render_mode='rgb_array'")
    return np.asarray(simulator.render(), np.uint8)


class Bodies:
    """The physics of E bodies. ``rows`` are the numbers, 0 to E - 1, of the R bodies that a call concerns.

    ``simulator`` is one Gymnasium environment of the body. It owns the model, and resets and renders every row,
    after its ``data`` was set to that row's.
    """

    def __init__(self, simulator: Any, rules: BodyRules, count: int) -> None:
        try:
            import mujoco
        except ImportError as error:
            raise MissingExtraError("mujoco", "mujoco") from error
        self._mj_step: Callable[[Any, Any, int], None] = mujoco.mj_step
        self._mj_contact_forces: Callable[[Any, Any], None] = mujoco.mj_rnePostConstraint
        self._simulator, self._rules = simulator, rules
        self._data = [mujoco.MjData(simulator.model) for _ in range(count)]
        # Views of MuJoCo's memory, made once: an MjData keeps its buffers for life.
        self._controls = [data.ctrl for data in self._data]
        self._positions = [data.qpos for data in self._data]
        self._velocities = [data.qvel for data in self._data]
        self._more = [
            [getattr(data, name)[hidden:].reshape(-1) for data in self._data] for name, hidden in rules.more
        ]
        self._contacts = [data.cfrc_ext[1:].reshape(-1) for data in self._data]  # those of body 0 are zeros
        places = {
            "joint": lambda data: data.qpos[:1],
            "torso": lambda data: data.xpos[_TORSO, :1],
            "mass": lambda data: data.xipos.reshape(-1),
        }
        self._places = [places[rules.forward](data) for data in self._data]
        self._mass: _Array = simulator.model.body_mass[:, None]

    def outcome_log(self, spec: TeamSpec) -> OutcomeLog:
        """Return a log of these bodies' outcomes, in a task of ``spec``'s limit and rate."""
        return OutcomeLog(self._data, spec)

    def reset(self, row: int, seed: int) -> None:
        """Start the episode that Gymnasium starts from ``seed``."""
        self._simulator.data = self._data[row]
        self._simulator.reset(seed=seed)

    def observe(self, rows: Sequence[int]) -> _Array:
        """Return the raw observations, float64 [R, O]."""
        return self._observation(rows, _gather(self._positions, rows), _gather(self._velocities, rows))

    def step(self, rows: Sequence[int], actions: _Array) -> tuple[_Array, _Array, NDArray[np.bool_]]:
        """Apply ``actions`` [R, joints], unclipped -> (observations [R, O], rewards [R], terminated [R]).

        Gymnasium also calls ``mj_rnePostConstraint``, which computes contact forces, whoever reads them.
        """
        rules, model, frame_skip = self._rules, self._simulator.model, self._simulator.frame_skip
        before = self._forward(rows)
        for row, action in zip(rows, actions, strict=True):
            self._controls[row][:] = action
            self._mj_step(model, self._data[row], frame_skip)
            if rules.contact_forces:
                self._mj_contact_forces(model, self._data[row])
        after = self._forward(rows)
        qpos, qvel = _gather(self._positions, rows), _gather(self._velocities, rows)
        rewards = rules.forward_weight * ((after - before) / self._simulator.dt)
        terminated = np.zeros(len(rows), np.bool_)
        if rules.is_healthy is not None:
            healthy = rules.is_healthy(qpos, qvel)
            terminated = ~healthy
            rewards = rewards + rules.healthy_reward * healthy
        rewards = rewards - rules.control_cost * np.square(actions).sum(axis=1)
        rewards[terminated] += (
            rules.healthy_reward
        )  # last, as in JointBody: another order would round differently
        return self._observation(rows, qpos, qvel), rewards, terminated

    def render(self, row: int) -> NDArray[np.uint8]:
        """Render the present frame of a row; errors as in :func:`render_frame`."""
        renderer = self._simulator.mujoco_renderer
        self._simulator.data = renderer.data = self._data[row]
        if renderer.viewer is not None:  # created at the first frame, with a reference of its own to the data
            renderer.viewer.data = self._data[row]
        return render_frame(self._simulator)

    def close(self) -> None:
        self._simulator.close()

    def _forward(self, rows: Sequence[int]) -> _Array:
        """Return the forward positions x [R]."""
        places = _gather(self._places, rows)
        if self._rules.forward == "mass":
            moments = (self._mass * places.reshape(len(rows), -1, 3)).sum(axis=1)
            places = moments / np.sum(self._mass)
        return places[:, 0]

    def _observation(self, rows: Sequence[int], qpos: _Array, qvel: _Array) -> _Array:
        limit = self._rules.velocity_limit
        velocities = qvel if limit is None else np.clip(qvel, -limit, limit)
        more = [_gather(views, rows) for views in self._more]
        if self._rules.contact_forces:
            more.append(np.clip(_gather(self._contacts, rows), -1.0, 1.0))
        return np.concatenate([qpos[:, self._rules.hidden_positions :], velocities, *more], axis=1)


class MujocoVector:
    """E teams of one task in step: a :class:`~omcda_deploy.envs.vector.BatchedEnvironment`.

    ``view`` maps the bodies' observations [R, X] to those of the team [R, N, O], short ones padded, and to the
    states [R, S], both float32. ``actuators`` are those that the entries of the joined action drive, in order.

    All are stepped in the calling process. Actions must be finite, and are not clipped. After a
    :class:`ContractError` nothing was stepped or reset. ``simulator`` is closed with this object.
    """

    def __init__(
        self,
        spec: TeamSpec,
        num_envs: int,
        simulator: Any,
        rules: BodyRules,
        view: Callable[[_Array], tuple[Float, Float]],
        actuators: Sequence[int],
    ) -> None:
        require_counts(num_envs)
        self.spec = spec
        self.num_envs = num_envs
        self._view, self._entry_of_actuator = view, np.argsort(actuators)
        bodies = Bodies(simulator, rules, num_envs)
        self._bodies: Bodies | None = bodies
        self._outcomes = bodies.outcome_log(spec)
        # Zeros before the first reset.
        self._observations = np.zeros((num_envs, len(spec.agents), spec.observation_size), np.float32)
        self._states = np.zeros((num_envs, spec.state_size), np.float32)
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.ones(num_envs, np.bool_)

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        bodies = self._open()
        require_indices(seeds, self.num_envs)
        if negative := [seed for seed in seeds.values() if seed < 0]:
            raise ContractError(f"expected seeds of at least 0, got {negative[0]}")
        rows = list(seeds)
        for row, seed in seeds.items():
            bodies.reset(row, seed)
        if rows:
            self._observe(rows, bodies.observe(rows))
        self._steps[rows] = 0
        self._ended[rows] = False
        flags = np.zeros(self.num_envs, np.bool_)
        return self._answer(np.zeros(self.num_envs), flags, flags.copy(), {})

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        bodies = self._open()
        active, columns = checked_actions(self.spec, self.num_envs, self._ended, actions, active)
        rows = np.flatnonzero(active).tolist()
        joint = self._joint_actions(columns)[rows]
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        info: dict[str, NDArray[Any]] = {}
        if rows:
            observations, reward[rows], terminated[rows] = bodies.step(rows, _finite(joint))
            self._observe(rows, observations)
            self._steps[rows] += 1
            truncated[rows] = ~terminated[rows] & (self._steps[rows] >= self.spec.episode_limit)
            outcomes = self._outcomes.step(rows, self._steps[rows], terminated[rows], truncated[rows])
            for name, values in outcomes.items():
                info[name] = np.zeros(self.num_envs, np.bool_)
                info[name][rows] = values
            self._ended |= terminated | truncated
        return self._answer(reward, terminated, truncated, info)

    def render(self, index: int) -> NDArray[np.uint8]:
        """Render one environment: uint8 [480, 480, 3]. Raises :class:`ConfigError` without a render_mode."""
        require_indices([index], self.num_envs)
        return self._open().render(index)

    def close(self) -> None:
        if self._bodies is not None:
            self._bodies.close()
        self._bodies = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Bodies:
        if self._bodies is None:
            raise ContractError("this MujocoVector is closed: make a new one")
        return self._bodies

    def _joint_actions(self, columns: Sequence[NDArray[Any]]) -> _Array:
        """Actions of all agents by actuator [E, joints], rounded to float32 as single environments get them."""
        joint = np.empty((self.num_envs, len(self._entry_of_actuator)), np.float32)
        np.concatenate(columns, axis=1, out=joint, casting="unsafe")
        return joint.astype(np.float64)[:, self._entry_of_actuator]

    def _observe(self, rows: Sequence[int], observations: _Array) -> None:
        self._observations[rows], self._states[rows] = self._view(observations)

    def _answer(
        self,
        reward: _Array,
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        info: dict[str, NDArray[Any]],
    ) -> VectorStep:
        observations = self._observations.copy()
        return VectorStep(
            observations={
                agent.name: observations[:, i, : agent.observation_size]
                for i, agent in enumerate(self.spec.agents)
            },
            state=self._states.copy(),
            action_masks=None,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            info=info,
        )


def _gather(views: Sequence[_Array], rows: Sequence[int]) -> _Array:
    """Copy the 1-D views of ``rows`` into one array [R, size of a view]."""
    return np.concatenate([views[row] for row in rows]).reshape(len(rows), -1)


def _finite(joint: _Array) -> _Array:
    if not (finite := np.isfinite(joint).all(axis=1)).all():
        row = int(np.flatnonzero(~finite)[0])
        raise ContractError(f"actions: expected finite numbers, got {joint[row].tolist()}")
    return joint
