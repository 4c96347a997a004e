"""gRPC handlers around plain functions that take a request message and return a serialised response.

Requests are parsed here rather than by gRPC, which answers INTERNAL to bytes that do not decode. The functions
never wait, so one control step is never interleaved with another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from omcda_deploy.serve.config import Limits
from omcda_deploy.serve.meter import MethodMeter
from omcda_deploy.serve.status import ExhaustedError, StoppingError, status_of
from omcda_deploy.serve.tracing import Tracing

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Request = TypeVar("Request", bound=Message)

QUIET_S = 0.02  # without a new unary call: then the queue counts as empty
STOPPING = "the server is stopping: use another one, or try again later"


class CallTracker:
    """Counts the calls that pass through a server, and ends them when the server stops."""

    def __init__(self, limits: Limits, tracing: Tracing | None = None) -> None:
        self.stopping = False
        self.tracing = tracing
        self.calls = 0  # unary calls that reached a handler
        self.denied = 0  # calls without a valid token, which reach no handler
        self.streams = 0  # open control streams
        self.meters: list[MethodMeter] = []  # one per method that is served
        self._limits = limits
        self._waiting: set[Context] = set()

    def deny(self) -> None:
        """Count a call without a valid token."""
        self.denied += 1

    def meter(self, service: str, method: str, kind: str) -> MethodMeter:
        """Create the meter of a method that is served from now on."""
        self.meters.append(MethodMeter(service, method, kind))
        return self.meters[-1]

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a control stream while it is open. Raises :class:`ExhaustedError` if too many are open already."""
        if self.streams >= self._limits.streams:
            raise ExhaustedError(
                f"expected at most {self._limits.streams} control streams, and so many are open: close one, or "
                "raise limits.streams"
            )
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def begin_wait(self, context: Context) -> None:
        """Mark a call that is about to wait without a time limit, so that :meth:`stop` can abort it.

        Raises :class:`StoppingError` if the server is stopping already. Call :meth:`end_wait` afterwards.
        """
        if self.stopping:
            raise StoppingError(STOPPING)
        self._waiting.add(context)

    def end_wait(self, context: Context) -> None:
        """Undo :meth:`begin_wait`."""
        self._waiting.discard(context)

    async def wait_until_quiet(self, limit_s: float) -> None:
        """Return when no unary call came for a moment, or after ``limit_s`` seconds.

        When a server stops, gRPC cancels the calls that have arrived but not reached a handler. Those in the queue
        must be answered before.
        """
        end = time.monotonic() + limit_s
        last_count = -1
        while last_count != self.calls and time.monotonic() < end:
            last_count = self.calls
            await asyncio.sleep(QUIET_S)

    async def stop(self) -> None:
        """End every stream: at once if it waits, otherwise after the message that is being answered."""
        self.stopping = True
        for context in tuple(self._waiting):
            with suppress(grpc.aio.AbortError):
                await abort(context, StoppingError(STOPPING))


def service_handlers(
    service: str,
    tracker: CallTracker,
    unary: Mapping[str, tuple[type[Any], Callable[[Any], bytes]]],
    streams: Mapping[str, tuple[type[Any], Callable[[], Callable[[Any], bytes]]]] | None = None,
) -> grpc.GenericRpcHandler:
    """Build the gRPC handlers of a service.

    ``unary``: per method the type of its requests and the function that answers one. ``streams``: per method the
    type and a factory of such functions, called once per stream, so that a function may remember earlier requests.
    """
    handlers: dict[str, tuple[Handler, MethodMeter]] = {}
    for name, (request_type, answer) in unary.items():
        meter = tracker.meter(service, name, "unary")
        handlers[f"/{service}/{name}"] = _unary(request_type, answer, tracker, meter), meter
    for name, (request_type, begin) in (streams or {}).items():
        meter = tracker.meter(service, name, "bidi_stream")
        handlers[f"/{service}/{name}"] = _stream(request_type, begin, tracker, meter), meter
    return _Service(service, handlers)


class _Service(grpc.ServiceRpcHandler):
    """Looks up handlers and counts calls.

    Counting in a handler would miss the calls that their callers cancel while they wait for one.
    """

    def __init__(self, name: str, handlers: Mapping[str, tuple[Handler, MethodMeter]]) -> None:
        self._name, self._handlers = name, handlers

    def service_name(self) -> str:
        return self._name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        handler, meter = self._handlers.get(handler_call_details.method, (None, None))
        if meter is not None:
            meter.started += 1
        return handler


def _unary(
    request_type: type[Request], answer: Callable[[Request], bytes], tracker: CallTracker, meter: MethodMeter
) -> Handler:
    """Return a handler that sends one response for one request."""

    async def handle(data: bytes, context: Context) -> bytes:
        tracker.calls += 1
        try:
            response = _respond(request_type, data, answer, tracker, meter, context)
        except Exception as error:
            await abort(context, error, meter)
            raise  # not reached: abort raises
        meter.handled["OK"] += 1
        if (left_s := context.time_remaining()) is not None and left_s <= 0.0:
            meter.late += 1
        return response

    return grpc.unary_unary_rpc_method_handler(handle)


def _stream(
    request_type: type[Request],
    begin: Callable[[], Callable[[Request], bytes]],
    tracker: CallTracker,
    meter: MethodMeter,
) -> Handler:
    """Return a handler that sends a response for every request of a stream, in order.

    The first refusal ends the stream. The meter's seconds are those of single messages.
    """

    # read() and write() cost a tenth less CPU per message than an async generator.
    async def handle(_: object, context: Context) -> None:
        try:
            with tracker.stream():
                answer = begin()
                while True:
                    tracker.begin_wait(context)
                    data = await context.read()
                    if data is grpc.aio.EOF:
                        meter.handled["OK"] += 1
                        return
                    tracker.end_wait(context)
                    await context.write(_respond(request_type, data, answer, tracker, meter, context))
        except (grpc.aio.BaseError, asyncio.CancelledError):  # the caller ended the call
            meter.handled["CANCELLED"] += 1
            raise
        except Exception as error:
            await abort(context, error, meter)
        finally:
            tracker.end_wait(context)

    return grpc.stream_stream_rpc_method_handler(handle)


def _respond(
    request_type: type[Request],
    data: bytes,
    answer: Callable[[Request], bytes],
    tracker: CallTracker,
    meter: MethodMeter,
    context: Context,
) -> bytes:
    """Parse a request, answer it inside a span if spans are wanted, and count its seconds."""
    started = time.perf_counter()
    if tracker.tracing is None:
        response = answer(parse(request_type, data))
    else:
        with tracker.tracing.span(meter.service, meter.method, context.invocation_metadata()):
            response = answer(parse(request_type, data))
    meter.seconds.add(time.perf_counter() - started)
    return response


def parse(request_type: type[Request], data: bytes) -> Request:
    """Parse a message. Raises :class:`DecodeError` with the name of the type that was expected."""
    try:
        return request_type.FromString(data)
    except DecodeError:
        raise DecodeError(
            f"expected a {request_type.DESCRIPTOR.full_name}, got bytes that are none"
        ) from None


async def abort(context: Context, error: Exception, meter: MethodMeter | None = None) -> None:
    """End a call with the status for ``error`` and count it; always raises."""
    code, details = status_of(error)
    if meter is not None:
        meter.handled[code.name] += 1
    await context.abort(code, details)
