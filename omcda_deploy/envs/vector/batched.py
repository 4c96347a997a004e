"""Many environments of one task, stepped together: :func:`vectorize`.

A simulator that steps many environments by itself brings its own :class:`BatchedEnvironment`; of any other,
:class:`VectorEnvironment` holds single ones, in this process or in worker processes. Workers share one block of
memory with the caller and own disjoint rows of it: a control step costs two short messages per worker, whatever the
sizes of observations. Rows never influence one another, so results are the same for any number of workers.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs import Float, Observations
from omcda_deploy.errors import ConfigError, ContractError, SimulatorError
from omcda_deploy.spec import TeamSpec

_Arrays = dict[str, NDArray[Any]]
_Info = dict[int, dict[str, Any]]  # by environment; only those with something to report

CLOSE_SECONDS = 5.0  # for a worker to end by itself before it is terminated


@dataclass(frozen=True)
class VectorStep:
    """What E environments show after a reset or step. The arrays are the caller's own.

    ``action_masks`` is None for continuous tasks. ``info`` holds the scalars that simulators report with the first
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
    """E environments of one task in step. Nothing is reset automatically.

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
        """Apply ``actions`` ([E, A_i], or [E] if discrete) in the environments of ``active`` [E] (default all).

        The others are not stepped: they keep their last observation, with reward 0 and both flags False.
        """
        ...

    def render(self, index: int) -> NDArray[np.uint8]:
        """The present frame of one environment, uint8 [height, width, 3]."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def vectorize(task: str, num_envs: int, *, workers: int = 0, **options: Any) -> BatchedEnvironment:
    """``num_envs`` environments of ``task`` in the fastest form that its simulator has.

    ``workers`` and the errors are those of :class:`VectorEnvironment`; a simulator that batches by itself needs no
    workers and starts none. ``options`` go to the simulator.
    """
    require_counts(num_envs, workers)
    make = registry.vector_factory(task)
    if make is None:
        return VectorEnvironment(task, num_envs, workers=workers, **options)
    registry.require_options(task, make, options)
    batched: BatchedEnvironment = make(task, num_envs, **options)
    return batched


