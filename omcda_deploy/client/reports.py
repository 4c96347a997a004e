"""Recording of what servers do not see: rewards, ends, and the observations behind them."""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.client.episode import EpisodeClock
from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.inputs import finite_rows, mask_rows, of_agent
from omcda_deploy.recordings import FORMAT, REPORTS
from omcda_deploy.recordings.columns import REPORT_COLUMNS, Values
from omcda_deploy.recordings.recorder import Recorder
from omcda_deploy.spec import TeamSpec

ByAgent: TypeAlias = Mapping[str, Any]

_ADVICE = "look at what the simulator says"


class Unseen(NamedTuple):
    """Details that :meth:`omcda_deploy.client.remote.RemoteTeam.report` may be told; None where it is not.

    ``active`` [B]: rows of the batch that took a step; the others belong to no episode now.
    """

    active: NDArray[np.bool_] | None = None
    next_observations: ByAgent | None = None
    next_action_masks: ByAgent | None = None
    state: NDArray[Any] | None = None
    next_state: NDArray[Any] | None = None


class _Sample(NamedTuple):
    """A report. ``active`` [A]: rows of the batch; ``rows``: their columns [A, …]."""

    time_ns: int
    episode_id: str
    step: int
    fallback: bool
    active: NDArray[np.int64]
    rows: Mapping[str, NDArray[Any]]


class Reports:
    """Records the reports of a client's steps. Raises as :class:`Recorder`."""

    folder = REPORTS
    columns = REPORT_COLUMNS

    def __init__(self, folder: Path, spec: TeamSpec, episode: EpisodeClock) -> None:
        self.metadata = {
            "format": FORMAT,
            "kind": "reports",
            "contract_hash": spec.contract_hash,
            "team": json.dumps(spec.to_json()),
        }
        self._spec, self._episode = spec, episode
        self._acted = 0  # the step that may be reported
        self._batch, self._fallback = 1, False
        self._recorder = Recorder(folder)

    @property
    def lost(self) -> int:
        """Rows that could not be recorded."""
        return self._recorder.tally.lost.total()

    def expect(self, batch: int, fallback: bool) -> None:
        """Note that the team has acted for ``batch`` rows, and whether a fallback acted for one of the agents."""
        self._acted, self._batch, self._fallback = self._episode.step, batch, fallback

    def add(self, reward: Any, terminated: Any, truncated: Any, unseen: Mapping[str, Any]) -> None:
        """Record the step that was acted last. ``unseen``: see :class:`Unseen`.

        Raises :class:`ConfigError` before a step, or for a second report of one, and :class:`ContractError` for
        other shapes, numbers that are not finite and masks of anything but 0 and 1.
        """
        if not self._acted:
            raise ConfigError("report: expected one call after each act(), got one without: call act() first")
        if unknown := unseen.keys() - set(Unseen._fields):
            raise ConfigError(
                f"report: expected {', '.join(Unseen._fields)}, got {unknown.pop()}: leave it out"
            )
        told = Unseen(**unseen)
        rows = {
            "reward": self._of_team("reward", reward, np.float64),
            "terminated": self._of_team("terminated", terminated, np.bool_),
            "truncated": self._of_team("truncated", truncated, np.bool_),
            "next_observation": self._joined(told.next_observations, "next_observations"),
            "next_action_mask": self._joined(told.next_action_masks, "next_action_masks"),
            "state": self._state(told.state, "state"),
            "next_state": self._state(told.next_state, "next_state"),
        }
        if not np.isfinite(rows["reward"]).all():
            raise ContractError(f"reward: expected finite numbers, got {reward}: {_ADVICE}")
        active = np.arange(self._batch)
        if told.active is not None:
            active = np.flatnonzero(self._of_team("active", told.active, np.bool_))
        rows = {
            name: values[active] for name, values in rows.items()
        }  # copies, as callers reuse their arrays
        sample = _Sample(time.time_ns(), self._episode.id, self._acted, self._fallback, active, rows)
        self._recorder.put(self, sample, len(active), sum(values.nbytes for values in rows.values()))
        self._acted = 0

    def values(self, samples: Sequence[_Sample]) -> Mapping[str, Values]:
        counts = [len(sample.active) for sample in samples]
        columns: dict[str, Any] = {
            "time": np.repeat([sample.time_ns for sample in samples], counts),
            "episode_id": [
                sample.episode_id for sample, count in zip(samples, counts, strict=True) for _ in range(count)
            ],
            "episode_step": np.repeat(np.array([sample.step for sample in samples], np.uint64), counts),
            "row": np.concatenate([sample.active for sample in samples]),
            "fallback": np.repeat([sample.fallback for sample in samples], counts),
        }
        told = {column.name for column in self.columns} - columns.keys()
        return columns | {name: [row for sample in samples for row in sample.rows[name]] for name in told}

    def derived(self, values: Mapping[str, Values]) -> Mapping[str, Values]:
        return {}

    def close(self) -> None:
        """Write what is waiting."""
        self._recorder.close()

    def _of_team(self, name: str, value: Any, kind: Any) -> NDArray[Any]:
        """Return the team's value of each row, [B]; equal values by agent, as PettingZoo's, count as one."""
        if isinstance(value, Mapping):
            agents = [_values(name, value[agent], kind) for agent in self._spec.names if agent in value]
            if len(agents) < len(self._spec.agents) or any(not np.array_equal(a, agents[0]) for a in agents):
                raise ContractError(
                    f"{name}: expected one value for the team, or equal ones of {', '.join(self._spec.names)}, got "
                    f"{dict(value)}: join the agents' own first"
                )
            value = agents[0]
        array = _values(name, value, kind)
        if array.shape not in ((), (self._batch,)) or (array.ndim == 0 and self._batch != 1):
            raise ContractError(
                f"{name}: expected shape [{self._batch}], as act() had, got {list(array.shape)}"
            )
        return array.reshape(self._batch)

    def _joined(self, by_agent: ByAgent | None, name: str) -> NDArray[Any]:
        """Return the agents' vectors side by side, [B, sum]; [B, 0] for none."""
        if by_agent is None:
            return np.zeros((self._batch, 0), np.float32)
        parts = []
        for agent in self._spec.agents:
            told, what = of_agent(by_agent, agent.name, name), f"{name} of {agent.name}"
            parts.append(
                mask_rows(told, agent.action.size, what)
                if name == "next_action_masks"
                else finite_rows(told, agent.observation_size, what, _ADVICE)
            )
        return np.concatenate([self._rows(part, name) for part in parts], axis=1)

    def _state(self, state: NDArray[Any] | None, name: str) -> NDArray[Any]:
        if state is None:
            return np.zeros((self._batch, 0), np.float32)
        return self._rows(finite_rows(state, self._spec.state_size, name, _ADVICE), name)

    def _rows(self, rows: NDArray[Any], name: str) -> NDArray[Any]:
        if len(rows) != self._batch:
            raise ContractError(f"{name}: expected {self._batch} rows, as act() had, got {len(rows)}")
        return rows


def _values(name: str, value: Any, kind: Any) -> NDArray[Any]:
    """Return numbers, or truth values: those themselves, 0 and 1, as anything else is true or false by accident."""
    truth = kind is np.bool_
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" or (truth and not np.isin(array, (0, 1)).all()):
        expected = "truth values" if truth else "numbers"
        raise ContractError(f"{name}: expected {expected}, got {reprlib.repr(value)}: convert them first")
    return array.astype(kind)
