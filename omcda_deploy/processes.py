"""Child processes that end with the process that started them, however that one ends.

A parent starts a child with :func:`child_environment`; the child's program calls :func:`end_with_parent` first of
all. A process that is killed cannot stop its children, so the children watch it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

CHECK_S = 0.2  # between two looks at the parent
_PARENT = "OMCDA_PARENT"  # process id


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
    os._exit(128 + signal.SIGTERM)
