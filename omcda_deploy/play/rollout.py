"""Play episodes: a team and a batch of environments, step by step.

Two layers. :class:`EpisodeBatch` takes one control step at a time; its caller says which episodes start and when,
and sees everything of each step. :func:`rollout` plays rounds of episodes with it and yields them as records, for
evaluation; :mod:`omcda_deploy.play.collect` has its own order of episodes and keeps their rows
(:class:`omcda_deploy.play.recording.EpisodeRecorder`). Neither stores anything for the other.

Shapes: E environments, N agents, T steps of an episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs.vector import BatchedEnvironment, VectorStep
from omcda_deploy.errors import ContractError, SimulatorError
from omcda_deploy.play.measurements import require_answer, saturated
from omcda_deploy.policy import Decision, Float, NoiseSource, TeamPolicy
from omcda_deploy.spec import TeamSpec

DISCARDED_IN_A_ROW = 10  # episodes lost to crashes of a simulator after which it is taken to be broken


@dataclass(frozen=True, eq=False)
class PlayedStep:
    """One control step of a batch of environments."""

    previous: VectorStep  # the observations that the team answers
    decisions: Mapping[str, Decision]  # its answers, by agent
    result: VectorStep  # the environments' answer to its actions
    active: NDArray[np.bool_]  # [E] environments that took the step
    age: NDArray[np.int64]  # [E] steps of each environment's episode, this one included
    ended: NDArray[np.bool_]  # [E] the episode ended with this step
    discarded: NDArray[np.bool_]  # [E] it ended because the simulator lost it
    seeds: Mapping[int, int]  # environment -> seed of its episode
    seconds: float  # wall-clock time of `team.act`


class EpisodeBatch:
    """Episodes that run side by side, one per environment.

    An environment without an episode keeps its last observation and is not stepped, so that every call of the team
    has the same batch size. ``discarded`` counts the episodes that the simulator lost.
    """

    def __init__(self, environment: BatchedEnvironment) -> None:
        self.spec: TeamSpec = environment.spec
        self.num_envs = environment.num_envs
        self.active = np.zeros(self.num_envs, np.bool_)  # environments with a running episode
        self.age = np.zeros(self.num_envs, np.int64)  # steps of each environment's episode so far
        self.discarded = 0
        self.reports_wins = False  # True once the simulator has reported `won`
        self._environment = environment
        self._seeds: dict[int, int] = {}
        self._latest: VectorStep | None = None
        self._discarded_in_a_row = 0

    def start(self, seeds: Mapping[int, int]) -> None:
        """Start an episode in each environment of ``seeds``, from its seed; one that runs there is given up."""
        self._latest = self._environment.reset(seeds)
        self._seeds |= seeds
        self.active[list(seeds)] = True
        self.age[list(seeds)] = 0

    def stop(self, environments: Iterable[int]) -> None:
        """Give up the episodes that run in ``environments``."""
        self.active[list(environments)] = False

    def step(self, team: TeamPolicy, noise: Mapping[str, Float] | None = None) -> PlayedStep:
        """Ask ``team`` once for all environments, and step those with a running episode.

        ``noise`` is float32 [E, A] per agent, None for deterministic actions. Raises :class:`ContractError` before
        the first :meth:`start`, for an answer that cannot be played, and for an episode that outlasts the spec's
        limit; :class:`SimulatorError` where the simulator loses one episode after another.
        """
        if (previous := self._latest) is None:
            raise ContractError("expected episodes to step, got none: start some first")
        start = perf_counter()
        decisions = team.act(previous.observations, noise=noise, action_masks=previous.action_masks)
        seconds = perf_counter() - start
        require_answer(self.spec, decisions, self.num_envs)
        active = self.active.copy()
        result = self._environment.step({name: decisions[name].action for name in self.spec.names}, active)
        self.age[active] += 1
        ended = active & (result.terminated | result.truncated)
        self._require_ended(active & ~ended)
        discarded = ended & np.asarray(result.info.get("discarded", False), np.bool_)
        self._count_discarded(discarded[ended].tolist())
        self.reports_wins |= "won" in result.info
        self.active &= ~ended
        self._latest = result
        return PlayedStep(
            previous=previous,
            decisions=decisions,
            result=result,
            active=active,
            age=self.age.copy(),
            ended=ended,
            discarded=discarded,
            seeds=dict(self._seeds),
            seconds=seconds,
        )

    def _require_ended(self, running: NDArray[np.bool_]) -> None:
        """Raise :class:`ContractError` where environments ``running`` [E] have had all steps of their spec."""
        if (overdue := running & (self.age >= self.spec.episode_limit)).any():
            raise ContractError(
                f"{self.spec.task}: environment {np.argmax(overdue)} did not end within {self.spec.episode_limit} "
                "steps, the episode limit of its spec"
            )

    def _count_discarded(self, ends: Sequence[bool]) -> None:
        """Count lost episodes among the ``ends`` of a step; give up on a simulator that loses too many in a row."""
        for discarded in ends:
            self.discarded += discarded
            self._discarded_in_a_row = self._discarded_in_a_row + 1 if discarded else 0
            if self._discarded_in_a_row >= DISCARDED_IN_A_ROW:
                raise SimulatorError(
                    f"the simulator lost {self._discarded_in_a_row} episodes in a row: its warnings say how. See "
                    "whether it runs by itself, and with fewer environments (--num-envs)"
                )


@dataclass(frozen=True, eq=False)
class PlayedEpisode:
    """A finished episode of T steps, without its observations."""

    seed: int  # the environment was reset with it
    round: int  # the batch that it was played in, counted from 0
    rewards: NDArray[np.float64]  # [T]
    divergence: NDArray[np.float64]  # [T, N] nats; nan where a fallback answered
    saturated: NDArray[np.int64]  # [N] entries of continuous actions within 0.1 % of a bound
    terminated: bool  # False: the time limit cut it
    won: bool | None  # None where the simulator does not report it
    discarded: bool  # the simulator lost it: it counts nowhere

    def __len__(self) -> int:
        """The number of steps T."""
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """The undiscounted sum of the rewards, added step by step."""
        return reduce(add, self.rewards.tolist(), 0.0)


def rollout(
    team: TeamPolicy,
    environment: BatchedEnvironment,
    *,
    episodes: int,
    seed: int = 0,
    stochastic: bool = False,
    on_step: Callable[[PlayedStep], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[PlayedEpisode]:
    """Play rounds, one episode per environment, until ``episodes`` of them count; yields them in order.

    Episode k starts from :func:`episode_seed` of ``seed`` and k. A round lasts until its last episode ends; the
    environments of shorter ones wait, so that all calls of the team have one batch size. An episode that the
    simulator loses is yielded too, marked ``discarded``, and a later round plays one more instead. ``stochastic``
    samples with noise seeded by ``seed``, drawn for the whole batch each step.

    ``on_step`` sees each step as it is taken. ``progress(done, total)`` is called after every step, in steps, and
    at the end; ``total`` supposes that every round lasts to the time limit. Raises what :meth:`EpisodeBatch.step`
    raises.
    """
    batch = EpisodeBatch(environment)
    noise = NoiseSource(batch.spec, seed) if stochastic else None
    limit = batch.spec.episode_limit
    counted = started = rounds = 0
    while (missing := episodes - counted) > 0:
        expected_rounds = rounds + math.ceil(missing / batch.num_envs)
        seeds = [episode_seed(seed, started + i) for i in range(min(batch.num_envs, missing))]
        team.reset()
        batch.start(dict(enumerate(seeds)))
        log = _RoundLog(batch)
        while batch.active.any():
            step = batch.step(team, noise.draw(batch.num_envs) if noise else None)
            log.add(step)
            if on_step:
                on_step(step)
            if progress:
                progress(rounds * limit + log.steps, expected_rounds * limit)
        for index, environment_seed in enumerate(seeds):
            episode = log.episode(index, environment_seed, rounds)
            counted += not episode.discarded
            yield episode
        started += len(seeds)
        rounds += 1
    if progress:
        progress(rounds * limit, rounds * limit)


def episode_seed(seed: int, episode: int) -> int:
    """Seed of one episode: a function of these two numbers alone, so that no batch size changes it."""
    return int(np.random.SeedSequence(seed, spawn_key=(episode,)).generate_state(1)[0])


class _RoundLog:
    """Rewards, divergences and ends of one round, from which its episodes are made."""

    def __init__(self, batch: EpisodeBatch) -> None:
        count, agents = batch.num_envs, len(batch.spec.agents)
        self._batch = batch
        self._rewards: list[NDArray[np.float64]] = []  # [E] each step
        self._divergence: list[NDArray[np.float64]] = []  # [E, N] each step
        self._saturated = np.zeros((count, agents), np.int64)
        self._terminated = np.zeros(count, np.bool_)
        self._won = np.zeros(count, np.bool_)
        self._discarded = np.zeros(count, np.bool_)

    @property
    def steps(self) -> int:
        return len(self._rewards)

    def add(self, step: PlayedStep) -> None:
        spec, ended = self._batch.spec, step.ended
        self._rewards.append(step.result.reward)
        self._divergence.append(
            np.stack([np.asarray(step.decisions[n].divergence, np.float64) for n in spec.names], axis=1)
        )
        if spec.action_kind == "continuous":
            for index, agent in enumerate(spec.agents):
                entries = saturated(step.decisions[agent.name].action, agent.action).sum(axis=1)
                self._saturated[step.active, index] += entries[step.active]
        self._terminated[ended] = step.result.terminated[ended]
        self._discarded |= step.discarded
        if "won" in step.result.info:
            self._won[ended] = np.asarray(step.result.info["won"], np.bool_)[ended]

    def episode(self, index: int, seed: int, round_number: int) -> PlayedEpisode:
        """The finished episode of environment ``index``."""
        length = int(self._batch.age[index])
        return PlayedEpisode(
            seed=seed,
            round=round_number,
            rewards=np.array([rewards[index] for rewards in self._rewards[:length]], np.float64),
            divergence=np.stack([values[index] for values in self._divergence[:length]]),
            saturated=self._saturated[index],
            terminated=bool(self._terminated[index]),
            won=bool(self._won[index]) if self._batch.reports_wins else None,
            discarded=bool(self._discarded[index]),
        )
