"""SMAC, the StarCraft Multi-Agent Challenge: ``smac/{5m_vs_6m,6h_vs_8z,corridor}`` in oxwhirl's standard form.

SMAC pins a protobuf that this package cannot share an interpreter with. So it runs in one of its own
(``smac_host.py``), which talks to us over two pipes; docs/smac.md tells how to install it. The specs are known
without it, by SMAC's own formulas (baselines.md 9.2): n agents, e enemies, shield bits s_a and s_e,

    O = 4 + e (5 + s_e) + (n - 1) (5 + s_a) + 1 + s_a        A = 6 + e
    S = n (4 + s_a) + e (3 + s_e) + n A

so datasets, bundles and servers need no StarCraft II. Actions: 0 nothing (the dead, and they alone), 1 stop, 2-5
move, 6 and up attack. A step is 8 game loops of the 22.4 that a second has at the speed "faster": 2.8 Hz.

An episode in which StarCraft II crashes or the host dies is lost: its last step has reward 0, is a truncation, and
carries ``discarded: True`` in the first agent's info; so is one that an exception of SMAC's ends, once a step has
been played. The next reset starts a new host.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import Float, Observations, StepResult, joint_choice
from omcda_deploy.envs.programs import smac_host
from omcda_deploy.errors import ConfigError, ContractError, SimulatorError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

ANSWER_SECONDS = 300.0  # longer than StarCraft II takes to start, or SMAC to start it again after a crash
VERSIONS_SECONDS = 30.0
CLOSE_SECONDS = 10.0  # for a host to end its StarCraft II before both are killed
PRINTED_BYTES = 4096  # of what a host and StarCraft II print, kept for error messages
GAME_LOOPS_PER_SECOND = 22.4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Map:
    agents: int
    enemies: int
    limit: int  # steps
    ally_shield: int = 0  # 1 for Protoss
    enemy_shield: int = 0

    def spec(self, task: str) -> TeamSpec:
        n, e, own, theirs = self.agents, self.enemies, self.ally_shield, self.enemy_shield
        observation = 4 + e * (5 + theirs) + (n - 1) * (5 + own) + 1 + own
        return TeamSpec(
            task=task,
            agents=tuple(
                AgentSpec(f"agent_{i}", observation, ActionSpec("discrete", 6 + e)) for i in range(n)
            ),
            state_size=n * (4 + own) + e * (3 + theirs) + n * (6 + e),
            control_rate=GAME_LOOPS_PER_SECOND / smac_host.STEP_MUL,
            episode_limit=self.limit,
        )


_MAPS = {
    "5m_vs_6m": _Map(5, 6, 70),
    "6h_vs_8z": _Map(6, 8, 150, enemy_shield=1),
    "corridor": _Map(6, 24, 400, ally_shield=1),
}
SPECS = {f"smac/{name}": played.spec(f"smac/{name}") for name, played in _MAPS.items()}
TASKS = tuple(SPECS)


def make(
    task: str,
    python: str | None = None,
    factory: str | None = None,
    path: str | None = None,
    render_mode: str | None = None,
) -> Smac:
    """A team in SMAC. Nothing is started before the first reset.

    ``python`` is the interpreter that SMAC is installed in. ``factory``, as ``module:callable``, makes the
    environment there instead of ``smac.env:StarCraft2Env``, from the same keywords (map_name, seed, difficulty,
    step_mul); its module is looked for among that interpreter's packages, then in the folder ``path`` (default: the
    working directory). Raises :class:`UnknownNameError`, and :class:`ConfigError` without an interpreter, for a
    factory of another form and for any ``render_mode``: SMAC shows no frames.
    """
    return Smac(task, python, factory, path, render_mode)


def versions(python: str | None = None, **_options: Any) -> dict[str, str]:
    """Of SMAC's packages in that interpreter and of StarCraft II; empty where it cannot say."""
    if python is None:
        return {}
    command = [python, "-I", smac_host.__file__, "--versions"]
    try:
        told = subprocess.run(command, capture_output=True, check=True, timeout=VERSIONS_SECONDS).stdout
        found: dict[str, str] = json.loads(told)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.warning("the versions of SMAC in %s stay unknown: %s", python, error)
        return {}
    return found


