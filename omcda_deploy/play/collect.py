"""Collect datasets by playing policies in a simulator.

Episode k is a function of (seed, k) alone: its two derived seeds start the environment and the noise of its whole
course. Idle environments take the next episode in order, and a dataset is episodes 0 to K-1, for the smallest K
that has enough transitions. Taking the first episodes to *finish* instead would prefer short ones, which are the
failures where falling ends an episode. So long episodes are waited for, and what runs beyond the K-th is dropped as
soon as it is certain not to be needed; neither ``num_envs`` nor ``workers`` changes which episodes a dataset holds.
(A policy's answers may differ in the last digit between batch sizes, so files are equal to the last digit only at
equal ``num_envs``.) An episode that its simulator loses (info ``discarded``) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets import Episode, Scalar
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.envs.vector import BatchedEnvironment, vectorize
from omcda_deploy.errors import ConfigError
from omcda_deploy.play.episodes import PlayedStep
from omcda_deploy.play.recording import EpisodeRecorder
from omcda_deploy.play.rollout import EpisodeBatch
from omcda_deploy.policy import NoiseSource, ScaledNoise, TeamPolicy, checked_temperature
from omcda_deploy.spec import TeamSpec, require_same_contract

Progress = Callable[[int, int], None]  # (transitions recorded so far, transitions asked for)


@dataclass(frozen=True)
class Source:
    """A policy of a mixture, and its share of the transitions."""

    behavior: str  # label of the policy in the dataset
    policy: TeamPolicy
    share: float


def collect(
    task: str,
    policy: TeamPolicy,
    out: Path,
    *,
    transitions: int,
    seed: int,
    behavior: str,
    num_envs: int = 32,
    workers: int = 2,
    temperature: float = 1.0,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record whole episodes of ``policy`` until they hold at least ``transitions``, as HDF5 at ``out``.

    ``behavior`` labels the policy in the file. ``temperature`` is a factor of the noise that the policy acts
    with: 1 samples, 0 is deterministic. The file appears when it is complete; an exception, Ctrl-C included, leaves
    nothing behind. ``options`` go to the task's simulator. Returns a summary: path, task, behavior, seed, episodes,
    transitions, the mean and standard deviation of returns, digest, and the number of episodes that the simulator
    lost. Raises :class:`ConfigError`, :class:`ContractError` for a policy of another task, :class:`SimulatorError`
    where the simulator loses one episode after another, and what :func:`vectorize` raises.
    """
    return collect_mixture(
        task,
        [Source(behavior, policy, 1.0)],
        out,
        transitions=transitions,
        seed=seed,
        behavior=behavior,
        num_envs=num_envs,
        workers=workers,
        temperature=temperature,
        progress=progress,
        options=options,
    )


