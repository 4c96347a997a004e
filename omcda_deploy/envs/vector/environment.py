"""Batched environments: the interface, and single environments behind it.

A simulator that steps many environments by itself defines its own :class:`BatchedEnvironment`. For any other,
:class:`VectorEnvironment` steps single ones, in this process or in worker processes
(:mod:`omcda_deploy.envs.vector.workers`). Rows never influence one another, so results are the same for any number
of workers. E is the number of environments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs import Float
from omcda_deploy.envs.vector.workers import EnvironmentGroup, ScalarInfo, Worker, start_workers, zero_arrays
from omcda_deploy.errors import ConfigError, ContractError, SimulatorError
from omcda_deploy.spec import TeamSpec

# More would fill the memory before anything is seen of them.
MOST_ENVIRONMENTS = 100_000
MOST_WORKERS = 1024


@dataclass(frozen=True)
class VectorStep:
    """Result of a reset or step of E environments. Later steps do not change its arrays.

    ``action_masks`` is None for continuous tasks. ``info`` holds the scalars that a simulator reports in the first
    agent's info (such as ``won``), 0 where an environment reported none.
    """

    observations: dict[str, Float]  # [E, O_i]
    state: Float  # [E, S]
    action_masks: dict[str, NDArray[np.uint8]] | None  # [E, A_i]
    reward: NDArray[np.float64]  # [E]
    terminated: NDArray[np.bool_]  # [E]
    truncated: NDArray[np.bool_]  # [E]
    info: dict[str, NDArray[Any]]  # [E]


class BatchedEnvironment(Protocol):
    """E environments of one task, stepped together. None is reset automatically.

    Raises :class:`ContractError` for actions that do not fit, or an environment stepped before its reset or after
    its end.
    """

    spec: TeamSpec
    num_envs: int

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        """Start new episodes in the environments named by ``seeds``; the others keep their present observation."""
        ...

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        """Apply ``actions`` ([E, A_i], or [E] if discrete) in the environments that ``active`` [E] marks.

        None marks all. The others are not stepped: they keep their last observation, with reward 0 and both flags
        False.
        """
        ...

    def render(self, index: int) -> NDArray[np.uint8]:
        """The present frame of one environment, uint8 [height, width, 3]."""
        ...

    def close(self) -> None:
        """Free what the environments hold; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def vectorize(task: str, num_envs: int, *, workers: int = 0, **options: Any) -> BatchedEnvironment:
    """Make ``num_envs`` environments of ``task`` in the fastest form that its simulator has.

    ``workers`` and the errors are those of :class:`VectorEnvironment`; a simulator that batches by itself starts no
    workers. ``options`` go to the simulator.
    """
    require_counts(num_envs, workers)
    make = registry.vector_factory(task)
    if make is None:
        return VectorEnvironment(task, num_envs, workers=workers, **options)
    registry.require_options(task, make, options)
    return make(task, num_envs, **options)