class Smac:
    """One SMAC environment in an interpreter of its own; see :func:`make` for the options.

    SMAC takes a seed only where its game is created: the seed of the first reset, and of the first after a lost
    episode, counts. Further episodes go on in that game, whatever their seed.
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
        self._proven = False  # a step has been played: this SMAC works
        self._first_episode = False  # of the host's game, not ended yet
        self._steps = 0
        agents = len(self.spec.agents)
        self._observations: Float = np.zeros((agents, self.spec.observation_size), np.float32)
        self._state: Float = np.zeros(self.spec.state_size, np.float32)
        self._masks: NDArray[np.uint8] = np.zeros((agents, self.spec.action_size), np.uint8)

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        """Start an episode; ``seed`` counts where a host is started for it.

        Raises :class:`ContractError` where the interpreter's SMAC shows another team than oxwhirl's, and
        :class:`SimulatorError` where SMAC does not start.
        """
        if self._first_episode:  # SMAC would launch another game beside it, and scale its rewards anew
            self.close()
        self._steps, self._playing = 0, False
        if self._host is not None:
            try:
                self._see(self._reset(self._host))
            except (_HostDiedError, SimulatorError) as death:  # between two episodes: nothing is lost
                logger.warning("%s: starting another host: %s", self.spec.task, death)
                self.close()
        if self._host is None:
            try:
                self._host = self._launch(seed)
                self._first_episode = True
                self._require_same_map(self._host.receive()[0]["env_info"])
                self._see(self._reset(self._host))
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
            answer, shown = self._host.ask("step", np.array(choices, "<i8").tobytes())
        except _HostDiedError as death:
            return self._discard(str(death))
        except SimulatorError as failure:
            if not self._proven:
                raise
            return self._discard(str(failure))  # SMAC could not start StarCraft II again, for instance
        if "refused" in answer:
            raise ContractError(
                f"{self.spec.task}: SMAC refused the actions {choices}, which it had called available: "
                f"{answer['refused']}"
            )
        if "crashed" in answer:
            return self._discard("StarCraft II crashed")
        self._see(shown)
        self._steps, self._proven = self._steps + 1, True
        over, won = bool(answer["terminated"]), bool(answer["won"])
        truncated = over and not won and self._steps >= self.spec.episode_limit  # SMAC calls this an end, too
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
        answer, shown = host.ask("reset")
        if "crashed" in answer:
            raise host.lost("StarCraft II crashed when an episode was to begin")
        return shown

    def _launch(self, seed: int | None) -> _Host:
        arguments = ["--map-name", self.spec.task.split("/")[1]]
        if seed is not None:
            arguments += ["--seed", str(seed)]
        if self._factory is not None:
            arguments += ["--factory", self._factory, "--path", str(Path(self._path or ".").resolve())]
        return _Host(self._python, arguments)

    def _require_same_map(self, found: Mapping[str, int]) -> None:
        expected = {
            "n_agents": len(self.spec.agents),
            "obs_shape": self.spec.observation_size,
            "state_shape": self.spec.state_size,
            "n_actions": self.spec.action_size,
            "episode_limit": self.spec.episode_limit,
        }
        if different := [
            f"{name} {found[name]} against {size}" for name, size in expected.items() if found[name] != size
        ]:
            self.close()
            raise ContractError(
                f"the SMAC in {self._python} is not that of {self.spec.task}: {', '.join(different)}. Expected "
                "oxwhirl's with its default settings; variants with other features, such as MAPPO's, need other "
                "bundles and datasets"
            )

    def _see(self, shown: bytes) -> None:
        split = self._observations.nbytes
        end = split + self._state.nbytes
        self._observations = np.frombuffer(shown[:split], "<f4").reshape(self._observations.shape)
        self._state = np.frombuffer(shown[split:end], "<f4")
        self._masks = np.frombuffer(shown[end:], np.uint8).reshape(self._masks.shape)
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
    """Says how the process of a host ended, or why it was."""


class _Host:
    """A process that runs ``smac_host.py``, and the two pipes to it."""

    def __init__(self, python: str, arguments: Sequence[str]) -> None:
        self._python = python
        requests, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Isolated: else the script's own folder, with this very file in it, would be where it imports `smac` from.
        command = [python, "-I", smac_host.__file__, str(requests), str(answers), *arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(requests, answers),
                start_new_session=True,  # a group to be killed with its StarCraft II, and out of reach of Ctrl-C
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
        """Send a request and wait for its answer; raises as :meth:`receive` does."""
        if not self._open:
            raise _HostDiedError("its process was ended")
        try:
            smac_host.write_frame(self._write, {"command": command}, data)
        except OSError as error:
            raise self._died(error) from error
        return self.receive()

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next answer. Raises :class:`_HostDiedError`, or :class:`SimulatorError` for SMAC's exceptions."""
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
        """Let it end its StarCraft II, or kill both. A second call does nothing."""
        if self._open:
            self._open = False
            os.close(self._write)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
            with suppress(
                ProcessLookupError, PermissionError
            ):  # none is left; macOS denies where all are dead
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._printing.join(CLOSE_SECONDS)
            os.close(self._read)

    def lost(self, reason: str) -> _HostDiedError:
        """End it for what it has told."""
        self.close()
        return _HostDiedError(reason)

    def _died(self, error: Exception) -> _HostDiedError:
        if isinstance(error, TimeoutError):
            self._process.kill()  # closing would wait for it once more
        self.close()
        ended = isinstance(error, EOFError | BrokenPipeError)
        reason = f"its process ended with exit code {self._process.returncode}" if ended else str(error)
        last = " / ".join(self._printed.decode(errors="replace").strip().splitlines()[-5:])
        return _HostDiedError(f"{reason}, having printed {last!r}" if last else reason)

    def _drain(self) -> None:
        """Read what is printed, so that no printer ever waits; the last of it is kept."""
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while part := os.read(stream.fileno(), 1 << 16):
                logger.debug("SMAC printed: %s", part.decode(errors="replace"))
                self._printed = (self._printed + part)[-PRINTED_BYTES:]
