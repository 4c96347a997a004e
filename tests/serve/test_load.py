"""Load generation: accounting of latencies on a simulated clock, and short runs with real servers."""

from __future__ import annotations

import json
import os
import statistics
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.cli import app
from omcda_deploy.client.transport import Calls, Stream
from omcda_deploy.errors import ConfigError, EndpointError
from omcda_deploy.local import LocalPolicy
from omcda_deploy.protos.policy_pb2 import ActRequest, ActResponse
from omcda_deploy.serve.bench.clients import ClientLoop
from omcda_deploy.serve.bench.http2 import FIRST_WINDOW, FRAME_LIMIT, Connection
from omcda_deploy.serve.bench.load import Answer, closed_loop, open_loop
from omcda_deploy.serve.bench.measured_servers import ACT, STREAM, requests_of, start_models, start_plain
from omcda_deploy.serve.bench.steps import Figures, Ratio, run
from tests.support.fuzz import resident_kb
from tests.support.server_process import ServerProcess


class OneAtATime:
    """A :class:`~omcda_deploy.serve.bench.load.Wire` to a server that takes ``service_s`` per request, in turn.

    During ``stall`` (from, to) it stands still: a request begun then waits until its end.
    """

    def __init__(self, service_s: float, stall: tuple[float, float] = (0.0, 0.0)) -> None:
        self.sent: list[tuple[float, int, int]] = []  # when, by which client, to which line
        self._service_s, self._stall = service_s, stall
        self._now = 0.0
        self._free = 0.0
        self._due: deque[tuple[float, Answer]] = deque()

    def now(self) -> float:
        return self._now

    def ask(self, client: int, line: int, began: float) -> None:
        self.sent.append((self._now, client, line))
        start = max(self._now, self._free)
        if self._stall[0] <= start < self._stall[1]:
            start = self._stall[1]
        self._free = start + self._service_s
        self._due.append((self._free, Answer(client, began, True)))

    def wait(self, until: float) -> Sequence[Answer]:
        if self._due and self._due[0][0] <= until:
            self._now, answer = self._due.popleft()
            return [answer]
        self._now = max(self._now, until)
        return []


def test_an_open_loop_counts_latency_from_when_a_request_was_due() -> None:
    """10 requests/s, 10 ms each, stalled from 1.0 to 2.0 s: the requests due at 1.0, 1.1, … wait for its end."""
    wire = OneAtATime(0.01, stall=(1.0, 2.0))
    timings = open_loop(wire, clients=2, rate=10.0, seconds=3.0)
    due = np.arange(30) / 10
    expected = np.full(30, 0.01)
    late = slice(10, 22)  # those due at 2.0 and 2.1 stand behind those of the stall
    expected[late] = 2.0 + 0.01 * np.arange(1, 13) - due[late]
    np.testing.assert_allclose(timings.latency.seconds, expected, atol=1e-9)
    assert timings.latency.percentile(95) > 800, "coordinated omission"
    np.testing.assert_allclose([when for when, _, _ in wire.sent], due, atol=1e-9)
    assert [client for _, client, _ in wire.sent] == [0, 1] * 15


def test_a_closed_loop_waits_for_the_stall_once() -> None:
    timings = closed_loop(OneAtATime(0.01, stall=(1.0, 2.0)), clients=1, seconds=3.0)
    seconds = timings.latency.seconds
    assert (seconds > 0.02).sum() == 1
    assert seconds.max() == pytest.approx(1.01)
    assert timings.rate == pytest.approx(seconds.size / 3.0, rel=0.01)


def test_an_overloaded_open_loop_falls_behind_ever_further() -> None:
    timings = open_loop(OneAtATime(0.02), clients=1, rate=100.0, seconds=1.0)  # twice what the server can do
    np.testing.assert_allclose(timings.latency.seconds, 0.02 + 0.01 * np.arange(100), atol=1e-9)
    assert timings.rate == pytest.approx(50.0)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_step_of_several_lines_ends_with_the_last_answer(at_once: bool) -> None:
    wire = OneAtATime(0.01)
    timings = closed_loop(wire, clients=1, seconds=0.295, lines=6, at_once=at_once)
    np.testing.assert_allclose(timings.latency.seconds, [0.06] * 5, atol=1e-9)
    assert [line for _, _, line in wire.sent] == list(range(6)) * 5
    between = 0.0 if at_once else 0.01
    np.testing.assert_allclose([when for when, _, _ in wire.sent[:6]], between * np.arange(6), atol=1e-9)


