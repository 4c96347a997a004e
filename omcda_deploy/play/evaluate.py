"""Evaluate a team in a simulator.

Episodes are played in rounds of a fixed batch size (:func:`omcda_deploy.play.rollout.rollout`): one that ends
before the others stays in the batch with its last observation, its answers unused, until the round is over. Matrix
products of another batch size may be summed in another order, so the fixed size makes a served team and the same
bundle in process play the same episodes to the last digit.

An episode that its simulator loses (info ``discarded``) counts nowhere; a later round plays one more instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs.vector import vectorize
from omcda_deploy.errors import ConfigError
from omcda_deploy.play.episodes import Episodes, PlayedEpisode, PlayedStep, episode_table
from omcda_deploy.play.measurements import (
    CallLog,
    Divergence,
    Latency,
    TeamDescription,
    divergences,
    installed_versions,
    json_number,
    machine,
    now,
    one_version,
    require_at_least,
)
from omcda_deploy.play.reporting import report_step
from omcda_deploy.play.rollout import EpisodeBatch, Plan, rollout, rollouts
from omcda_deploy.play.scripted import RandomTeam
from omcda_deploy.play.video import filming, rendering, require_video
from omcda_deploy.policy import NoiseSource, TeamPolicy, checked_temperature, own_temperature
from omcda_deploy.references import is_reference
from omcda_deploy.spec import TeamSpec, require_same_contract

DEFAULT_NUM_ENVS = 10

Progress: TypeAlias = Callable[[float, float], None]  # (episodes so far, episodes in all)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Episodes):
    """Measurements of E episodes, in order; ``to_json`` is the file that ``omcda-deploy evaluate`` writes.

    ``temperature``: the factor of the noise, 0 for deterministic actions and 1 for samples.
    ``saturation``: share of action entries within 0.1 % of a bound, None for discrete actions.
    ``step_latency``: one ``team.act`` for the whole batch. ``agent_latency``: per agent, where the team times them.
    ``stalled``, ``fell``, ``won``: as the simulator defines them (docs/simulators.md#outcomes), None where it does
    not report them. ``fallback_steps``: by agent, the number of calls of ``team.act`` that its fallback answered
    instead of its policy; they have no divergence and count nowhere in it. ``not_awaited``: those of them for which
    it did not wait.
    """

    task: str
    spec: TeamSpec
    team: TeamDescription
    seed: int
    temperature: float
    num_envs: int
    divergence: dict[str, Divergence]
    saturation: dict[str, float | None]
    step_latency: Latency
    agent_latency: dict[str, Latency]
    seconds: float  # wall clock of all episodes, simulator included
    versions: dict[str, str]
    machine: str
    date: str
    reward: str | None = None  # how the agents' own rewards join, where that was chosen
    discarded: int = 0  # episodes that the simulator lost; none of them is among the E
    fallback_steps: dict[str, int] = field(default_factory=dict)
    not_awaited: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: numbers, strings, lists; null for what was not measured."""
        return {
            "kind": "evaluation",
            "task": self.task,
            "contract_hash": self.spec.contract_hash,
            "team": self.team.to_json(),
            "seed": self.seed,
            "temperature": self.temperature,
            **({} if self.reward is None else {"reward": self.reward}),
            "episodes": self.returns.size,
            "discarded": self.discarded,
            "num_envs": self.num_envs,
            "return": {
                "mean": json_number(self.mean),
                "std": json_number(self.std),
                "standard_error": json_number(self.standard_error),
                "min": json_number(self.returns.min()),
                "max": json_number(self.returns.max()),
            },
            **self.columns(),
            "shares": self.shares,
            "divergence": {name: value.to_json() for name, value in self.divergence.items()},
            "saturation": {name: json_number(value) for name, value in self.saturation.items()},
            "fallback": {"by": self.team.fallback, "steps": self.fallback_steps},
            "not_awaited": self.not_awaited,
            "latency": {
                "step": self.step_latency.to_json(),
                "agents": {name: value.to_json() for name, value in self.agent_latency.items()},
            },
            "seconds": json_number(self.seconds),
            "versions": self.versions,
            "machine": self.machine,
            "date": self.date,
        }


def evaluate(
    team: TeamPolicy,
    task: str,
    *,
    episodes: int = 20,
    seed: int = 0,
    num_envs: int | None = None,
    temperature: float | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    video: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Play ``episodes`` episodes of ``task`` with ``team`` and measure returns, divergences and latencies.

    Episode k starts from a seed made of ``seed`` and k, so a deterministic team plays the same episodes whatever
    ``num_envs`` and ``workers`` are (up to the rounding of another batch size). ``temperature`` is a factor of the
    noise, which is drawn from ``seed`` for the whole batch each step: 0 is deterministic, 1 samples, and above 0
    the episodes also depend on ``num_envs``. None is the team's own temperature, 0 for a team without one. A served
    team answers all episodes by the version that is current when the first one begins.

    ``num_envs`` (default 10) is never more than ``episodes``. ``progress(done, total)`` is called after every
    control step, in episodes; one that is under way counts as the share of the time limit that it has lasted.
    ``video`` is an mp4 of the first episode, in real time; for it ``MUJOCO_GL`` is set to ``egl`` where it is
    unset. ``options`` go to the task's simulator (:func:`omcda_deploy.registry.make_environment`).

    Raises :class:`ContractError` when team and task do not fit or an answer cannot be played,
    :class:`ConfigError` for a setting out of range or where nothing can be rendered, and :class:`SimulatorError`
    where the simulator loses one episode after another, or where none here plays the team's task.
    """
    require_at_least(episodes, 1, "episodes")
    require_at_least(seed, 0, "seed")
    temperature = checked_temperature(own_temperature(team) if temperature is None else temperature)
    num_envs = min(episodes, DEFAULT_NUM_ENVS if num_envs is None else num_envs)
    require_at_least(num_envs, 1, "num_envs")
    options = dict(options or {})
    if video is not None:
        require_video(video)
        os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported: it reads this once
        options["render_mode"] = "rgb_array"
    _require_playable(team, task)
    if video is not None:
        _require_rendering(task)
    with rendering(task) if video else nullcontext():
        simulator = vectorize(task, num_envs, workers=workers, **options)
    versions = {**installed_versions(), **registry.simulator_versions(task, **options)}
    with simulator as environment:
        spec = environment.spec
        require_same_contract(team.spec, spec, "the team", "the simulator")
        with (
            one_version(team) as description,
            filming(environment, video) if video else nullcontext(environment) as stage,
        ):
            calls = CallLog(team)
            start = perf_counter()
            records = list(
                rollout(
                    team,
                    stage,
                    episodes=episodes,
                    seed=seed,
                    temperature=temperature,
                    on_step=lambda step: _note(team, calls, step),
                    progress=progress,
                )
            )
            seconds = perf_counter() - start
    return _evaluation(
        task,
        spec,
        description,
        records,
        calls,
        seed=seed,
        temperature=temperature,
        num_envs=num_envs,
        seconds=seconds,
        versions=versions,
        reward=options.get("reward"),
    )


def play_plans(
    team: TeamPolicy,
    task: str,
    plans: Sequence[Plan],
    *,
    workers: int = 0,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Episodes]:
    """Play ``plans`` of ``task`` with a team that remembers nothing between calls; return a table for each.

    They are played at once where the simulator steps many environments in one call, and otherwise one after
    another: there, environments side by side save nothing, and each may be a game of its own. The numbers of a plan
    are those of :func:`evaluate` at its temperature, to the last bit. ``workers``, ``progress``, ``options`` and
    the errors are those of :func:`evaluate`.
    """
    _require_playable(team, task)
    indices = range(len(plans))
    if registry.vector_factory(task) is not None:
        stages = {sum(plan.num_envs for plan in plans): [list(indices)]}
    else:
        sizes = {plan.num_envs for plan in plans}
        stages = {size: [[i] for i in indices if plans[i].num_envs == size] for size in sorted(sizes)}
    played: list[list[PlayedEpisode]] = [[] for _ in plans]
    finished, total = 0, sum(plan.episodes for plan in plans)
    for num_envs, groups in stages.items():
        with vectorize(task, num_envs, workers=workers, **(options or {})) as environment:
            require_same_contract(team.spec, environment.spec, "the team", "the simulator")
            for group in groups:
                share = part_of(progress, finished, total)
                for index, episode in rollouts(team, environment, [plans[i] for i in group], progress=share):
                    played[group[index]].append(episode)
                finished += sum(plans[i].episodes for i in group)
    return [episode_table(episodes) for episodes in played]


def try_out(task: str, spec: TeamSpec, options: Mapping[str, Any]) -> None:
    """Take one step of one environment, so that what is wrong with it is said before hours are spent.

    Raises what :func:`evaluate` raises for an environment that cannot be made or played, or is no place for a team
    of ``spec``.
    """
    with vectorize(task, 1, **options) as environment:
        require_same_contract(spec, environment.spec, "the dataset", "the simulator")
        batch = EpisodeBatch(environment)
        batch.start({0: 0})
        batch.step(RandomTeam(environment.spec), NoiseSource(environment.spec, 0).draw(1))


def part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Report the progress of a part as the whole's, of ``total`` episodes of which ``before`` are finished."""
    if progress is None:
        return None
    return lambda done, part: progress(before + min(done, part), total)


def _note(team: TeamPolicy, calls: CallLog, step: PlayedStep) -> None:
    calls.add(step.seconds, step.decisions)
    report_step(team, step)


def _require_playable(team: TeamPolicy, task: str) -> None:
    """Raise :class:`NoSimulatorError` where the team's own task is played and has no simulator here."""
    if task == team.spec.task:  # else the name may be misspelt, which the registry tells
        registry.require_simulator(task)


def _require_rendering(task: str) -> None:
    """Raise :class:`ConfigError` where the simulator of ``task`` cannot be asked for frames."""
    if not registry.takes_option(task, "render_mode"):
        add = "add one, or " if is_reference(task) else ""
        raise ConfigError(f"--video: {task} takes no argument render_mode: {add}leave the video out")


def _evaluation(
    task: str,
    spec: TeamSpec,
    description: TeamDescription,
    episodes: Sequence[PlayedEpisode],
    calls: CallLog,
    *,
    seed: int,
    temperature: float,
    num_envs: int,
    seconds: float,
    versions: dict[str, str],
    reward: str | None,
) -> Evaluation:
    """Sum up ``episodes``; those that the simulator lost count nowhere."""
    counted = [episode for episode in episodes if not episode.discarded]
    table = episode_table(counted)
    times, divergence = _in_order_of_answers(counted)
    return Evaluation(
        task=task,
        spec=spec,
        team=description,
        seed=seed,
        temperature=temperature,
        num_envs=num_envs,
        **vars(table),
        divergence=divergences(spec, times, divergence, description.budgets),
        saturation={
            agent.name: sum(int(episode.saturated[index]) for episode in counted)
            / (int(table.lengths.sum()) * agent.action.size)
            if agent.action.kind == "continuous"
            else None
            for index, agent in enumerate(spec.agents)
        },
        step_latency=calls.step_latency,
        agent_latency=calls.agent_latency,
        seconds=seconds,
        versions=versions,
        machine=machine(),
        date=now(),
        reward=reward,
        discarded=len(episodes) - len(counted),
        fallback_steps=calls.fallback_steps,
        not_awaited=calls.not_awaited,
    )


def _in_order_of_answers(
    episodes: Sequence[PlayedEpisode],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps [n] and divergences [n, N] of all episodes, round by round and in each of them step by step."""
    steps = np.concatenate([np.arange(len(episode)) for episode in episodes])
    rounds = np.repeat([episode.round for episode in episodes], [len(episode) for episode in episodes])
    order = np.lexsort((steps, rounds))
    return steps[order], np.concatenate([episode.divergence for episode in episodes])[order]
