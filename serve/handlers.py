"""gRPC handlers around plain functions that take a request message and return a serialised response.

Requests are parsed here rather than by gRPC, which answers INTERNAL to bytes that do not decode. The functions
never wait, so one control step is never interleaved with another; large requests are answered beside them, in a
thread (:mod:`omcda_deploy.serve.batches`).

Every method is served as a stream of requests, also where callers send one: so the handler runs before the message
has come, and can limit how long it waits for it (:mod:`omcda_deploy.serve.places`). On the wire both look alike.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, Never, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from omcda_deploy.serve.batches import LARGE_BYTES, Batches
from omcda_deploy.serve.config import Limits
from omcda_deploy.serve.meter import MethodMeter
from omcda_deploy.serve.places import ANSWERING, SENDING, Context, Place, Places
from omcda_deploy.serve.status import RequestError, status_of
from omcda_deploy.serve.tracing import Tracing

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Request = TypeVar("Request", bound=Message)
End: TypeAlias = tuple[grpc.StatusCode, str]  # status and details

# Seconds without a new call, after which callers count as served, and then gRPC's queue as empty.
QUIET_S, EMPTY_S = 0.02, 0.05
SWEEP_S = 1.0  # between two looks for calls that wait too long
INTROSPECTION = 64  # health and reflection calls, watchers among them


class CallTracker:
    """Counts the calls that pass through a server, holds their places, and ends them when the server stops."""

    def __init__(self, limits: Limits, tracing: Tracing | None = None) -> None:
        self.tracing = tracing
        self.denied = 0  # calls without a valid token, which reach no handler
        self.refused: Counter[str] = Counter()  # calls refused or ended for lack of places, by reason
        self.meters: list[MethodMeter] = []  # one per method that is served
        self.calls = Places(
            "concurrent calls", limits.concurrent_calls, "limits.concurrent_calls", self.refused
        )
        self.streams = Places(
            "control streams",
            limits.streams,
            "limits.streams",
            self.refused,
            per_connection=limits.streams_of_one_connection,
        )
        self.large = Places(
            "large requests",
            limits.large_requests,
            "limits.concurrent_calls",
            self.refused,
            per_connection=(limits.large_requests + 1) // 2,
        )
        # Apart, so that neither probes nor their callers are in the way of the others.
        self.introspection = Places(
            "health and reflection calls", INTROSPECTION, "the interval of your probes", self.refused
        )
        self._all = (self.calls, self.streams, self.large, self.introspection)
        self.batches = Batches()

    def resize(self, limits: Limits) -> None:
        """Change the numbers of places; calls that are open stay."""
        self.calls.resize(limits.concurrent_calls)
        self.streams.resize(limits.streams, limits.streams_of_one_connection)
        self.large.resize(limits.large_requests, (limits.large_requests + 1) // 2)

    def deny(self) -> None:
        """Count a call without a valid token."""
        self.denied += 1

    def meter(self, service: str, method: str, kind: str) -> MethodMeter:
        """Create the meter of a method that is served from now on."""
        self.meters.append(MethodMeter(service, method, kind))
        return self.meters[-1]

    async def sweep(self) -> None:
        """End calls that wait too long, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            for places in self._all:
                places.sweep()

    async def stop(self, server: grpc.aio.Server, grace_s: float) -> None:
        """Stop a server, so that each call that has come is answered or told why not.

        For half of ``grace_s`` all go on, until the unary calls pause. Then those that wait for their callers are
        ended, and newcomers are held back until gRPC has begun to close the connections.
        """
        await self._wait_until_quiet((self.calls, self.large), QUIET_S, grace_s / 2)
        for places in self._all:
            places.stop()
        await self._wait_until_quiet(self._all, EMPTY_S, grace_s / 4)
        stopped = asyncio.ensure_future(server.stop(grace_s / 4))
        await asyncio.sleep(0)  # begins it
        for places in self._all:
            places.release()
        await stopped

    @staticmethod
    async def _wait_until_quiet(kinds: Sequence[Places], quiet_s: float, limit_s: float) -> None:
        """Return when no call is being answered and none came for ``quiet_s``, or after ``limit_s`` seconds."""
        end = time.monotonic() + limit_s
        last = -1
        while time.monotonic() < end:
            arrived = sum(places.arrived for places in kinds)
            if arrived == last and not any(places.answering for places in kinds):
                return
            last = arrived
            await asyncio.sleep(quiet_s)


class Method(Generic[Request]):
    """One RPC method of a server: the type of its requests, its counters, and where its answers are computed."""

    def __init__(self, request_type: type[Request], tracker: CallTracker, meter: MethodMeter) -> None:
        self.meter = meter
        self._request_type, self._tracker, self._tracing = request_type, tracker, tracker.tracing

    def respond(self, answer: Callable[[Request], bytes], data: bytes, context: Context) -> bytes:
        """Parse a request and answer it, inside a span if spans are wanted."""
        if self._tracing is None:
            return answer(parse(self._request_type, data))
        with self._tracing.span(self.meter.service, self.meter.method, context.invocation_metadata()):
            return answer(parse(self._request_type, data))

    async def respond_large(
        self, answer: Callable[[Request], bytes], data: bytes, context: Context, place: Place
    ) -> bytes:
        """Do the same in the thread of large requests. Raises :class:`ExhaustedError` if too many wait for it."""
        tracker = self._tracker
        queued = tracker.large.take(context)
        tracker.calls.leave(place)  # an ordinary call may have it
        try:
            for taken in (place, queued):
                taken.enter(ANSWERING)
            return await tracker.batches.run(self.respond, answer, data, context)
        finally:
            tracker.large.leave(queued)


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
        method = Method(request_type, tracker, tracker.meter(service, name, "unary"))
        handlers[f"/{service}/{name}"] = _unary(method, answer, tracker), method.meter
    for name, (request_type, begin) in (streams or {}).items():
        method = Method(request_type, tracker, tracker.meter(service, name, "bidi_stream"))
        handlers[f"/{service}/{name}"] = _stream(method, begin, tracker), method.meter
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


