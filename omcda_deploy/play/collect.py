"""Record datasets by rolling policies out in a simulator.

Episode k is a function of (seed, k) alone: its two derived seeds start the environment and the noise of its whole
course. Free environments take the next episode in order, and a dataset is episodes 0 to K-1, for the smallest K
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
from omcda_deploy.envs.vector import BatchedEnvironment, VectorStep, vectorize
from omcda_deploy.errors import ConfigError
from omcda_deploy.play.measurements import DiscardCount, require_ended
from omcda_deploy.policy import NoiseSource, TeamPolicy
from omcda_deploy.spec import require_same_contract

Progress = Callable[[int, int], None]  # (transitions recorded so far, transitions asked for)


@dataclass(frozen=True)
class Source:
    """A policy of a mixture, and its share of the transitions."""

    behavior: str
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
    stochastic: bool = True,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record whole episodes of ``policy`` until they hold at least ``transitions``, as HDF5 at ``out``.

    ``behavior`` labels the policy in the file. The file appears when it is complete; an exception, Ctrl-C
    included, leaves nothing behind. ``options`` go to the task's simulator. Returns what was recorded: path,
    episodes, transitions, the mean and standard deviation of returns, digest, and how many episodes the simulator
    lost. Raises :class:`ConfigError`, :class:`ContractError` for a policy of another task,
    :class:`SimulatorError` where the simulator loses one episode after another, and what :func:`vectorize` raises.
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
        stochastic=stochastic,
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
    stochastic: bool = True,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As :func:`collect`, with several policies one after another, each for its share of the transitions.

    Shares are relative to their sum. ``behavior`` labels the whole (such as ``medium-replay``), and each episode
    is marked with its source's own label. Episodes are numbered through, so no two share a seed.
    """
    total_share = sum(source.share for source in sources)
    if not sources or min(source.share for source in sources) <= 0:
        raise ConfigError("expected at least one policy, each with a share above 0")
    if transitions < 1 or not 0 <= seed < 2**63:
        raise ConfigError(
            f"expected transitions of at least 1 and a seed of at least 0, below 2^63, got {transitions} and {seed}"
        )
    with vectorize(task, num_envs, workers=workers, **(options or {})) as vector:
        for source in sources:
            require_same_contract(source.policy.spec, vector.spec, f"policy {source.behavior}", "the task")
        metadata: dict[str, Scalar] = {
            "behavior": behavior,
            "seed": seed,
            "stochastic": stochastic,
            **{
                f"version_{name}": number
                for name, number in registry.simulator_versions(task, **(options or {})).items()
            },
        }
        with DatasetWriter(out, vector.spec, metadata) as writer:
            writer.declare_behaviors(source.behavior for source in sources)
            recorder = _Recorder(vector, writer, seed, stochastic, transitions, progress)
            share = 0.0
            for source in sources:
                share += source.share
                recorder.record(source, round(transitions * share / total_share))
        if progress:
            progress(transitions, transitions)
    returns = np.asarray(recorder.returns)
    return {
        "path": str(out),
        "task": task,
        "behavior": behavior,
        "seed": seed,
        "episodes": returns.size,
        "transitions": recorder.written,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "digest": writer.digest,
        "discarded": recorder.discards.total,
    }


