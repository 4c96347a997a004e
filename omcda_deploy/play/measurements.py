"""Measurements of a team, shared by :mod:`omcda_deploy.play.evaluate` and :mod:`omcda_deploy.play.replay`."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.policy import Decision, TeamPolicy
from omcda_deploy.spec import ActionSpec, TeamSpec

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
            "mean_ms": json_number(self.seconds.mean() * 1e3) if self.seconds.size else None,
            "p50_ms": json_number(self.percentile(50)),
            "p95_ms": json_number(self.percentile(95)),
            "p99_ms": json_number(self.percentile(99)),
            "max_ms": json_number(self.percentile(100)),
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
            "mean": json_number(self.mean),
            "p99": json_number(self.p99),
            "budget": json_number(self.budget),
            "by_step": [json_number(value) for value in self.by_step],
        }


def divergences(
    spec: TeamSpec,
    times: NDArray[np.int64],
    values: NDArray[np.float64],
    budgets: Mapping[str, float | None],
) -> dict[str, Divergence]:
    """Summaries by agent of ``values`` [n, N], measured at the steps ``times`` [n] of their episodes.

    nan stands for a step that a fallback answered; it counts nowhere. Means are sums in the order of ``values``,
    which decides their last digit: give them in the order in which the team answered.
    """
    return {
        name: _divergence(times, values[:, index], budgets.get(name)) for index, name in enumerate(spec.names)
    }


def _divergence(times: NDArray[np.int64], values: NDArray[np.float64], budget: float | None) -> Divergence:
    measured = ~np.isnan(values)
    length = int(times.max()) + 1
    counts = np.bincount(times[measured], minlength=length)
    sums = np.bincount(times[measured], weights=values[measured], minlength=length)
    return Divergence(
        mean=float(values[measured].mean()) if measured.any() else math.nan,
        p99=float(np.percentile(values[measured], 99)) if measured.any() else math.nan,
        by_step=np.divide(sums, counts, where=counts > 0, out=np.full(length, math.nan)),
        budget=budget,
    )


@runtime_checkable
class Described(Protocol):
    """A team that says which bundle it plays; :func:`describe` puts it into reports."""

    @property
    def bundle_digest(self) -> str:
        """sha256 of the bundle's manifest."""
        ...

    @property
    def divergence_kind(self) -> str:
        """Meaning of its divergences: ``kl`` or ``neg_log_behavior`` (:class:`omcda_deploy.bundle.Bundle`)."""
        ...

    @property
    def budgets(self) -> Mapping[str, float | None]:
        """d_i by agent in nats, None without a budget."""
        ...


@runtime_checkable
class HasFallback(Protocol):
    """A team whose agents may miss an answer."""

    @property
    def fallback(self) -> str:
        """Name of the policy that acts then, or ``raise`` (:mod:`omcda_deploy.client.fallback`)."""
        ...


@runtime_checkable
class Versioned(Protocol):
    """A team whose bundle may change when an episode begins."""

    @property
    def version(self) -> str:
        """Name of the bundle that answers this episode."""
        ...

    def pinned(self) -> AbstractContextManager[None]:
        """Return a context in which all episodes are answered by the version that is current at its beginning."""
        ...


@runtime_checkable
class TimesAgents(Protocol):
    """A team that measures how long each agent takes."""

    @property
    def latencies(self) -> Mapping[str, float]:
        """Seconds per agent of the team's last act."""
        ...


@dataclass(frozen=True)
class TeamDescription:
    """A team's bundle, as far as it is made of one, and its fallback.

    ``fallback``: :attr:`HasFallback.fallback`, and ``version``: :attr:`Versioned.version`; both None for a team
    without servers.
    """

    bundle_digest: str | None
    divergence_kind: str | None
    budgets: Mapping[str, float | None]
    fallback: str | None = None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **({} if self.version is None else {"version": self.version}),
            "bundle_digest": self.bundle_digest,
            "divergence_kind": self.divergence_kind,
            "budgets": {name: json_number(value) for name, value in self.budgets.items()},
        }


