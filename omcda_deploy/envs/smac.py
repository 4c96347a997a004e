"""SMAC, the StarCraft Multi-Agent Challenge: ``smac/<map>`` in oxwhirl's standard form.

SMAC pins a version of protobuf that this package cannot use. So it runs in an interpreter of its own
(``programs/smac_host.py``) and exchanges messages with this module over two pipes; docs/smac.md explains its
installation. The specs follow from SMAC's own formulas (:mod:`omcda_deploy.envs.starcraft`), so datasets, bundles
and servers need no StarCraft II. Actions: 0 nothing (the only one of the dead), 1 stop, 2-5 move, 6 and up attack.
A step is 8 game loops, of which a second has 22.4 at the speed "faster": 2.8 Hz.

An episode is lost when StarCraft II crashes, when the host dies, or when SMAC raises an exception in an environment
that has played a step before. Its last step has reward 0, is a truncation, and carries ``discarded: True`` in the
first agent's info. The next reset starts a new host.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.entries import AgentEntries
from omcda_deploy.envs import Float, Observations, StepResult, joint_choice
from omcda_deploy.envs.programs import smac_host
from omcda_deploy.envs.starcraft import MAPS
from omcda_deploy.errors import ConfigError, ContractError, SimulatorError, UnknownNameError

ANSWER_SECONDS = 300.0  # longer than StarCraft II takes to start, or SMAC to start it again after a crash
VERSIONS_SECONDS = 30.0
CLOSE_SECONDS = 10.0  # time for a host to end its StarCraft II before both are killed
PRINTED_BYTES = 4096  # end of the output of a host and StarCraft II, kept for error messages

logger = logging.getLogger(__name__)

SPECS = {f"smac/{name}": smac_map.spec(f"smac/{name}") for name, smac_map in MAPS.items()}
TASKS = tuple(SPECS)


def make(
    task: str,
    python: str | None = None,
    factory: str | None = None,
    path: str | None = None,
    render_mode: str | None = None,
) -> Smac:
    """Make a team in SMAC. The first reset starts SMAC.

    ``python`` is the interpreter that SMAC is installed in. ``factory``, as ``module:callable``, makes the
    environment there instead of ``smac.env:StarCraft2Env``, from the same keywords (map_name, seed, difficulty,
    step_mul). Its module is searched among that interpreter's packages, then in the folder ``path`` (default: the
    working directory). Raises :class:`UnknownNameError`, and :class:`ConfigError` without an interpreter, for a
    factory of another form and for any ``render_mode``, because SMAC renders no frames.
    """
    return Smac(task, python, factory, path, render_mode)


def entries(task: str) -> dict[str, AgentEntries]:
    """Name what each agent observes and may choose."""
    return MAPS[task.split("/")[1]].entries(SPECS[task].names)


def versions(python: str | None = None, **_options: Any) -> dict[str, str]:
    """Versions of SMAC's packages in that interpreter and of StarCraft II; empty where they cannot be read."""
    if python is None:
        return {}
    command = [python, "-I", smac_host.__file__, "--versions"]
    try:
        output = subprocess.run(command, capture_output=True, check=True, timeout=VERSIONS_SECONDS).stdout
        installed: dict[str, str] = json.loads(output)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.warning("the versions of SMAC in %s stay unknown: %s", python, error)
        return {}
    return installed