class _Recorder:
    """Rolls out, and writes episodes in their order."""

    def __init__(
        self,
        vector: BatchedEnvironment,
        writer: DatasetWriter,
        seed: int,
        stochastic: bool,
        transitions: int,
        progress: Progress | None,
    ) -> None:
        self.written = 0  # transitions
        self.returns: list[float] = []  # of written episodes
        self.discards = DiscardCount()
        self._upcoming = 0  # the number behind the last one written
        self._vector, self._writer = vector, writer
        self._seed, self._stochastic = seed, stochastic
        self._transitions, self._progress = transitions, progress
        spec, count, limit = vector.spec, vector.num_envs, vector.spec.episode_limit
        agents = len(spec.agents)
        # One row per environment; an episode is copied out when it ends.
        self._observations = np.zeros((count, limit + 1, agents, spec.observation_size), np.float32)
        self._states = np.zeros((count, limit + 1, spec.state_size), np.float32)
        self._discrete = spec.action_kind == "discrete"
        self._actions: NDArray[Any] = (
            np.zeros((count, limit, agents), np.int64)
            if self._discrete
            else np.zeros((count, limit, agents, spec.action_size), np.float32)
        )
        self._masks = (
            np.zeros((count, limit + 1, agents, spec.action_size), np.uint8) if self._discrete else None
        )
        self._rewards = np.zeros((count, limit), np.float64)
        self._noise = {a.name: np.zeros((count, limit, a.action.size), np.float32) for a in spec.agents}

    def record(self, source: Source, target: int) -> None:
        """Write whole episodes of ``source`` until :attr:`written` reaches ``target``."""
        spec, count = self._vector.spec, self._vector.num_envs
        label = source.behavior
        source.policy.reset()
        running = np.full(count, -1)  # episode of each environment, -1 where there is none
        age = np.zeros(count, np.int64)  # steps into it
        seeds: dict[int, int] = {}
        started: dict[int, int] = {}  # unwritten episodes in order, and the transitions of each so far
        finished: dict[int, Episode] = {}
        upcoming = self._upcoming
        shown = self._vector.reset({})
        while self.written < target:
            certain = self.written
            for episode in list(started):
                if certain >= target:  # the episodes before this one suffice
                    running[running == episode] = -1
                    upcoming = min(upcoming, episode)  # played after all where one before it is lost
                    del started[episode]
                    finished.pop(episode, None)
                else:
                    certain += started[episode]
            if certain < target:
                fresh = {}
                for slot in np.flatnonzero(running < 0).tolist():
                    running[slot], age[slot], started[upcoming] = upcoming, 0, 0
                    fresh[slot], seeds[slot] = upcoming, self._seed_episode(slot, upcoming)
                    upcoming += 1
                if fresh:
                    shown = self._vector.reset({slot: seeds[slot] for slot in fresh})
            active = running >= 0
            slots = np.flatnonzero(active)
            self._see(slots, age, shown)
            noise = (
                {
                    name: values[np.arange(count), np.minimum(age, spec.episode_limit - 1)]
                    for name, values in self._noise.items()
                }
                if self._stochastic
                else None
            )
            decisions = source.policy.act(shown.observations, noise=noise, action_masks=shown.action_masks)
            actions = {name: decisions[name].action for name in spec.names}
            shown = self._vector.step(actions, active)
            for index, agent in enumerate(spec.agents):
                if self._discrete:
                    self._actions[slots, age[slots], index] = actions[agent.name][slots]
                else:
                    self._actions[slots, age[slots], index, : agent.action.size] = actions[agent.name][slots]
            self._rewards[slots, age[slots]] = shown.reward[slots]
            age[slots] += 1
            ended = (shown.terminated | shown.truncated) & active
            lost = ended & np.asarray(shown.info.get("discarded", False), np.bool_)
            require_ended(spec, active & ~ended, age)
            for slot in slots.tolist():
                started[int(running[slot])] = int(age[slot])
            self._see(np.flatnonzero(ended), age, shown)
            for slot in np.flatnonzero(ended).tolist():
                self.discards.add(bool(lost[slot]))
                if lost[slot]:
                    del started[int(running[slot])]
                    running[slot] = -1
                    continue
                finished[int(running[slot])] = self._copy(
                    slot,
                    int(age[slot]),
                    bool(shown.truncated[slot] and not shown.terminated[slot]),
                    seeds[slot],
                )
                running[slot] = -1
            self._write(started, finished, target, label)
            if self._progress:
                self._progress(min(self.written + sum(started.values()), target), self._transitions)

    def _seed_episode(self, slot: int, episode: int) -> int:
        """Draw the noise of the whole episode, and return the seed of its environment."""
        environment, noise = np.random.SeedSequence([self._seed, episode]).generate_state(2).tolist()
        if self._stochastic:
            # Two seeds: a simulator seeded as numpy is would draw its initial state from the noise's own stream.
            drawn = NoiseSource(self._vector.spec, noise).draw(self._vector.spec.episode_limit)
            for name, values in drawn.items():
                self._noise[name][slot] = values
        return int(environment)

    def _see(self, slots: NDArray[np.int64], age: NDArray[np.int64], shown: VectorStep) -> None:
        for index, agent in enumerate(self._vector.spec.agents):
            width = agent.observation_size
            self._observations[slots, age[slots], index, :width] = shown.observations[agent.name][slots]
            if self._masks is not None and shown.action_masks is not None:
                masks = shown.action_masks[agent.name][slots]
                self._masks[slots, age[slots], index, : agent.action.size] = masks
        self._states[slots, age[slots]] = shown.state[slots]

    def _copy(self, slot: int, steps: int, timeout: bool, seed: int) -> Episode:
        return Episode(
            self._observations[slot, : steps + 1].copy(),
            self._states[slot, : steps + 1].copy(),
            self._actions[slot, :steps].copy(),
            self._rewards[slot, :steps].copy(),
            timeout=timeout,
            action_masks=None if self._masks is None else self._masks[slot, : steps + 1].copy(),
            seed=seed,
        )

    def _write(self, started: dict[int, int], finished: dict[int, Episode], target: int, label: str) -> None:
        while self.written < target and started and (number := next(iter(started))) in finished:
            episode = finished.pop(number)
            self._writer.append(episode, label)
            self.written += len(episode)
            self.returns.append(episode.undiscounted_return)
            self._upcoming = number + 1
            del started[number]
