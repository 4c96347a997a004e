"""Limits of the use of a client: one thread at a time, until it is closed, in the process that made it."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import NoReturn, Self

from omcda_deploy.errors import EndpointError

_forks = 0  # between the first process and this one; cheaper to look at than the process id


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Usage:
    """The use of one client, whose type is ``kind``. As a context manager it holds one call.

    Entering raises :class:`EndpointError` for a call beside another one, after :attr:`closed` was set, and in
    another process than the client was made in.
    """

    def __init__(self, kind: str) -> None:
        self.closed = False
        self._kind = kind
        self._calls = threading.Lock()
        self._process, self._forks = os.getpid(), _forks

    def refuse_pickling(self) -> NoReturn:
        """Raise :class:`EndpointError`, as connections cannot be moved."""
        raise EndpointError(
            f"a {self._kind} cannot be pickled or copied: send its endpoints, and make one where it is used"
        )

    def __enter__(self) -> None:
        if _forks != self._forks:
            raise EndpointError(
                f"this {self._kind} was made in process {self._process}: make one in each process, after the fork"
            )
        if self.closed:
            raise EndpointError(f"this {self._kind} is closed: make a new one from its endpoints")
        if not self._calls.acquire(blocking=False):
            raise EndpointError(
                f"this {self._kind} is in use by another thread: make one for each thread, or call it under a lock"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.release()


class UsedByOne:
    """Base of clients: closed at the end of a ``with`` block, and never pickled. ``_usage``: holds each call."""

    def __init__(self) -> None:
        self._usage = Usage(type(self).__name__)

    def close(self) -> None:
        """Close the client; each has its own way."""
        raise NotImplementedError

    def __reduce__(self) -> NoReturn:
        self._usage.refuse_pickling()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
