"""Send recorded episodes to a team, on the clock; for :mod:`omcda_deploy.play.replay`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset
from omcda_deploy.play.measurements import CallLog, require_answer
from omcda_deploy.policy import Decision, Float, NoiseSource, TeamPolicy


@dataclass(frozen=True, eq=False)
class Round:
    """B recorded episodes that are sent side by side."""

    members: NDArray[np.int64]  # [B] numbers of the episodes
    lengths: NDArray[np.int64]  # [B] transitions
    counted: NDArray[np.bool_]  # [B] False for copies of the first one, which fill up a short last round

    @classmethod
    def of(cls, dataset: Dataset, members: NDArray[np.int64], batch: int) -> Round:
        """Fill ``members`` up to ``batch`` episodes."""
        copies = np.repeat(members[:1], batch - len(members))
        numbers = np.concatenate([members, copies])
        return cls(numbers, dataset.episode_length[numbers], np.arange(batch) < len(members))

    def __len__(self) -> int:
        """The number of steps of the longest episode."""
        return int(self.lengths.max())


@dataclass(frozen=True, eq=False)
class Answer:
    """A call of the team: the rows of the dataset that it was sent, and its decisions."""

    rows: NDArray[np.int64]  # [B]
    noise: Mapping[str, Float] | None  # [B, A] by agent, None for deterministic actions
    decisions: Mapping[str, Decision]


class Sender:
    """Sends rounds step by step as a control loop at ``rate`` Hz would, and keeps the time.

    ``calls`` has the latencies, ``misses`` counts late answers; :func:`omcda_deploy.play.replay.replay` defines
    them, ``paced`` and ``progress``. ``total`` is the number of calls of all rounds.
    """

    def __init__(
        self,
        team: TeamPolicy,
        dataset: Dataset,
        rate: float,
        paced: bool,
        noise: NoiseSource,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.calls = CallLog(team)
        self.misses = 0
        self._team, self._dataset, self._noise = team, dataset, noise
        self._rate, self._paced = rate, paced
        self._total, self._progress = total, progress

    def send(self, episodes: Round) -> list[Answer]:
        """Send one round; returns the team's answers, step by step."""
        batch = len(episodes.members)
        answers = []
        self._team.reset()
        origin = perf_counter()
        for t in range(len(episodes)):
            rows = self._dataset.episode_start[episodes.members] + np.minimum(t, episodes.lengths - 1)
            observations, masks = observations_of(self._dataset, rows), masks_of(self._dataset, rows)
            noise = self._noise.draw_for(self._team, batch)
            if self._paced and (wait := origin + t / self._rate - perf_counter()) > 0:
                sleep(wait)
            sent = perf_counter()
            decisions = self._team.act(observations, noise=noise, action_masks=masks)
            arrival = perf_counter()
            tick = origin + t / self._rate if self._paced else sent
            self.misses += arrival - tick > 1 / self._rate
            require_answer(self._dataset.spec, decisions, batch)
            self.calls.add(arrival - sent, decisions)
            answers.append(Answer(rows, noise, decisions))
            if self._progress:
                self._progress(len(self.calls.step_seconds), self._total)
        return answers


def observations_of(dataset: Dataset, rows: NDArray[np.int64]) -> dict[str, Float]:
    """Rows as a simulator shows them: per agent [B, O], without the dataset's padding to the longest vector."""
    return {
        agent.name: np.ascontiguousarray(dataset.observations[rows, i, : agent.observation_size])
        for i, agent in enumerate(dataset.spec.agents)
    }


def masks_of(dataset: Dataset, rows: NDArray[np.int64]) -> dict[str, NDArray[np.uint8]] | None:
    """Action masks of ``rows``, per agent [B, A], without padding; None for continuous actions."""
    masks = dataset.action_masks
    if masks is None:
        return None
    return {
        agent.name: np.ascontiguousarray(masks[rows, i, : agent.action.size])
        for i, agent in enumerate(dataset.spec.agents)
    }
