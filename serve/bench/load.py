"""Load on policy servers: closed loops, open loops, and their latencies.

In a **closed loop** each client sends its next request when it has its answer, as a simulator does; this gives the
highest rate that a server can hold. In an **open loop** requests come at a fixed rate, whether or not the last ones
were answered, and latency counts from the moment at which a request was *due*. A server that stalls for a second
then has a second of late requests; counted from when they were sent, only one would be late (coordinated omission).
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from omcda_deploy.errors import EndpointError
from omcda_deploy.play.measurements import Latency
from omcda_deploy.serve.bench.http2 import TIMEOUT_S, Connection


class Answer(NamedTuple):
    """One answer to a client; ``granted``: False for a refusal."""

    client: int
    began: float  # the start of its request
    granted: bool


class Wire(Protocol):
    """Clients with one or more lines each, one line per model that they ask; and a clock."""

    def now(self) -> float: ...

    def ask(self, client: int, line: int, began: float) -> None: ...

    def wait(self, until: float) -> Sequence[Answer]:
        """Return answers as soon as there are any, or none at the time ``until``."""


@dataclass(frozen=True)
class Timings:
    """Measurements of a loop.

    ``latency``: of the steps that were answered. ``elapsed_s``: from the start to the last answer. ``refused``:
    number of requests.
    """

    latency: Latency
    elapsed_s: float
    refused: int

    @property
    def rate(self) -> float:
        """Answered steps per second."""
        return self.latency.seconds.size / self.elapsed_s


def closed_loop(
    wire: Wire, clients: int, seconds: float, *, lines: int = 1, at_once: bool = False
) -> Timings:
    """Run steps of ``clients`` clients, each begun when the client's last one was answered, during ``seconds``.

    A step asks all ``lines`` of a client, one after another or at once, and ends with the last answer. Raises
    :class:`EndpointError` for a refusal, as refusals would be measured as fast answers.
    """
    start = wire.now()
    end = start + seconds
    latencies: list[float] = []
    left = [0] * clients

    def begin(client: int) -> None:
        left[client] = lines
        now = wire.now()
        for line in range(lines if at_once else 1):
            wire.ask(client, line, now)

    for client in range(clients):
        begin(client)
    running = clients
    while running:
        for client, began, granted in wire.wait(end + TIMEOUT_S):
            if not granted:
                raise EndpointError("a server refused a request under load: raise its limits (--config)")
            left[client] -= 1
            if left[client]:
                if not at_once:
                    wire.ask(client, lines - left[client], began)
                continue
            now = wire.now()
            latencies.append(now - began)
            if now < end:
                begin(client)
            else:
                running -= 1
    return Timings(Latency(np.array(latencies)), wire.now() - start, 0)


def open_loop(wire: Wire, clients: int, rate: float, seconds: float) -> Timings:
    """Send requests every ``1 / rate`` seconds for ``seconds``, from each client in turn, and await all answers."""
    start = wire.now()
    total = max(1, round(rate * seconds))
    latencies: list[float] = []
    sent = refused = 0
    while len(latencies) + refused < total:
        while sent < total and (due := start + sent / rate) <= wire.now():
            wire.ask(sent % clients, 0, due)
            sent += 1
        until = start + sent / rate if sent < total else start + seconds + TIMEOUT_S
        for _, due, granted in wire.wait(until):
            if granted:
                latencies.append(wire.now() - due)
            else:
                refused += 1
    return Timings(Latency(np.array(latencies)), wire.now() - start, refused)


class Line(NamedTuple):
    """A model that a client asks: its connection, and an endless iterator of serialised requests."""

    connection: Connection
    messages: Iterator[bytes]


class Sockets:
    """A :class:`Wire` of real connections. Raises :class:`EndpointError` if no answer comes in time."""

    def __init__(self, clients: Sequence[Sequence[Line]]) -> None:
        self._clients = clients
        self._selector = selectors.DefaultSelector()
        for client, lines in enumerate(clients):
            for connection in {line.connection for line in lines}:
                self._selector.register(connection, selectors.EVENT_READ, (client, connection))

    def now(self) -> float:
        return time.perf_counter()

    def ask(self, client: int, line: int, began: float) -> None:
        connection, messages = self._clients[client][line]
        connection.ask(next(messages), began)

    def wait(self, until: float) -> Sequence[Answer]:
        left = until - self.now()
        ready = self._selector.select(min(max(0.0, left), TIMEOUT_S))
        if not ready and left > TIMEOUT_S:
            raise EndpointError(f"a server gave no answer within {TIMEOUT_S:.0f} s: look at its log")
        return [
            Answer(client, began, granted)
            for key, _ in ready
            for client, connection in (key.data,)
            for began, granted in connection.answers()
        ]

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data[1].close()
        self._selector.close()