def _unary(method: Method[Request], answer: Callable[[Request], bytes], tracker: CallTracker) -> Handler:
    """Return a handler that sends one response for one request."""
    meter, places = method.meter, tracker.calls

    # As :func:`placed`, written out: another coroutine for every call would cost a hundredth of it.
    async def handle(_: object, context: Context) -> bytes:
        place: Place | None = None
        try:
            place = places.take(context)
            data = await context.read()
            if data is grpc.aio.EOF:
                tracker.refused["message"] += 1
                tracker.batches.plan_release()  # what gRPC had received of it
                raise RequestError("expected one message, got none that can be read")
            started = time.perf_counter()
            if len(data) > LARGE_BYTES:
                response = await method.respond_large(answer, data, context, place)
            else:
                response = method.respond(answer, data, context)
            meter.seconds.add(time.perf_counter() - started)
            meter.handled["OK"] += 1
            if (left_s := context.time_remaining()) is not None and left_s <= 0.0:
                meter.late += 1
            return response
        except BaseException as error:
            data = None  # gRPC keeps the error with which a call ends, and that keeps this frame
            if (end := _end_of(error, place, meter)) is None:
                raise
        finally:
            if place is not None:
                places.leave(place)
        await _finish(context, end, place, places)

    return grpc.stream_unary_rpc_method_handler(handle)


def _stream(
    method: Method[Request], begin: Callable[[], Callable[[Request], bytes]], tracker: CallTracker
) -> Handler:
    """Return a handler that sends a response for every request of a stream, in order.

    The first refusal ends the stream. The meter's seconds are those of single messages.
    """
    meter = method.meter

    # read() and write() cost a tenth less CPU per message than an async generator.
    async def respond(context: Context, place: Place) -> None:
        answer = begin()
        while (data := await context.read()) is not grpc.aio.EOF:
            started = time.perf_counter()
            if len(data) > LARGE_BYTES:
                response = await method.respond_large(answer, data, context, place)
            else:
                response = method.respond(answer, data, context)
            meter.seconds.add(time.perf_counter() - started)
            place.enter(SENDING)
            await context.write(response)
            place.steps += 1
            place.await_next()
        meter.handled["OK"] += 1

    return grpc.stream_stream_rpc_method_handler(placed(tracker.streams, respond, meter))


def placed(
    places: Places, respond: Callable[[Context, Place], Awaitable[Any]], meter: MethodMeter | None = None
) -> Callable[[object, Context], Awaitable[Any]]:
    """Return a gRPC handler that takes a place, runs ``respond``, and ends the call with its error's status."""

    async def handle(_: object, context: Context) -> Any:
        place: Place | None = None
        try:
            place = places.take(context)
            return await respond(context, place)
        except BaseException as error:
            if (end := _end_of(error, place, meter)) is None:
                raise
        finally:
            if place is not None:
                places.leave(place)
        await _finish(context, end, place, places)

    return handle


def _end_of(error: BaseException, place: Place | None, meter: MethodMeter | None) -> End | None:
    """Return the status with which a call is to be ended after ``error``, and count it.

    None where the call has ended already, or cannot be ended.
    """
    if isinstance(error, asyncio.CancelledError) and place is not None and place.ended is not None:
        end = status_of(place.ended)
        if place.state is SENDING:  # gRPC sends no status behind an answer that its caller does not read
            count(end[0], meter)
            return None
        place.task.uncancel()
    elif isinstance(
        error, (asyncio.CancelledError, grpc.aio.BaseError)
    ):  # its caller has ended it or is gone
        count(grpc.StatusCode.CANCELLED, meter)
        return None
    elif isinstance(error, Exception):
        end = status_of(error)
    else:
        return None
    count(end[0], meter)
    return end


async def _finish(context: Context, end: End, place: Place | None, places: Places) -> Never:
    """End a call; not from inside ``except``, as gRPC keeps the error, and that would keep the request."""
    if place is None:
        await places.hold()
    await context.abort(*end)
    raise AssertionError("abort raises")


def parse(request_type: type[Request], data: bytes) -> Request:
    """Parse a message. Raises :class:`DecodeError` with the name of the type that was expected."""
    try:
        return request_type.FromString(data)
    except DecodeError:
        raise DecodeError(
            f"expected a {request_type.DESCRIPTOR.full_name}, got bytes that are none"
        ) from None


def count(code: grpc.StatusCode, meter: MethodMeter | None) -> None:
    """Count a call that ended with ``code``, if its method has a meter."""
    if meter is not None:
        meter.handled[code.name] += 1


async def abort(context: Context, error: Exception) -> Never:
    """End a call with the status for ``error``; always raises."""
    await context.abort(*status_of(error))
    raise AssertionError("abort raises")