class VectorEnvironment:
    """Single environments as a :class:`BatchedEnvironment`.

    Each of ``workers`` spawned processes steps an equal share of them; 0 steps all of them in this process.
    ``options`` go to the task's ``make``. Raises UnknownNameError or MissingExtraError as making one environment
    does, :class:`SimulatorError` when a worker fails or dies, and :class:`ContractError` for actions that do not
    fit or an environment stepped before its reset or after its end. An error inside a simulator closes them all.
    """

    def __init__(self, task: str, num_envs: int, *, workers: int = 0, **options: Any) -> None:
        require_counts(num_envs, workers)
        self.spec: TeamSpec = registry.team_spec(task, **options)
        self.num_envs = num_envs
        self._idle = np.ones(num_envs, np.bool_)
        self._groups: list[EnvironmentGroup] = []
        self._workers: list[Worker] = []
        if workers == 0:
            self._arrays = zero_arrays(self.spec, num_envs)
            self._groups = [EnvironmentGroup(task, options, range(num_envs), self._arrays)]
            return
        count = min(workers, num_envs)
        try:
            self._arrays = start_workers(task, options, self.spec, num_envs, count, self._workers)
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        require_indices(seeds, self.num_envs)
        for name in ("reward", "terminated", "truncated"):
            self._arrays[name][:] = 0
        self._idle[list(seeds)] = False
        return self._answer(self._call("reset", dict(seeds)))

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        active, columns = checked_actions(self.spec, self.num_envs, self._idle, actions, active)
        discrete = self.spec.action_kind == "discrete"
        for index, action in enumerate(columns):
            self._arrays["action"][:, index if discrete else self.spec.action_slices[index]] = action
        self._arrays["active"][:] = active
        answer = self._answer(self._call("step"))
        self._idle |= answer.terminated | answer.truncated
        return answer

    def render(self, index: int) -> NDArray[np.uint8]:
        require_indices([index], self.num_envs)
        if self._groups:
            return self._groups[0].render(index)
        worker = next(worker for worker in self._workers if index in worker.rows)
        try:
            worker.send("render", index)
            frame: NDArray[np.uint8] = worker.receive()
        except BaseException:
            self.close()
            raise
        return frame

    def close(self) -> None:
        for group in self._groups:
            group.close()
        for worker in self._workers:
            with suppress(SimulatorError):
                worker.send("close", None)
        for worker in self._workers:
            worker.join()
        self._groups, self._workers = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, command: str, seeds: dict[int, int] | None = None) -> ScalarInfo:
        if not self._groups and not self._workers:
            raise ContractError("this VectorEnvironment is closed: make a new one")
        info: ScalarInfo = {}
        try:
            for group in self._groups:
                info |= group.run(command, seeds)
            for worker in self._workers:
                worker.send(command, seeds)
            for worker in self._workers:
                info |= worker.receive()
        except BaseException:
            self.close()  # some environments have stepped and some have not
            raise
        return info

    def _answer(self, info: ScalarInfo) -> VectorStep:
        agents = self.spec.agents
        joined, masks = self._arrays["observation"].copy(), self._arrays.get("action_mask")
        masks = masks.copy() if masks is not None else None
        return VectorStep(
            observations={
                agent.name: joined[:, columns]
                for agent, columns in zip(agents, self.spec.observation_slices, strict=True)
            },
            state=self._arrays["state"].copy(),
            action_masks=None
            if masks is None
            else {
                agent.name: masks[:, columns]
                for agent, columns in zip(agents, self.spec.action_slices, strict=True)
            },
            reward=self._arrays["reward"].copy(),
            terminated=self._arrays["terminated"].copy(),
            truncated=self._arrays["truncated"].copy(),
            info=_info_arrays(info, self.num_envs),
        )


def require_indices(indices: Iterable[int], num_envs: int) -> None:
    """Raise :class:`ContractError` for an index that none of the environments has."""
    if outside := [index for index in indices if not 0 <= index < num_envs]:
        raise ContractError(f"expected environments 0 to {num_envs - 1}, got {outside[0]}")


def checked_actions(
    spec: TeamSpec,
    num_envs: int,
    idle: NDArray[np.bool_],
    actions: Mapping[str, NDArray[Any]],
    active: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.bool_], list[NDArray[Any]]]:
    """Check the arguments of a step; return ``active`` [E] and one array of ``actions`` per agent in team order.

    ``idle`` [E] marks environments between episodes. Raises :class:`ContractError` where one of these is active,
    and for shapes and types that do not fit; the simulator checks the values.
    """
    active = np.ones(num_envs, np.bool_) if active is None else np.asarray(active, np.bool_)
    if active.shape != (num_envs,):
        raise ContractError(f"active: expected shape [{num_envs}], got {list(active.shape)}")
    if (between := np.flatnonzero(active & idle)).size:
        raise ContractError(
            f"environment {between[0]} is between episodes: reset it, or leave it out of `active`"
        )
    columns = []
    for agent in spec.agents:
        if agent.name not in actions:
            raise ContractError(f"no action for {agent.name}: expected one per agent, got {sorted(actions)}")
        action = np.asarray(actions[agent.name])
        discrete = agent.action.kind == "discrete"
        expected = (num_envs,) if discrete else (num_envs, agent.action.size)
        if action.shape != expected:
            raise ContractError(
                f"action of {agent.name}: expected shape {list(expected)}, got {list(action.shape)}"
            )
        if discrete and action.dtype.kind not in "iu":
            raise ContractError(f"action of {agent.name}: expected integers, got {action.dtype}")
        columns.append(action)
    return active, columns


def require_counts(num_envs: int, workers: int = 0) -> None:
    """Raise :class:`ConfigError` for numbers of environments or workers that are out of range."""
    for name, number, least, most in (
        ("num_envs", num_envs, 1, MOST_ENVIRONMENTS),
        ("workers", workers, 0, MOST_WORKERS),
    ):
        if isinstance(number, bool) or not least <= number <= most:
            raise ConfigError(f"{name}: expected {least} to {most:,}, got {number}")


def _info_arrays(info: ScalarInfo, num_envs: int) -> dict[str, NDArray[Any]]:
    reported: dict[str, dict[int, Any]] = {}
    for index, scalars in info.items():
        for name, value in scalars.items():
            reported.setdefault(name, {})[index] = value
    arrays = {}
    for name, values in reported.items():
        column = np.asarray(list(values.values()))
        arrays[name] = np.zeros(num_envs, column.dtype)
        arrays[name][list(values)] = column
    return arrays
