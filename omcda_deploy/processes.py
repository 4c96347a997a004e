"""Child processes that end with the process that started them, however that one ends.

A parent starts a child with :func:`child_environment`; the child's program calls :func:`end_with_parent` first of
all. A process that is killed cannot stop its children, so the children watch it. One that SIGTERM asks to end
(:func:`unwinding_on_sigterm`) asks those first that it started with :func:`run_child`, so that they clean up too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

CHECK_S = 0.2  # between two looks at the parent
_PARENT = "OMCDA_PARENT"  # process id
_TERMINATED = 128 + signal.SIGTERM  # the exit status

_children: set[subprocess.Popen[bytes]] = set()  # of run_child
_ending = False


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process' environment with ``changes``, for a child that is to end with this process."""
    return {**os.environ, **changes, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Watch the parent that started this process with :func:`child_environment`, and end when it is gone.

    Processes that were started otherwise, and the children of this process, are not affected. The end is as sudden
    as by SIGKILL, 0.2 s after the parent's.
    """
    parent = os.environ.pop(_PARENT, None)
    if parent is None:
        return
    # SLURM warns all processes of a job before its time limit. The parent acts on it: it stops this process and
    # queues the job again.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(int(parent),), name="parent watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_S)
    with suppress(OSError):  # the parent may have been the reader
        os.write(2, f"process {parent}, which started this one, has ended: stopping\n".encode())
    os._exit(_TERMINATED)


def run_child(command: Sequence[str], output: IO[str] | None = None, **changes: str) -> int:
    """Run a command as a child that ends with this process; return its exit status.

    ``output`` takes what it prints; ``changes`` are to its environment.
    """
    environment = child_environment(**changes)
    errors = None if output is None else subprocess.STDOUT
    with subprocess.Popen(command, stdout=output, stderr=errors, env=environment) as child:
        _children.add(child)
        try:
            if _ending:  # this process was asked to meanwhile
                child.terminate()
            return child.wait()
        finally:
            _children.discard(child)


class _TerminatedError(SystemExit):
    """SIGTERM came."""


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that context managers remove what is half-written.

    The exit status is 143. A second SIGTERM does not disturb that.
    """
    before = {number: signal.signal(number, _unwind) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind(number: int, frame: FrameType | None) -> None:
    global _ending
    if not _ending:
        _ending = True
        for child in tuple(_children):
            child.terminate()
        # Extension modules swallow exceptions as they are imported: it is raised again until it gets through.
        signal.setitimer(signal.ITIMER_REAL, CHECK_S, CHECK_S)
    if not _is_unwinding():
        raise _TerminatedError(_TERMINATED)


def _is_unwinding() -> bool:
    """Test if the clean-up that runs at this moment, if any, is that of a termination."""
    error = sys.exception()
    while error is not None and not isinstance(error, _TerminatedError):
        error = error.__context__
    return error is not None