class Smac:
    """Environment of SMAC in an interpreter of its own; see :func:`make` for the options.

    SMAC takes a seed only when it creates its game: at the first reset, and at the first after a lost episode.
    Further episodes continue in that game, and their seeds have no effect.
    """

    def __init__(
        self, task: str, python: str | None, factory: str | None, path: str | None, render_mode: str | None
    ) -> None:
        if task not in SPECS:
            raise UnknownNameError("task", task, SPECS)
        if render_mode is not None:
            raise _no_frames(task)
        if python is None or shutil.which(python) is None:
            raise ConfigError(
                f"{task}: --simulator-python (in Python, the option python): expected the bin/python of a virtual "
                f"environment with SMAC, got {python}. docs/smac.md tells how to make one"
            )
        if factory is not None and not all(factory.partition(":")):
            raise ConfigError(f"--simulator-factory: expected MODULE:CALLABLE, got {factory!r}")
        self.spec = SPECS[task]
        self._python, self._factory, self._path = python, factory, path
        self._host: _Host | None = None
        self._playing = False
        self._proven = False  # True once a step was played, so that this SMAC is known to work
        self._first_episode = False  # True while the first episode of the host's game goes on
        self._steps = 0
        agents = len(self.spec.agents)
        self._observations: Float = np.zeros((agents, self.spec.observation_size), np.float32)
        self._state: Float = np.zeros(self.spec.state_size, np.float32)
        self._masks: NDArray[np.uint8] = np.zeros((agents, self.spec.action_size), np.uint8)

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        """Start an episode; ``seed`` has an effect where a host is started for it.

        Raises :class:`ContractError` where the interpreter's SMAC has another team than oxwhirl's, and
        :class:`SimulatorError` where SMAC does not start.
        """
        if self._first_episode:
            self.close()  # a reset in its first episode makes SMAC launch a second game and rescale rewards
        self._steps, self._playing = 0, False
        if self._host is not None:
            try:
                self._read_step(self._reset(self._host))
            except (_HostDiedError, SimulatorError) as death:  # between two episodes, so none is lost
                logger.warning("%s: starting another host: %s", self.spec.task, death)
                self.close()
        if self._host is None:
            try:
                self._host = self._launch(seed)
                self._first_episode = True
                self._require_same_map(self._host.receive()[0]["env_info"])
                self._read_step(self._reset(self._host))
            except _HostDiedError as death:
                self._host = None
                raise SimulatorError(
                    f"{self.spec.task}: expected SMAC to start in {self._python}, but {death}. See docs/smac.md"
                ) from death
        self._playing = True
        return self._observe(), self._infos({})

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        choices = joint_choice(self.spec, actions)
        if self._host is None or not self._playing:
            raise ContractError(f"{self.spec.task} is between episodes: reset it first")
        for name, mask, choice in zip(self.spec.names, self._masks, choices, strict=True):
            if not mask[choice]:
                raise ContractError(
                    f"{self.spec.task}: action of {name}: expected one of the available "
                    f"{np.flatnonzero(mask).tolist()}, got {choice}: give the policy its action mask"
                )
        try:
            answer, data = self._host.ask("step", np.array(choices, "<i8").tobytes())
        except _HostDiedError as death:
            return self._discard(str(death))
        except SimulatorError as failure:
            if not self._proven:
                raise
            return self._discard(str(failure))  # perhaps SMAC could not start StarCraft II again
        if "refused" in answer:
            raise ContractError(
                f"{self.spec.task}: SMAC refused the actions {choices}, which it had called available: "
                f"{answer['refused']}"
            )
        if "crashed" in answer:
            return self._discard("StarCraft II crashed")
        self._read_step(data)
        self._steps, self._proven = self._steps + 1, True
        over, won = bool(answer["terminated"]), bool(answer["won"])
        truncated = over and not won and self._steps >= self.spec.episode_limit  # an end, for SMAC
        self._playing = not over
        self._first_episode &= not over
        return self._result(float(answer["reward"]), over and not truncated, truncated, {"won": won})

    def state(self) -> Float:
        return self._state.copy()

    def render(self) -> NDArray[np.uint8]:
        raise _no_frames(self.spec.task)

    def close(self) -> None:
        """End the host and its StarCraft II."""
        self._playing = self._first_episode = False
        if self._host is not None:
            self._host.close()
            self._host = None

    def _reset(self, host: _Host) -> bytes:
        answer, data = host.ask("reset")
        if "crashed" in answer:
            raise host.lost("StarCraft II crashed when an episode was to begin")
        return data

    def _launch(self, seed: int | None) -> _Host:
        arguments = ["--map-name", self.spec.task.split("/")[1]]
        if seed is not None:
            arguments += ["--seed", str(seed)]
        if self._factory is not None:
            arguments += ["--factory", self._factory, "--path", str(Path(self._path or ".").resolve())]
        return _Host(self._python, arguments)

    def _require_same_map(self, env_info: Mapping[str, int]) -> None:
        expected = {
            "n_agents": len(self.spec.agents),
            "obs_shape": self.spec.observation_size,
            "state_shape": self.spec.state_size,
            "n_actions": self.spec.action_size,
            "episode_limit": self.spec.episode_limit,
        }
        if different := [
            f"{name} {env_info[name]} against {size}"
            for name, size in expected.items()
            if env_info[name] != size
        ]:
            self.close()
            raise ContractError(
                f"the SMAC in {self._python} is not that of {self.spec.task}: {', '.join(different)}. Expected "
                "oxwhirl's with its default settings; variants with other features, such as MAPPO's, need other "
                "bundles and datasets"
            )

    def _read_step(self, data: bytes) -> None:
        split = self._observations.nbytes
        end = split + self._state.nbytes
        self._observations = np.frombuffer(data[:split], "<f4").reshape(self._observations.shape)
        self._state = np.frombuffer(data[split:end], "<f4")
        self._masks = np.frombuffer(data[end:], np.uint8).reshape(self._masks.shape)
        if not (available := self._masks.any(axis=1)).all():
            raise ContractError(
                f"{self.spec.task}: expected an available action for every agent, SMAC has none for "
                f"{self.spec.names[int(available.argmin())]}: look at its get_avail_actions"
            )

    def _discard(self, reason: str) -> StepResult:
        self.close()
        logger.warning("%s: an episode is lost after %d steps: %s", self.spec.task, self._steps, reason)
        return self._result(0.0, False, True, {"discarded": True})

    def _result(
        self, reward: float, terminated: bool, truncated: bool, report: Mapping[str, Any]
    ) -> StepResult:
        names = self.spec.names
        return (
            self._observe(),
            dict.fromkeys(names, reward),
            dict.fromkeys(names, terminated),
            dict.fromkeys(names, truncated),
            self._infos(report),
        )

    def _observe(self) -> Observations:
        return {name: row.copy() for name, row in zip(self.spec.names, self._observations, strict=True)}

    def _infos(self, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        infos: dict[str, dict[str, Any]] = {
            name: {"action_mask": row.copy()} for name, row in zip(self.spec.names, self._masks, strict=True)
        }
        infos[self.spec.names[0]].update(report)
        return infos


def _no_frames(task: str) -> ConfigError:
    return ConfigError(
        f"{task} shows no frames: leave the video out. SMAC saves replays for StarCraft II instead (docs/smac.md)"
    )


class _HostDiedError(Exception):
    """The process of a host has ended; the message says how, or why it was ended."""


class _Host:
    """A process that runs ``smac_host.py``, and the two pipes to it."""

    def __init__(self, python: str, arguments: Sequence[str]) -> None:
        self._python = python
        requests, self._write = os.pipe()
        self._read, answers = os.pipe()
        # -I: neither PYTHONPATH nor the script's folder may hide that interpreter's packages.
        command = [python, "-I", smac_host.__file__, str(requests), str(answers), *arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(requests, answers),
                start_new_session=True,  # so that it is killed together with StarCraft II, and not by Ctrl-C
            )
        except OSError as error:
            os.close(self._write)
            os.close(self._read)
            raise SimulatorError(f"{python} cannot be run: {error}. See docs/smac.md") from error
        finally:
            os.close(requests)
            os.close(answers)
        self._open = True
        self._printed = b""
        self._printing = threading.Thread(target=self._drain, daemon=True)
        self._printing.start()

    def ask(self, command: str, data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer; errors are those of :meth:`receive`."""
        if not self._open:
            raise _HostDiedError("its process was ended")
        try:
            smac_host.write_frame(self._write, {"command": command}, data)
        except OSError as error:
            raise self._died(error) from error
        return self.receive()

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Read an answer. Raises :class:`_HostDiedError`, and :class:`SimulatorError` for SMAC's exceptions."""
        try:
            control, data = smac_host.read_frame(self._read, ANSWER_SECONDS)
        except (OSError, EOFError, ValueError) as error:
            raise self._died(error) from error
        if "error" in control:
            self.close()
            raise SimulatorError(
                f"SMAC failed in {self._python}: {control['error']}. Does it run there by itself? See docs/smac.md"
            )
        return control, data

    def close(self) -> None:
        """Let the host end its StarCraft II, or kill both. A second call does nothing."""
        if self._open:
            self._open = False
            os.close(self._write)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
            # No process of the group may be left; macOS raises PermissionError where all have ended.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._printing.join(CLOSE_SECONDS)
            os.close(self._read)

    def lost(self, reason: str) -> _HostDiedError:
        """End the host because of an answer; return the error to raise."""
        self.close()
        return _HostDiedError(reason)

    def _died(self, error: Exception) -> _HostDiedError:
        if isinstance(error, TimeoutError):
            self._process.kill()  # otherwise close() would wait for it once more
        self.close()
        closed_pipe = isinstance(error, EOFError | BrokenPipeError)
        reason = f"its process ended with exit code {self._process.returncode}" if closed_pipe else str(error)
        last = " / ".join(self._printed.decode(errors="replace").strip().splitlines()[-5:])
        return _HostDiedError(f"{reason}, having printed {last!r}" if last else reason)

    def _drain(self) -> None:
        """Read the host's output, so that printing never blocks it, and keep the end."""
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while part := os.read(stream.fileno(), 1 << 16):
                logger.debug("SMAC printed: %s", part.decode(errors="replace"))
                self._printed = (self._printed + part)[-PRINTED_BYTES:]
