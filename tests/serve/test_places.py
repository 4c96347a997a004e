"""Places of calls, streams and watchers: who gives way, and honest control loops beside hostile clients."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.remote import RemotePolicy
from omcda_deploy.errors import OmcdaError
from omcda_deploy.protos.policy_pb2 import ActRequest
from omcda_deploy.serve.config import Limits
from omcda_deploy.serve.places import (
    ANSWERING,
    FIRST_MESSAGE,
    NEXT_MESSAGE,
    REFUSALS,
    SENDING,
    WATCHING,
    Place,
    Places,
    State,
)
from omcda_deploy.serve.status import ExhaustedError, StoppingError
from tests.serve.test_metrics import scrape, value
from tests.support.hostile import ACT, BEGUN, CHECK, KINDS, HostileConnection, Kind
from tests.support.server_process import ROOT, free_port, server_process

LIVE = "/inference.GRPCInferenceService/ServerLive"
LIMIT = 4
RATE = 100.0  # of an honest control loop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the one entry of a list."""
    now = [1000.0]
    monkeypatch.setattr("omcda_deploy.serve.places.time.monotonic", lambda: now[0])
    return now


class Hall:
    """Places with calls of some connections, each a task that waits as a handler does."""

    def __init__(self, per_connection: int | None = None) -> None:
        self.refused: Counter[str] = Counter()
        self.places = Places("calls", LIMIT, "limits.calls", self.refused, per_connection)
        self._tasks: set[asyncio.Task[None]] = set()

    async def enter(self, peer: str, state: State = FIRST_MESSAGE) -> Place:
        """Let a call of ``peer`` take a place, and wait in ``state``."""
        taken: asyncio.Future[Place] = asyncio.get_running_loop().create_future()

        async def handle() -> None:
            context: Any = SimpleNamespace(peer=lambda: peer)
            try:
                place = self.places.take(context)
            except OmcdaError as error:
                taken.set_exception(error)
                return
            place.enter(state)
            taken.set_result(place)
            await asyncio.Event().wait()

        self._tasks.add(asyncio.create_task(handle()))
        return await taken

    def peers(self) -> list[str]:
        return sorted(place.peer for place in self.places)


def test_the_one_that_waits_longest_of_the_greediest_connection_gives_way(clock: list[float]) -> None:
    async def run() -> None:
        hall = Hall()
        first = await hall.enter("greedy")
        for peer in ("modest", "greedy", "greedy"):
            clock[0] += 1
            await hall.enter(peer)
        await hall.enter("new")
        assert hall.peers() == ["greedy", "greedy", "modest", "new"]
        assert isinstance(first.ended, ExhaustedError)
        await asyncio.sleep(0)
        assert first.task.cancelled()
        with pytest.raises(
            ExhaustedError, match="at most 4 calls, and so many are open: close one, or raise"
        ):
            await hall.enter("greedy")  # it would take from connections that have fewer
        await hall.enter("other")
        assert hall.peers() == ["greedy", "modest", "new", "other"]
        assert hall.refused == {"full": 3}

    asyncio.run(run())


def test_among_equals_the_one_that_waits_longest_gives_way(clock: list[float]) -> None:
    async def run() -> None:
        hall = Hall()
        for index in range(LIMIT):
            await hall.enter(f"peer {index}")
            clock[0] += 1
        await hall.enter("new")  # many connections with one place each
        assert hall.peers() == ["new", "peer 1", "peer 2", "peer 3"]

    asyncio.run(run())


def test_who_is_answered_keeps_its_place(clock: list[float]) -> None:
    async def run() -> None:
        hall = Hall()
        for _ in range(LIMIT - 1):
            await hall.enter("busy", ANSWERING)
        idle = await hall.enter("busy", NEXT_MESSAGE)
        clock[0] += NEXT_MESSAGE.yields_s / 2  # a control loop's stream between two steps
        with pytest.raises(ExhaustedError):
            await hall.enter("new")
        clock[0] += NEXT_MESSAGE.yields_s
        await hall.enter("new", ANSWERING)
        assert idle.ended is not None
        with pytest.raises(ExhaustedError):
            await hall.enter("another")
        clock[0] += 1e6
        hall.places.sweep()
        assert hall.peers() == ["busy"] * 3 + ["new"]

    asyncio.run(run())


