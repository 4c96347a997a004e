"""The thread that answers large requests, so that ordinary control steps need not wait for them.

A batch of thousands of rows takes a tenth of a second and more. It runs whole, as another number of rows would be
summed in another order and answered with other bits. Such requests are answered one after another.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

LARGE_BYTES = 1 << 14  # of a request; smaller ones take a millisecond or less
RELEASE_AFTER_S = (1.0, 10.0)  # without a large request; again, as clients close their connections
LARGE_PIECE = 1 << 18  # bytes
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)


class Batches:
    """Runs functions for large requests in a thread of their own."""

    def __init__(self) -> None:
        self.release_memory: Callable[[], None] = return_free_memory  # called after the last one
        self._thread = ThreadPoolExecutor(1, "batches")
        self._waiting = 0
        self._timers: list[asyncio.TimerHandle] = []

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function when those before it are done."""
        loop = asyncio.get_running_loop()
        self._waiting += 1
        try:
            return await loop.run_in_executor(self._thread, function, *arguments)
        finally:
            self._waiting -= 1
            self.plan_release()

    def plan_release(self) -> None:
        """Release memory in a moment, if no large request comes until then."""
        for timer in self._timers:
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(seconds, self._release) for seconds in RELEASE_AFTER_S]

    def _release(self) -> None:
        if not self._waiting:
            self._thread.submit(self.release_memory)


def return_large_memory() -> None:
    """Let large pieces of memory go back to the system when they are freed, from now on.

    glibc would keep more and more of them, in heaps of each thread, after the first that it has seen.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc only
        set_option(_MMAP_THRESHOLD, LARGE_PIECE)


def return_free_memory() -> None:
    """Return memory that was freed to the system; glibc would keep it, in pieces."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
        trim(0)
