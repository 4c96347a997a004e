"""Measurements that :mod:`omcda_deploy.play.evaluate` and :mod:`omcda_deploy.play.replay` have in common."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError, ContractError, SimulatorError
from omcda_deploy.policy import Decision, TeamPolicy
from omcda_deploy.spec import ActionSpec, TeamSpec

DISCARDED_IN_A_ROW = 10  # episodes lost to crashes of a simulator after which it is taken to be broken
_PACKAGES = ("omcda-deploy", "numpy", "onnxruntime", "grpcio")


@dataclass(frozen=True)
class Latency:
    """Wall-clock times of one kind of call, first calls included. ``seconds``: float64 [calls]."""

    seconds: NDArray[np.float64]

    def percentile(self, q: float) -> float:
        """The q-th percentile in milliseconds; nan where nothing was timed."""
        return float(np.percentile(self.seconds, q)) * 1e3 if self.seconds.size else math.nan

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": self.seconds.size,
            "mean_ms": number(self.seconds.mean() * 1e3) if self.seconds.size else None,
            "p50_ms": number(self.percentile(50)),
            "p95_ms": number(self.percentile(95)),
            "p99_ms": number(self.percentile(99)),
            "max_ms": number(self.percentile(100)),
        }


@dataclass(frozen=True)
class Divergence:
    """One agent's divergence over all steps that its policy answered, in nats; nan where there is none.

    ``by_step``: float64 [T], the mean over the episodes still running at step t. ``budget`` is d_i, None where
    the algorithm has none.
    """

    mean: float
    p99: float
    by_step: NDArray[np.float64]
    budget: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": number(self.mean),
            "p99": number(self.p99),
            "budget": number(self.budget),
            "by_step": [number(value) for value in self.by_step],
        }


def divergences(
    spec: TeamSpec,
    steps: Sequence[NDArray[np.int64]],
    values: Sequence[NDArray[np.float64]],
    budgets: Mapping[str, float | None],
) -> dict[str, Divergence]:
    """Per-agent summaries of ``values`` (each [N, n]) seen at the times ``steps`` (each [n]) of their episodes.

    nan stands for a step that a fallback answered; it counts nowhere.
    """
    times = np.concatenate(steps)
    return {
        name: _divergence(times, rows, budgets.get(name))
        for name, rows in zip(spec.names, np.concatenate(values, axis=1), strict=True)
    }


def _divergence(times: NDArray[np.int64], values: NDArray[np.float64], budget: float | None) -> Divergence:
    seen = ~np.isnan(values)
    length = int(times.max()) + 1
    counts = np.bincount(times[seen], minlength=length)
    sums = np.bincount(times[seen], weights=values[seen], minlength=length)
    return Divergence(
        mean=float(values[seen].mean()) if seen.any() else math.nan,
        p99=float(np.percentile(values[seen], 99)) if seen.any() else math.nan,
        by_step=np.divide(sums, counts, where=counts > 0, out=np.full(length, math.nan)),
        budget=budget,
    )


@dataclass(frozen=True)
class TeamDescription:
    """What a team says about the bundle it came from; a team that is no bundle leaves it empty.

    ``fallback``: who answers the steps that its servers miss; None for a team without servers.
    """

    bundle_digest: str | None
    divergence_kind: str | None
    budgets: Mapping[str, float | None]
    fallback: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle_digest": self.bundle_digest,
            "divergence_kind": self.divergence_kind,
            "budgets": {name: number(value) for name, value in self.budgets.items()},
        }


def describe(team: TeamPolicy) -> TeamDescription:
    """A local team carries its bundle; a served one repeats what its servers said at connect."""
    bundle = getattr(team, "bundle", None)
    if bundle is not None:
        return TeamDescription(bundle.digest, bundle.divergence_kind, bundle.budgets)
    return TeamDescription(
        getattr(team, "bundle_digest", None),
        getattr(team, "divergence_kind", None),
        getattr(team, "budgets", None) or {},
        getattr(team, "fallback", None),
    )


def agent_latencies(team: TeamPolicy) -> Mapping[str, float]:
    """Seconds per agent of the team's last act, empty for a team that does not time its agents."""
    latencies: Mapping[str, float] | None = getattr(team, "latencies", None)
    return latencies or {}