def test_who_neither_sends_nor_reads_is_ended(clock: list[float]) -> None:
    async def run() -> None:
        hall = Hall()
        first = await hall.enter("a")
        stuck = await hall.enter("b", SENDING)
        await hall.enter("c", NEXT_MESSAGE)
        await hall.enter("d", WATCHING)
        clock[0] += 4.9
        hall.places.sweep()
        assert len(hall.places) == LIMIT
        clock[0] += 0.2
        hall.places.sweep()
        assert "expected its first message within 5 s" in str(first.ended)
        assert hall.peers() == ["b", "c", "d"]
        clock[0] += 5.0
        hall.places.sweep()
        assert "expected its answers to be read within 10 s" in str(stuck.ended)
        assert hall.peers() == ["c", "d"]
        assert hall.refused == {"slow": 2}

    asyncio.run(run())


def test_one_connection_has_its_share(clock: list[float]) -> None:
    async def run() -> None:
        hall = Hall(per_connection=2)
        await hall.enter("a")
        await hall.enter("a")
        with pytest.raises(ExhaustedError, match="at most 2 calls of one connection, and so many are open"):
            await hall.enter("a")
        await hall.enter("b")
        assert hall.refused == {"connection": 1}

    asyncio.run(run())


def test_a_stop_ends_what_waits(clock: list[float]) -> None:
    async def run() -> None:
        hall = Hall()
        waiting, working, sending = [await hall.enter("a", s) for s in (NEXT_MESSAGE, ANSWERING, SENDING)]
        hall.places.stop()
        await asyncio.sleep(0)
        assert waiting.task.cancelled()
        assert isinstance(waiting.ended, StoppingError)
        for place in (working, sending):  # they end when they have finished
            assert not place.task.cancelling()
            with pytest.raises(StoppingError):
                place.await_next()
        with pytest.raises(StoppingError):
            await hall.enter("b")

    asyncio.run(run())


# Real servers ----------------------------------------------------------------------------------------------


class ControlLoop(threading.Thread):
    """An honest client at a fixed rate; ``steps`` and ``failures`` are told at its end."""

    def __init__(self, endpoint: str, stream: bool, seconds: float) -> None:
        super().__init__()
        self.steps = 0
        self.failures: list[str] = []
        self._endpoint, self._stream, self._seconds = endpoint, stream, seconds

    def run(self) -> None:
        observation = np.zeros((1, 4), np.float32)
        try:
            with RemotePolicy(self._endpoint, stream=self._stream, deadline_s=2.0) as policy:
                policy.act(observation)
                began = time.monotonic()
                while (now := time.monotonic()) < began + self._seconds:
                    policy.act(observation)
                    self.steps += 1
                    time.sleep(max(0.0, now + 1 / RATE - time.monotonic()))
        except OmcdaError as error:
            self.failures.append(str(error))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("seconds", "share"),
    [(1.0, 0.5), pytest.param(12.0, 0.8, marks=pytest.mark.slow)],  # slow: past all time limits, alone
)
def test_no_client_takes_the_places_of_control_loops(
    continuous_bundle: Bundle, kind: Kind, seconds: float, share: float
) -> None:
    port = free_port()
    with server_process(continuous_bundle, "agent_0", options=("--metrics-port", str(port))) as server:
        words = ("-m", "tests.support.hostile", server.endpoint, kind, str(seconds + 2.0))
        with subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as attacker:
            assert attacker.stdout is not None
            assert attacker.stdout.readline().strip() == BEGUN
            time.sleep(2 * SENDING.yields_s)  # newer calls need not give way
            loops = [ControlLoop(server.endpoint, stream, seconds) for stream in (False, True)]
            for loop in loops:
                loop.start()
            for loop in loops:
                loop.join()
            assert attacker.poll() is None, "the attack ended too early: the test shows nothing"
        assert [loop.failures for loop in loops] == [[], []]
        least = share * RATE * seconds
        if (
            kind == "cancelling"
        ):  # it keeps a core busy, so what is left to others is the machine's, in short runs
            least = 1.0 if seconds == 1.0 else 0.5 * RATE * seconds
        assert min(loop.steps for loop in loops) >= least
        samples = scrape(port)
        refused = {reason: value(samples, "omcda_refused_calls_total", reason=reason) for reason in REFUSALS}
        if kind in ("half-open", "never-reading"):
            assert refused["full"] > 0, "the places were never all taken: the test shows nothing"


