"""Child processes that end with the process that started them, however that one ends.

A parent starts a child with :func:`child_environment`; the child's program calls :func:`end_with_parent` first of
all. A process that is killed cannot stop its children, so the children watch it. One that SIGTERM or Ctrl-C asks to
end (:func:`unwinding_on_sigterm`) asks those first that it started here, so that they clean up too.
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

from omcda_deploy.errors import TerminatedError

CHECK_S = 0.2  # between two looks at the parent
_PARENT = "OMCDA_PARENT"  # process id
INTERRUPTED = 128 + signal.SIGINT  # exit statuses
TERMINATED = 128 + signal.SIGTERM

_children: set[subprocess.Popen[bytes]] = set()
_has_parent = False
_ending = 0  # the first signal that asked this process to end


class _Postponed(threading.local):
    """State of a thread: while ``now``, signals wait. They interrupt the main thread alone."""

    now = False


_postponed = _Postponed()


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process' environment with ``changes``, for a child that is to end with this process."""
    return {**os.environ, **changes, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Watch the parent that started this process with :func:`child_environment`, and end when it is gone.

    Processes that were started otherwise, and the children of this process, are not affected. The end is as sudden
    as by SIGKILL, 0.2 s after the parent's.
    """
    global _has_parent
    parent = os.environ.pop(_PARENT, None)
    if parent is None:
        return
    _has_parent = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: the parent passes it on as SIGTERM
    # SLURM warns all processes of a job before its time limit. The parent acts on it: it stops this process and
    # queues the job again.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(int(parent),), name="parent watch", daemon=True).start()


def has_parent() -> bool:
    """Test if this process called :func:`end_with_parent` and is such a child."""
    return _has_parent


def is_ending() -> bool:
    """Test if SIGTERM or Ctrl-C has asked this process to end."""
    return _ending != 0


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_S)
    with suppress(OSError):  # the parent may have been the reader
        os.write(2, f"process {parent}, which started this one, has ended: stopping\n".encode())
    os._exit(TERMINATED)


def start_child(command: Sequence[str], niceness: int = 0) -> subprocess.Popen[bytes]:
    """Start a command as a child that ends with this process, ``niceness`` below its priority."""
    child = subprocess.Popen(command, env=child_environment(), preexec_fn=lambda: os.nice(niceness))
    _children.add(child)
    return child


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


@contextmanager
def postponing_signals() -> Iterator[None]:
    """Let a signal that ends this process wait for the block, which must be short.

    What the block makes is then either not there or known to a clean-up. So must run what shares locks with another
    thread, such as a :class:`queue.Queue`: left half-way, it never gives them back.
    """
    before, _postponed.now = _postponed.now, True
    try:
        yield
    finally:
        _postponed.now = before


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that context managers remove what is half-written.

    SIGTERM raises :class:`TerminatedError`, with the exit status 143, and Ctrl-C KeyboardInterrupt. A second signal
    does not disturb the clean-up.
    """
    numbers = (signal.SIGTERM, signal.SIGALRM, *(() if _has_parent else (signal.SIGINT,)))
    before = {number: signal.signal(number, _unwind) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, _told_unless_stopping
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind(number: int, frame: FrameType | None) -> None:
    global _ending
    if not _ending:
        _ending = number
        for child in tuple(_children):
            child.terminate()
        # Extension modules swallow exceptions as they are imported: it is raised again until it gets through.
        signal.setitimer(signal.ITIMER_REAL, CHECK_S, CHECK_S)
    if not _postponed.now and not _is_unwinding():  # else the timer comes back to it
        raise KeyboardInterrupt if _ending == signal.SIGINT else TerminatedError(TERMINATED)


def _told_unless_stopping(unraisable: sys.UnraisableHookArgs) -> None:
    """Report an exception that could not be raised, as Python does, unless it will be raised again."""
    if not issubclass(unraisable.exc_type, TerminatedError | KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _is_unwinding() -> bool:
    """Test if the clean-up that runs at this moment, if any, is that of a signal."""
    error = sys.exception()
    while error is not None and not isinstance(error, TerminatedError | KeyboardInterrupt):
        error = error.__context__
    return error is not None
