"""Groups of single environments, in this process or in worker processes, and the arrays they share with the caller.

Every group owns some rows of one set of arrays (:func:`array_layout`) and writes only these. The arrays of worker
processes lie in shared memory, so a control step costs two short messages per worker, whatever the size of an
observation.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs import Environment
from omcda_deploy.envs.adapters.border import Answer, Border
from omcda_deploy.errors import ConfigError, ContractError, PluginError, SimulatorError, TerminatedError
from omcda_deploy.references import describe_error
from omcda_deploy.spec import TeamSpec

Arrays: TypeAlias = dict[str, NDArray[Any]]
ScalarInfo: TypeAlias = dict[int, dict[str, Any]]  # by environment, only those that reported scalars

CLOSE_SECONDS = 5.0  # time for a worker to end by itself before it is terminated


def array_layout(spec: TeamSpec, num_envs: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every array that the caller and E environments exchange."""
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


def zero_arrays(spec: TeamSpec, num_envs: int) -> Arrays:
    """Make the arrays of environments that are stepped in this process."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in array_layout(spec, num_envs).items()}


class EnvironmentGroup:
    """The environments ``rows``, in the process that steps them; writes only these rows of ``arrays``."""

    def __init__(self, task: str, options: Mapping[str, Any], rows: range, arrays: Arrays) -> None:
        self._task = task
        self._environments: dict[int, Environment] = {}
        try:
            for index in rows:
                self._environments[index] = registry.make_environment(task, **options)
        except BaseException:
            self.close()
            raise
        self._arrays = arrays
        self._spec = self._environments[rows[0]].spec
        self._names = self._spec.names
        self._discrete = self._spec.action_kind == "discrete"
        self._borders = {index: Border(self._spec) for index in rows}

    def run(self, command: str, seeds: Mapping[int, int] | None) -> ScalarInfo:
        """Run the command ``step``, or ``reset`` with ``seeds`` by environment."""
        try:
            return self._step() if command == "step" else self._reset(seeds or {})
        except TerminatedError:
            raise
        except SystemExit as error:  # of a simulator: it would end the command, as if all were done
            raise SimulatorError(f"{self._task}: {command}() raised {describe_error(error)}") from error

    def render(self, index: int) -> NDArray[np.uint8]:
        """The present frame of one environment, uint8 [height, width, 3]."""
        return self._environments[index].render()

    def close(self) -> None:
        """Close all environments of the group, also where one raises (:func:`registry.close_environment`)."""
        for environment in self._environments.values():
            registry.close_environment(self._task, environment)

    def _reset(self, seeds: Mapping[int, int]) -> ScalarInfo:
        info: ScalarInfo = {}
        for index, seed in seeds.items():
            if index in self._environments:
                environment = self._environments[index]
                answer = environment.reset(seed)
                self._write(index, self._borders[index].reset(answer, environment.state()), info)
        return info

    def _step(self) -> ScalarInfo:
        info: ScalarInfo = {}
        arrays = self._arrays
        for index, environment in self._environments.items():
            if not arrays["active"][index]:
                arrays["reward"][index] = arrays["terminated"][index] = arrays["truncated"][index] = 0
                continue
            row = arrays["action"][index]
            actions: dict[str, Any] = (
                {name: int(action) for name, action in zip(self._names, row, strict=True)}
                if self._discrete
                else {
                    name: row[columns]
                    for name, columns in zip(self._names, self._spec.action_slices, strict=True)
                }
            )
            answer = self._borders[index].step(environment.step(actions), environment.state())
            arrays["reward"][index] = answer.reward
            arrays["terminated"][index] = answer.terminated
            arrays["truncated"][index] = answer.truncated
            self._write(index, answer, info)
        return info

    def _write(self, index: int, answer: Answer, info: ScalarInfo) -> None:
        """Write one environment's row, and the scalars that it reported into ``info``."""
        self._arrays["observation"][index] = answer.observation
        self._arrays["state"][index] = answer.state
        if answer.action_mask is not None:
            self._arrays["action_mask"][index] = answer.action_mask
        if answer.info:
            info[index] = answer.info


@dataclass(frozen=True)
class Worker:
    """Caller's side of a process with the environments ``rows``.

    Its methods raise :class:`SimulatorError` where the process has died, and the error that the worker reports.
    """

    process: multiprocessing.context.SpawnProcess
    connection: Connection
    rows: range

    def send(self, command: str, payload: Any) -> None:
        """Send a command without waiting for its answer."""
        try:
            self.connection.send((command, payload))
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        """Wait for the answer to the oldest command that has none yet."""
        try:
            error, answer = self.connection.recv()
        except (EOFError, OSError) as failure:
            raise self._death() from failure
        if error is not None:
            raise error
        return answer

    def join(self) -> None:
        """Wait until the process ends, or terminate it after :data:`CLOSE_SECONDS`."""
        self.connection.close()
        self.process.join(CLOSE_SECONDS)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def _death(self) -> SimulatorError:
        self.process.join(CLOSE_SECONDS)
        return SimulatorError(
            f"worker with {self.process.name} died (exit code {self.process.exitcode}; -9 is often a lack of "
            "memory). Start again, with fewer environments or workers if it repeats"
        )


def start_workers(
    task: str, options: Mapping[str, Any], spec: TeamSpec, num_envs: int, count: int, workers: list[Worker]
) -> Arrays:
    """Spawn ``count`` processes with an equal share of the environments each; returns the arrays they share.

    Appends to ``workers`` as the processes start, so that the caller can end them when a later one fails.
    """
    context = multiprocessing.get_context("spawn")
    shared = {
        name: context.RawArray("B", math.prod(shape) * np.dtype(dtype).itemsize)
        for name, (shape, dtype) in array_layout(spec, num_envs).items()
    }
    bounds = [num_envs * i // count for i in range(count + 1)]
    for first, last in pairwise(bounds):
        callers_end, workers_end = context.Pipe()
        rows = range(first, last)
        process = context.Process(
            target=_work,
            args=(workers_end, task, options, spec, num_envs, rows, shared),
            name=f"environments {first} to {last - 1} of {task}",
            daemon=True,
        )
        process.start()
        workers_end.close()
        workers.append(Worker(process, callers_end, rows))
    for worker in workers:
        worker.receive()
    return _views(spec, num_envs, shared)


def _work(
    connection: Connection,
    task: str,
    options: Mapping[str, Any],
    spec: TeamSpec,
    num_envs: int,
    rows: range,
    shared: Mapping[str, Any],
) -> None:
    # Ctrl-C reaches the whole process group; the parent decides which processes end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    group: EnvironmentGroup | None = None
    try:
        group = EnvironmentGroup(task, options, rows, _views(spec, num_envs, shared))
        connection.send((None, None))
        while (message := connection.recv())[0] != "close":
            command, payload = message
            connection.send(
                (None, group.render(payload) if command == "render" else group.run(command, payload))
            )
    except (Exception, SystemExit) as error:
        name = multiprocessing.current_process().name
        text = f"worker with {name} failed: {type(error).__name__}: {error}"
        with suppress(OSError):  # the parent, and with it the other end of the pipe, may be gone
            complete = isinstance(error, ContractError | ConfigError | PluginError | SimulatorError)
            connection.send((error if complete else SimulatorError(text), None))
    finally:
        if group:
            group.close()


def _views(spec: TeamSpec, num_envs: int, shared: Mapping[str, Any]) -> Arrays:
    return {
        name: np.frombuffer(shared[name], dtype).reshape(shape)
        for name, (shape, dtype) in array_layout(spec, num_envs).items()
    }