def test_clients_of_a_closed_loop_take_turns() -> None:
    timings = closed_loop(OneAtATime(0.01), clients=4, seconds=1.0)
    np.testing.assert_allclose(timings.latency.seconds[4:], 0.04, atol=1e-9)
    assert timings.rate == pytest.approx(100.0, rel=0.01)


def test_ratios_are_medians_of_ratios_within_rounds() -> None:
    def figures(p50: float) -> Figures:
        return Figures(p50, 0, 0, 0, 0, 0, 0, 0)

    rounds = [{"a": figures(a), "b": figures(b)} for a, b in ((1.0, 1.0), (30.0, 10.0), (4.0, 2.0))]
    ratio = Ratio("a", "b", "p50_ms", at_most=2.0)
    assert ratio.of(rounds) == 2.0  # the ratio of the medians is 2 as well, that of the means 2.7
    assert (ratio.holds(2.0), ratio.holds(2.1)) == (True, False)
    least = Ratio("a", "b", "p50_ms", at_least=2.0)
    assert (least.holds(2.0), least.holds(1.9), Ratio("a", "b", "rate").holds(1.0)) == (True, False, None)


AT_ONCE = 32  # below the server's limit


# Real servers ----------------------------------------------------------------------------------------------


def took(connection: Connection, count: int) -> list[tuple[float, bool]]:
    answers: list[tuple[float, bool]] = []
    while len(answers) < count:
        answers += connection.answers()
    return answers


@pytest.mark.parametrize("path", [ACT, STREAM])
def test_the_light_client_is_answered_many_times_over(continuous_server: ServerProcess, path: str) -> None:
    rows = 700
    large = ActRequest(model="agent_1", batch=rows, observation=bytes(20 * rows)).SerializeToString()
    with closing(Connection(continuous_server.endpoint, path, stream=path == STREAM)) as connection:
        answers: list[tuple[float, bool]] = []
        for wave in range(3):
            for index in range(AT_ONCE):
                connection.ask(large, float(AT_ONCE * wave + index))
            answers += took(connection, AT_ONCE)
    assert AT_ONCE * len(large) > 4 * FIRST_WINDOW, "more than may be under way"
    assert sorted(answers) == [(float(began), True) for began in range(3 * AT_ONCE)]
    if path == STREAM:
        assert answers == sorted(answers), "out of order"


def test_requests_are_what_the_server_takes(
    continuous_bundle: Bundle, continuous_server: ServerProcess
) -> None:
    requests = requests_of(continuous_bundle.spec, 0)
    assert {model for _, model in requests} == {*continuous_bundle.spec.names, TEAM}
    with grpc.insecure_channel(continuous_server.endpoint) as channel:
        act = channel.unary_unary(ACT, request_serializer=bytes, response_deserializer=bytes)
        assert len(act(requests[ACT, "agent_2"][0])) > 100
    assert len(set(requests[ACT, "agent_2"])) == len(requests[ACT, "agent_2"])


def test_refusals_are_told_from_answers(continuous_server: ServerProcess) -> None:
    unknown = ActRequest(model="nobody", batch=1).SerializeToString()
    connection = Connection(continuous_server.endpoint, ACT)
    connection.ask(unknown, 1.0)
    assert took(connection, 1) == [(1.0, False)]
    connection.close()
    stream = Connection(continuous_server.endpoint, STREAM, stream=True)
    stream.ask(unknown, 1.0)
    with pytest.raises(EndpointError, match="ended the stream"):
        took(stream, 1)
    stream.close()


def test_what_cannot_be_sent_or_reached_is_said(continuous_server: ServerProcess) -> None:
    connection = Connection(continuous_server.endpoint, ACT)
    with pytest.raises(EndpointError, match=f"less than {FRAME_LIMIT}"):
        connection.ask(bytes(FRAME_LIMIT), 0.0)
    connection.close()
    with pytest.raises(EndpointError, match=r"cannot connect to 127\.0\.0\.1:1 "):
        Connection("127.0.0.1:1", ACT)
    with pytest.raises(ConfigError, match="seconds: expected a number above 0, got 0"):
        run("nowhere", seconds=0)