class FallbackCount:
    """Counts, by agent, the calls of ``team.act`` that a fallback answered."""

    def __init__(self, spec: TeamSpec) -> None:
        self.steps: dict[str, int] = dict.fromkeys(spec.names, 0)

    def add(self, decisions: Mapping[str, Decision]) -> None:
        for name in self.steps:
            self.steps[name] += decisions[name].fallback


def require_answer(spec: TeamSpec, decisions: Mapping[str, Decision], batch: int) -> None:
    """Raise :class:`ContractError` unless every agent answered with finite actions of the contract's shape."""
    for agent in spec.agents:
        if agent.name not in decisions:
            raise ContractError(f"the team gave no action for {agent.name}: expected one for each agent")
        action = np.asarray(decisions[agent.name].action)
        shape = (batch, agent.action.size) if agent.action.kind == "continuous" else (batch,)
        if action.shape != shape:
            raise ContractError(
                f"{agent.name} answered with an action of shape {list(action.shape)}, expected {list(shape)}: "
                "use a bundle exported for this task"
            )
        if not np.isfinite(action).all():
            raise ContractError(
                f"{agent.name} answered with an action that is not finite: check the bundle with "
                "omcda-deploy inspect, and export the run again"
            )


def saturated(actions: NDArray[Any], spec: ActionSpec) -> NDArray[np.bool_]:
    """Which entries of continuous ``actions`` lie within 0.1 % of a bound (|a| > 0.999 for actions in [-1, 1])."""
    centred = (2.0 * actions - (spec.low + spec.high)) / (spec.high - spec.low)
    return np.asarray(np.abs(centred) > 0.999)


class DiscardCount:
    """Counts the episodes that a simulator lost, and gives up where it loses one after another."""

    def __init__(self) -> None:
        self.total = 0
        self._in_a_row = 0

    def add(self, discarded: bool) -> None:
        """An episode ended, ``discarded`` or not. Raises :class:`SimulatorError` for too many in a row."""
        self.total += discarded
        self._in_a_row = self._in_a_row + 1 if discarded else 0
        if self._in_a_row >= DISCARDED_IN_A_ROW:
            raise SimulatorError(
                f"the simulator lost {self._in_a_row} episodes in a row: its warnings say how. See whether it runs "
                "by itself, and with fewer environments (--num-envs)"
            )


def require_ended(spec: TeamSpec, running: NDArray[np.bool_], steps: NDArray[np.int64] | int) -> None:
    """Raise :class:`ContractError` where environments ``running`` [E] have had all ``steps`` of their spec."""
    if (overdue := running & (np.asarray(steps) >= spec.episode_limit)).any():
        raise ContractError(
            f"{spec.task}: environment {np.argmax(overdue)} did not end within {spec.episode_limit} steps, the "
            "episode limit of its spec"
        )


def episode_seed(seed: int, episode: int) -> int:
    """The seed of one episode: a function of these two numbers alone, so that no batch size changes it."""
    return int(np.random.SeedSequence(seed, spawn_key=(episode,)).generate_state(1)[0])


def require_at_least(value: int, least: int, what: str) -> None:
    if value < least:
        raise ConfigError(f"{what}: expected at least {least}, got {value}")


def number(value: float | np.floating[Any] | None) -> float | None:
    """A plain JSON number; None stands for what JSON cannot say."""
    return float(value) if value is not None and math.isfinite(value) else None


def installed_versions() -> dict[str, str]:
    """Versions of Python, this package and the installed run times of policies."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> str:
    """Processor, number of usable cores and operating system; nothing that names the host."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"{processor}, {cores} cores, {platform.system()}"


def now() -> str:
    """The present time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary beside ``path`` that takes its place when the block succeeds and vanishes when it fails."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or leave what was there. Raises :class:`ConfigError` where it cannot be written."""
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}): choose another place") from error


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """As :func:`write_text`, for what ``to_json()`` of an evaluation or a replay returns."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
