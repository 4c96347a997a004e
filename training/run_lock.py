"""A lock beside a run folder, so that one process at a time trains it.

The lock is an ``flock`` on the file ``.NAME.lock`` beside the run folder NAME; it is held while a run is created,
when there is no folder yet, and while it is trained. The operating system drops the lock of a process that dies, so
a file that a killed process left is no obstacle. Between machines that share a folder it holds where the file
system passes ``flock`` on, as NFS does.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from omcda_deploy.errors import ConfigError

# A trainer that outlives its sweep notices within a fraction of a second; the next sweep must not trip over it.
PATIENCE_S = 3.0
RETRY_S = 0.1


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which need not exist yet; its parent must.

    Raises :class:`ConfigError` where another process holds it for 3 s, naming that process, and where the place
    beside the folder cannot be written.
    """
    path = lock_path(run)
    try:
        file = _acquire(path, time.monotonic() + PATIENCE_S)
    except OSError as error:
        raise ConfigError(
            f"cannot lock {run} with {path} ({error.strerror}): expected a folder that can be written, on a file "
            "system with flock"
        ) from error
    if file is None:
        raise _busy(run, path)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock is dropped, so never somebody else's file


def require_unlocked(run: Path) -> None:
    """Raise :class:`ConfigError` where a process trains the run, or creates it."""
    path = lock_path(run)
    with suppress(FileNotFoundError, PermissionError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(run, path) from None


def lock_path(run: Path) -> Path:
    """Return the lock's file; different paths of one folder have the same one."""
    folder = run.resolve()
    return folder.with_name(f".{folder.name}.lock")


def _acquire(path: Path, deadline: float) -> IO[str] | None:
    """Return the locked file, None where another process held it until the deadline."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if time.monotonic() > deadline:
                return None
            time.sleep(RETRY_S)
            continue
        except OSError:
            file.close()
            raise
        if _is_at(path, file):
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # its holder removed it when it ended: there is another file by now, or none


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _busy(run: Path, path: Path) -> ConfigError:
    try:
        pid, host = path.read_text().split()
    except (OSError, ValueError):  # ended meanwhile, or has not written its name yet
        return ConfigError(f"{run} is being trained by another process: wait for it, and try again")
    place = "" if host == socket.gethostname() else f" on {host}"
    return ConfigError(
        f"{run} is being trained by process {pid}{place}: wait for it, or stop it with  kill {pid}{place} and "
        f"continue with  train --resume {run}"
    )