def collect_mixture(
    task: str,
    sources: Sequence[Source],
    out: Path,
    *,
    transitions: int,
    seed: int,
    behavior: str,
    num_envs: int = 32,
    workers: int = 2,
    temperature: float = 1.0,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record several policies one after another, each for its share of the transitions, as :func:`collect` does.

    Shares are relative to their sum. ``behavior`` labels the whole (such as ``medium-replay``), and each episode
    is marked with its source's own label. Episodes are numbered through, so no two share a seed.
    """
    temperature = checked_temperature(temperature)
    total_share = sum(source.share for source in sources)
    if not sources or min(source.share for source in sources) <= 0:
        raise ConfigError("expected at least one policy, each with a share above 0")
    if bool in (type(transitions), type(seed)) or transitions < 1 or not 0 <= seed < 2**63:
        raise ConfigError(
            f"expected transitions of at least 1 and a seed of at least 0, below 2^63, got {transitions} and {seed}"
        )
    with vectorize(task, num_envs, workers=workers, **(options or {})) as environment:
        for source in sources:
            require_same_contract(
                source.policy.spec, environment.spec, f"policy {source.behavior}", "the task"
            )
        metadata: dict[str, Scalar] = {
            "behavior": behavior,
            "seed": seed,
            "temperature": temperature,
            **({"reward": str(options["reward"])} if options and "reward" in options else {}),
            **{
                f"version_{name}": number
                for name, number in registry.simulator_versions(task, **(options or {})).items()
            },
        }
        with DatasetWriter(out, environment.spec, metadata) as writer:
            writer.declare_behaviors(source.behavior for source in sources)
            collector = _Collector(environment, writer, seed, temperature, transitions, progress)
            share = 0.0
            for source in sources:
                share += source.share
                collector.collect(source, round(transitions * share / total_share))
        if progress:
            progress(transitions, transitions)
    return {
        "path": str(out),
        "task": task,
        "behavior": behavior,
        "seed": seed,
        **writer.summary(),
        "discarded": collector.batch.discarded,
    }


class _Collector:
    """Plays policies one after another, and writes their episodes in order."""

    def __init__(
        self,
        environment: BatchedEnvironment,
        writer: DatasetWriter,
        seed: int,
        temperature: float,
        transitions: int,
        progress: Progress | None,
    ) -> None:
        self.batch = EpisodeBatch(environment)
        self._recorder = EpisodeRecorder(environment.spec, environment.num_envs)
        self._noise = (
            _EpisodeNoise(environment.spec, environment.num_envs, temperature) if temperature else None
        )
        self._writer, self._seed = writer, seed
        self._transitions, self._progress = transitions, progress
        self._written = 0  # transitions
        self._next = 0  # the number behind the last written episode's

    def collect(self, source: Source, target: int) -> None:
        """Write whole episodes of ``source`` until all that is written holds ``target`` transitions."""
        source.policy.reset()
        queue = _Queue(self.batch.num_envs, self._next)
        while (missing := target - self._written) > 0:
            self.batch.stop(queue.trim(missing))
            if queue.transitions < missing:
                self._start(queue.fill())
            noise = self._noise.at(self.batch.age) if self._noise else None
            step = self.batch.step(source.policy, noise)
            queue.note(step, self._recorder.add(step))
            while self._written < target and (episode := queue.pop()) is not None:
                self._writer.append(episode, source.behavior)
                self._written += len(episode)
            if self._progress:
                self._progress(min(self._written + queue.transitions, target), self._transitions)
        self.batch.stop(range(self.batch.num_envs))
        self._next = queue.next_unwritten

    def _start(self, episodes: Mapping[int, int]) -> None:
        """Start the numbered ``episodes`` in their environments, and draw the noise of their whole course."""
        seeds = {}
        for index, number in episodes.items():
            # Two seeds: a simulator seeded as numpy is would draw its initial state from the noise's own stream.
            words = np.random.SeedSequence([self._seed, number]).generate_state(2)
            seeds[index], noise_seed = words.tolist()
            if self._noise:
                self._noise.draw(index, noise_seed)
        if seeds:
            self.batch.start(seeds)


class _Queue:
    """A policy's episodes that have started and are not yet written, in the order of their numbers."""

    def __init__(self, num_envs: int, first: int) -> None:
        self.next_unwritten = first
        self._next_start = first
        self._idle = set(range(num_envs))
        self._running: dict[int, int] = {}  # environment -> number of its episode
        self._steps: dict[int, int] = {}  # number -> transitions so far
        self._finished: dict[int, Episode] = {}

    @property
    def transitions(self) -> int:
        """Transitions of all episodes so far."""
        return sum(self._steps.values())

    def trim(self, missing: int) -> list[int]:
        """Drop the episodes behind those that already hold ``missing`` transitions; returns their environments."""
        certain = 0
        for number in list(self._steps):
            if certain < missing:
                certain += self._steps[number]
            else:
                self._next_start = min(self._next_start, number)  # played after all if one before it is lost
                del self._steps[number]
                self._finished.pop(number, None)
        freed = [index for index, number in self._running.items() if number not in self._steps]
        for index in freed:
            del self._running[index]
        self._idle.update(freed)
        return freed

    def fill(self) -> dict[int, int]:
        """Assign the next episodes to the idle environments; returns their numbers by environment."""
        assigned = {index: self._next_start + i for i, index in enumerate(sorted(self._idle))}
        self._next_start += len(assigned)
        self._idle.clear()
        self._running |= assigned
        self._steps |= dict.fromkeys(assigned.values(), 0)
        return assigned

    def note(self, step: PlayedStep, finished: Mapping[int, Episode]) -> None:
        """Count a step of the running episodes, and keep those that ``finished`` with it, by environment.

        Episodes that ended and are not among them were lost by the simulator.
        """
        for index, number in list(self._running.items()):
            self._steps[number] = int(step.age[index])
            if step.ended[index]:
                del self._running[index]
                self._idle.add(index)
                if index in finished:
                    self._finished[number] = finished[index]
                else:
                    del self._steps[number]

    def pop(self) -> Episode | None:
        """Take the first episode if it is finished, else None."""
        number = next(iter(self._steps), None)
        if number is None or number not in self._finished:
            return None
        del self._steps[number]
        self.next_unwritten = number + 1
        return self._finished.pop(number)


class _EpisodeNoise:
    """Noise of each environment's whole episode, drawn when it starts."""

    def __init__(self, spec: TeamSpec, num_envs: int, temperature: float) -> None:
        self._spec, self._temperature = spec, temperature
        self._noise = {
            agent.name: np.zeros((num_envs, spec.episode_limit, agent.action.size), np.float32)
            for agent in spec.agents
        }

    def draw(self, index: int, seed: int) -> None:
        """Draw the noise of the episode that starts in environment ``index``."""
        source = NoiseSource(self._spec, seed, self._temperature)
        for name, values in source.draw(self._spec.episode_limit).items():
            self._noise[name][index] = values

    def at(self, age: NDArray[np.int64]) -> ScaledNoise:
        """Noise [E, A] by agent, for environments whose episodes are ``age`` [E] steps old."""
        steps = np.minimum(age, self._spec.episode_limit - 1)
        noise = {name: values[np.arange(len(age)), steps] for name, values in self._noise.items()}
        return ScaledNoise(noise, self._temperature)
