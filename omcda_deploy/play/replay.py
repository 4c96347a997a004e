"""Replay recorded episodes through a team, to measure agreement with the data, parity with a bundle, and latency.

Needs a dataset and a team, no simulator. Recorded observations are sent step by step, as a control loop would send
them; the team's answers do not change the observations that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.play.measurements import (
    Divergence,
    Latency,
    TeamDescription,
    describe,
    divergences,
    installed_versions,
    json_number,
    machine,
    now,
    one_version,
    require_at_least,
)
from omcda_deploy.play.sending import Answer, Round, Sender, masks_of, observations_of
from omcda_deploy.policy import Decision, NoiseSource, TeamPolicy, own_temperature
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
            "action": json_number(self.action),
            "divergence": json_number(self.divergence),
            "parameters": json_number(self.parameters),
            "local_digest": self.local_digest,
        }


@dataclass(frozen=True)
class Replay:
    """Measurements of a replay; ``to_json`` is the file that ``omcda-deploy replay`` writes.

    ``agreement`` per agent: for continuous actions the mean of |a - a_recorded| over steps and entries, in action
    units; for discrete ones the share of steps with the recorded choice.
    ``step_latency``: one ``team.act`` for a batch of ``batch`` episodes. ``agent_latency``: per agent, where the
    team times them.
    ``misses``: steps that missed their deadline of 1 / ``rate`` seconds, as :func:`replay` defines it.
    ``fallback_steps``: by agent, the number of calls of ``team.act`` that its fallback answered instead of its
    policy. They count neither for agreement (nan where none is left) nor for parity and divergence.
    ``not_awaited``: those of them for which it did not wait.
    """

    task: str
    spec: TeamSpec
    team: TeamDescription
    dataset_digest: str
    seed: int
    temperature: float
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
    not_awaited: dict[str, int] = field(default_factory=dict)

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
            "temperature": self.temperature,
            "batch": self.batch,
            "episodes": list(self.episodes),
            "steps": self.steps,
            "agreement": {
                "measure": agreement_measure(self.spec),
                "agents": {name: json_number(value) for name, value in self.agreement.items()},
            },
            "parity": self.parity.to_json() if self.parity else None,
            "divergence": {name: value.to_json() for name, value in self.divergence.items()},
            "fallback": {"by": self.team.fallback, "steps": self.fallback_steps},
            "not_awaited": self.not_awaited,
            "latency": {
                "step": self.step_latency.to_json(),
                "agents": {name: value.to_json() for name, value in self.agent_latency.items()},
            },
            "deadline": {
                "rate_hz": self.rate,
                "deadline_ms": 1e3 / self.rate,
                "paced": self.paced,
                "misses": self.misses,
                "miss_share": json_number(self.miss_share),
            },
            "seconds": json_number(self.seconds),
            "versions": self.versions,
            "machine": self.machine,
            "date": self.date,
        }


def agreement_measure(spec: TeamSpec) -> str:
    """Name of the measure behind :attr:`Replay.agreement`."""
    return "mean |a - a_recorded|" if spec.action_kind == "continuous" else "share of equal actions"


def replay(
    team: TeamPolicy,
    dataset: Dataset,
    *,
    episodes: int = 10,
    rate: float | None = None,
    batch: int = 1,
    local: TeamPolicy | None = None,
    temperature: float | None = None,
    seed: int = 0,
    paced: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Send ``episodes`` recorded episodes, drawn without replacement by ``seed``, through ``team``.

    ``batch`` episodes are sent side by side (1: as one robot team would); one that ends before the others keeps
    sending its last observation, uncounted, so that all calls have one batch size. ``local`` is asked the same
    questions afterwards, off the clock, for :class:`Parity`. ``temperature`` is a factor of the noise, which is
    drawn from ``seed``: 0 is deterministic, 1 samples; None is the team's own, 0 for a team without one.

    ``rate`` is in Hz, by default the task's control rate. Flat out, a step misses its deadline when its own answer
    takes longer than 1 / rate. ``paced``, step t is sent at its tick, t / rate after the episode's start, or at
    once where the step before overran it, and misses when its answer is not there by the next tick: a long
    stall then counts once for every tick that it makes late, as it would in a running control loop.

    A served team answers all episodes by the version that is current when the first one begins.
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

    numbers = _sample(dataset, episodes, seed)
    batch = min(batch, len(numbers))
    rounds = [
        Round.of(dataset, numbers[first : first + batch], batch) for first in range(0, len(numbers), batch)
    ]
    temperature = own_temperature(team) if temperature is None else temperature
    noise = NoiseSource(spec, seed, temperature)
    comparison = _Comparison(dataset, local)
    with one_version(team) as description:
        sender = Sender(team, dataset, rate, paced, noise, sum(map(len, rounds)), progress)
        start = perf_counter()
        for group in rounds:
            comparison.add(group, sender.send(group))
    return Replay(
        task=spec.task,
        spec=spec,
        team=description,
        dataset_digest=dataset.digest,
        seed=seed,
        temperature=noise.temperature,
        batch=batch,
        episodes=tuple(numbers.tolist()),
        steps=comparison.steps,
        rate=rate,
        paced=paced,
        agreement=comparison.agreement(),
        parity=comparison.parity(),
        divergence=divergences(spec, *comparison.divergence(), description.budgets),
        step_latency=sender.calls.step_latency,
        agent_latency=sender.calls.agent_latency,
        misses=sender.misses,
        seconds=perf_counter() - start,
        versions=installed_versions(),
        machine=machine(),
        date=now(),
        fallback_steps=sender.calls.fallback_steps,
        not_awaited=sender.calls.not_awaited,
    )


def _sample(dataset: Dataset, episodes: int, seed: int) -> NDArray[np.int64]:
    """Numbers of ``episodes`` recorded episodes, or of all, drawn without replacement; sorted."""
    count = len(dataset.episode_length)
    if count == 0:
        raise DatasetError("the dataset holds no closed episode to replay: record at least one to its end")
    return np.sort(np.random.default_rng(seed).choice(count, size=min(episodes, count), replace=False))


class _Comparison:
    """Compares a team's answers with the recorded actions and with a local bundle's answers, off the clock.

    Steps that a fallback answered are compared with nothing.
    """

    def __init__(self, dataset: Dataset, local: TeamPolicy | None) -> None:
        agents = len(dataset.spec.agents)
        self.steps = 0  # recorded joint actions
        self._dataset, self._local = dataset, local
        self._disagreement = np.zeros(agents)  # sums of |a - a_recorded|, or of unequal choices
        self._compared = np.zeros(agents, np.int64)  # steps that the policy answered
        self._differences = {"action": 0.0, "divergence": 0.0, "parameters": 0.0}
        self._times: list[NDArray[np.int64]] = []  # [n] steps of their episodes
        self._divergence: list[NDArray[np.float64]] = []  # [n, N]

    def add(self, episodes: Round, answers: Sequence[Answer]) -> None:
        """Compare the ``answers`` of one round."""
        names = self._dataset.spec.names
        if self._local is not None:
            self._local.reset()
        for t, answer in enumerate(answers):
            running = episodes.counted & (t < episodes.lengths)
            count = int(running.sum())
            self.steps += count
            self._times.append(np.full(count, t))
            divergence = [np.asarray(answer.decisions[name].divergence, np.float64) for name in names]
            self._divergence.append(np.stack(divergence, axis=1)[running])
            comparable = [name for name in names if not answer.decisions[name].fallback]
            for name in comparable:
                index, action = names.index(name), answer.decisions[name].action[running]
                self._disagreement[index] += _disagreement(self._dataset, answer.rows[running], index, action)
                self._compared[index] += count
            if self._local is not None:
                self._compare_locally(self._local, answer, comparable)

    def _compare_locally(self, local: TeamPolicy, answer: Answer, names: Sequence[str]) -> None:
        """Ask ``local`` the same question, and keep the largest differences of the agents ``names``."""
        decisions = local.act(
            observations_of(self._dataset, answer.rows),
            noise=answer.noise,
            action_masks=masks_of(self._dataset, answer.rows),
        )
        for name in names:
            for quantity, difference in _differences(answer.decisions[name], decisions[name]).items():
                self._differences[quantity] = max(self._differences[quantity], difference)

    def agreement(self) -> dict[str, float]:
        """Agreement by agent, as in :attr:`Replay.agreement`; nan where nothing was compared."""
        none = np.full(len(self._compared), np.nan)
        mean = np.divide(self._disagreement, self._compared, where=self._compared > 0, out=none)
        spec = self._dataset.spec
        return {
            name: float(value if spec.action_kind == "continuous" else 1.0 - value)
            for name, value in zip(spec.names, mean, strict=True)
        }

    def parity(self) -> Parity | None:
        """Differences from the local bundle, nan where nothing was compared; None without one."""
        if self._local is None:
            return None
        compared = self._compared.any()
        differences = self._differences if compared else dict.fromkeys(self._differences, float("nan"))
        return Parity(**differences, local_digest=describe(self._local).bundle_digest)

    def divergence(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps [n] of their episodes and divergences [n, N], in the order of the answers."""
        return np.concatenate(self._times), np.concatenate(self._divergence)


def _disagreement(dataset: Dataset, rows: NDArray[np.int64], agent: int, action: NDArray[Any]) -> float:
    """Sum over ``rows`` of the mean |a - a_recorded| over entries, or of unequal choices."""
    action_spec = dataset.spec.agents[agent].action
    if action_spec.kind == "discrete":
        return float((action != dataset.actions[rows, agent]).sum())
    target = dataset.actions[rows, agent, : action_spec.size].astype(np.float64)
    return float(np.abs(action - target).mean(axis=1).sum())


def _differences(ours: Decision, theirs: Decision) -> dict[str, float]:
    """Largest absolute differences of two answers; parameters under other names differ infinitely."""
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
