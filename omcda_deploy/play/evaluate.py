"""Evaluate a team in a simulator.

Episodes are played in rounds of a fixed batch size (:func:`omcda_deploy.play.rollout.rollout`): one that ends
before the others stays in the batch with its last observation, its answers unused, until the round is over. Matrix
products of another batch size may be summed in another order, so the fixed size makes a served team and the same
bundle in process play the same episodes to the last digit.

An episode that its simulator loses (info ``discarded``) counts nowhere; a later round plays one more instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs.vector import vectorize
from omcda_deploy.play.measurements import (
    CallLog,
    Divergence,
    Latency,
    TeamDescription,
    describe,
    divergences,
    installed_versions,
    json_number,
    machine,
    now,
    require_at_least,
)
from omcda_deploy.play.rollout import PlayedEpisode, rollout
from omcda_deploy.play.video import filming, rendering, require_video
from omcda_deploy.policy import TeamPolicy
from omcda_deploy.spec import TeamSpec, require_same_contract

DEFAULT_NUM_ENVS = 10


@dataclass(frozen=True)
class Evaluation:
    """Measurements of E episodes, in order; ``to_json`` is the file that ``omcda-deploy evaluate`` writes.

    ``saturation``: share of action entries within 0.1 % of a bound, None for discrete actions.
    ``step_latency``: one ``team.act`` for the whole batch. ``agent_latency``: per agent, where the team times them.
    ``won``: None where the simulator does not report it. ``fallback_steps``: by agent, the number of calls of
    ``team.act`` that its fallback answered instead of its policy; they have no divergence and count nowhere in it.
    """

    task: str
    spec: TeamSpec
    team: TeamDescription
    seed: int
    stochastic: bool
    num_envs: int
    episode_seeds: tuple[int, ...]
    returns: NDArray[np.float64]  # [E]
    lengths: NDArray[np.int64]  # [E]
    terminated: NDArray[np.bool_]  # [E]; the others were cut by the time limit
    won: NDArray[np.bool_] | None  # [E]
    divergence: dict[str, Divergence]
    saturation: dict[str, float | None]
    step_latency: Latency
    agent_latency: dict[str, Latency]
    seconds: float  # wall clock of all episodes, simulator included
    versions: dict[str, str]
    machine: str
    date: str
    discarded: int = 0  # episodes that the simulator lost; none of them is among the E
    fallback_steps: dict[str, int] = field(default_factory=dict)

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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: numbers, strings, lists; null for what was not measured."""
        return {
            "kind": "evaluation",
            "task": self.task,
            "contract_hash": self.spec.contract_hash,
            "team": self.team.to_json(),
            "seed": self.seed,
            "stochastic": self.stochastic,
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
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
            "ended_by": ["terminal" if end else "time limit" for end in self.terminated],
            "won": None if self.won is None else self.won.tolist(),
            "win_rate": None if self.won is None else json_number(float(self.won.mean())),
            "episode_seeds": list(self.episode_seeds),
            "divergence": {name: value.to_json() for name, value in self.divergence.items()},
            "saturation": {name: json_number(value) for name, value in self.saturation.items()},
            "fallback": {"by": self.team.fallback, "steps": self.fallback_steps},
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
    stochastic: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    video: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Play ``episodes`` episodes of ``task`` with ``team`` and measure returns, divergences and latencies.

    Episode k starts from a seed made of ``seed`` and k, so a deterministic team plays the same episodes whatever
    ``num_envs`` and ``workers`` are (up to the rounding of another batch size). ``stochastic`` samples with noise
    seeded by ``seed`` and drawn for the whole batch each step, so there the episodes also depend on ``num_envs``.

    ``num_envs`` (default 10) is never more than ``episodes``. ``progress(done, total)`` is called after every
    control step; ``total`` supposes that every round lasts to the time limit. ``video`` is an mp4 of the first
    episode, in real time; for it ``MUJOCO_GL`` is set to ``egl`` where it is unset. ``options`` go to the task's
    simulator (:func:`omcda_deploy.registry.make_environment`).

    Raises :class:`ContractError` when team and task do not fit or an answer cannot be played,
    :class:`ConfigError` for a setting out of range or where nothing can be rendered, and :class:`SimulatorError`
    where the simulator loses one episode after another.
    """
    require_at_least(episodes, 1, "episodes")
    require_at_least(seed, 0, "seed")
    num_envs = min(episodes, DEFAULT_NUM_ENVS if num_envs is None else num_envs)
    require_at_least(num_envs, 1, "num_envs")
    options = dict(options or {})
    if video is not None:
        require_video(video)
        os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported: it reads this once
        options["render_mode"] = "rgb_array"

    with rendering(task) if video else nullcontext():
        simulator = vectorize(task, num_envs, workers=workers, **options)
    versions = {**installed_versions(), **registry.simulator_versions(task, **options)}
    with simulator as environment:
        spec = environment.spec
        require_same_contract(team.spec, spec, "the team", "the simulator")
        description, calls = describe(team), CallLog(team)
        with filming(environment, video) if video else nullcontext(environment) as stage:
            start = perf_counter()
            records = list(
                rollout(
                    team,
                    stage,
                    episodes=episodes,
                    seed=seed,
                    stochastic=stochastic,
                    on_step=lambda step: calls.add(step.seconds, step.decisions),
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
        stochastic=stochastic,
        num_envs=num_envs,
        seconds=seconds,
        versions=versions,
    )


def _evaluation(
    task: str,
    spec: TeamSpec,
    description: TeamDescription,
    episodes: Sequence[PlayedEpisode],
    calls: CallLog,
    *,
    seed: int,
    stochastic: bool,
    num_envs: int,
    seconds: float,
    versions: dict[str, str],
) -> Evaluation:
    """Sum up ``episodes``; those that the simulator lost count nowhere."""
    counted = [episode for episode in episodes if not episode.discarded]
    lengths = np.array([len(episode) for episode in counted], np.int64)
    times, divergence = _in_order_of_answers(counted)
    return Evaluation(
        task=task,
        spec=spec,
        team=description,
        seed=seed,
        stochastic=stochastic,
        num_envs=num_envs,
        episode_seeds=tuple(episode.seed for episode in counted),
        returns=np.array([episode.episode_return for episode in counted]),
        lengths=lengths,
        terminated=np.array([episode.terminated for episode in counted]),
        won=_won(counted),
        divergence=divergences(spec, times, divergence, description.budgets),
        saturation={
            agent.name: sum(int(episode.saturated[index]) for episode in counted)
            / (int(lengths.sum()) * agent.action.size)
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
        discarded=len(episodes) - len(counted),
        fallback_steps=calls.fallback_steps,
    )


def _won(episodes: Sequence[PlayedEpisode]) -> NDArray[np.bool_] | None:
    """Wins [E], False before the simulator's first report of one; None where it reports none at all."""
    if all(episode.won is None for episode in episodes):
        return None
    return np.array([bool(episode.won) for episode in episodes])


def _in_order_of_answers(
    episodes: Sequence[PlayedEpisode],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps [n] and divergences [n, N] of all episodes, round by round and in each of them step by step."""
    steps = np.concatenate([np.arange(len(episode)) for episode in episodes])
    rounds = np.repeat([episode.round for episode in episodes], [len(episode) for episode in episodes])
    order = np.lexsort((steps, rounds))
    return steps[order], np.concatenate([episode.divergence for episode in episodes])[order]
