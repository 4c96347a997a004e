"""Records of play: a step of a batch, an episode, and a table of episodes.

Shapes: E environments or episodes, N agents, T steps of an episode.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.envs.vector import VectorStep
from omcda_deploy.play.measurements import saturated
from omcda_deploy.policy import Decision
from omcda_deploy.spec import TeamSpec


@dataclass(frozen=True, eq=False)
class PlayedStep:
    """One control step of a batch of environments."""

    spec: TeamSpec
    previous: VectorStep  # the observations that the team answers
    decisions: Mapping[str, Decision]  # its answers, by agent
    result: VectorStep  # the environments' answer to its actions
    active: NDArray[np.bool_]  # [E] environments that took the step
    age: NDArray[np.int64]  # [E] steps of each environment's episode, this one included
    ended: NDArray[np.bool_]  # [E] the episode ended with this step
    discarded: NDArray[np.bool_]  # [E] it ended because the simulator lost it
    seeds: Mapping[int, int]  # environment -> seed of its episode
    seconds: float  # wall-clock time of `team.act`

    @cached_property
    def divergence(self) -> NDArray[np.float64]:
        """Divergence of each agent's answer in nats, [E, N]."""
        values = [np.asarray(self.decisions[name].divergence, np.float64) for name in self.spec.names]
        return np.stack(values, axis=1)

    @cached_property
    def saturated(self) -> NDArray[np.int64]:
        """Entries of each agent's action within 0.1 % of a bound, [E, N]; 0 for discrete ones."""
        entries = np.zeros((len(self.active), len(self.spec.agents)), np.int64)
        if self.spec.action_kind == "continuous":
            for index, agent in enumerate(self.spec.agents):
                entries[:, index] = saturated(self.decisions[agent.name].action, agent.action).sum(axis=1)
        return entries


@dataclass(frozen=True, eq=False)
class PlayedEpisode:
    """A finished episode of T steps, without its observations."""

    seed: int  # the environment was reset with it
    round: int  # the batch that it was played in, counted from 0
    rewards: NDArray[np.float64]  # [T]
    divergence: NDArray[np.float64]  # [T, N] nats; nan where a fallback answered
    saturated: NDArray[np.int64]  # [N] entries of continuous actions within 0.1 % of a bound
    terminated: bool  # False: the time limit cut it
    outcomes: Mapping[str, bool]  # of omcda_deploy.envs.OUTCOMES, those that the simulator reports
    discarded: bool  # the simulator lost it: it counts nowhere

    def __len__(self) -> int:
        """The number of steps T."""
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """The undiscounted sum of the rewards, added step by step."""
        return reduce(add, self.rewards.tolist(), 0.0)


class RoundLog:
    """Rewards, divergences and ends of one round in the environments ``rows``, from which its episodes are made."""

    def __init__(self, spec: TeamSpec, rows: slice) -> None:
        count, agents = rows.stop - rows.start, len(spec.agents)
        self._rows = rows
        self._age = np.zeros(count, np.int64)
        self._rewards: list[NDArray[np.float64]] = []  # [rows] each step
        self._divergence: list[NDArray[np.float64]] = []  # [rows, N] each step
        self._saturated = np.zeros((count, agents), np.int64)
        self._terminated = np.zeros(count, np.bool_)
        self._discarded = np.zeros(count, np.bool_)
        self._outcomes = {name: np.zeros(count, np.bool_) for name in OUTCOMES}

    @property
    def steps(self) -> int:
        return len(self._rewards)

    def add(self, step: PlayedStep) -> None:
        rows = self._rows
        self._age = step.age[rows]
        ended, active = step.ended[rows], step.active[rows]
        self._rewards.append(step.result.reward[rows])
        self._divergence.append(step.divergence[rows])
        self._saturated[active] += step.saturated[rows][active]
        self._terminated[ended] = step.result.terminated[rows][ended]
        self._discarded |= step.discarded[rows]
        for name in step.result.info.keys() & self._outcomes.keys():
            self._outcomes[name][ended] = np.asarray(step.result.info[name], np.bool_)[rows][ended]

    def episode(self, index: int, seed: int, round_number: int, reported: Container[str]) -> PlayedEpisode:
        """The finished episode of environment ``index`` of the round, with its ``reported`` outcomes."""
        length = int(self._age[index])
        return PlayedEpisode(
            seed=seed,
            round=round_number,
            rewards=np.array([rewards[index] for rewards in self._rewards[:length]], np.float64),
            divergence=np.stack([values[index] for values in self._divergence[:length]]),
            saturated=self._saturated[index],
            terminated=bool(self._terminated[index]),
            outcomes={
                name: bool(values[index]) for name, values in self._outcomes.items() if name in reported
            },
            discarded=bool(self._discarded[index]),
        )


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Table of E played episodes, in order; those that the simulator lost are not among them.

    ``stalled``, ``fell`` and ``won`` are None where the simulator does not report them; what they mean is the
    simulator's definition (docs/simulators.md#outcomes).
    """

    episode_seeds: tuple[int, ...]
    returns: NDArray[np.float64]  # [E]
    lengths: NDArray[np.int64]  # [E]
    terminated: NDArray[np.bool_]  # [E]; the others were cut by the time limit
    stalled: NDArray[np.bool_] | None = None  # [E]
    fell: NDArray[np.bool_] | None = None  # [E]
    won: NDArray[np.bool_] | None = None  # [E]

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Sample standard deviation of the returns, nan for a single episode."""
        return float(self.returns.std(ddof=1)) if self.returns.size > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`mean`, nan for a single episode."""
        return self.std / math.sqrt(self.returns.size)

    @property
    def shares(self) -> dict[str, float | None]:
        """Share of the episodes by outcome; None for one that the simulator does not report."""
        outcomes = {name: getattr(self, name) for name in OUTCOMES}
        return {name: None if values is None else float(values.mean()) for name, values in outcomes.items()}

    def columns(self) -> dict[str, Any]:
        """Plain JSON: one list per column, null for an outcome that is not reported."""
        outcomes = {name: getattr(self, name) for name in OUTCOMES}
        return {
            "episode_seeds": list(self.episode_seeds),
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
            "ended_by": ["terminal" if end else "time limit" for end in self.terminated],
            **{name: None if values is None else values.tolist() for name, values in outcomes.items()},
        }


def episode_table(played: Sequence[PlayedEpisode]) -> Episodes:
    """Tabulate ``played``; an outcome that is reported late counts as False in the episodes before."""
    counted = [episode for episode in played if not episode.discarded]
    reported = {name for episode in counted for name in episode.outcomes}
    return Episodes(
        episode_seeds=tuple(episode.seed for episode in counted),
        returns=np.array([episode.episode_return for episode in counted]),
        lengths=np.array([len(episode) for episode in counted], np.int64),
        terminated=np.array([episode.terminated for episode in counted]),
        **{
            name: np.array([episode.outcomes.get(name, False) for episode in counted])
            for name in OUTCOMES
            if name in reported
        },
    )


def read_episodes(columns: Mapping[str, Any]) -> Episodes:
    """Read what :meth:`Episodes.columns` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    outcomes = {name: columns[name] for name in OUTCOMES}
    return Episodes(
        episode_seeds=tuple(columns["episode_seeds"]),
        returns=np.array(columns["returns"], np.float64),
        lengths=np.array(columns["lengths"], np.int64),
        terminated=np.array([end == "terminal" for end in columns["ended_by"]], np.bool_),
        **{name: None if values is None else np.array(values, np.bool_) for name, values in outcomes.items()},
    )
