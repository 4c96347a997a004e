"""Roll a team in a simulator.

A batch of environments is kept in step and the team is asked once per control step for all of them. An episode
that ends before the others stays in the batch with its last observation, its answers unused, until the round is
over: every call has the same batch size. Matrix products of another batch size may be summed in another order, so
that is what makes a served team and the same bundle in process play the same episodes to the last digit.

An episode that its simulator loses (info ``discarded``) counts nowhere; a later round plays one more instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs.vector import BatchedEnvironment, vectorize
from omcda_deploy.errors import ConfigError, MissingExtraError, OmcdaError
from omcda_deploy.play.measurements import (
    DiscardCount,
    Divergence,
    FallbackCount,
    Latency,
    TeamDescription,
    agent_latencies,
    describe,
    divergences,
    episode_seed,
    installed_versions,
    machine,
    now,
    number,
    replacing,
    require_answer,
    require_at_least,
    require_ended,
    saturated,
)
from omcda_deploy.policy import NoiseSource, TeamPolicy
from omcda_deploy.spec import TeamSpec, require_same_contract

DEFAULT_NUM_ENVS = 10
_MAX_FRAME_RATE = 30.0  # frames per second of a video


@dataclass(frozen=True)
class Evaluation:
    """What happened. E episodes, in order; ``to_json`` is the file that ``omcda-deploy evaluate`` writes.

    ``saturation``: share of action entries within 0.1 % of a bound, None for discrete actions.
    ``step_latency``: one ``team.act`` for the whole batch. ``agent_latency``: per agent, where the team times them.
    ``won``: None where the simulator does not tell. ``fallback_steps``: by agent, how many calls of ``team.act``
    its fallback answered instead of its policy; their divergence is not known and counts nowhere.
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
                "mean": number(self.mean),
                "std": number(self.std),
                "standard_error": number(self.standard_error),
                "min": number(self.returns.min()),
                "max": number(self.returns.max()),
            },
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
            "ended_by": ["terminal" if end else "time limit" for end in self.terminated],
            "won": None if self.won is None else self.won.tolist(),
            "win_rate": None if self.won is None else number(float(self.won.mean())),
            "episode_seeds": list(self.episode_seeds),
            "divergence": {name: value.to_json() for name, value in self.divergence.items()},
            "saturation": {name: number(value) for name, value in self.saturation.items()},
            "fallback": {"by": self.team.fallback, "steps": self.fallback_steps},
            "latency": {
                "step": self.step_latency.to_json(),
                "agents": {name: value.to_json() for name, value in self.agent_latency.items()},
            },
            "seconds": number(self.seconds),
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
    """Play ``episodes`` episodes of ``task`` and measure.

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
        if video.suffix != ".mp4" or not os.access(video.parent, os.W_OK):
            raise ConfigError(f"video: expected an .mp4 file in a folder that can be written, got {video}")
        os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported: it reads this once
        options["render_mode"] = "rgb_array"

    with _renderable(task) if video else nullcontext():
        simulator = vectorize(task, num_envs, workers=workers, **options)
    versions = {**installed_versions(), **registry.simulator_versions(task, **options)}
    with simulator as environment:
        spec = environment.spec
        require_same_contract(team.spec, spec, "the team", "the simulator")
        with _recording(video, spec.control_rate) if video else nullcontext() as recording:
            return _play(team, environment, task, episodes, seed, stochastic, versions, progress, recording)


def _play(
    team: TeamPolicy,
    environment: BatchedEnvironment,
    task: str,
    episodes: int,
    seed: int,
    stochastic: bool,
    versions: dict[str, str],
    progress: Callable[[int, int], None] | None,
    recording: _Recording | None,
) -> Evaluation:
    spec, num_envs = environment.spec, environment.num_envs
    description = describe(team)
    noise_source = NoiseSource(spec, seed) if stochastic else None
    seeds: list[int] = []  # of the episodes that count; so are the next three
    returns: list[NDArray[np.float64]] = []
    lengths: list[NDArray[np.int64]] = []
    terminated: list[NDArray[np.bool_]] = []
    won: list[NDArray[np.bool_]] = []
    knows_won = False
    discards, fallbacks = DiscardCount(), FallbackCount(spec)
    steps: list[NDArray[np.int64]] = []
    divergence: list[NDArray[np.float64]] = []
    saturations = dict.fromkeys(spec.names, 0)
    step_seconds: list[float] = []
    agent_seconds: dict[str, list[float]] = {}
    first = round_index = 0
    started = perf_counter()

    while len(seeds) < episodes:
        playing = min(num_envs, episodes - len(seeds))
        rounds = round_index + math.ceil((episodes - len(seeds)) / num_envs)
        active = np.arange(num_envs) < playing
        counts = active.copy()  # False where the episode was lost
        sums, ages = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        terminal, victory = np.zeros(num_envs, np.bool_), np.zeros(num_envs, np.bool_)
        diverged: list[NDArray[np.float64]] = []  # [E, N] each step; a row is read while its episode runs
        saturated_entries = np.zeros((num_envs, len(spec.agents)), np.int64)
        round_seeds = [episode_seed(seed, first + i) for i in range(playing)]
        team.reset()
        step = environment.reset(dict(enumerate(round_seeds)))
        if recording and round_index == 0:
            recording.add(environment)
        t = 0
        while active.any():
            noise = noise_source.draw(num_envs) if noise_source else None
            before = perf_counter()
            decisions = team.act(step.observations, noise=noise, action_masks=step.action_masks)
            step_seconds.append(perf_counter() - before)
            for name, latency in agent_latencies(team).items():
                agent_seconds.setdefault(name, []).append(latency)
            require_answer(spec, decisions, num_envs)
            fallbacks.add(decisions)

            diverged.append(
                np.stack([np.asarray(decisions[name].divergence, np.float64) for name in spec.names], axis=1)
            )
            if spec.action_kind == "continuous":
                for index, agent in enumerate(spec.agents):
                    entries = saturated(decisions[agent.name].action, agent.action).sum(axis=1)
                    saturated_entries[active, index] += entries[active]

            step = environment.step({name: decisions[name].action for name in spec.names}, active)
            t += 1
            sums[active] += step.reward[active]
            ages[active] = t
            ended = active & (step.terminated | step.truncated)
            require_ended(spec, active & ~ended, t)
            terminal[ended] = step.terminated[ended]
            if "won" in step.info:
                knows_won = True
                victory[ended] = np.asarray(step.info["won"], np.bool_)[ended]
            if "discarded" in step.info:
                counts &= ~(ended & np.asarray(step.info["discarded"], np.bool_))
            for lost in (~counts[ended]).tolist():
                discards.add(lost)
            if recording and round_index == 0 and active[0] and t % recording.stride == 0:
                recording.add(environment)
            active = active & ~ended
            if progress:
                progress(round_index * spec.episode_limit + t, rounds * spec.episode_limit)

        seeds += [episode for episode, count in zip(round_seeds, counts, strict=False) if count]
        returns.append(sums[counts])
        lengths.append(ages[counts])
        terminated.append(terminal[counts])
        won.append(victory[counts])
        for age, values in enumerate(diverged):
            running = counts & (ages > age)
            steps.append(np.full(int(running.sum()), age))
            divergence.append(values[running].T)
        for index, name in enumerate(spec.names):
            saturations[name] += int(saturated_entries[counts, index].sum())
        first += playing
        round_index += 1
    if progress:
        progress(round_index * spec.episode_limit, round_index * spec.episode_limit)

    played = int(np.concatenate(lengths).sum())
    return Evaluation(
        task=task,
        spec=spec,
        team=description,
        seed=seed,
        stochastic=stochastic,
        num_envs=num_envs,
        episode_seeds=tuple(seeds),
        returns=np.concatenate(returns),
        lengths=np.concatenate(lengths),
        terminated=np.concatenate(terminated),
        won=np.concatenate(won) if knows_won else None,
        divergence=divergences(spec, steps, divergence, description.budgets),
        saturation={
            agent.name: saturations[agent.name] / (played * agent.action.size)
            if agent.action.kind == "continuous"
            else None
            for agent in spec.agents
        },
        step_latency=Latency(np.array(step_seconds)),
        agent_latency={name: Latency(np.array(values)) for name, values in agent_seconds.items()},
        seconds=perf_counter() - started,
        versions=versions,
        machine=machine(),
        date=now(),
        discarded=discards.total,
        fallback_steps=fallbacks.steps,
    )


@contextmanager
def _renderable(task: str) -> Iterator[None]:
    """Say what to do where MuJoCo finds no GL, on import or at the first frame."""
    try:
        yield
    except OmcdaError:
        raise
    except Exception as error:  # each GL platform fails in its own way, down to AttributeError
        reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise ConfigError(
            f"video: {task} cannot be rendered here with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({reason}). "
            "Install EGL (Debian: apt-get install libegl1 libgl1-mesa-dri), or set MUJOCO_GL=osmesa with "
            "libosmesa6 installed, or leave the video out"
        ) from error


class _Recording:
    """An mp4 in the making; frames go to the encoder as they come."""

    def __init__(self, writer: Any, stride: int) -> None:
        self._writer = writer
        self.stride = stride  # control steps per frame

    def add(self, environment: BatchedEnvironment) -> None:
        """Append the present frame of the first environment."""
        with _renderable(environment.spec.task):
            frame = environment.render(0)
        self._writer.append_data(frame)


@contextmanager
def _recording(path: Path, control_rate: float) -> Iterator[_Recording]:
    """Record to ``path`` in real time, at 30 frames per second or fewer; a failed block leaves no file."""
    try:
        import imageio

        import_module("imageio_ffmpeg")  # the encoder, which imageio misses only at the first frame
    except ImportError as error:
        raise MissingExtraError("imageio with imageio-ffmpeg", "mujoco") from error
    stride = math.ceil(control_rate / _MAX_FRAME_RATE)
    with replacing(path) as temporary:
        writer = imageio.get_writer(
            temporary, format="FFMPEG", fps=control_rate / stride, codec="libx264", macro_block_size=2
        )
        try:
            yield _Recording(writer, stride)
        finally:
            writer.close()
