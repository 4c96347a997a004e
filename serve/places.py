"""Places: how many calls, streams and watchers a server has open at once, and who gives way when all are taken.

A call takes a place when it arrives, before its message does, because gRPC buffers messages that are on their way.
When no place is free, a newcomer gets that of a call which only waits for its peer: of the connection with the most
places, the one that has waited longest. An ordinary call waits for microseconds, so what gives way is a client that
holds places without using them. A connection never displaces one that has fewer places than itself.

How many calls one connection may have at all is told to its client by HTTP/2 (``limits.connection_calls``), which
then keeps further ones back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import grpc

from omcda_deploy.serve.status import ExhaustedError, StoppingError

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Reasons of refusals in metrics. full: no place is free. connection: it has too many. slow: the caller neither
# sends nor reads. operator: ended by one. message: none that can be read, as it is too large for instance.
REFUSALS = ("full", "connection", "slow", "operator", "message")
STOPPING = "the server is stopping: use another one, or try again later"


class State(NamedTuple):
    """Occupation of an open call."""

    name: str
    limit_s: float  # it is ended after so many seconds
    yields_s: float  # it gives way to a newcomer after so many seconds
    waits: bool = True  # for its peer, with nothing to do meanwhile: it can be ended at any moment


FIRST_MESSAGE = State("first message", 5.0, 0.0)
NEXT_MESSAGE = State("next message", math.inf, 2.0)
SENDING = State("sending", 10.0, 0.25, waits=False)  # longer only if the peer does not read
WATCHING = State("watching", math.inf, 0.0)
ANSWERING = State("answering", math.inf, math.inf, waits=False)


class Place:
    """The place of one open call.

    ``since``: when it entered its ``state``. ``steps``: answered ones of a stream. ``ended``: why somebody other
    than its caller ended it; None until then. One is made for every call: what few calls change is the class'.
    """

    context: Context
    task: asyncio.Task[Any]
    began: float
    since: float
    state = FIRST_MESSAGE
    steps = 0
    ended: Exception | None = None
    _peer: str | None = None

    @property
    def peer(self) -> str:
        """The connection, as gRPC names it: ``ipv4:127.0.0.1:41234``."""
        if self._peer is None:
            self._peer = self.context.peer()
        return self._peer

    def enter(self, state: State) -> None:
        """Note that the call does something else from now on."""
        self.state = state
        self.since = time.monotonic()

    def await_next(self) -> None:
        """Note that the call waits for its next message. Raises the reason if somebody has ended it."""
        if self.ended is not None:
            raise self.ended
        self.enter(NEXT_MESSAGE)


class Places:
    """The places for calls of one kind.

    ``kind``: in words, in the plural. ``setting``: name of the limit in the configuration. ``refused``: counts
    refusals by reason. ``per_connection``: places that one connection may have.
    """

    def __init__(
        self,
        kind: str,
        limit: int,
        setting: str,
        refused: Counter[str],
        per_connection: int | None = None,
    ) -> None:
        self._kind, self._limit, self._setting = kind, limit, setting
        self._per_connection = per_connection
        self.refused = refused
        self._open: dict[Place, None] = {}  # in the order of their arrival
        self._loop: asyncio.AbstractEventLoop | None = None
        self.arrived = 0  # calls that came, those that were refused a place among them
        self._stopping = False
        self._over = asyncio.Event()

    def resize(self, limit: int, per_connection: int | None = None) -> None:
        """Change both limits; calls that are open stay."""
        self._limit, self._per_connection = limit, per_connection

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Place]:
        return iter(tuple(self._open))

    @property
    def answering(self) -> bool:
        """True while one of the calls is being answered."""
        return any(place.state is ANSWERING for place in self)

    def take(self, context: Context) -> Place:
        """Take a place for the call that the present task handles; :meth:`leave` gives it back.

        Raises :class:`ExhaustedError` if there is none, and :class:`StoppingError`.
        """
        self.arrived += 1
        if self._stopping:
            raise StoppingError(STOPPING)
        if self._per_connection is not None:
            self._require_few_of(context.peer(), self._per_connection)
        if len(self._open) >= self._limit:
            self._make_room(context.peer())
        place = Place()
        place.context, place.task = context, self._current_task()
        place.began = place.since = time.monotonic()
        self._open[place] = None
        return place

    def leave(self, place: Place) -> None:
        """Give a place back, if it has not been taken away already."""
        self._open.pop(place, None)

    def end(self, place: Place, reason: Exception) -> None:
        """End a call: at once if it waits for its peer, otherwise when what it does is done.

        Its handler is woken by a cancellation, or looks when it is done; it finds ``place.ended`` and ends the call
        itself, as gRPC takes one end of a call only.
        """
        place.ended = reason
        if place.state.waits or time.monotonic() - place.since >= place.state.yields_s:
            self.leave(place)
            place.task.cancel()

    def sweep(self) -> None:
        """End the calls that have waited for longer than their state allows."""
        now = time.monotonic()
        for place in self:
            if now - place.since > place.state.limit_s:
                self.refused["slow"] += 1
                expected = "its first message" if place.state is FIRST_MESSAGE else "its answers to be read"
                self.end(
                    place,
                    ExhaustedError(
                        f"expected {expected} within {place.state.limit_s:g} s, and waited in vain: its place is "
                        "given to others"
                    ),
                )

    def stop(self) -> None:
        """Refuse newcomers from now on, and end all others as :meth:`end` does."""
        self._stopping = True
        for place in self:
            self.end(place, StoppingError(STOPPING))

    def release(self) -> None:
        """Let :meth:`hold` return, as the server has begun to close its connections."""
        self._over.set()

    async def hold(self) -> None:
        """Hold back the refusal of a call if it came after :meth:`stop`, for the moment until :meth:`release`.

        A caller that is refused calls again at once. What gRPC finds in its queue when it begins to close a
        connection, it cancels; a caller that is told after that moment takes no such risk.
        """
        if self._stopping:
            await self._over.wait()

    def _current_task(self) -> asyncio.Task[Any]:
        """Return the task that runs. The event loop is remembered, as asking for it is a system call."""
        task = None if self._loop is None else asyncio.current_task(self._loop)
        if task is None:
            self._loop = asyncio.get_running_loop()
            task = asyncio.current_task(self._loop)
            assert task is not None
        return task

    def _require_few_of(self, peer: str, limit: int) -> None:
        if sum(place.peer == peer for place in self._open) >= limit:
            self.refused["connection"] += 1
            raise ExhaustedError(
                f"expected at most {limit} {self._kind} of one connection, and so many are open: close one, or "
                f"raise {self._setting}"
            )

    def _make_room(self, newcomer: str) -> None:
        """Take the place of a call that may give way. Raises :class:`ExhaustedError` if there is none."""
        now = time.monotonic()
        counts = Counter(place.peer for place in self._open)
        victim = max(
            (place for place in self._open if now - place.since >= place.state.yields_s),
            key=lambda place: (counts[place.peer], now - place.since),
            default=None,
        )
        self.refused["full"] += 1
        if victim is None or counts[victim.peer] <= counts[newcomer]:
            raise ExhaustedError(
                f"expected at most {self._limit} {self._kind}, and so many are open: close one, or raise "
                f"{self._setting}"
            )
        self.end(
            victim,
            ExhaustedError(
                f"{self._limit} {self._kind} are open, and this one waited for its caller: its place was given to "
                f"another connection. Try again, or raise {self._setting}"
            ),
        )
