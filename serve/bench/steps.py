"""Benchmark of a served step beside gRPC alone: servers, scenarios, interleaved rounds, ratios.

Every round starts new servers, because the memory pages of a process make one start up to a tenth faster than
another. Each round runs all scenarios in another order, so that a drift of the machine affects all alike. The
figures to quote are the medians of ratios within a round. The servers are real processes on this machine: all
agents in one, the joint graph, bare grpc.aio servers that answer as many bytes
(:mod:`omcda_deploy.serve.bench.echo`), and a server as a user would write it
(:mod:`omcda_deploy.serve.bench.plain`). The load comes from the calling process
(:mod:`omcda_deploy.serve.bench.http2`); its CPU per step is among the figures, and must stay far below a server's
for the figures to describe the servers. In scenarios of the package's own client
(:mod:`omcda_deploy.serve.bench.clients`) it is the figure to look at. Linux only, as it reads the CPU clocks of
other processes.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from omcda_deploy.bundle import TEAM, read_bundle
from omcda_deploy.errors import ConfigError, EndpointError
from omcda_deploy.play.measurements import installed_versions, machine
from omcda_deploy.serve.bench.clients import ClientLoop
from omcda_deploy.serve.bench.http2 import Connection
from omcda_deploy.serve.bench.load import Line, Sockets, Timings, closed_loop, open_loop
from omcda_deploy.serve.bench.measured_servers import (
    ACT,
    INFER,
    STREAM,
    Requests,
    Servers,
    requests_of,
    start_echo,
    start_models,
    start_plain,
)
from omcda_deploy.spec import TeamSpec

WARM_UP_S = 0.1

Where = Literal["agents", "team", "echo", "default echo", "plain", "processes", "recording"]
Measure = Literal["p50_ms", "cpu_us", "client_cpu_us", "rate", "rss_mb"]
PRICES: tuple[Measure, Measure] = ("p50_ms", "cpu_us")


@dataclass(frozen=True)
class Scenario:
    """One kind of load: a step asks all ``models``, in turn or ``at_once``; with a ``rate`` the loop is open.

    ``client``: the steps are those of the package's own client, at all ``models``, on streams if ``path`` is one.
    """

    name: str
    where: Where
    path: str
    models: tuple[str, ...]
    clients: int = 1
    at_once: bool = False
    rate: float | None = None
    client: bool = False


@dataclass(frozen=True)
class Figures:
    """One scenario in one round. ``cpu_us``: server CPU per step; ``client_cpu_us``: this process' own."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    rate: float
    cpu_us: float
    client_cpu_us: float
    rss_mb: float
    refused: int


