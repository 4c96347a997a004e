"""The end of a busy server: what had come is answered or told UNAVAILABLE, and the process exits with 0."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.protos import policy_pb2
from tests.support.server_process import server_process

STREAMS, CALLERS = 16, 8
ACT, STREAM = "/omcda.v1.PolicyService/Act", "/omcda.v1.PolicyService/ActStream"
STOPPING = "UNAVAILABLE: the server is stopping: use another one, or try again later"


class Client(threading.Thread):
    """Asks again and again, on a connection of its own, until nobody listens any more.

    ``rows``: of a request. ``begun``: released after a few answers. ``ends``: the statuses of refusals.
    """

    def __init__(self, endpoint: str, rows: int, begun: threading.Semaphore, ends: Counter[str]) -> None:
        super().__init__()
        self._rows = rows
        self._channel: Any = grpc.insecure_channel(endpoint, (("grpc.use_local_subchannel_pool", 1),))
        self._begun, self._ends = begun, ends

    def run(self) -> None:
        with self._channel:
            while True:
                try:
                    self._ask()
                except grpc.RpcError as error:
                    assert isinstance(error, grpc.Call)  # noqa: PT017
                    if "failed to connect" in error.details():
                        return
                    self._ends[f"{error.code().name}: {error.details()}"] += 1

    def _ask(self) -> None:
        rows = self._rows
        request = policy_pb2.ActRequest(model="agent_0", batch=rows, observation=bytes(16 * rows))
        act = self._channel.unary_unary(ACT)
        for count in range(1_000_000):
            assert len(act(request.SerializeToString(), timeout=30)) > 10
            if count == 3:
                self._begun.release()


class StreamClient(Client):
    def _ask(self) -> None:
        request = policy_pb2.ActRequest(model="agent_0", batch=1, observation=bytes(16))
        answered, ended = threading.Semaphore(1), threading.Event()

        def requests() -> Any:
            for count in range(1_000_000):
                answered.acquire()
                if ended.is_set():
                    return
                if count == 4:
                    self._begun.release()
                yield request.SerializeToString()

        try:
            for _ in self._channel.stream_stream(STREAM)(requests()):
                answered.release()
        finally:
            ended.set()
            answered.release()  # for the thread in which gRPC waits for the next request


@pytest.mark.parametrize(
    "times",
    [2, pytest.param(50, marks=pytest.mark.slow)],  # slow: a minute of full load
)
@pytest.mark.parametrize("rows", [100, 4000])  # the latter for the thread of large requests
def test_a_busy_server_drains(continuous_bundle: Bundle, tmp_path: Path, rows: int, times: int) -> None:
    for _ in range(times):
        ends: Counter[str] = Counter()
        begun = threading.Semaphore(0)
        log = tmp_path / "log"
        with server_process(continuous_bundle, "agent_0", options=("--grace", "1"), log=log) as server:
            kinds = [StreamClient] * STREAMS + [Client] * CALLERS
            clients = [kind(server.endpoint, rows, begun, ends) for kind in kinds]
            for client in clients:
                client.start()
            for _ in clients:
                assert begun.acquire(timeout=30)
            server.process.terminate()
            assert server.process.wait(10) == 0, log.read_text()
            for client in clients:
                client.join(30)
                assert not client.is_alive()
        assert log.read_text() == ""
        assert ends.keys() == {STOPPING}, "not answered, and not told why"
        assert ends[STOPPING] >= len(clients)
