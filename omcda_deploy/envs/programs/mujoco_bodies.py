"""Many MuJoCo bodies stepped together, for :mod:`omcda_deploy.envs.mamujoco`.

E environments are E ``MjData`` of one ``MjModel``. MuJoCo's own step runs once per environment; observations,
rewards, ends and standardisation are computed for all of them at once. All numbers equal, to the bit, those of
:class:`omcda_deploy.envs.mamujoco.MultiAgentMujoco`, which steps Gymnasium's classes one by one: as there, every
sum runs over the contiguous entries of one row, and no expression changes its order.

Rules of reward and end: docs/simulators.md#rewards-and-ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class BodyRules:
    """Observation, reward and end of a body, those of Gymnasium's v5 class but for v2's last reward.

    The observation is ``qpos`` without its leading entries, then ``qvel``. With x the forward position, in metres,
    and a_j the action of joint j, the reward of a control step of dt seconds is

        (x' - x) / dt - control_cost * sum_j a_j^2            and 1 more if the body can fall.

    v5 withholds this 1 on the terminating step, and v2 does not.
    """

    control_cost: float
    hidden_positions: int  # leading entries of qpos that are not observed
    velocity_limit: float | None = None  # observed velocities are clipped to [-limit, limit]
    # x is the torso's xpos instead of qpos[0]. MuJoCo computes xpos before the last substep, so the two differ.
    by_torso: bool = False
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
        self._simulator, self._rules = simulator, rules
        self._data = [mujoco.MjData(simulator.model) for _ in range(count)]
        # Views of MuJoCo's memory, made once: an MjData keeps its buffers for life.
        self._controls = [data.ctrl for data in self._data]
        self._positions = [data.qpos for data in self._data]
        self._velocities = [data.qvel for data in self._data]
        self._forward = [data.xpos[_TORSO, :1] if rules.by_torso else data.qpos[:1] for data in self._data]

    def reset(self, row: int, seed: int) -> None:
        """Start the episode that Gymnasium starts from ``seed``."""
        self._simulator.data = self._data[row]
        self._simulator.reset(seed=seed)

    def observe(self, rows: Sequence[int]) -> _Array:
        """Return the raw observations, float64 [R, O]."""
        return self._observation(_gather(self._positions, rows), _gather(self._velocities, rows))

    def step(self, rows: Sequence[int], actions: _Array) -> tuple[_Array, _Array, NDArray[np.bool_]]:
        """Apply ``actions`` [R, joints], unclipped -> (observations [R, O], rewards [R], terminated [R]).

        Gymnasium also calls ``mj_rnePostConstraint``, which computes contact forces; nothing here reads them.
        """
        rules, model, frame_skip = self._rules, self._simulator.model, self._simulator.frame_skip
        before = _gather(self._forward, rows)[:, 0]
        for row, action in zip(rows, actions, strict=True):
            self._controls[row][:] = action
            self._mj_step(model, self._data[row], frame_skip)
        after = _gather(self._forward, rows)[:, 0]
        qpos, qvel = _gather(self._positions, rows), _gather(self._velocities, rows)
        rewards = (after - before) / self._simulator.dt
        terminated = np.zeros(len(rows), np.bool_)
        if rules.is_healthy is not None:
            healthy = rules.is_healthy(qpos, qvel)
            terminated = ~healthy
            rewards = rewards + healthy
        rewards = rewards - rules.control_cost * np.square(actions).sum(axis=1)
        rewards[terminated] += 1.0  # last, as in JointBody: another order would round differently
        return self._observation(qpos, qvel), rewards, terminated

    def render(self, row: int) -> NDArray[np.uint8]:
        """Render the present frame of a row; errors as in :func:`render_frame`."""
        renderer = self._simulator.mujoco_renderer
        self._simulator.data = renderer.data = self._data[row]
        if renderer.viewer is not None:  # created at the first frame, with a reference of its own to the data
            renderer.viewer.data = self._data[row]
        return render_frame(self._simulator)

    def close(self) -> None:
        self._simulator.close()

    def _observation(self, qpos: _Array, qvel: _Array) -> _Array:
        limit = self._rules.velocity_limit
        velocities = qvel if limit is None else np.clip(qvel, -limit, limit)
        return np.concatenate([qpos[:, self._rules.hidden_positions :], velocities], axis=1)


class MujocoVector:
    """E teams of one ``mamujoco`` task in step: a :class:`~omcda_deploy.envs.vector.BatchedEnvironment`.

    All are stepped in the calling process. Actions must be finite, and are not clipped. After a
    :class:`ContractError` nothing was stepped or reset. ``simulator`` is closed with this object.
    """

    def __init__(self, spec: TeamSpec, num_envs: int, simulator: Any, rules: BodyRules) -> None:
        require_counts(num_envs)
        self.spec = spec
        self.num_envs = num_envs
        agents = len(spec.agents)
        self._bodies: Bodies | None = Bodies(simulator, rules, num_envs)
        self._joints = sum(agent.action.size for agent in spec.agents)
        # Raw vectors of all agents. Each step writes their first entries; the rest, Ant's 84 zeros and the
        # identities, is constant and equal in all rows.
        self._vectors = np.zeros((num_envs, agents, spec.observation_size))
        self._vectors[:, :, -agents:] = np.eye(agents)
        self._observations = np.zeros(self._vectors.shape, np.float32)  # zeros before the first reset
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
        return self._answer(np.zeros(self.num_envs), flags, flags.copy())

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        bodies = self._open()
        active, columns = checked_actions(self.spec, self.num_envs, self._ended, actions, active)
        rows = np.flatnonzero(active).tolist()
        joint = self._joint_actions(columns)[rows]
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        if rows:
            observations, reward[rows], terminated[rows] = bodies.step(rows, _finite(joint))
            self._observe(rows, observations)
            self._steps[rows] += 1
            truncated[rows] = ~terminated[rows] & (self._steps[rows] >= self.spec.episode_limit)
            self._ended |= terminated | truncated
        return self._answer(reward, terminated, truncated)

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
        """Actions of all agents side by side [E, joints], rounded to float32 as single environments get them."""
        joint = np.empty((self.num_envs, self._joints), np.float32)
        np.concatenate(columns, axis=1, out=joint, casting="unsafe")
        return joint.astype(np.float64)

    def _observe(self, rows: Sequence[int], observations: _Array) -> None:
        vectors = self._vectors[: len(rows)]
        vectors[:, :, : observations.shape[1]] = observations[:, None]
        self._observations[rows] = self.spec.normalizer.apply(vectors)

    def _answer(
        self, reward: _Array, terminated: NDArray[np.bool_], truncated: NDArray[np.bool_]
    ) -> VectorStep:
        observations = self._observations.copy()
        return VectorStep(
            observations={name: observations[:, i] for i, name in enumerate(self.spec.names)},
            state=self._observations.reshape(self.num_envs, -1).copy(),
            action_masks=None,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            info={},
        )


def _gather(views: Sequence[_Array], rows: Sequence[int]) -> _Array:
    """Copy the 1-D views of ``rows`` into one array [R, size of a view]."""
    return np.concatenate([views[row] for row in rows]).reshape(len(rows), -1)


def _finite(joint: _Array) -> _Array:
    if not (finite := np.isfinite(joint).all(axis=1)).all():
        row = int(np.flatnonzero(~finite)[0])
        raise ContractError(f"actions: expected finite numbers, got {joint[row].tolist()}")
    return joint