def test_bench_serve_measures_and_writes_its_arithmetic(continuous_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ["--seconds", "0.02", "--rounds", "2", "--clients", "3", "--rate", "100"]
    done = CliRunner().invoke(
        app, ["bench", "serve", str(continuous_bundle.path), "--json", str(file), *options]
    )
    assert done.exit_code == 0, done.output
    assert "load average" in done.output
    written = json.loads(file.read_text())
    by_name = {scenario["name"]: scenario for scenario in written["scenarios"]}
    names = {"unary", "stream x3", "joint stream", "agents in turn", "unary at 100/s", "plain server"}
    assert names | {"default echo", "client agents stream", "client joint"} <= set(by_name)
    for scenario in by_name.values():
        for figures in scenario["rounds"]:
            assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
            assert figures["refused"] == 0
            assert figures["cpu_us"] > 20
    for ratio in written["ratios"]:
        pairs = zip(by_name[ratio["scenario"]]["rounds"], by_name[ratio["base"]]["rounds"], strict=True)
        assert ratio["median"] == pytest.approx(
            statistics.median(own[ratio["measure"]] / base[ratio["measure"]] for own, base in pairs)
        )
    rss = {name: scenario["median"]["rss_mb"] for name, scenario in by_name.items()}
    assert rss["unary"] > 1.3 * rss["echo"] > 13, "the figures are of the servers that they name"


def test_servers_are_measured_together(continuous_bundle: Bundle) -> None:
    message = requests_of(continuous_bundle.spec, 0)[ACT, "agent_0"][0]
    with ExitStack() as stack:
        servers = start_models(stack, continuous_bundle.path, [["agent_0"], ["agent_1", "agent_2"]], None)
        assert len(set(servers.endpoints.values())) == len(servers.processes) == 2
        assert servers.endpoints["agent_1"] == servers.endpoints["agent_2"]
        connection = stack.enter_context(closing(Connection(servers.endpoints["agent_0"], ACT)))
        for _ in range(100):
            connection.ask(message, 0.0)
            took(connection, 1)
        ticks = [
            Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split() for p in servers.processes
        ]
        seconds = sum(int(fields[11]) + int(fields[12]) for fields in ticks) / os.sysconf("SC_CLK_TCK")
        assert servers.cpu_s() == pytest.approx(seconds, abs=0.1)
        kb = sum(resident_kb(process.pid) for process in servers.processes)
        assert servers.rss_mb() == pytest.approx(1.024e-3 * kb, rel=0.05)
    assert [process.poll() for process in servers.processes] == [0, 0]


def test_reloads_refuse_nobody_and_are_reported(
    discrete_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short run of the whole benchmark, one server process per agent."""
    monkeypatch.setattr("omcda_deploy.serve.bench.reload.COMPARISONS", 1)
    monkeypatch.setattr("omcda_deploy.serve.bench.reload.COMPARISON_S", 0.05)
    file = tmp_path / "report.json"
    options = ("--seconds", "0.5", "--rounds", "1", "--reloads", "2", "--processes", "--json", str(file))
    result = CliRunner().invoke(app, ["bench", "reload", str(discrete_bundle.path), *options])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    (measured,) = report["rounds"]
    assert measured["quiet"]["reloads"] == 0
    assert measured["reloading"]["reloads"] >= 1
    assert measured["quiet"]["requests"] == measured["reloading"]["requests"] == 100
    assert measured["quiet"]["refused"] == measured["reloading"]["refused"] == 0
    assert report["reloads"] == 2
    assert report["after"]["rss_mb"] > 10.0
    assert "p99 while reloading / quiet" in result.output


def test_the_clients_loop_asks_as_the_scenario_says(continuous_bundle: Bundle) -> None:
    spec = continuous_bundle.spec
    with ExitStack() as stack:
        servers = start_models(stack, continuous_bundle.path, [spec.names[:1], spec.names[1:]], None)
        for stream, transport in ((False, Calls), (True, Stream)):
            with closing(ClientLoop(servers, spec, stream)) as loop:
                assert loop.run(0.05).latency.seconds.size > 0
                assert {type(served._transport) for served in loop._team._served} == {transport}
                assert [served.models for served in loop._team._served] == [spec.names[:1], spec.names[1:]]


def test_the_plain_server_answers_as_the_policy_does(continuous_bundle: Bundle) -> None:
    spec = continuous_bundle.spec
    request = requests_of(spec, 0)[ACT, spec.names[0]][0]
    observation = np.frombuffer(ActRequest.FromString(request).observation, np.float32)
    with ExitStack() as stack:
        servers = start_plain(stack, continuous_bundle, spec.names[0])
        with grpc.insecure_channel(servers.endpoints[spec.names[0]]) as channel:
            untyped: Any = channel
            answer = ActResponse.FromString(untyped.unary_unary(ACT)(request, timeout=5))
    expected = LocalPolicy(continuous_bundle, spec.names[0]).act(observation)
    assert answer.action == expected.action.tobytes()
    assert answer.divergence == expected.divergence.tobytes()
