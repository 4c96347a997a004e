"""Play episodes: a team and a batch of environments, step by step.

Two layers. :class:`EpisodeBatch` takes one control step at a time; its caller says which episodes start and when,
and sees everything of each step. :func:`rollout` plays rounds of episodes with it and yields them as records, for
evaluation, and :func:`rollouts` plays several such plans at once; :mod:`omcda_deploy.play.collect` has its own
order of episodes and keeps their rows (:class:`omcda_deploy.play.recording.EpisodeRecorder`). Neither stores
anything for the other.

Shapes: E environments, N agents, T steps of an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.envs.adapters.border import require_sound
from omcda_deploy.envs.vector import BatchedEnvironment, VectorStep
from omcda_deploy.errors import ContractError, SimulatorError
from omcda_deploy.play.episodes import PlayedEpisode, PlayedStep, RoundLog
from omcda_deploy.play.measurements import require_answer
from omcda_deploy.policy import Decision, Float, NoiseSource, TeamPolicy
from omcda_deploy.spec import TeamSpec

DISCARDED_IN_A_ROW = 10  # episodes lost to crashes of a simulator after which it is taken to be broken


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
        self.reported: set[str] = set()  # outcomes that the simulator has reported so far
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
        require_sound(self.spec, self.num_envs, self._latest, self.age)

    def stop(self, environments: Iterable[int]) -> None:
        """Give up the episodes that run in ``environments``."""
        self.active[list(environments)] = False

    @property
    def latest(self) -> VectorStep:
        """The last step of the environments. Raises :class:`ContractError` before the first :meth:`start`."""
        if self._latest is None:
            raise ContractError("expected episodes to step, got none: start some first")
        return self._latest

    def shown(
        self, rows: slice = slice(None)
    ) -> tuple[dict[str, Float], dict[str, NDArray[np.uint8]] | None]:
        """Observations and masks of environments ``rows``, as a team gets to see them: they cannot be written to.

        They are recorded after the team has answered.
        """
        latest = self.latest
        masks = latest.action_masks
        return _read_only(latest.observations, rows), None if masks is None else _read_only(masks, rows)

    def step(self, team: TeamPolicy, noise: Mapping[str, Float] | None = None) -> PlayedStep:
        """Ask ``team`` once for all environments, and :meth:`take` its answers.

        ``noise`` is float32 [E, A] per agent, None for actions without it. Raises what :meth:`take` raises, and
        :class:`ContractError` for an answer that cannot be played.
        """
        observations, masks = self.shown()
        start = perf_counter()
        decisions = team.act(observations, noise=noise, action_masks=masks)
        seconds = perf_counter() - start
        require_answer(self.spec, decisions, self.num_envs, self.age + 1)
        return self.take(decisions, seconds)

    def take(self, decisions: Mapping[str, Decision], seconds: float) -> PlayedStep:
        """Step the environments with a running episode; ``decisions`` are [E, …], ``seconds`` the time they took.

        They have been checked (:func:`~omcda_deploy.play.measurements.require_answer`). Raises
        :class:`ContractError` before the first :meth:`start` and for an episode that outlasts the spec's limit, or
        an answer of the simulator that is not sound; :class:`SimulatorError` where the simulator loses one episode
        after another.
        """
        previous = self.latest
        active = self.active.copy()
        result = self._environment.step({name: decisions[name].action for name in self.spec.names}, active)
        self.age[active] += 1
        require_sound(self.spec, self.num_envs, result, self.age)
        ended = active & (result.terminated | result.truncated)
        self._require_ended(active & ~ended)
        discarded = ended & np.asarray(result.info.get("discarded", False), np.bool_)
        self._count_discarded(discarded[ended].tolist())
        self.reported |= result.info.keys() & set(OUTCOMES)
        self.active &= ~ended
        self._latest = result
        return PlayedStep(
            spec=self.spec,
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


@dataclass(frozen=True)
class Plan:
    """Episodes that are played alike: ``episodes`` that count, ``num_envs`` of them side by side.

    Episode k starts from :func:`episode_seed` of ``seed`` and k. The noise of the actions is drawn from ``seed``
    for ``num_envs`` rows each step, times ``temperature`` (:class:`omcda_deploy.policy.NoiseSource`).
    """

    episodes: int
    num_envs: int
    seed: int = 0
    temperature: float = 0.0


def rollout(
    team: TeamPolicy,
    environment: BatchedEnvironment,
    *,
    episodes: int,
    seed: int = 0,
    temperature: float = 0.0,
    on_step: Callable[[PlayedStep], None] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Iterator[PlayedEpisode]:
    """Play one :class:`Plan` in all environments, as :func:`rollouts` does; yields its episodes in order."""
    plan = Plan(episodes, environment.num_envs, seed, temperature)
    for _, episode in rollouts(team, environment, [plan], on_step=on_step, progress=progress):
        yield episode


def rollouts(
    team: TeamPolicy,
    environment: BatchedEnvironment,
    plans: Sequence[Plan],
    *,
    on_step: Callable[[PlayedStep], None] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Iterator[tuple[int, PlayedEpisode]]:
    """Play ``plans`` at once; yields (index of its plan, episode), those of one plan in order.

    The environments belong to the plans in turn, ``num_envs`` to each. A plan is played in rounds, one episode per
    environment, until its ``episodes`` count. A round lasts until its last episode ends; the environments of
    shorter ones wait. An episode that the simulator loses is yielded too, marked ``discarded``, and a later round
    plays one more instead.

    The team is asked once per step and plan, always for the plan's ``num_envs`` rows. So a plan's numbers are those
    of the plan alone, to the last bit; several plans at once need a team that remembers nothing between calls.

    ``on_step`` sees each step as it is taken. ``progress(done, total)`` is called after every step, in episodes of
    all plans, and at the end; of an episode under way the share of the time limit counts that it has lasted, and
    both numbers include the episodes that were lost. Raises :class:`ContractError` unless the plans have as many
    environments as there are, and what :meth:`EpisodeBatch.take` raises.
    """
    batch = EpisodeBatch(environment)
    courses = _courses(batch, plans)
    while running := [course for course in courses if course.begin(team)]:
        step = batch.take(*_ask(team, batch, running))
        for course in running:
            course.log.add(step)
        if on_step:
            on_step(step)
        if progress:
            progress(sum(course.done for course in courses), sum(course.total for course in courses))
        for course in running:
            for episode in course.finished():
                yield course.index, episode
    if progress:
        total = sum(course.total for course in courses)
        progress(total, total)


def episode_seed(seed: int, episode: int) -> int:
    """Seed of one episode: a function of these two numbers alone, so that no batch size changes it."""
    return int(np.random.SeedSequence(seed, spawn_key=(episode,)).generate_state(1)[0])


def _courses(batch: EpisodeBatch, plans: Sequence[Plan]) -> list[_Course]:
    needed = sum(plan.num_envs for plan in plans)
    if needed != batch.num_envs:
        raise ContractError(f"expected {needed} environments for {len(plans)} plans, got {batch.num_envs}")
    courses: list[_Course] = []
    for index, plan in enumerate(plans):
        first = courses[-1].rows.stop if courses else 0
        courses.append(_Course(index, plan, slice(first, first + plan.num_envs), batch))
    return courses


class _Course:
    """A plan as it is played, in the environments ``rows`` of a batch."""

    log: RoundLog  # of the round under way

    def __init__(self, index: int, plan: Plan, rows: slice, batch: EpisodeBatch) -> None:
        self.index, self.plan, self.rows = index, plan, rows
        self.noise = NoiseSource(batch.spec, plan.seed, plan.temperature)
        self._batch = batch
        self._seeds: list[int] = []  # of the round under way
        self._counted = self._started = self._rounds = 0

    @property
    def done(self) -> float:
        """Episodes that ended, lost ones included, and the shares of those under way."""
        rows = slice(self.rows.start, self.rows.start + len(self._seeds))
        shares = self._batch.age[rows] / self._batch.spec.episode_limit
        ended = ~self._batch.active[rows]
        return self._started - len(self._seeds) + float(np.where(ended, 1.0, shares).sum())

    @property
    def total(self) -> int:
        """Episodes to play, and those that were lost in earlier rounds."""
        return self.plan.episodes + self._started - len(self._seeds) - self._counted

    def begin(self, team: TeamPolicy) -> bool:
        """Start the next round where none is under way; return False once there is none left."""
        missing = self.plan.episodes - self._counted
        if self._seeds or missing <= 0:
            return missing > 0
        numbers = range(self._started, self._started + min(self.plan.num_envs, missing))
        self._seeds = [episode_seed(self.plan.seed, number) for number in numbers]
        self._started = numbers.stop
        team.reset()
        self._batch.start(dict(enumerate(self._seeds, self.rows.start)))
        self.log = RoundLog(self._batch.spec, self.rows)
        return True

    def finished(self) -> Iterator[PlayedEpisode]:
        """Yield the episodes of the round once all of them have ended."""
        if self._batch.active[self.rows].any():
            return
        for index, seed in enumerate(self._seeds):
            episode = self.log.episode(index, seed, self._rounds, self._batch.reported)
            self._counted += not episode.discarded
            yield episode
        self._seeds = []
        self._rounds += 1


def _ask(
    team: TeamPolicy, batch: EpisodeBatch, courses: Sequence[_Course]
) -> tuple[dict[str, Decision], float]:
    """Ask ``team`` for each course's rows; return answers for all rows, zeros elsewhere, and its seconds."""
    names = batch.spec.names
    answers: list[tuple[slice, dict[str, Decision]]] = []
    seconds = 0.0
    for course in courses:
        rows = course.rows
        observations, masks = batch.shown(rows)
        noise = course.noise.draw_for(team, course.plan.num_envs)
        start = perf_counter()
        decisions = team.act(observations, noise=noise, action_masks=masks)
        seconds += perf_counter() - start
        require_answer(batch.spec, decisions, course.plan.num_envs, batch.age[course.rows] + 1)
        answers.append((rows, decisions))

    def joined(field: str, name: str) -> NDArray[Any]:
        parts = [(rows, np.asarray(getattr(decisions[name], field))) for rows, decisions in answers]
        values = np.zeros((batch.num_envs, *parts[0][1].shape[1:]), parts[0][1].dtype)
        for rows, part in parts:
            values[rows] = part
        return values

    return {
        name: Decision(
            joined("action", name),
            joined("divergence", name),
            fallback=any(decisions[name].fallback for _, decisions in answers),
            awaited=all(decisions[name].awaited for _, decisions in answers),
        )
        for name in names
    }, seconds


def _read_only(arrays: Mapping[str, NDArray[Any]], rows: slice) -> dict[str, NDArray[Any]]:
    """Return views of ``rows`` that refuse to be written to."""
    views = {name: values[rows] for name, values in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    return views
