"""A minimal HTTP/2 client for load on gRPC servers, which costs a fraction of what it measures.

grpcio's own client needs as much CPU per call as the server, so that a slow server and a fast one would look alike.
This client takes about a fifth of the CPU of a bare gRPC server: it sends messages that are serialised already, and
reads only the length of an answer. It supports plaintext and messages smaller than a frame (16 KiB), and reads no
status: an answer without a message counts as a refusal. Source: RFC 9113 (frames, codes) and RFC 7541 (headers).
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence

from omcda_deploy.errors import EndpointError

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
WINDOW = 2**31 - 1  # bytes that the server may send without credit; more than a measurement receives
FIRST_WINDOW = 65535
INITIAL_WINDOW_SIZE = 4
FRAME_LIMIT = 16384
FIRST_DYNAMIC = 62  # index of the newest entry of the dynamic header table
RECEIVE = 1 << 16
TIMEOUT_S = 30.0


class Connection:
    """One connection to one method, with any number of requests in flight.

    ``stream``: all requests are messages of one stream, answered in order; otherwise each is a call. A request
    carries the time from which its latency counts. Raises :class:`EndpointError` if there is no server.
    """

    def __init__(self, endpoint: str, path: str, *, stream: bool = False) -> None:
        host, _, port = endpoint.rpartition(":")
        try:
            self._socket = socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S)
        except (OSError, ValueError) as error:
            raise EndpointError(f"cannot connect to {endpoint} ({error}): expected a server there") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._endpoint = endpoint
        self._stream = stream
        headers = request_headers(path, endpoint)
        self._literal = b"".join(b"\x40" + text(name) + text(value) for name, value in headers)
        self._indexed = bytes(0x80 | FIRST_DYNAMIC + index for index in reversed(range(len(headers))))
        self._calls = 0
        self._open: dict[int, deque[float]] = {}  # start times of the requests in flight, by stream
        self._received: dict[int, bytearray] = {}
        # (stream, headers, data) of the requests that wait for a window to open
        self._held: deque[tuple[int, bytes, bytes]] = deque()
        self._buffer = bytearray()
        self._window = FIRST_WINDOW
        self._stream_window = FIRST_WINDOW  # the stream window of the one stream
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, WINDOW)
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - FIRST_WINDOW))
        )

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, message: bytes, began: float) -> None:
        """Send one serialised request. Raises :class:`EndpointError` if it is larger than a frame."""
        if len(message) + 5 > FRAME_LIMIT:
            raise EndpointError(f"expected requests of less than {FRAME_LIMIT} bytes, got {len(message)}")
        opens = not (self._stream and self._calls)
        if opens:
            block = self._indexed if self._calls else self._literal
            self._calls += 1
            headers = frame(HEADERS, END_HEADERS, 2 * self._calls - 1, block)
        number = 2 * self._calls - 1
        self._open.setdefault(number, deque()).append(began)
        data = struct.pack(">BI", 0, len(message)) + message
        self._held.append((number, headers if opens else b"", data))
        self._flush()

    def _flush(self) -> None:
        while self._held:
            number, headers, data = self._held[0]
            window = min(self._window, self._stream_window) if self._stream else self._window
            if len(data) > window:
                return
            self._held.popleft()
            self._window -= len(data)
            self._stream_window -= len(data)
            self._socket.sendall(headers + frame(DATA, 0 if self._stream else END_STREAM, number, data))

    def answers(self) -> Iterator[tuple[float, bool]]:
        """Read once, and yield (start of the request, whether it was granted) per answer that is now complete.

        Raises :class:`EndpointError` if the connection, or the one stream, has ended.
        """
        try:
            data = self._socket.recv(RECEIVE)
        except OSError as error:
            raise EndpointError(f"{self._endpoint} does not answer ({error}): look at its log") from error
        if not data:
            raise EndpointError(f"{self._endpoint} closed the connection: look at its log")
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= 9:
            high, low, kind, flags, number = struct.unpack_from(">HBBBI", self._buffer, at)
            end = at + 9 + (high << 8 | low)
            if len(self._buffer) < end:
                break
            if kind in (DATA, HEADERS, RST_STREAM):
                yield from self._take(kind, flags, number, self._buffer[at + 9 : end])
            else:
                self._control(kind, flags, number, bytes(self._buffer[at + 9 : end]))
            at = end
        del self._buffer[:at]

    def _take(self, kind: int, flags: int, number: int, payload: bytearray) -> Iterator[tuple[float, bool]]:
        if number not in self._open:
            return
        if kind == DATA:
            received = self._received.setdefault(number, bytearray())
            received += payload
            while len(received) >= 5 and len(received) >= (length := 5 + int.from_bytes(received[1:5])):
                del received[:length]
                yield self._open[number].popleft(), True
        if flags & END_STREAM or kind == RST_STREAM:
            refused = self._open.pop(number)
            self._received.pop(number, None)
            if self._stream:
                raise EndpointError(
                    f"{self._endpoint} ended the stream: see that its limits are above the number of clients"
                )
            for began in refused:
                yield began, False

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == PING and not flags & ACK:
            self._socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == INITIAL_WINDOW_SIZE:
                    self._stream_window += value - FIRST_WINDOW  # sent once, at the start
            self._socket.sendall(frame(SETTINGS, ACK, 0, b""))
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload)
            if number == 0:
                self._window += more
            else:
                self._stream_window += more
            self._flush()
        elif kind == GOAWAY:
            raise EndpointError(
                f"{self._endpoint} ended the connection ({payload[8:].decode(errors='replace')})"
            )

    def close(self) -> None:
        self._socket.close()


def request_headers(path: str, authority: str) -> Sequence[tuple[str, str]]:
    """Return the names and values of the headers of a gRPC call."""
    return (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "omcda-deploy-bench"),
        ("grpc-accept-encoding", "identity"),
    )


def text(characters: str) -> bytes:
    """Return a string literal of HPACK, without Huffman code."""
    return bytes([len(characters)]) + characters.encode()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2."""
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload
