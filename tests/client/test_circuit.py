"""Circuit breakers: a hung server costs a loop a few deadlines, and is taken back when it answers in time."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.circuit import LONG_MISS_S, MISSES, Circuit
from omcda_deploy.client.connection import episode_limit_s
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import MissedAnswerError
from omcda_deploy.local import LocalPolicy, LocalTeam
from omcda_deploy.policy import Decision
from tests.client.test_client import assert_same, observations
from tests.client.test_fallback import SlowService, slow_server
from tests.serve.test_supervisor import agent_process, supervised, wait_for
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.server_process import server_process

DEADLINE_S = 0.2


class Hang:
    """Holds up a model's steps, and contracts, from :meth:`begin` until :meth:`end`."""

    def __init__(self, service: SlowService, model: str) -> None:
        self._going = threading.Event()
        self._going.set()
        service.hold_up = lambda asked: asked in ("", model) and self._going.wait(20)

    def begin(self) -> None:
        self._going.clear()

    def end(self) -> None:
        self._going.set()


@contextmanager
def hanging(bundle: Bundle, model: str) -> Iterator[tuple[dict[str, str], Hang]]:
    """Yield the addresses of two servers, of which that of ``model`` can hang."""
    others = [name for name in bundle.spec.names if name != model]
    with slow_server(bundle, model) as (hung, service, _), slow_server(bundle, *others) as (endpoint, _, _):
        hang = Hang(service, model)
        try:
            yield {model: hung} | dict.fromkeys(others, endpoint), hang
        finally:
            hang.end()


def timed(act: Callable[[], Mapping[str, Decision]]) -> tuple[float, Mapping[str, Decision]]:
    began = time.perf_counter()
    decisions = act()
    return time.perf_counter() - began, decisions


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_waits_for_a_hung_server_a_few_times_only(continuous_bundle: Bundle, stream: bool) -> None:
    spec, local = continuous_bundle.spec, LocalTeam(continuous_bundle)
    with (
        hanging(continuous_bundle, "agent_1") as (endpoints, hang),
        RemoteTeam(endpoints, stream=stream, deadline_s=DEADLINE_S, fallback="hold") as team,
    ):
        last = team.act(observations(spec, 2))["agent_1"]
        hang.begin()
        for step in range(12):
            batch = observations(spec, 2, seed=step)
            seconds, decisions = timed(lambda batch=batch: team.act(batch))  # type: ignore[misc]
            waited = step < MISSES
            assert (seconds >= DEADLINE_S) == waited
            assert seconds < DEADLINE_S + 1.0
            held = decisions["agent_1"]
            assert (held.fallback, held.awaited) == (True, waited)
            assert held.action.tobytes() == last.action.tobytes()
            for name in ("agent_0", "agent_2"):
                assert decisions[name].awaited
                assert not decisions[name].fallback
            time.sleep(0.03)
        assert team.missed == {"agent_0": 0, "agent_1": 12, "agent_2": 0}
        assert team.not_awaited == {"agent_0": 0, "agent_1": 12 - MISSES, "agent_2": 0}
        assert "agent_1" not in team.latencies
        hang.end()
        end = time.monotonic() + 5.0
        while (decisions := team.act(batch))["agent_1"].fallback:
            assert time.monotonic() < end, "an agent that answers again is not asked again"
            time.sleep(0.02)
        for step in range(3):  # answers belong to the step that asked, not to one in the background
            batch = observations(spec, 2, seed=100 + step)
            assert_same(team.act(batch), local.act(batch))
        missed = dict(team.missed)
        hang.begin()
        assert team.act(batch)["agent_1"].awaited  # all is forgiven
        assert team.missed["agent_1"] == missed["agent_1"] + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_new_episode_does_not_wait_for_a_hung_server(continuous_bundle: Bundle, stream: bool) -> None:
    """The hung one is the first, which is otherwise asked for the current version."""
    spec = continuous_bundle.spec
    local = LocalTeam(continuous_bundle)
    with (
        hanging(continuous_bundle, "agent_0") as (endpoints, hang),
        RemoteTeam(endpoints, stream=stream, deadline_s=DEADLINE_S, fallback=local) as team,
    ):
        batch = observations(spec, 2)
        team.act(batch)
        hang.begin()
        for _ in range(MISSES):
            team.act(batch)
        seconds, _ = timed(lambda: (team.reset(), {})[1])  # type: ignore[func-returns-value]
        assert seconds < 0.5
        decisions = team.act(batch)
        assert not decisions["agent_0"].awaited
        hang.end()
        end = time.monotonic() + 5.0
        while team.act(batch)["agent_0"].fallback:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_hung_server_between_episodes_is_noticed_once(
    continuous_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omcda_deploy.client.connection.CONNECT_LIMIT_S", 0.3)
    monkeypatch.setattr("omcda_deploy.client.circuit.LONG_MISS_S", 0.3)
    with (
        hanging(continuous_bundle, "agent_0") as (endpoints, hang),
        RemoteTeam(endpoints, deadline_s=DEADLINE_S, fallback=LocalTeam(continuous_bundle)) as team,
    ):
        hang.begin()
        for limit in (0.6, 0.2):
            seconds, _ = timed(lambda: (team.reset(), {})[1])  # type: ignore[func-returns-value]
            assert seconds < limit
        assert not team.act(observations(continuous_bundle.spec, 2))["agent_0"].awaited


@pytest.mark.parametrize("protocol", ["omcda", "oip"])
def test_servers_that_hang_between_episodes_cost_a_second_together(
    discrete_bundle: Bundle, protocol: Any
) -> None:
    """Two processes are stopped: with a fallback an episode begins after a second, however many they are."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(server_process(discrete_bundle, name)) for name in ("agent_0", "agent_1")
        ]
        team = stack.enter_context(
            RemoteTeam(
                [server.endpoint for server in servers],
                protocol=protocol,
                bundle=discrete_bundle if protocol == "oip" else None,
                deadline_s=0.05,
                fallback=LocalTeam(discrete_bundle),
            )
        )
        team.reset()
        for server in servers:
            server.process.send_signal(signal.SIGSTOP)
        try:
            seconds, _ = timed(lambda: (team.reset(), {})[1])  # type: ignore[func-returns-value]
        finally:
            for server in servers:
                server.process.send_signal(signal.SIGCONT)
        assert LONG_MISS_S <= seconds < 1.9 * LONG_MISS_S


@pytest.mark.parametrize(
    ("deadline_s", "lenient", "seconds"),
    [(0.02, True, 1.0), (3.0, True, 3.0), (60.0, True, 5.0), (0.02, False, 5.0), (60.0, False, 5.0)],
)
def test_a_new_episode_waits_no_longer_than_a_step_may(
    deadline_s: float, lenient: bool, seconds: float
) -> None:
    assert episode_limit_s(deadline_s, lenient=lenient) == seconds


@pytest.mark.parametrize("stream", [False, True])
def test_a_single_agent_and_the_joint_graph_have_circuits_too(
    continuous_bundle: Bundle, stream: bool
) -> None:
    spec = continuous_bundle.spec
    options: dict[str, Any] = {"stream": stream, "deadline_s": DEADLINE_S}
    with (
        slow_server(continuous_bundle, TEAM) as (joint, joint_service, _),
        slow_server(continuous_bundle, "agent_0") as (alone, service, _),
        RemoteTeam([joint], fallback=LocalTeam(continuous_bundle), **options) as team,
        RemotePolicy(alone, fallback=LocalPolicy(continuous_bundle, "agent_0"), **options) as policy,
    ):
        hangs = [Hang(joint_service, TEAM), Hang(service, "agent_0")]
        batch = observations(spec, 2)
        for hang in hangs:
            hang.begin()
        try:
            for step in range(MISSES + 2):
                decisions = team.act(batch) | {"alone": policy.act(batch["agent_0"])}
                assert {decision.awaited for decision in decisions.values()} == {step < MISSES}
            assert team.not_awaited == dict.fromkeys(spec.names, 2)
            assert (policy.missed, policy.not_awaited) == (MISSES + 2, 2)
        finally:
            for hang in hangs:
                hang.end()
        end = time.monotonic() + 5.0
        while team.act(batch)["agent_0"].fallback or policy.act(batch["agent_0"]).fallback:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_without_a_fallback_every_step_is_awaited(continuous_bundle: Bundle) -> None:
    with (
        hanging(continuous_bundle, "agent_1") as (endpoints, hang),
        RemoteTeam(endpoints, deadline_s=DEADLINE_S) as team,
    ):
        hang.begin()
        for _ in range(MISSES + 1):
            with pytest.raises(MissedAnswerError, match="no answer within 200 ms"):
                team.act(observations(continuous_bundle.spec, 2))
        assert team.not_awaited["agent_1"] == 0


@pytest.mark.slow  # six processes, and a figure that other load disturbs
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("deadline_s", [0.2, 1.0])
def test_one_hung_server_of_six_slows_the_loop_for_a_second(
    tmp_path: Path, stream: bool, deadline_s: float
) -> None:
    bundle = write_test_bundle(tmp_path / "bundle", continuous_spec(agents=6))
    batch = observations(bundle.spec, 1)

    def steps(seconds: float) -> list[float]:
        taken, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            taken.append(timed(lambda: team.act(batch))[0])
            time.sleep(0.02)
        return taken

    with (
        supervised(bundle.path, 6) as (process, endpoints, _),
        RemoteTeam(endpoints, stream=stream, deadline_s=deadline_s, fallback=LocalTeam(bundle)) as team,
    ):
        steps(0.5)
        usual = statistics.median(steps(1.5))
        os.kill(agent_process(process, "agent_3"), signal.SIGSTOP)
        steps(1.0)
        after = statistics.median(steps(1.5))
        assert team.not_awaited["agent_3"] > 20
        assert after < 1.5 * usual, (after, usual)
        print(f"{1000 * usual:.2f} ms, then {1000 * after:.2f} ms")
        wait_for(endpoints[3], "agent_3")  # the supervisor starts it again
        time.sleep(1.5)
        steps(0.3)
        missed = team.missed["agent_3"]
        steps(0.3)
        assert team.missed["agent_3"] == missed


def test_one_long_wait_opens_a_circuit_as_well() -> None:
    circuit = Circuit(breaks=True)
    circuit.miss(0.5)
    circuit.miss(0.5)
    assert not circuit.open
    circuit.close()
    circuit.miss(1.0)
    assert circuit.open
    circuit.close()
    assert not circuit.open
    for _ in range(MISSES):
        assert not circuit.open
        circuit.miss(0.1)
    assert circuit.open