@pytest.mark.parametrize("path", [ACT, LIVE])
def test_a_connection_with_half_of_its_calls_in_flight_is_never_refused(
    continuous_bundle: Bundle, path: str
) -> None:
    """The other half is for calls that are answered, and not cleared away yet."""
    step = ActRequest(model="agent_0", batch=1, observation=np.zeros(4, np.float32).tobytes())
    request = step.SerializeToString() if path == ACT else b""

    async def ask(endpoint: str) -> list[grpc.StatusCode]:
        refused = []
        async with grpc.aio.insecure_channel(endpoint) as channel:
            untyped: Any = channel
            call = untyped.unary_unary(path)

            async def ask_on(calls: int) -> None:
                for _ in range(calls):
                    try:
                        await call(request, timeout=20.0)
                    except grpc.aio.AioRpcError as error:
                        refused.append(error.code())

            await asyncio.gather(*(ask_on(100) for _ in range(Limits().connection_calls // 2)))
        return refused

    with server_process(continuous_bundle, "agent_0") as server:
        assert asyncio.run(asyncio.wait_for(ask(server.endpoint), 120.0)) == []


def test_a_call_without_a_message_is_ended_and_counted(continuous_bundle: Bundle) -> None:
    port = free_port()
    code = """if True:
        import sys
        from omcda_deploy.serve import handlers, places, server
        places.Place.state = places.FIRST_MESSAGE = places.FIRST_MESSAGE._replace(limit_s=0.2)
        handlers.SWEEP_S = 0.1
        sys.exit(server.main(sys.argv[1:]))
    """
    with (
        server_process(
            continuous_bundle, "agent_0", start=("-c", code), options=("--metrics-port", str(port))
        ) as server,
        grpc.insecure_channel(server.endpoint) as channel,
        closing(HostileConnection(server.endpoint)) as other,
    ):
        never = threading.Event()
        act: Any = channel.stream_unary(ACT)
        with pytest.raises(grpc.RpcError, match=r"(?s)RESOURCE_EXHAUSTED.*its first message within 0.2 s"):
            act((never.wait() for _ in range(1)), timeout=10)
        never.set()
        with pytest.raises(grpc.RpcError, match=r"(?s)INVALID_ARGUMENT.*expected one message, got none"):
            act(iter(()), timeout=10)
        for path in (ACT, CHECK):
            other.open(path)
        other.serve(0.6)
        samples = scrape(port)
    assert value(samples, "omcda_refused_calls_total", reason="slow") == 3.0
    assert value(samples, "omcda_refused_calls_total", reason="message") == 1.0
    act_codes = {"grpc_type": "unary", "grpc_service": "omcda.v1.PolicyService", "grpc_method": "Act"}
    assert value(samples, "grpc_server_handled_total", **act_codes, grpc_code="RESOURCE_EXHAUSTED") == 2.0


@pytest.mark.slow  # it waits for keepalive to notice
def test_the_place_of_a_vanished_robot_is_free_within_a_minute(continuous_bundle: Bundle) -> None:
    port = free_port()
    code = """if True:
        import sys, time
        import numpy as np
        from omcda_deploy.client.remote import RemotePolicy
        policy = RemotePolicy(sys.argv[1], stream=True)
        while True:
            policy.act(np.zeros((1, 4), np.float32))
            print("acted", flush=True)
            time.sleep(0.05)
    """
    with (
        server_process(continuous_bundle, "agent_0", options=("--metrics-port", str(port))) as server,
        subprocess.Popen(
            [sys.executable, "-c", code, server.endpoint], stdout=subprocess.PIPE, text=True
        ) as robot,
    ):
        try:
            assert robot.stdout is not None
            assert robot.stdout.readline() == "acted\n"
            assert value(scrape(port), "omcda_control_streams") == 1.0
            os.kill(robot.pid, signal.SIGSTOP)
            end = time.monotonic() + 60.0
            while value(scrape(port), "omcda_control_streams"):
                assert time.monotonic() < end, "its place is still taken"
                time.sleep(0.5)
        finally:
            robot.kill()