@dataclass(frozen=True)
class Ratio:
    """The ratio of one scenario's ``measure`` to that of another, and its target."""

    scenario: str
    base: str
    measure: Measure
    at_most: float | None = None
    at_least: float | None = None

    def of(self, rounds: Sequence[Mapping[str, Figures]]) -> float:
        """Return the median of the ratios within rounds."""
        ratios: list[float] = [
            getattr(figures[self.scenario], self.measure) / getattr(figures[self.base], self.measure)
            for figures in rounds
        ]
        return statistics.median(ratios)

    @property
    def target(self) -> str:
        """The target in words; empty if there is none."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}"

    def holds(self, value: float) -> bool | None:
        """Return whether ``value`` meets the target; None if there is none."""
        if self.at_most is not None:
            return value <= self.at_most
        return None if self.at_least is None else value >= self.at_least


@dataclass(frozen=True)
class StepReport:
    """Figures of a run.

    ``rounds``: figures by scenario, one mapping per round. ``load_average``: of one minute, before and after.
    ``ready_s``: seconds from the start of the server of all agents to its first line, median over rounds.
    """

    scenarios: tuple[Scenario, ...]
    ratios: tuple[Ratio, ...]
    rounds: tuple[Mapping[str, Figures], ...]
    load_average: tuple[float, float]
    ready_s: float

    def median(self, scenario: str) -> dict[str, float]:
        """Return the median over rounds of every figure of a scenario."""
        rows = [asdict(figures[scenario]) for figures in self.rounds]
        return {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "load_average": self.load_average,
            "ready_s": self.ready_s,
            "versions": installed_versions(),
            "scenarios": [
                asdict(scenario)
                | {"median": self.median(scenario.name)}
                | {"rounds": [asdict(figures[scenario.name]) for figures in self.rounds]}
                for scenario in self.scenarios
            ],
            "ratios": [
                asdict(ratio) | {"median": (value := ratio.of(self.rounds)), "holds": ratio.holds(value)}
                for ratio in self.ratios
            ],
        }


def scenarios(
    spec: TeamSpec, clients: int, rate: float, *, processes: bool, record: bool = False
) -> tuple[Scenario, ...]:
    """List the scenarios. ``clients``: of the busy loops. ``rate``: of the open loops, in requests/s."""
    one, team, every = spec.names[:1], (TEAM,), spec.names
    chosen: tuple[Scenario, ...] = (
        Scenario("echo", "echo", ACT, one),
        Scenario("echo infer", "echo", INFER, one),
        Scenario("echo stream", "echo", STREAM, one),
        Scenario("default echo", "default echo", ACT, one),
        Scenario("default echo infer", "default echo", INFER, one),
        Scenario("plain server", "plain", ACT, one),
        Scenario("unary", "agents", ACT, one),
        Scenario("infer", "agents", INFER, one),
        Scenario("stream", "agents", STREAM, one),
        Scenario(f"echo x{clients}", "echo", ACT, one, clients),
        Scenario(f"unary x{clients}", "agents", ACT, one, clients),
        Scenario(f"stream x{clients}", "agents", STREAM, one, clients),
        Scenario("joint unary", "team", ACT, team),
        Scenario("joint stream", "team", STREAM, team),
        Scenario("agents in turn", "agents", ACT, every),
        Scenario("agents at once", "agents", ACT, every, at_once=True),
        Scenario("client joint", "team", ACT, team, client=True),
        Scenario("client joint stream", "team", STREAM, team, client=True),
        Scenario("client agents", "agents", ACT, every, client=True),
        Scenario("client agents stream", "agents", STREAM, every, client=True),
        Scenario(f"unary at {rate:g}/s", "agents", ACT, one, clients, rate=rate),
        Scenario(f"stream at {rate:g}/s", "agents", STREAM, one, clients, rate=rate),
    )
    if processes:
        chosen += (
            Scenario("processes at once", "processes", ACT, every, at_once=True),
            Scenario("client processes", "processes", ACT, every, client=True),
            Scenario("client processes stream", "processes", STREAM, every, client=True),
        )
    if record:
        chosen += (
            Scenario("unary recorded", "recording", ACT, one),
            Scenario("stream recorded", "recording", STREAM, one),
            Scenario(f"unary recorded at {rate:g}/s", "recording", ACT, one, clients, rate=rate),
        )
    return chosen


def targets(clients: int, rate: float, *, record: bool = False) -> tuple[Ratio, ...]:
    """List the ratios that are reported, with their targets."""
    recorded = (
        Ratio("unary recorded", "unary", "cpu_us", at_most=1.1),
        Ratio("stream recorded", "stream", "cpu_us", at_most=1.1),
        Ratio("unary recorded", "unary", "p50_ms"),
        Ratio("unary recorded", "unary", "rss_mb"),
        Ratio(f"unary recorded at {rate:g}/s", f"unary at {rate:g}/s", "cpu_us"),
    )
    return (
        *(recorded if record else ()),
        *(
            Ratio(name, f"{echo}{kind}", measure, at_most=limit)
            for name, kind in (("unary", ""), ("infer", " infer"))
            for echo, limit in (("default echo", 1.25), ("echo", None))
            for measure in PRICES
        ),
        Ratio("unary", "plain server", "p50_ms", at_most=0.8),
        Ratio("unary", "plain server", "cpu_us", at_most=0.8),
        Ratio("stream", "unary", "p50_ms", at_most=0.6),
        Ratio("stream", "unary", "cpu_us", at_most=0.65),
        Ratio(f"stream x{clients}", f"unary x{clients}", "rate", at_least=1.7),
        Ratio("joint unary", "unary", "p50_ms", at_most=1.5),
        Ratio("joint stream", "stream", "p50_ms", at_most=1.5),
        Ratio("agents in turn", "joint unary", "p50_ms", at_least=4.0),
        Ratio("agents at once", "joint unary", "p50_ms"),
        Ratio("client agents stream", "client joint stream", "p50_ms", at_most=2.5),
        Ratio("client agents stream", "client joint stream", "client_cpu_us"),
        Ratio("stream", "echo stream", "cpu_us"),
        Ratio(f"unary x{clients}", f"echo x{clients}", "rate"),
    )


def run(
    bundle_path: str | Path,
    *,
    seconds: float = 2.0,
    rounds: int = 5,
    clients: int = 8,
    rate: float = 200.0,
    processes: bool = False,
    record: bool = False,
    config: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StepReport:
    """Serve a bundle several ways and measure each for ``seconds`` in each of ``rounds`` rounds.

    ``processes``: also one server per agent. ``record``: also a server that records its steps. ``config``: of the
    servers. ``seed``: of observations and order.

    Raises :class:`BundleError`, :class:`ConfigError` for a setting out of range, and :class:`EndpointError` if a
    server fails.
    """
    require_measurable(seconds=seconds, rounds=rounds, clients=clients, rate=rate)
    bundle = read_bundle(bundle_path)
    spec = bundle.spec
    requests = requests_of(spec, seed)
    chosen = scenarios(spec, clients, rate, processes=processes, record=record)
    load_before = os.getloadavg()[0]
    measured: list[Mapping[str, Figures]] = []
    order = list(chosen)
    draw = random.Random(seed)
    ready: list[float] = []
    for done in range(rounds):
        draw.shuffle(order)
        figures: dict[str, Figures] = {}
        with ExitStack() as stack:
            agents = start_models(stack, bundle.path, [spec.names], config)
            servers: dict[Where, Servers] = {
                "agents": agents,
                "team": start_models(stack, bundle.path, [[TEAM]], config),
                "echo": start_echo(stack, agents, spec.names[0], requests),
                "default echo": start_echo(stack, agents, spec.names[0], requests, defaults=True),
                "plain": start_plain(stack, bundle, spec.names[0]),
            }
            if processes:
                alone = [[name] for name in spec.names]
                servers["processes"] = start_models(stack, bundle.path, alone, config)
            if record:
                folder = Path(stack.enter_context(TemporaryDirectory()))
                servers["recording"] = start_models(stack, bundle.path, [spec.names], config, record=folder)
            for index, scenario in enumerate(order):
                progress(done * len(order) + index, rounds * len(order))
                load = _load(scenario, servers[scenario.where], requests, spec)
                figures[scenario.name] = _measure(scenario, servers[scenario.where], load, seconds)
        measured.append(figures)
        ready.append(agents.ready_s)
    load_average = (load_before, os.getloadavg()[0])
    ratios = targets(clients, rate, record=record)
    return StepReport(chosen, ratios, tuple(measured), load_average, statistics.median(ready))


def require_measurable(**settings: float) -> None:
    """Check that all settings are above 0, and that this is Linux. Raises :class:`ConfigError`."""
    for name, value in settings.items():
        if not 0 < value < 1e6:
            raise ConfigError(f"{name}: expected a number above 0, got {value!r}")
    if sys.platform != "linux":
        raise ConfigError(
            f"expected Linux, whose processes tell their CPU time, got {sys.platform}: run it there"
        )


class _ServerLoop:
    """The loop of a scenario, closed or open, over connections that cost next to nothing."""

    def __init__(self, scenario: Scenario, servers: Servers, requests: Requests) -> None:
        self._scenario = scenario
        self._sockets = Sockets([_lines(scenario, servers, requests) for _ in range(scenario.clients)])
        self.close = self._sockets.close

    def warm_up(self, seconds: float) -> Timings:
        lines = len(self._scenario.models)
        clients, at_once = self._scenario.clients, self._scenario.at_once
        return closed_loop(self._sockets, clients, seconds, lines=lines, at_once=at_once)

    def run(self, seconds: float) -> Timings:
        if self._scenario.rate is None:
            return self.warm_up(seconds)
        return open_loop(self._sockets, self._scenario.clients, self._scenario.rate, seconds)


def _load(
    scenario: Scenario, servers: Servers, requests: Requests, spec: TeamSpec
) -> _ServerLoop | ClientLoop:
    if scenario.client:
        return ClientLoop(servers, spec, scenario.path == STREAM)
    return _ServerLoop(scenario, servers, requests)


def _measure(scenario: Scenario, servers: Servers, load: _ServerLoop | ClientLoop, seconds: float) -> Figures:
    with closing(load):
        load.warm_up(min(WARM_UP_S, seconds))
        cpu_s, client_s = servers.cpu_s(), time.process_time()
        timings = load.run(seconds)
        cpu_s, client_s = servers.cpu_s() - cpu_s, time.process_time() - client_s
    steps = timings.latency.seconds.size
    if not steps:
        raise EndpointError(
            f"{scenario.name}: all of {timings.refused} requests were refused: ask for a lower rate"
        )
    return Figures(
        p50_ms=timings.latency.percentile(50),
        p95_ms=timings.latency.percentile(95),
        p99_ms=timings.latency.percentile(99),
        rate=timings.rate,
        cpu_us=1e6 * cpu_s / steps,
        client_cpu_us=1e6 * client_s / steps,
        rss_mb=servers.rss_mb(),
        refused=timings.refused,
    )


def _lines(scenario: Scenario, servers: Servers, requests: Requests) -> list[Line]:
    """Return the lines of one client, with a connection per server."""
    connections: dict[str, Connection] = {}
    lines = []
    for model in scenario.models:
        endpoint = servers.endpoints[model]
        if endpoint not in connections:
            connections[endpoint] = Connection(endpoint, scenario.path, stream=scenario.path == STREAM)
        lines.append(Line(connections[endpoint], cycle(requests[scenario.path, model])))
    return lines