class VectorEnvironment:
    """Single environments as a :class:`BatchedEnvironment`.

    ``workers`` spawned processes each step an equal share, 0 steps all of them in this process. ``options`` go to
    the task's ``make``. Raises UnknownNameError or MissingExtraError as making one environment does,
    :class:`SimulatorError` when a worker fails or dies, and :class:`ContractError` for actions that do not fit or
    an environment stepped before its reset or after its end. After an error inside a simulator all are closed.
    """

    def __init__(self, task: str, num_envs: int, *, workers: int = 0, **options: Any) -> None:
        require_counts(num_envs, workers)
        self.spec: TeamSpec = registry.team_spec(task, **options)
        self.num_envs = num_envs
        self._ended = np.ones(num_envs, np.bool_)
        self._columns = _columns(self.spec)
        self._shares: list[_Share] = []
        self._workers: list[_Worker] = []
        if workers == 0:
            self._arrays = {
                name: np.zeros(shape, dtype) for name, (shape, dtype) in _layout(self.spec, num_envs).items()
            }
            self._shares = [_Share(task, options, range(num_envs), self._arrays)]
            return
        context = multiprocessing.get_context("spawn")
        shared = {
            name: context.RawArray("B", math.prod(shape) * np.dtype(dtype).itemsize)
            for name, (shape, dtype) in _layout(self.spec, num_envs).items()
        }
        self._arrays = _views(self.spec, num_envs, shared)
        workers = min(workers, num_envs)
        bounds = [num_envs * i // workers for i in range(workers + 1)]
        try:
            for first, last in pairwise(bounds):
                ours, theirs = context.Pipe()
                rows = range(first, last)
                process = context.Process(
                    target=_work,
                    args=(theirs, task, options, self.spec, num_envs, rows, shared),
                    name=f"environments {first} to {last - 1} of {task}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, rows))
            for worker in self._workers:
                worker.receive()
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        require_indices(seeds, self.num_envs)
        for name in ("reward", "terminated", "truncated"):
            self._arrays[name][:] = 0
        self._ended[list(seeds)] = False
        return self._answer(self._call("reset", dict(seeds)))

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        active, columns = checked_actions(self.spec, self.num_envs, self._ended, actions, active)
        discrete = self.spec.action_kind == "discrete"
        for index, action in enumerate(columns):
            self._arrays["action"][:, index if discrete else self._columns.actions[index]] = action
        self._arrays["active"][:] = active
        answer = self._answer(self._call("step"))
        self._ended |= answer.terminated | answer.truncated
        return answer

    def render(self, index: int) -> NDArray[np.uint8]:
        require_indices([index], self.num_envs)
        if self._shares:
            return self._shares[0].render(index)
        worker = next(worker for worker in self._workers if index in worker.rows)
        try:
            worker.send("render", index)
            frame: NDArray[np.uint8] = worker.receive()
        except BaseException:
            self.close()
            raise
        return frame

    def close(self) -> None:
        for share in self._shares:
            share.close()
        for worker in self._workers:
            with suppress(SimulatorError):
                worker.send("close", None)
        for worker in self._workers:
            worker.join()
        self._shares, self._workers = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, command: str, seeds: dict[int, int] | None = None) -> _Info:
        if not self._shares and not self._workers:
            raise ContractError("this VectorEnvironment is closed: make a new one")
        info: _Info = {}
        try:
            for share in self._shares:
                info |= share.run(command, seeds)
            for worker in self._workers:
                worker.send(command, seeds)
            for worker in self._workers:
                info |= worker.receive()
        except BaseException:
            self.close()  # some have stepped and some have not
            raise
        return info

    def _answer(self, info: _Info) -> VectorStep:
        agents = self.spec.agents
        joined, masks = self._arrays["observation"].copy(), self._arrays.get("action_mask")
        masks = masks.copy() if masks is not None else None
        return VectorStep(
            observations={
                agent.name: joined[:, own]
                for agent, own in zip(agents, self._columns.observations, strict=True)
            },
            state=self._arrays["state"].copy(),
            action_masks=None
            if masks is None
            else {
                agent.name: masks[:, own] for agent, own in zip(agents, self._columns.actions, strict=True)
            },
            reward=self._arrays["reward"].copy(),
            terminated=self._arrays["terminated"].copy(),
            truncated=self._arrays["truncated"].copy(),
            info=_info_arrays(info, self.num_envs),
        )


def require_indices(indices: Iterable[int], num_envs: int) -> None:
    """Raise :class:`ContractError` for the number of an environment that is not there."""
    if outside := [index for index in indices if not 0 <= index < num_envs]:
        raise ContractError(f"expected environments 0 to {num_envs - 1}, got {outside[0]}")


def checked_actions(
    spec: TeamSpec,
    num_envs: int,
    ended: NDArray[np.bool_],
    actions: Mapping[str, NDArray[Any]],
    active: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.bool_], list[NDArray[Any]]]:
    """The arguments of a step as (active [E], one array of ``actions`` per agent in team order).

    ``ended`` [E] marks environments between episodes. Raises :class:`ContractError` where one of these is active,
    or a shape or type does not fit; values are left to the simulator.
    """
    active = np.ones(num_envs, np.bool_) if active is None else np.asarray(active, np.bool_)
    if active.shape != (num_envs,):
        raise ContractError(f"active: expected shape [{num_envs}], got {list(active.shape)}")
    if (between := np.flatnonzero(active & ended)).size:
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
    """Raise :class:`ConfigError` for numbers that are out of range."""
    if num_envs < 1 or workers < 0:
        raise ConfigError(
            f"expected num_envs of at least 1 and workers of at least 0, got {num_envs} and {workers}"
        )


class _Share:
    """Some of the environments, in the process that steps them. Writes only its own rows of ``arrays``."""

    def __init__(self, task: str, options: Mapping[str, Any], rows: range, arrays: _Arrays) -> None:
        self._environments = {index: registry.make_environment(task, **options) for index in rows}
        self._arrays = arrays
        spec = self._environments[rows[0]].spec
        self._names = spec.names
        self._discrete = spec.action_kind == "discrete"
        self._columns = _columns(spec)

    def run(self, command: str, seeds: Mapping[int, int] | None) -> _Info:
        return self._step() if command == "step" else self._reset(seeds or {})

    def render(self, index: int) -> NDArray[np.uint8]:
        return self._environments[index].render()

    def close(self) -> None:
        for environment in self._environments.values():
            environment.close()

    def _reset(self, seeds: Mapping[int, int]) -> _Info:
        info: _Info = {}
        for index, seed in seeds.items():
            if index in self._environments:
                observations, infos = self._environments[index].reset(seed)
                self._show(index, observations, infos, info)
        return info

    def _step(self) -> _Info:
        info: _Info = {}
        arrays, first = self._arrays, self._names[0]
        for index, environment in self._environments.items():
            if not arrays["active"][index]:
                arrays["reward"][index] = arrays["terminated"][index] = arrays["truncated"][index] = 0
                continue
            row = arrays["action"][index]
            actions: dict[str, Any] = (
                {name: int(action) for name, action in zip(self._names, row, strict=True)}
                if self._discrete
                else {name: row[own] for name, own in zip(self._names, self._columns.actions, strict=True)}
            )
            observations, rewards, terminations, truncations, infos = environment.step(actions)
            arrays["reward"][index] = rewards[first]
            arrays["terminated"][index] = terminations[first]
            arrays["truncated"][index] = truncations[first]
            self._show(index, observations, infos, info)
        return info

    def _show(
        self, index: int, observations: Observations, infos: Mapping[str, Mapping[str, Any]], info: _Info
    ) -> None:
        row = self._arrays["observation"][index]
        for name, own in zip(self._names, self._columns.observations, strict=True):
            row[own] = observations[name]
        self._arrays["state"][index] = self._environments[index].state()
        if self._discrete:
            row = self._arrays["action_mask"][index]
            for name, own in zip(self._names, self._columns.actions, strict=True):
                row[own] = infos[name]["action_mask"]
        scalars = {
            name: value
            for name, value in infos.get(self._names[0], {}).items()
            if isinstance(value, bool | int | float | np.generic)
        }
        if scalars:
            info[index] = scalars


