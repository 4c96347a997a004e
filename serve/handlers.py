"""From bytes to bytes: gRPC handlers around plain functions from a message to the bytes of another.

Requests are parsed here rather than by gRPC, which answers INTERNAL to bytes that do not decode. The functions
run to their end without waiting, so one control step is never interleaved with another.
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

QUIET_S = 0.02
STOPPING = "the server is stopping: use another one, or try again later"


class Traffic:
    """The calls that pass through a server, and their end when it is to stop."""

    def __init__(self, limits: Limits, tracing: Tracing | None = None) -> None:
        self.stopping = False
        self.tracing = tracing
        self.calls = 0  # unary ones that reached a handler
        self.denied = 0  # those that did not, for want of a token
        self.meters: list[MethodMeter] = []  # of every method served
        self._limits = limits
        self.streams = 0
        self._waiting: set[Context] = set()

    def deny(self) -> None:
        """Count a call without a valid token."""
        self.denied += 1

    def meter(self, service: str, method: str, kind: str) -> MethodMeter:
        """The counters of a method that is served from now on."""
        self.meters.append(MethodMeter(service, method, kind))
        return self.meters[-1]

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Around a control stream. Raises :class:`ExhaustedError` where there are as many as there may be."""
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

    def wait(self, context: Context) -> None:
        """Before a wait without an end of its own, which is broken off when the server is to stop.

        Raises :class:`StoppingError` when it is to stop already. :meth:`waited` follows.
        """
        if self.stopping:
            raise StoppingError(STOPPING)
        self._waiting.add(context)

    def waited(self, context: Context) -> None:
        self._waiting.discard(context)

    async def quiet(self, limit_s: float) -> None:
        """Return when no unary call came for a moment, or after ``limit_s``.

        gRPC cancels the calls that have arrived but not reached a handler when a server stops, so the queue must
        be worked off first.
        """
        end = time.monotonic() + limit_s
        seen = -1
        while seen != self.calls and time.monotonic() < end:
            seen = self.calls
            await asyncio.sleep(QUIET_S)

    async def stop(self) -> None:
        """End every stream: at once where it waits, after the message in hand otherwise."""
        self.stopping = True
        for context in tuple(self._waiting):
            with suppress(grpc.aio.AbortError):
                await abort(context, StoppingError(STOPPING))


def methods(
    service: str,
    traffic: Traffic,
    unary: Mapping[str, tuple[type[Any], Callable[[Any], bytes]]],
    streams: Mapping[str, tuple[type[Any], Callable[[], Callable[[Any], bytes]]]] | None = None,
) -> grpc.GenericRpcHandler:
    """The handlers of a service: per method its request's type and the function that answers one.

    For a stream it is what makes that function, once for every stream: it may remember what went before.
    """
    found: dict[str, tuple[Handler, MethodMeter]] = {}
    for name, (request_type, answer) in unary.items():
        meter = traffic.meter(service, name, "unary")
        found[f"/{service}/{name}"] = _unary(request_type, answer, traffic, meter), meter
    for name, (request_type, begin) in (streams or {}).items():
        meter = traffic.meter(service, name, "bidi_stream")
        found[f"/{service}/{name}"] = _stream(request_type, begin, traffic, meter), meter
    return _Service(service, found)


class _Service(grpc.ServiceRpcHandler):
    """Finds handlers, and counts the calls that come: one that is given up while it waits reaches no handler."""

    def __init__(self, name: str, found: Mapping[str, tuple[Handler, MethodMeter]]) -> None:
        self._name, self._found = name, found

    def service_name(self) -> str:
        return self._name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        handler, meter = self._found.get(handler_call_details.method, (None, None))
        if meter is not None:
            meter.started += 1
        return handler


def _unary(
    request_type: type[Request], answer: Callable[[Request], bytes], traffic: Traffic, meter: MethodMeter
) -> Handler:
    """One response for one request."""

    async def handle(data: bytes, context: Context) -> bytes:
        traffic.calls += 1
        try:
            response = _respond(request_type, data, answer, traffic, meter, context)
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
    traffic: Traffic,
    meter: MethodMeter,
) -> Handler:
    """One response for every request of a stream, in order; the first refusal ends the stream.

    The meter's seconds are those of single messages.
    """

    # read() and write() rather than an async generator: a tenth less CPU per message
    async def handle(_: object, context: Context) -> None:
        try:
            with traffic.stream():
                answer = begin()
                while True:
                    traffic.wait(context)
                    data = await context.read()
                    if data is grpc.aio.EOF:
                        meter.handled["OK"] += 1
                        return
                    traffic.waited(context)
                    await context.write(_respond(request_type, data, answer, traffic, meter, context))
        except (grpc.aio.BaseError, asyncio.CancelledError):  # the call has ended under us
            meter.handled["CANCELLED"] += 1
            raise
        except Exception as error:
            await abort(context, error, meter)
        finally:
            traffic.waited(context)

    return grpc.stream_stream_rpc_method_handler(handle)


def _respond(
    request_type: type[Request],
    data: bytes,
    answer: Callable[[Request], bytes],
    traffic: Traffic,
    meter: MethodMeter,
    context: Context,
) -> bytes:
    started = time.perf_counter()
    if traffic.tracing is None:
        response = answer(parse(request_type, data))
    else:
        with traffic.tracing.span(meter.service, meter.method, context.invocation_metadata()):
            response = answer(parse(request_type, data))
    meter.seconds.add(time.perf_counter() - started)
    return response


def parse(request_type: type[Request], data: bytes) -> Request:
    try:
        return request_type.FromString(data)
    except DecodeError:
        raise DecodeError(
            f"expected a {request_type.DESCRIPTOR.full_name}, got bytes that are none"
        ) from None


async def abort(context: Context, error: Exception, meter: MethodMeter | None = None) -> None:
    code, details = status_of(error)
    if meter is not None:
        meter.handled[code.name] += 1
    await context.abort(code, details)
