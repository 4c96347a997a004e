"""Large requests: beside ordinary steps, with the bits of the whole batch, and with memory that is given back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.local import JointTeam
from omcda_deploy.protos import policy_pb2
from omcda_deploy.serve.batches import LARGE_BYTES
from omcda_deploy.serve.config import Limits
from omcda_deploy.serve.handlers import CallTracker, service_handlers
from omcda_deploy.serve.meter import BLOCK
from omcda_deploy.serve.session import Session
from omcda_deploy.serve.wire import WireTensors
from tests.client.test_client import assert_same, observations
from tests.support.fuzz import resident_kb
from tests.support.server_process import server_process

ACT, STREAM = "/omcda.v1.PolicyService/Act", "/omcda.v1.PolicyService/ActStream"
LARGE, SMALL = bytes(LARGE_BYTES + 1), bytes(10)


class Calls:
    """Calls of one method, made directly; ``gate`` holds up the large ones."""

    def __init__(self, limits: Limits) -> None:
        self.gate = threading.Event()
        self.threads: list[str] = []
        tracker = CallTracker(limits)

        def answer(request: Any) -> bytes:
            self.threads.append(threading.current_thread().name)
            if len(request.observation) > LARGE_BYTES:
                self.gate.wait(10)
            return b"answer"

        service = service_handlers("a.B", tracker, {"C": (policy_pb2.ActRequest, answer)})
        assert isinstance(service, grpc.ServiceRpcHandler)
        handler: Any = service.service(cast("grpc.HandlerCallDetails", SimpleNamespace(method="/a.B/C")))
        self._handle = handler.stream_unary

    async def call(self, observation: bytes, peer: str = "peer") -> bytes | grpc.StatusCode:
        ended: list[grpc.StatusCode] = []

        async def read() -> bytes:
            return policy_pb2.ActRequest(observation=observation).SerializeToString()

        async def end(code: grpc.StatusCode, details: str) -> None:
            ended.append(code)
            raise grpc.aio.AbortError

        context = SimpleNamespace(read=read, abort=end, peer=lambda: peer, time_remaining=lambda: None)
        try:
            answer: bytes = await self._handle(None, context)
        except grpc.aio.AbortError:
            return ended[0]
        return answer


def test_ordinary_steps_pass_a_large_request() -> None:
    async def run() -> None:
        calls = Calls(Limits(concurrent_calls=1))
        large = asyncio.create_task(calls.call(LARGE))
        await asyncio.sleep(0.05)
        for _ in range(3):  # it does not even hold the only place
            assert await asyncio.wait_for(calls.call(SMALL), 1.0) == b"answer"
        assert not large.done()
        assert await calls.call(LARGE, "other") is grpc.StatusCode.RESOURCE_EXHAUSTED  # half of 1, rounded up
        calls.gate.set()
        assert await large == b"answer"
        assert calls.threads[0].startswith("batches")
        assert set(calls.threads[1:]) == {threading.current_thread().name}

    asyncio.run(run())


def test_one_connection_has_half_of_the_large_requests() -> None:
    async def run() -> None:
        calls = Calls(Limits(concurrent_calls=8))
        tasks = [asyncio.create_task(calls.call(LARGE, peer)) for peer in ("a", "a", "a", "b", "b")]
        await asyncio.sleep(0.05)
        calls.gate.set()
        refused, answered = grpc.StatusCode.RESOURCE_EXHAUSTED, b"answer"
        assert await asyncio.gather(*tasks) == [answered, answered, refused, answered, answered]

    asyncio.run(run())


def test_metrics_are_counted_after_the_answer(continuous_bundle: Bundle) -> None:
    """A block that is full is counted by a later turn of the event loop, not within the step that fills it."""
    session = Session(continuous_bundle, "agent_0", {})
    row = WireTensors(1, bytes(16))
    counted: list[int] = []

    async def run() -> None:
        for _ in range(BLOCK // 4):
            session.answer(row)
            counted.append(session.meter._totals.answers)
        await asyncio.sleep(0)
        counted.append(session.meter._totals.answers)

    asyncio.run(run())
    assert counted == [0] * (BLOCK // 4) + [BLOCK // 4]
    for _ in range(BLOCK // 4):  # without an event loop nobody waits
        session.answer(row)
    assert session.meter._totals.answers == 2 * (BLOCK // 4)


# Real servers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_batch_is_answered_as_a_whole(continuous_bundle: Bundle, stream: bool) -> None:
    batch = observations(continuous_bundle.spec, 3000)
    with (
        server_process(continuous_bundle, TEAM) as server,
        RemoteTeam([server.endpoint], stream=stream, deadline_s=20) as team,
    ):
        assert_same(team.act(batch), JointTeam(continuous_bundle).act(batch))


@contextmanager
def clients(endpoint: str, count: int) -> Iterator[list[Callable[[bytes], Any]]]:
    """Yield functions that send a request, each on a connection of its own."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(endpoint, options)) for _ in range(count)]
        calls: list[Any] = [channel.unary_unary(ACT) for channel in channels]
        yield [partial(call.future, timeout=60) for call in calls]