@dataclass(frozen=True)
class _Worker:
    process: multiprocessing.context.SpawnProcess
    connection: Connection
    rows: range

    def send(self, command: str, payload: Any) -> None:
        try:
            self.connection.send((command, payload))
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        try:
            error, answer = self.connection.recv()
        except (EOFError, OSError) as failure:
            raise self._died() from failure
        if error is not None:
            raise error
        return answer

    def join(self) -> None:
        self.connection.close()
        self.process.join(CLOSE_SECONDS)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def _died(self) -> SimulatorError:
        self.process.join(CLOSE_SECONDS)
        return SimulatorError(
            f"worker with {self.process.name} died (exit code {self.process.exitcode}; -9 is often a lack of "
            "memory). Start again, with fewer environments or workers if it repeats"
        )


def _work(
    connection: Connection,
    task: str,
    options: Mapping[str, Any],
    spec: TeamSpec,
    num_envs: int,
    rows: range,
    shared: Mapping[str, Any],
) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides what ends
    share: _Share | None = None
    try:
        share = _Share(task, options, rows, _views(spec, num_envs, shared))
        connection.send((None, None))
        while (message := connection.recv())[0] != "close":
            command, payload = message
            connection.send(
                (None, share.render(payload) if command == "render" else share.run(command, payload))
            )
    except Exception as error:
        name = multiprocessing.current_process().name
        text = f"worker with {name} failed: {type(error).__name__}: {error}"
        with suppress(OSError):  # the parent may be gone, and its end of the pipe what failed
            told = isinstance(error, ContractError | ConfigError)
            connection.send((error if told else SimulatorError(text), None))
    finally:
        if share:
            share.close()


@dataclass(frozen=True)
class _Columns:
    """Where each agent's part of a joined row lies."""

    observations: list[slice]
    actions: list[slice]  # of continuous actions, and of the masks of discrete ones


def _columns(spec: TeamSpec) -> _Columns:
    return _Columns(
        list(_runs([agent.observation_size for agent in spec.agents])),
        list(_runs([agent.action.size for agent in spec.agents])),
    )


def _runs(sizes: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _layout(spec: TeamSpec, num_envs: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every array that the caller and the environments exchange."""
    actions = sum(agent.action.size for agent in spec.agents)
    discrete = spec.action_kind == "discrete"
    layout: dict[str, tuple[tuple[int, ...], Any]] = {
        "observation": ((num_envs, sum(agent.observation_size for agent in spec.agents)), np.float32),
        "state": ((num_envs, spec.state_size), np.float32),
        "action": ((num_envs, len(spec.agents)), np.int64) if discrete else ((num_envs, actions), np.float32),
        "reward": ((num_envs,), np.float64),
        "terminated": ((num_envs,), np.bool_),
        "truncated": ((num_envs,), np.bool_),
        "active": ((num_envs,), np.bool_),
    }
    if discrete:
        layout["action_mask"] = ((num_envs, actions), np.uint8)
    return layout


def _views(spec: TeamSpec, num_envs: int, shared: Mapping[str, Any]) -> _Arrays:
    return {
        name: np.frombuffer(shared[name], dtype).reshape(shape)
        for name, (shape, dtype) in _layout(spec, num_envs).items()
    }


def _info_arrays(info: _Info, num_envs: int) -> dict[str, NDArray[Any]]:
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
