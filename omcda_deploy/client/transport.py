"""Transports of steps: one call per step, or one stream for all.

A transport sends the serialised requests of a step, one as a rule, and waits for their answers until the deadline.
It has one step at a time under way.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grpc

from omcda_deploy.client.channel import Metadata
from omcda_deploy.errors import EndpointError

SERVICE = "/omcda.v1.PolicyService/"


class Arrivals:
    """Parses answers and records their arrival, as gRPC parses an answer as soon as it has arrived.

    ``parse``: of the type of the answers.
    """

    def __init__(self, parse: Callable[[bytes], Any]) -> None:
        self.last = 0.0
        self._parse = parse

    def __call__(self, data: bytes) -> Any:
        self.last = time.perf_counter()
        return self._parse(data)


class Calls:
    """Unary calls of the method ``path``, one for each request of a step."""

    def __init__(
        self,
        channel: grpc.Channel,
        deadline_s: float,
        parse: Callable[[bytes], Any],
        metadata: Metadata,
        path: str = SERVICE + "Act",
    ) -> None:
        self._metadata = metadata
        untyped: Any = channel  # the stubs know no requests that are serialised already
        self._act = untyped.unary_unary(path, response_deserializer=parse)
        self._deadline_s = deadline_s
        self._pending: list[grpc.Future[Any]] = []

    def ask(self, requests: Sequence[bytes]) -> Sequence[Any]:
        if len(requests) == 1:  # a blocking call costs less than a future
            return [self._act(requests[0], timeout=self._deadline_s, metadata=self._metadata)]
        self.send(requests)
        return self.receive()

    def send(self, requests: Sequence[bytes]) -> None:
        self._pending = [
            self._act.future(request, timeout=self._deadline_s, metadata=self._metadata)
            for request in requests
        ]

    def arrived(self) -> bool:
        """Return whether :meth:`receive` has not to wait."""
        return all(pending.done() for pending in self._pending)

    def receive(self) -> Sequence[Any]:
        if not self._pending:
            raise RuntimeError("receive() before send()")
        answers = [pending.result() for pending in self._pending]
        self._pending = []
        return answers

    def abandon(self) -> None:
        for pending in self._pending:
            pending.cancel()
        self._pending = []


class _Answers(Protocol):
    """A gRPC stream: an iterator of its answers, which can be cancelled."""

    def __iter__(self) -> Iterator[Any]: ...

    def cancel(self) -> object: ...


_Requests = queue.SimpleQueue["bytes | None"]  # None ends the requests
_Arrived = queue.SimpleQueue[Any]  # an exception ends the answers


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
        parse: Callable[[bytes], Any],
        metadata: Metadata,
    ) -> None:
        self._channel = channel
        self._metadata = metadata
        self._deadline_s = deadline_s
        self._parse = parse
        self._due = 0.0
        self._expected = 0  # answers to the step under way
        self._requests = _Requests()
        self._answers = _Arrived()
        self._call: _Answers | None = None

    def ask(self, requests: Sequence[bytes]) -> Sequence[Any]:
        self.send(requests)
        return self.receive()

    def send(self, requests: Sequence[bytes]) -> None:
        if not self._answers.empty():  # the stream ended between two steps: open a new one for this step
            self.abandon()
        if self._call is None:
            self._call = self._open()
        self._due = time.monotonic() + self._deadline_s
        self._expected = len(requests)
        for request in requests:
            self._requests.put(request)

    def arrived(self) -> bool:
        """Return whether :meth:`receive` has not to wait."""
        return self._call is None or self._answers.qsize() >= self._expected or time.monotonic() >= self._due

    def receive(self) -> Sequence[Any]:
        if self._call is None:
            raise RuntimeError("receive() before send()")
        return [self._next() for _ in range(self._expected)]

    def _next(self) -> Any:
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

        def parse(data: bytes) -> Any:
            response = self._parse(data)
            answers.put(response)
            return response

        untyped: Any = self._channel
        call: _Answers = untyped.stream_stream(
            SERVICE + "ActStream",
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
