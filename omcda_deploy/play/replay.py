"""Recorded episodes through a team: does it answer as the data did, as its bundle does, and in time?

Needs a dataset and a team, no simulator. Recorded observations are sent step by step, as a control loop would;
what the team answers changes nothing in what it is sent next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.play.measurements import (
    Divergence,
    FallbackCount,
    Latency,
    TeamDescription,
    agent_latencies,
    describe,
    divergences,
    installed_versions,
    machine,
    now,
    number,
    require_answer,
    require_at_least,
)
from omcda_deploy.policy import Decision, Float, NoiseSource, TeamPolicy
from omcda_deploy.spec import TeamSpec, require_same_contract


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences between the team's answers and the local bundle's, over all agents and steps.

    Both are asked with the same batches, so anything but zero means that they do not run the same graph in the
    same way: another bundle, another runtime version, more threads, or the team graph instead of the
    agents'.
    """

    action: float
    divergence: float
    parameters: float
    local_digest: str | None

    @property
    def exact(self) -> bool:
        return self.action == self.divergence == self.parameters == 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "exact": self.exact,
            "action": number(self.action),
            "divergence": number(self.divergence),
            "parameters": number(self.parameters),
            "local_digest": self.local_digest,
        }


@dataclass(frozen=True)
class Replay:
    """What happened; ``to_json`` is the file that ``omcda-deploy replay`` writes.

    ``agreement`` per agent: for continuous actions the mean of |a - a_recorded| over steps and entries, in action
    units; for discrete ones the share of steps with the recorded choice.
    ``step_latency``: one ``team.act`` for a batch of ``batch`` episodes. ``agent_latency``: per agent, where the
    team times them.
    ``misses``: steps that missed their deadline of 1 / ``rate`` seconds; what that means is in :func:`replay`.
    ``fallback_steps``: by agent, how many calls of ``team.act`` its fallback answered instead of its policy. They
    count neither for agreement (nan where none is left) nor for parity and divergence.
    """

    task: str
    spec: TeamSpec
    team: TeamDescription
    dataset_digest: str
    seed: int
    stochastic: bool
    batch: int
    episodes: tuple[int, ...]  # indices in the dataset
    steps: int  # joint actions compared
    rate: float
    paced: bool
    agreement: dict[str, float]
    parity: Parity | None
    divergence: dict[str, Divergence]
    step_latency: Latency
    agent_latency: dict[str, Latency]
    misses: int
    seconds: float
    versions: dict[str, str]
    machine: str
    date: str
    fallback_steps: dict[str, int] = field(default_factory=dict)

    @property
    def miss_share(self) -> float:
        return self.misses / self.step_latency.seconds.size

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: numbers, strings, lists; null for what was not measured."""
        return {
            "kind": "replay",
            "task": self.task,
            "contract_hash": self.spec.contract_hash,
            "team": self.team.to_json(),
            "dataset_digest": self.dataset_digest,
            "seed": self.seed,
            "stochastic": self.stochastic,
            "batch": self.batch,
            "episodes": list(self.episodes),
            "steps": self.steps,
            "agreement": {
                "measure": agreement_measure(self.spec),
                "agents": {name: number(value) for name, value in self.agreement.items()},
            },
            "parity": self.parity.to_json() if self.parity else None,
            "divergence": {name: value.to_json() for name, value in self.divergence.items()},
            "fallback": {"by": self.team.fallback, "steps": self.fallback_steps},
            "latency": {
                "step": self.step_latency.to_json(),
                "agents": {name: value.to_json() for name, value in self.agent_latency.items()},
            },
            "deadline": {
                "rate_hz": self.rate,
                "deadline_ms": 1e3 / self.rate,
                "paced": self.paced,
                "misses": self.misses,
                "miss_share": number(self.miss_share),
            },
            "seconds": number(self.seconds),
            "versions": self.versions,
            "machine": self.machine,
            "date": self.date,
        }


def agreement_measure(spec: TeamSpec) -> str:
    return "mean |a - a_recorded|" if spec.action_kind == "continuous" else "share of equal actions"


def replay(
    team: TeamPolicy,
    dataset: Dataset,
    *,
    episodes: int = 10,
    rate: float | None = None,
    batch: int = 1,
    local: TeamPolicy | None = None,
    stochastic: bool = False,
    seed: int = 0,
    paced: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Send ``episodes`` recorded episodes, drawn without replacement by ``seed``, through ``team``.

    ``batch`` episodes are sent side by side (1: as one robot team would); one that ends before the others keeps
    sending its last observation, uncounted, so that all calls have one batch size. ``local`` is asked the same
    questions afterwards, off the clock, for :class:`Parity`. ``stochastic`` samples with noise seeded by ``seed``.

    ``rate`` is in Hz, by default the task's control rate. Flat out, a step misses its deadline when its own answer
    takes longer than 1 / rate. ``paced``, step t is sent at its tick, t / rate after the episode's start, or at
    once where the step before overran it, and misses when its answer is not there by the next tick: a long
    stall then counts once for every tick that it makes late, as it would in a running control loop.

    ``progress(done, total)`` is called after every step, with numbers of calls. Raises :class:`ContractError`
    when team, dataset and local bundle do not fit together and :class:`ConfigError` for a setting out of range.
    """
    require_at_least(episodes, 1, "episodes")
    require_at_least(batch, 1, "batch")
    require_at_least(seed, 0, "seed")
    spec = dataset.spec
    rate = spec.control_rate if rate is None else rate
    if not 0 < rate < float("inf"):
        raise ConfigError(f"rate: expected a positive number of Hz, got {rate}")
    require_same_contract(team.spec, spec, "the team", "the dataset")
    if local is not None:
        require_same_contract(local.spec, team.spec, "the local bundle", "the team")

    recorded = len(dataset.episode_length)
    if recorded == 0:
        raise DatasetError("the dataset holds no closed episode to replay: record at least one to its end")
    chosen = np.sort(
        np.random.default_rng(seed).choice(recorded, size=min(episodes, recorded), replace=False)
    )
    batch = min(batch, len(chosen))
    description = describe(team)
    noise_source = NoiseSource(spec, seed) if stochastic else None
    times: list[NDArray[np.int64]] = []
    divergence: list[NDArray[np.float64]] = []
    disagreement = np.zeros(len(spec.agents))  # sums of |a - a_recorded|, or of unequal choices
    compared = np.zeros(len(spec.agents), np.int64)  # steps that the policy answered
    fallbacks = FallbackCount(spec)
    differences = {"action": 0.0, "divergence": 0.0, "parameters": 0.0}
    step_seconds: list[float] = []
    agent_seconds: dict[str, list[float]] = {}
    misses = 0
    rounds = [chosen[first : first + batch] for first in range(0, len(chosen), batch)]
    calls = sum(int(dataset.episode_length[r].max()) for r in rounds)
    started = perf_counter()

    for members in rounds:
        # The last round may be short: its first episode fills the batch, uncounted.
        filled = np.concatenate([members, np.repeat(members[:1], batch - len(members))])
        lengths = dataset.episode_length[filled]
        counted = np.arange(batch) < len(members)
        asked: list[tuple[NDArray[np.int64], Mapping[str, Float] | None, dict[str, Decision]]] = []
        team.reset()
        origin = perf_counter()
        for t in range(int(lengths.max())):
            rows = _rows(dataset, filled, np.minimum(t, lengths - 1))
            observations = _observations(dataset, rows)
            masks = _masks(dataset, rows)
            noise = noise_source.draw(batch) if noise_source else None
            if paced and (wait := origin + t / rate - perf_counter()) > 0:
                sleep(wait)
            before = perf_counter()
            decisions = team.act(observations, noise=noise, action_masks=masks)
            after = perf_counter()
            step_seconds.append(after - before)
            misses += after - (origin + t / rate if paced else before) > 1 / rate
            for name, latency in agent_latencies(team).items():
                agent_seconds.setdefault(name, []).append(latency)
            require_answer(spec, decisions, batch)
            fallbacks.add(decisions)
            asked.append((rows, noise, decisions))
            if progress:
                progress(len(step_seconds), calls)

        if local is not None:
            local.reset()
        for t, (rows, drawn, decisions) in enumerate(asked):
            active = counted & (t < lengths)
            times.append(np.full(int(active.sum()), t))
            divergence.append(
                np.stack([np.asarray(decisions[name].divergence, np.float64)[active] for name in spec.names])
            )
            answered = [(i, name) for i, name in enumerate(spec.names) if not decisions[name].fallback]
            for i, name in answered:
                disagreement[i] += _disagreement(dataset, rows[active], i, decisions[name].action[active])
                compared[i] += int(active.sum())
            if local is not None:
                answers = local.act(
                    _observations(dataset, rows), noise=drawn, action_masks=_masks(dataset, rows)
                )
                for _, name in answered:
                    for what, difference in _differences(decisions[name], answers[name]).items():
                        differences[what] = max(differences[what], difference)

    steps = int(sum(counts.size for counts in times))
    mean = np.divide(disagreement, compared, where=compared > 0, out=np.full(len(spec.agents), np.nan))
    if not compared.any():
        differences = dict.fromkeys(differences, float("nan"))
    return Replay(
        task=spec.task,
        spec=spec,
        team=description,
        dataset_digest=dataset.digest,
        seed=seed,
        stochastic=stochastic,
        batch=batch,
        episodes=tuple(int(index) for index in chosen),
        steps=steps,
        rate=rate,
        paced=paced,
        agreement={
            name: float(value if spec.action_kind == "continuous" else 1.0 - value)
            for name, value in zip(spec.names, mean, strict=True)
        },
        parity=None if local is None else Parity(**differences, local_digest=describe(local).bundle_digest),
        divergence=divergences(spec, times, divergence, description.budgets),
        step_latency=Latency(np.array(step_seconds)),
        agent_latency={name: Latency(np.array(values)) for name, values in agent_seconds.items()},
        misses=misses,
        seconds=perf_counter() - started,
        versions=installed_versions(),
        machine=machine(),
        date=now(),
        fallback_steps=fallbacks.steps,
    )


