"""Claims on paths that are being written, so that one process at a time writes each.

A claim is an ``flock`` on the file ``.NAME.lock`` beside the file or folder NAME, which need not exist yet. The
operating system drops the claim of a process that dies, so a lock file that a killed process left is no obstacle.
Between machines that share a folder it holds where the file system passes ``flock`` on, as NFS does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from omcda_deploy.errors import ConfigError
from omcda_deploy.processes import postponing_signals

RETRY_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of the file system


class ClaimedError(ConfigError):
    """Another process writes a path. ``process``: its id, and its machine if it is another; None if not known."""

    def __init__(self, path: Path, process: str | None) -> None:
        self.process = process
        who = "another process" if process is None else f"process {process}"
        super().__init__(f"{path} is being written by {who}: wait for it, or choose another place")


@contextmanager
def claimed(path: Path, *, patience_s: float = 0.0, required: bool = False) -> Iterator[None]:
    """Hold the claim on ``path``, whose folder must exist, while the block writes it.

    Raises :class:`ClaimedError` where another process holds it for ``patience_s``, and :class:`OSError` where its
    folder cannot be written. Where the file system has no locks, the block runs without one unless it is
    ``required``.
    """
    lock = lock_path(path)
    try:
        file = _acquire(lock, time.monotonic() + patience_s)
    except OSError as error:
        if required or error.errno not in _NO_LOCKS:
            raise
        lock.unlink(missing_ok=True)
        yield
        return
    if file is None:
        raise ClaimedError(path, _holder(lock))
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # before the lock is dropped, so never somebody else's file


def require_unclaimed(path: Path) -> None:
    """Raise :class:`ClaimedError` where a process holds the claim on ``path``."""
    lock = lock_path(path)
    with suppress(FileNotFoundError, PermissionError), lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClaimedError(path, _holder(lock)) from None


def lock_path(path: Path) -> Path:
    """Return the lock's file; different paths of one file or folder have the same one."""
    place = path.resolve()
    return place.with_name(f".{place.name}.lock")


def _acquire(path: Path, deadline: float) -> IO[str] | None:
    """Return the locked file, None where another process held it until the deadline."""
    while True:
        with suppress(BlockingIOError):
            if (file := _locked(path)) is not None:
                return file
            continue
        if time.monotonic() > deadline:
            return None
        time.sleep(RETRY_S)


def _locked(path: Path) -> IO[str] | None:
    """Return the locked file, None where its holder removed it meanwhile: there is another one by now, or none.

    Raises :class:`BlockingIOError` where another process holds it, and :class:`OSError` as the system does.
    """
    # A signal that came in between would leave the file behind.
    with postponing_signals(), ExitStack() as unless_locked:
        file = unless_locked.enter_context(path.open("a+"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, file):
            return None
        with suppress(OSError):  # on a full disk the holder stays unnamed
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()
        unless_locked.pop_all()
        return file


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _holder(lock: Path) -> str | None:
    try:
        pid, host = lock.read_text().split()
    except (OSError, ValueError):  # ended meanwhile, or has not written its name yet
        return None
    return pid if host == socket.gethostname() else f"{pid} on {host}"
