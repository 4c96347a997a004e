"""Transports of steps: one call per step, or one stream for all.

A transport sends a request and waits for its answer until the deadline; it has one request at a time under way.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import grpc

from omcda_deploy.client.channel import Metadata
from omcda_deploy.errors import EndpointError
from omcda_deploy.protos.policy_pb2 import ActRequest, ActResponse

SERVICE = "/omcda.v1.PolicyService/"


class Arrivals:
    """Parses answers and records their arrival, as gRPC parses an answer as soon as it has arrived."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, data: bytes) -> ActResponse:
        self.last = time.perf_counter()
        return ActResponse.FromString(data)


class Calls:
    """One unary call per step."""

    def __init__(
        self,
        channel: grpc.Channel,
        deadline_s: float,
        parse: Callable[[bytes], ActResponse],
        metadata: Metadata,
    ) -> None:
        self._metadata = metadata
        self._act = channel.unary_unary(
            SERVICE + "Act", request_serializer=ActRequest.SerializeToString, response_deserializer=parse
        )
        self._deadline_s = deadline_s
        self._pending: grpc.Future[ActResponse] | None = None

    def ask(self, request: ActRequest) -> ActResponse:
        # A blocking call, which costs less than a future.
        return self._act(request, timeout=self._deadline_s, metadata=self._metadata)

    def send(self, request: ActRequest) -> None:
        self._pending = self._act.future(request, timeout=self._deadline_s, metadata=self._metadata)

    def arrived(self) -> bool:
        """Return whether :meth:`receive` has not to wait."""
        return self._pending is None or self._pending.done()

    def receive(self) -> ActResponse:
        if self._pending is None:
            raise RuntimeError("receive() before send()")
        pending, self._pending = self._pending, None
        return pending.result()

    def abandon(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None


class _Answers(Protocol):
    """A gRPC stream: an iterator of its answers, which can be cancelled."""

    def __iter__(self) -> Iterator[ActResponse]: ...

    def cancel(self) -> object: ...


_Requests = queue.SimpleQueue["ActRequest | None"]  # None ends the requests
_Arrived = queue.SimpleQueue["ActResponse | Exception"]  # an exception ends the answers


class Stream:
    """One stream for all steps, opened by the first step, and again by the first step after an error.

    In gRPC a deadline holds for a whole stream, and waiting for a message has none. Hence answers are put into a
    queue, which can be read with a timeout, when gRPC parses them, which is before the stream's iterator returns
    them.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        deadline_s: float,
        parse: Callable[[bytes], ActResponse],
        metadata: Metadata,
    ) -> None:
        self._channel = channel
        self._metadata = metadata
        self._deadline_s = deadline_s
        self._parse = parse
        self._due = 0.0
        self._requests = _Requests()
        self._answers = _Arrived()
        self._call: _Answers | None = None

    def ask(self, request: ActRequest) -> ActResponse:
        self.send(request)
        return self.receive()

    def send(self, request: ActRequest) -> None:
        if not self._answers.empty():  # the stream ended between two steps: open a new one for this step
            self.abandon()
        if self._call is None:
            self._call = self._open()
        self._due = time.monotonic() + self._deadline_s
        self._requests.put(request)

    def arrived(self) -> bool:
        """Return whether :meth:`receive` has not to wait."""
        return self._call is None or not self._answers.empty() or time.monotonic() >= self._due

    def receive(self) -> ActResponse:
        if self._call is None:
            raise RuntimeError("receive() before send()")
        try:
            answer = self._answers.get(timeout=max(0.0, self._due - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def abandon(self) -> None:
        if self._call is not None:
            self._requests.put(None)  # ends the thread in which gRPC waits for requests
            self._call.cancel()
            self._call = None

    def _open(self) -> _Answers:
        """Open a stream with new queues, which contain no late answers."""
        self._requests, self._answers = requests, answers = _Requests(), _Arrived()

        def parse(data: bytes) -> ActResponse:
            response = self._parse(data)
            answers.put(response)
            return response

        call: _Answers = self._channel.stream_stream(
            SERVICE + "ActStream",
            request_serializer=ActRequest.SerializeToString,
            response_deserializer=parse,
        )(iter(requests.get, None), metadata=self._metadata)
        threading.Thread(
            target=_read, args=(call, answers), name="answers of a policy stream", daemon=True
        ).start()
        return call


def _read(call: _Answers, answers: _Arrived) -> None:
    """Read a stream to its end, as gRPC parses a message only when the next one is wanted, and add the end."""
    try:
        for _ in call:
            pass
        answers.put(EndpointError("the server ended the stream without an answer: update it"))
    except grpc.RpcError as error:
        answers.put(error)
