"""Metrics scraped from a real server after known requests."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.guard import DataReference, Guard, GuardSetting
from omcda_deploy.local import LocalTeam
from omcda_deploy.protos import policy_pb2
from omcda_deploy.serve.config import Limits
from omcda_deploy.serve.handlers import CallTracker, service_handlers
from omcda_deploy.serve.logs import JsonFormatter
from omcda_deploy.serve.meter import (
    BLOCK,
    LEAST_THRESHOLD,
    RATE_S,
    RATIO_BOUNDS,
    RATIO_LIMIT,
    Histogram,
    ModelMeter,
    Sample,
)
from omcda_deploy.serve.metrics import CONNECTIONS
from tests.support.bundles import continuous_spec
from tests.support.server_process import free_port, server_process

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]  # values by name and labels


def scrape(port: int) -> Samples:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_scrape_adds_up(continuous_bundle: Bundle, tmp_path: Path) -> None:
    bundle, port = continuous_bundle, free_port()
    config = tmp_path / "serve.toml"
    config.write_text('[guard.agents.agent_1]\nmode = "fallback"\nthreshold = 0.05\n')
    options = ("--config", str(config), "--metrics-port", str(port))
    generator = np.random.default_rng(2)
    steps = [
        {
            a.name: generator.normal(size=(4, a.observation_size)).astype(np.float32)
            for a in bundle.spec.agents
        }
        for _ in range(5)
    ]
    local = LocalTeam(bundle)
    with server_process(bundle, "agent_1", TEAM, options=options) as server:
        with RemoteTeam({TEAM: server.endpoint}, stream=True) as team:
            for step in steps:
                team.act(step)
            assert value(scrape(port), "omcda_control_streams") == 1.0
        with RemotePolicy(server.endpoint, "agent_1") as policy:
            policy.act(steps[0]["agent_1"])
        with grpc.insecure_channel(server.endpoint) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/omcda.v1.PolicyService/Act")(b"\xff", timeout=5)  # type: ignore[arg-type]
        samples = scrape(port)
    act = {"grpc_service": "omcda.v1.PolicyService", "grpc_method": "Act", "grpc_type": "unary"}
    stream = {**act, "grpc_method": "ActStream", "grpc_type": "bidi_stream"}
    assert value(samples, "grpc_server_started_total", **act) == 2.0
    assert value(samples, "grpc_server_handled_total", **act, grpc_code="OK") == 1.0
    assert value(samples, "grpc_server_handled_total", **act, grpc_code="INVALID_ARGUMENT") == 1.0
    assert value(samples, "grpc_server_handling_seconds_count", **stream) == 5.0
    assert 0.0 < value(samples, "grpc_server_handling_seconds_sum", **stream) < 5.0
    assert value(samples, "omcda_control_streams") == 0.0
    assert value(samples, "omcda_answers_total", model=TEAM, version="1") == 5.0
    assert value(samples, "omcda_rows_total", model=TEAM, version="1") == 20.0
    agent = {"model": TEAM, "agent": "agent_1", "version": "1"}
    divergence = np.concatenate([local.act(step)["agent_1"].divergence for step in steps])
    above = int((divergence > 0.05).sum())
    assert 0 < above < 20
    assert value(samples, "omcda_guard_exceeded_rows_total", **agent) == above
    assert value(samples, "omcda_guard_replaced_rows_total", **agent, mode="fallback") == above
    assert value(samples, "omcda_divergence_nats_total", **agent) == pytest.approx(divergence.sum(), rel=1e-4)
    assert value(samples, "omcda_guard_threshold_nats", **agent) == 0.05
    assert value(samples, "omcda_divergence_budget_nats", **agent) == pytest.approx(0.2)
    largest = divergence.reshape(5, 4).max(axis=1) / 0.05
    for bound in ("0.5", "1.0", "2.0"):
        counted = value(samples, "omcda_divergence_ratio_bucket", **agent, le=bound)
        assert counted == (largest <= float(bound)).sum()
    assert value(samples, "omcda_version_info", version="1", current="yes", shadow="no") == 1.0
    assert value(samples, "omcda_version_load_seconds_count") == 0.0  # none beside the one it began with
    assert value(samples, "omcda_shadow_answers_total", model=TEAM, version="1") == 0.0
    alone = {"model": "agent_1", "version": "1"}
    assert value(samples, "omcda_answers_total", **alone) == 1.0


def test_half_open_requests_take_no_threads_and_no_scrape(continuous_bundle: Bundle) -> None:
    port = free_port()
    with (
        server_process(continuous_bundle, "agent_0", options=("--metrics-port", str(port))) as server,
        ExitStack() as stack,
    ):
        threads = Path(f"/proc/{server.process.pid}/task")
        idle = len(list(threads.iterdir()))
        for _ in range(100):
            half_open = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            half_open.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert scrape(port)
        end = time.monotonic() + 3.0  # far less than the half-open requests are waited for
        while len(list(threads.iterdir())) > idle + CONNECTIONS + 1:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_histograms_are_cumulative_with_closed_upper_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(number)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 14.0


def test_recent_calls_give_a_rate_and_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = ModelMeter(Guard(spec := continuous_spec(agents=1), spec.agents, "kl", {}, {}))
    assert meter.recent() is None
    now = 1000.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    calls = [(now - 2 * RATE_S, 0.5)] * 10  # too long ago for the rate
    calls += [(now - index * 0.1, 0.001 * (index + 1)) for index in range(120)]
    observation, one, zero = np.ones((1, 4), np.float32), np.ones((1, 1), np.float32), bytes(4)
    for when, seconds in calls:
        meter.add(Sample(1, observation, zero, one, when, seconds))
    monkeypatch.setattr("time.perf_counter", lambda: now)
    recent = meter.recent()
    assert recent is not None
    assert recent.per_second == pytest.approx(2.0)
    assert recent.p50_ms == pytest.approx(65.5, abs=1.0)


@pytest.mark.parametrize("known", [True, False])
def test_answers_counted_in_blocks_add_up_to_those_of_each_alone(known: bool) -> None:
    """Steps and batches in any order, more than a block of them, against sums over a plain list."""
    spec, generator = continuous_spec(), np.random.default_rng(4)
    width, k = sum(agent.observation_size for agent in spec.agents), len(spec.agents)
    references = {
        agent.name: DataReference(0.5, 2.0, [0.5] * agent.observation_size, [1.5] * agent.observation_size)
        for agent in spec.agents
    }
    settings = {"agent_0": GuardSetting("fallback", 0.3), "agent_2": GuardSetting("observe", 0.0)}
    settings |= {"agent_1": GuardSetting("observe", 0.6)}
    guard = Guard(spec, spec.agents, "kl", settings, references if known else {})
    meter = ModelMeter(guard)
    ratios, distances = ([Histogram(RATIO_BOUNDS) for _ in range(k)] for _ in range(2))
    divergences, weights = [], []
    for rows in generator.choice([1, 1, 1, 2, 7], size=2 * BLOCK // width):
        observation = generator.normal(size=(rows, width)).astype(np.float32)
        divergence = generator.exponential(0.4, size=(rows, k)).astype(np.float32)
        weight = generator.choice([0.0, 0.5, 1.0], size=(rows, k)).astype(np.float32)
        arrays: Any = (observation, divergence, weight)
        if rows == 1:
            arrays = [array.tobytes() for array in arrays]
        meter.add(Sample(int(rows), arrays[0], arrays[1], arrays[2], time.perf_counter(), 0.001))
        divergences.append(divergence.astype(np.float64))
        weights.append(weight)
        distance = guard.distance(observation)
        for index, threshold in enumerate((0.3, 0.6, LEAST_THRESHOLD)):
            ratios[index].add(min(float(divergences[-1][:, index].max()) / threshold, RATIO_LIMIT))
            if distance is not None:
                distances[index].add(float(distance[:, index].max()))
    with ThreadPoolExecutor(1) as other:  # as a scrape's
        totals = other.submit(meter.totals).result()
    divergence, weight = np.concatenate(divergences), np.concatenate(weights)
    assert (totals.answers, totals.rows) == (len(divergences), len(divergence))
    np.testing.assert_allclose(totals.divergence, divergence.sum(axis=0))
    np.testing.assert_array_equal(totals.exceeded, (divergence > [0.3, 0.6, 0.0]).sum(axis=0))
    np.testing.assert_array_equal(totals.replaced, (weight < 1.0).sum(axis=0))
    for counted, expected in zip([*totals.ratios, *totals.distances], [*ratios, *distances], strict=True):
        assert counted.counts == expected.counts
        assert counted.sum == pytest.approx(expected.sum)
    assert (sum(totals.distances[0].counts) > 0) == known
    assert (recent := meter.recent()) is not None
    assert recent.p50_ms == pytest.approx(1.0)


def test_answers_that_come_too_late_are_counted() -> None:
    tracker = CallTracker(Limits())
    service = service_handlers("a.B", tracker, {"C": (policy_pb2.ActRequest, lambda request: b"")})
    assert isinstance(service, grpc.ServiceRpcHandler)
    details = cast("grpc.HandlerCallDetails", SimpleNamespace(method="/a.B/C"))
    for left_s in (None, 0.5, -0.001):
        handler: Any = service.service(details)

        async def read() -> bytes:
            return b""

        context = SimpleNamespace(read=read, time_remaining=lambda left_s=left_s: left_s)
        assert asyncio.run(handler.stream_unary(None, context)) == b""
    service.service(details)  # one that was given up before it was handled
    (meter,) = tracker.meters
    assert (meter.started, meter.handled["OK"], meter.late) == (4, 3, 1)
    assert service.service(cast("grpc.HandlerCallDetails", SimpleNamespace(method="/a.B/D"))) is None


def test_log_lines_are_json_with_their_fields() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("serve", logging.ERROR, "", 0, "agent %s", ("agent_1",), sys.exc_info())
    record.fields = {"version": "3"}
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["level"], line["version"]) == ("agent agent_1", "ERROR", "3")
    assert "ValueError: broken" in line["error"]
    assert line["time"].endswith("+00:00")
