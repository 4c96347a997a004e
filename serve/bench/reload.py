"""Benchmark of reloads: their cost for concurrent requests, and their lasting effect on CPU and memory.

Two copies of a bundle are versions 1 and 2 of a team. A *reload* loads the other version on all servers, makes it
current and unloads the old one, as ``release switch`` and ``release unload`` do. Requests to all agents come in
an open loop, so that stalls of a server are measured. Rounds without and with reloads alternate; the figure to
quote is the median of the ratios within rounds.

The lasting effect is measured on servers that were reloaded many times, beside servers that never were: the ratio
of their CPU per request before and after, and the memory of the former. Both measurements come after the rounds,
as memory grows during the first tens of reloads: by the second version, and by fragmentation. Linux only, as
:mod:`omcda_deploy.serve.bench.steps`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omcda_deploy.bundle import Bundle, read_bundle
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.errors import EndpointError
from omcda_deploy.play.measurements import installed_versions, machine
from omcda_deploy.serve.bench.http2 import Connection
from omcda_deploy.serve.bench.load import Line, Sockets, closed_loop, open_loop
from omcda_deploy.serve.bench.measured_servers import ACT, Requests, Servers, requests_of, start_models
from omcda_deploy.serve.bench.steps import require_measurable

P99_RATIO, DRIFT = 1.5, 0.05  # targets: at most
VERSIONS = ("1", "2")
COMPARISONS = 11  # measurements of CPU per request beside the servers that are never reloaded
COMPARISON_S = 0.5


@dataclass(frozen=True)
class Half:
    """One half of a round. ``reloads``: of all servers together; the last one may end after the half."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    requests: int
    refused: int
    reloads: int = 0


@dataclass(frozen=True)
class Round:
    """Both halves, one after the other."""

    quiet: Half
    reloading: Half

    @property
    def p99_ratio(self) -> float:
        return self.reloading.p99_ms / self.quiet.p99_ms


@dataclass(frozen=True)
class State:
    """CPU and memory at one moment. ``cpu_ratio``: CPU per request over that of servers that are never reloaded."""

    cpu_ratio: float
    rss_mb: float


@dataclass(frozen=True)
class ReloadReport:
    """Figures of a run; ``before`` and ``after`` are the states around ``reloads`` reloads."""

    rounds: tuple[Round, ...]
    before: State
    after: State
    reloads: int
    load_average: tuple[float, float]

    @property
    def p99_ratio(self) -> float:
        return statistics.median(each.p99_ratio for each in self.rounds)

    @property
    def refused(self) -> int:
        return sum(each.quiet.refused + each.reloading.refused for each in self.rounds)

    @property
    def cpu_drift(self) -> float:
        return self.after.cpu_ratio / self.before.cpu_ratio - 1.0

    @property
    def rss_drift(self) -> float:
        return self.after.rss_mb / self.before.rss_mb - 1.0

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "versions": installed_versions(),
            **asdict(self),
            "p99_ratio": self.p99_ratio,
            "cpu_drift": self.cpu_drift,
            "rss_drift": self.rss_drift,
        }


def run(
    bundle_path: str | Path,
    *,
    seconds: float = 60.0,
    rounds: int = 5,
    rate: float = 200.0,
    reloads: int = 1000,
    processes: bool = False,
    config: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReloadReport:
    """Measure ``rounds`` of ``seconds`` without and ``seconds`` with back-to-back reloads, then ``reloads`` more.

    ``rate``: requests per second to all agents together. ``processes``: one server per agent instead of one for
    all. ``progress`` counts rounds and hundreds of reloads.

    Raises :class:`BundleError`, :class:`ConfigError` for a setting out of range, and :class:`EndpointError` if a
    server fails.
    """
    require_measurable(seconds=seconds, rounds=rounds, rate=rate, reloads=reloads)
    bundle = read_bundle(bundle_path)
    names = bundle.spec.names
    requests = requests_of(bundle.spec, seed)
    load_before = os.getloadavg()[0]
    total = rounds + -(-reloads // 100)
    with ExitStack() as stack:
        versions = _versions(stack, bundle)
        groups = [[name] for name in names] if processes else [names]
        servers = start_models(stack, versions, groups, config, admin=True)
        control = start_models(stack, versions, groups, config)
        team = _Team(stack, servers)
        measured = []
        for done in range(rounds):
            progress(done, total)
            quiet = _half(servers, requests, names, rate, seconds)
            with team.reloading() as finished:
                reloading = _half(servers, requests, names, rate, seconds)
            measured.append(Round(quiet, replace(reloading, reloads=len(finished))))
        before = _state(servers, control, requests, names)
        for done in range(reloads):
            if done % 100 == 0:
                progress(rounds + done // 100, total)
            team.reload()
        after = _state(servers, control, requests, names)
    return ReloadReport(tuple(measured), before, after, reloads, (load_before, os.getloadavg()[0]))


class _Team:
    """The servers of a team, with the versions that they answer with."""

    def __init__(self, stack: ExitStack, servers: Servers) -> None:
        self._admin = stack.enter_context(TeamAdmin(servers.admin))
        self._current, self._other = VERSIONS
        self._admin.switch(self._current)

    def reload(self) -> None:
        self._admin.switch(self._other)
        self._admin.unload(self._current)
        self._current, self._other = self._other, self._current

    @contextmanager
    def reloading(self) -> Iterator[list[None]]:
        """Reload back to back in another thread; the list grows by an entry per reload. Raises a reload's error."""
        finished: list[None] = []
        failures: list[EndpointError] = []
        stop = threading.Event()

        def loop() -> None:
            try:
                while not stop.is_set():
                    self.reload()
                    finished.append(None)
            except EndpointError as error:
                failures.append(error)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield finished
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]


def _versions(stack: ExitStack, bundle: Bundle) -> Path:
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="omcda-reload-")))
    for version in VERSIONS:
        shutil.copytree(bundle.path, folder / version)
    return folder


def _half(
    servers: Servers,
    requests: Requests,
    names: tuple[str, ...],
    rate: float,
    seconds: float,
) -> Half:
    with closing(_sockets(servers, requests, names)) as sockets:
        timings = open_loop(sockets, len(names), rate, seconds)
    latency = timings.latency
    return Half(
        p50_ms=latency.percentile(50),
        p99_ms=latency.percentile(99),
        max_ms=latency.percentile(100),
        requests=latency.seconds.size + timings.refused,
        refused=timings.refused,
    )


def _state(servers: Servers, control: Servers, requests: Requests, names: tuple[str, ...]) -> State:
    ratios = []
    for _ in range(COMPARISONS):
        cost, other = (_cpu_us(each, requests, names) for each in (servers, control))
        ratios.append(cost / other)
    return State(statistics.median(ratios), servers.rss_mb())


def _cpu_us(servers: Servers, requests: Requests, names: tuple[str, ...]) -> float:
    with closing(_sockets(servers, requests, names)) as sockets:
        began = servers.cpu_s()
        timings = closed_loop(sockets, len(names), COMPARISON_S)
        return 1e6 * (servers.cpu_s() - began) / timings.latency.seconds.size


def _sockets(servers: Servers, requests: Requests, names: tuple[str, ...]) -> Sockets:
    """Return sockets with one client per agent, each with its own connection."""
    return Sockets(
        [
            [Line(Connection(servers.endpoints[name], ACT, stream=False), cycle(requests[ACT, name]))]
            for name in names
        ]
    )
