"""Prometheus metrics of a server, computed from its meters at each scrape.

Metrics of RPCs have the names of go-grpc-prometheus, the others begin with ``omcda_``. Labels are ``model`` (an
agent, or ``team``), ``agent`` and ``version`` where they apply.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from omcda_deploy.errors import EndpointError
from omcda_deploy.serve.handlers import CallTracker
from omcda_deploy.serve.places import REFUSALS
from omcda_deploy.serve.recording import FlightRecorder
from omcda_deploy.serve.releases import Releases

log = logging.getLogger(__name__)

CONNECTIONS = 16  # of scrapers
REQUEST_LIMIT_S = 5.0  # for each read of a request
_RPC = ("grpc_type", "grpc_service", "grpc_method")
_AGENT = ("model", "agent", "version")
_VERSION = ("version", "current", "shadow")


class ServerCollector:
    """Collects the RPCs of ``tracker``, the models that are held at the moment of a scrape, and recorded rows."""

    def __init__(self, tracker: CallTracker, releases: Releases, recorder: FlightRecorder) -> None:
        self._tracker, self._releases, self._recorder = tracker, releases, recorder

    def collect(self) -> Iterator[Metric]:
        yield from self._rpcs()
        yield from self._versions()
        yield from self._models()
        yield from self._recording()

    def _recording(self) -> Iterator[Metric]:
        on = GaugeMetricFamily("omcda_recording", "1 while answered steps are recorded.")
        on.add_metric([], bool(self._recorder.folder))
        tally = self._recorder.tally
        recorded = CounterMetricFamily("omcda_recorded_rows", "Rows of answered steps that are in files.")
        recorded.add_metric([], tally.recorded)
        lost = CounterMetricFamily(
            "omcda_recording_lost_rows", "Rows that could not be recorded, by reason.", labels=("reason",)
        )
        for reason, count in sorted(tally.lost.items()):
            lost.add_metric([reason], count)
        yield from (on, recorded, lost)

    def _rpcs(self) -> Iterator[Metric]:
        started = CounterMetricFamily("grpc_server_started", "RPCs started on the server.", labels=_RPC)
        handled = CounterMetricFamily(
            "grpc_server_handled", "RPCs completed on the server, by status.", labels=(*_RPC, "grpc_code")
        )
        seconds = HistogramMetricFamily(
            "grpc_server_handling_seconds",
            "From having a request, or a message of a stream, to having its response.",
            labels=_RPC,
        )
        late = CounterMetricFamily(
            "omcda_late_answers", "Answers that were ready only after their deadline.", labels=_RPC
        )
        for meter in self._tracker.meters:
            labels = [meter.kind, meter.service, meter.method]
            started.add_metric(labels, meter.started)
            late.add_metric(labels, meter.late)
            for code, count in sorted(meter.handled.items()):
                handled.add_metric([*labels, code], count)
            seconds.add_metric(labels, meter.seconds.cumulative(), meter.seconds.sum)
        streams = GaugeMetricFamily("omcda_control_streams", "Open control streams.")
        streams.add_metric([], len(self._tracker.streams))
        denied = CounterMetricFamily(
            "omcda_denied_calls", "Calls without a valid token, which no method saw."
        )
        denied.add_metric([], self._tracker.denied)
        refused = CounterMetricFamily(
            "omcda_refused_calls", "Calls refused or ended for lack of places, by reason.", labels=("reason",)
        )
        for reason in REFUSALS:
            refused.add_metric([reason], self._tracker.refused[reason])
        yield from (started, handled, seconds, late, streams, denied, refused)

    def _versions(self) -> Iterator[Metric]:
        releases = self._releases
        held = GaugeMetricFamily(
            "omcda_version_info",
            "1 for every version held; current and shadow are yes or no.",
            labels=_VERSION,
        )
        for models, _ in list(releases.held_versions()):
            parts = (models.version == releases.current, models.version == releases.shadow)
            held.add_metric([models.version, *("yes" if part else "no" for part in parts)], 1.0)
        loading = HistogramMetricFamily(
            "omcda_version_load_seconds", "From disk to warm, per version loaded."
        )
        loading.add_metric([], releases.loading.cumulative(), releases.loading.sum)
        yield from (held, loading)

    def _models(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("omcda_answers", "Answered requests.", labels=("model", "version"))
        rows = CounterMetricFamily("omcda_rows", "Rows of answered requests.", labels=("model", "version"))
        divergence = CounterMetricFamily(
            "omcda_divergence_nats", "Sum of the divergence over rows.", labels=_AGENT
        )
        budget = GaugeMetricFamily("omcda_divergence_budget_nats", "d_i, a mean over rows.", labels=_AGENT)
        threshold = GaugeMetricFamily("omcda_guard_threshold_nats", "The guard's, per row.", labels=_AGENT)
        exceeded = CounterMetricFamily(
            "omcda_guard_exceeded_rows", "Rows with a divergence above the threshold.", labels=_AGENT
        )
        replaced = CounterMetricFamily(
            "omcda_guard_replaced_rows", "Rows whose action the guard replaced.", labels=(*_AGENT, "mode")
        )
        ratio = HistogramMetricFamily(
            "omcda_divergence_ratio", "Largest divergence of an answer by the threshold.", labels=_AGENT
        )
        distance = HistogramMetricFamily(
            "omcda_observation_distance",
            "Largest distance of an answer's observations from the training data.",
            labels=_AGENT,
        )
        compared = CounterMetricFamily(
            "omcda_shadow_answers", "Answers compared with the shadow's.", labels=("model", "version")
        )
        difference = CounterMetricFamily(
            "omcda_shadow_difference",
            "Sum over them: mean absolute difference, or share of different choices.",
            labels=("model", "version"),
        )
        failures = CounterMetricFamily(
            "omcda_shadow_failures", "Answers that the shadow could not give.", labels=("model", "version")
        )
        for models, _ in list(self._releases.held_versions()):
            for session in list(models.sessions.values()):
                meter, version, guard = session.meter, session.version, session.guard
                totals = meter.totals()
                answers.add_metric([session.name, version], totals.answers)
                rows.add_metric([session.name, version], totals.rows)
                compared.add_metric([session.name, version], meter.compared)
                difference.add_metric([session.name, version], meter.difference)
                failures.add_metric([session.name, version], meter.shadow_failures)
                for index, agent in enumerate(agent.name for agent in guard.agents):
                    labels = [session.name, agent, version]
                    divergence.add_metric(labels, totals.divergence[index])
                    if (agent_budget := models.bundle.budgets[agent]) is not None:
                        budget.add_metric(labels, agent_budget)
                    threshold.add_metric(labels, float(guard.thresholds[index]))
                    exceeded.add_metric(labels, totals.exceeded[index])
                    replaced.add_metric([*labels, guard.settings[index].mode], totals.replaced[index])
                    for family, histograms in ((ratio, totals.ratios), (distance, totals.distances)):
                        family.add_metric(labels, histograms[index].cumulative(), histograms[index].sum)
        yield from (answers, rows, divergence, budget, threshold, exceeded, replaced, ratio, distance)
        yield from (compared, difference, failures)


class _MetricsServer(ThreadingHTTPServer):
    """Answers scrapes, each in a thread; when too many connections are open, the oldest one is closed."""

    daemon_threads = True
    request_queue_size = 128  # more than can come before the oldest are closed

    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        family, _, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self._connections: list[socket.socket] = []  # from the oldest
        self._changing = threading.Lock()
        super().__init__(place[:2], handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind, for IPv4 too if the address is that of all IPv6; without looking up the host's name."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changing:
            self._connections.append(request)
            oldest = self._connections.pop(0) if len(self._connections) > CONNECTIONS else None
        if oldest is not None:
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread sees the end, and closes it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._changing, suppress(ValueError):
            self._connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that vanish; a defect of the metrics goes to the log."""
        if not isinstance(error := sys.exc_info()[1], OSError):
            log.error("metrics cannot be told", exc_info=error)


def serve_metrics(collector: ServerCollector, host: str, port: int) -> Callable[[], None]:
    """Answer ``GET /metrics`` from a new thread; returns a function that stops it.

    Raises :class:`EndpointError` if the address cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    handler: Any = MetricsHandler.factory(registry)
    handler.timeout = REQUEST_LIMIT_S
    try:
        server = _MetricsServer((host, port), handler)
    except OSError as error:
        raise EndpointError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}. Choose another port or stop what uses it"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