def _rows(dataset: Dataset, episodes: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(dataset.episode_start[episodes] + steps, np.int64)


def _observations(dataset: Dataset, rows: NDArray[np.int64]) -> dict[str, Float]:
    """Rows as the team meets them: per agent [B, O], without the dataset's padding to the longest vector."""
    return {
        agent.name: np.ascontiguousarray(dataset.observations[rows, i, : agent.observation_size])
        for i, agent in enumerate(dataset.spec.agents)
    }


def _masks(dataset: Dataset, rows: NDArray[np.int64]) -> dict[str, NDArray[np.uint8]] | None:
    masks = dataset.action_masks
    if masks is None:
        return None
    return {
        agent.name: np.ascontiguousarray(masks[rows, i, : agent.action.size])
        for i, agent in enumerate(dataset.spec.agents)
    }


def _disagreement(dataset: Dataset, rows: NDArray[np.int64], agent: int, action: NDArray[Any]) -> float:
    """Sum over ``rows`` of the mean |a - a_recorded| over entries, or of unequal choices."""
    action_spec = dataset.spec.agents[agent].action
    if action_spec.kind == "discrete":
        return float((action != dataset.actions[rows, agent]).sum())
    recorded = dataset.actions[rows, agent, : action_spec.size].astype(np.float64)
    return float(np.abs(action - recorded).mean(axis=1).sum())


def _differences(ours: Decision, theirs: Decision) -> dict[str, float]:
    names = ours.parameters.keys() & theirs.parameters.keys()
    if names != ours.parameters.keys() | theirs.parameters.keys():
        parameters = float("inf")
    else:
        parameters = max((_largest(ours.parameters[n], theirs.parameters[n]) for n in names), default=0.0)
    return {
        "action": _largest(ours.action, theirs.action),
        "divergence": _largest(ours.divergence, theirs.divergence),
        "parameters": parameters,
    }


def _largest(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Largest absolute difference; equal infinities (masked logits) do not differ, nan on one side is infinite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    difference = np.abs(np.subtract(ours, theirs, where=~same, out=np.zeros_like(ours)))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