def test_streams_that_are_never_read_do_not_fill_the_memory(continuous_bundle: Bundle) -> None:
    """Four connections send legal requests as fast as they may and read nothing."""
    request = policy_pb2.ActRequest(
        model="agent_0", batch=4000, observation=np.zeros((4000, 4), np.float32).tobytes()
    ).SerializeToString()
    with ExitStack() as stack:
        server = stack.enter_context(server_process(continuous_bundle, "agent_0"))
        idle = resident_kb(server.process.pid)
        held = []
        for _ in range(4):
            options = (("grpc.use_local_subchannel_pool", 1),)
            channel: Any = stack.enter_context(grpc.insecure_channel(server.endpoint, options))
            held += [channel.stream_stream(STREAM)(repeat(request)) for _ in range(8)]
        end = time.monotonic() + 3.0
        most = 0
        while time.monotonic() < end:
            most = max(most, resident_kb(server.process.pid))
            time.sleep(0.05)
        for call in held:
            call.cancel()
    assert most - idle < 268 << 10  # docs/serving.md: 368 MB, of which 100 are the idle server's


@pytest.mark.parametrize(
    ("count", "answers"),
    # slow: the number that is promised; half of the calls may wait for the thread of large ones
    [(12, {"OK"}), pytest.param(64, {"OK", "RESOURCE_EXHAUSTED"}, marks=pytest.mark.slow)],
)
def test_memory_is_bounded_and_given_back(
    continuous_bundle: Bundle, tmp_path: Path, count: int, answers: set[str]
) -> None:
    """Clients send the largest requests that are answered, requests of too many rows, and too large ones."""
    code = """if True:
        import sys
        from omcda_deploy.serve import batches, server
        batches.RELEASE_AFTER_S = (0.2, 1.2)
        sys.exit(server.main(sys.argv[1:]))
    """
    limits, width = Limits(), sum(agent.observation_size for agent in continuous_bundle.spec.agents)
    rows = limits.message_bytes // (4 * width) - 10
    assert rows > limits.rows, "requests of that size are refused: the test shows less than it says"
    config = tmp_path / "serve.toml"
    config.write_text(f"[limits]\nrows = {rows}\n")
    request = policy_pb2.ActRequest(model=TEAM, batch=rows)
    request.observation = np.random.default_rng(0).standard_normal((rows, width)).astype("<f4").tobytes()
    largest = request.SerializeToString()
    request.batch, request.observation = rows + 5, request.observation + bytes(5 * 4 * width)
    options = ("--config", str(config))
    with server_process(continuous_bundle, start=("-c", code), options=options) as server:
        with clients(server.endpoint, 1) as (act,):
            act(policy_pb2.ActRequest(model=TEAM, batch=1, observation=bytes(4 * width)).SerializeToString())
            time.sleep(0.3)
            idle_kb = resident_kb(server.process.pid)
        places = limits.concurrent_calls + limits.streams + limits.large_requests
        bound_kb = idle_kb + 2 * places * limits.message_bytes // 1024
        for data, codes in (
            (largest, answers),
            (request.SerializeToString(), {"RESOURCE_EXHAUSTED"}),
            (bytes(5 << 20), {"RESOURCE_EXHAUSTED"}),
        ):
            peak_kb = 0
            with clients(server.endpoint, count) as acts:
                pending = [act(data) for act in acts]
                while not all(call.done() for call in pending):
                    peak_kb = max(peak_kb, resident_kb(server.process.pid))
                    time.sleep(0.002)
                assert {call.code().name for call in pending} == codes
            time.sleep(1.5)
            assert peak_kb < bound_kb
            assert resident_kb(server.process.pid) < 1.2 * idle_kb