def describe(team: TeamPolicy) -> TeamDescription:
    """Description of a team; what it does not say about itself stays empty."""
    fallback = team.fallback if isinstance(team, HasFallback) else None
    version = team.version if isinstance(team, Versioned) else None
    if not isinstance(team, Described):
        return TeamDescription(None, None, {}, fallback, version)
    return TeamDescription(team.bundle_digest, team.divergence_kind, team.budgets, fallback, version)


@contextmanager
def one_version(team: TeamPolicy) -> Iterator[TeamDescription]:
    """Keep a team at its current version, whatever servers switch to meanwhile, and yield its description."""
    with team.pinned() if isinstance(team, Versioned) else nullcontext():
        yield describe(team)


class CallLog:
    """Wall-clock times of a team's calls, and the calls that a fallback answered.

    ``step_seconds``: of each ``team.act``. ``fallback_steps``: by agent, the calls that its fallback answered;
    ``not_awaited``: those for which it did not wait for the policy.
    """

    def __init__(self, team: TeamPolicy) -> None:
        self.step_seconds: list[float] = []
        self.fallback_steps: dict[str, int] = dict.fromkeys(team.spec.names, 0)
        self.not_awaited: dict[str, int] = dict.fromkeys(team.spec.names, 0)
        self._described = team if isinstance(team, Described) else None
        self._digest = None if self._described is None else self._described.bundle_digest
        self._timed = team if isinstance(team, TimesAgents) else None
        self._agent_seconds: dict[str, list[float]] = {}

    def add(self, seconds: float, decisions: Mapping[str, Decision]) -> None:
        """Log the call of ``team.act`` that was made last: its time, and its answers.

        Raises :class:`ContractError` if another bundle has answered than the first.
        """
        self.step_seconds.append(seconds)
        if self._described is not None and self._described.bundle_digest != self._digest:
            raise ContractError(
                f"step {len(self.step_seconds)} was answered by bundle {self._described.bundle_digest[:12]}, those "
                f"before by {(self._digest or '')[:12]}: measure one bundle at a time"
            )
        for name in self.fallback_steps:
            self.fallback_steps[name] += decisions[name].fallback
            self.not_awaited[name] += not decisions[name].awaited
        if self._timed is not None:
            for name, latency in self._timed.latencies.items():
                self._agent_seconds.setdefault(name, []).append(latency)

    @property
    def step_latency(self) -> Latency:
        """Latency of ``team.act``."""
        return Latency(np.array(self.step_seconds))

    @property
    def agent_latency(self) -> dict[str, Latency]:
        """Latency per agent, empty for a team that does not time its agents."""
        return {name: Latency(np.array(seconds)) for name, seconds in self._agent_seconds.items()}


def require_answer(
    spec: TeamSpec, decisions: Mapping[str, Decision], batch: int, steps: NDArray[np.int64] | None = None
) -> None:
    """Raise :class:`ContractError` unless every agent answered with actions of the contract's shape and range.

    ``steps`` [B] are the steps that the rows of the batch are at, for the message.
    """
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
        if not agent.action.admits(action):
            row = next(row for row in range(batch) if not agent.action.admits(action[row]))
            place = f"row {row}" if steps is None else f"environment {row}, step {steps[row]}"
            raise ContractError(
                f"{agent.name} answered with the action {action[row].tolist()} in {place}, expected "
                f"{agent.action}: check the policy, and export it again if it is a bundle's"
            )


def saturated(actions: NDArray[Any], spec: ActionSpec) -> NDArray[np.bool_]:
    """Mark the entries of continuous ``actions`` within 0.1 % of a bound (|a| > 0.999 for actions in [-1, 1])."""
    centred = (2.0 * actions - (spec.low + spec.high)) / (spec.high - spec.low)
    return np.asarray(np.abs(centred) > 0.999)


def require_at_least(value: int, least: int, setting: str) -> None:
    """Raise :class:`ConfigError` where ``value`` of ``setting`` is below ``least``, true or false."""
    if isinstance(value, bool) or value < least:
        raise ConfigError(f"{setting}: expected at least {least}, got {value}")


def json_number(value: float | np.floating[Any] | None) -> float | None:
    """A plain JSON number; None for nan and infinity, which JSON does not have."""
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
