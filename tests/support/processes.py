"""Processes of this machine that tests started, found by what stands on their command lines."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def running(folder: Path, *words: str) -> dict[int, str]:
    """Processes whose command lines name ``folder`` and hold all ``words``: id -> command line."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout
    lines = (line.strip().partition(" ") for line in listed.splitlines())
    return {int(pid): line for pid, _, line in lines if all(word in line for word in (str(folder), *words))}


def wait_for(condition: Callable[[], object], seconds: float, message: str) -> None:
    """Return once ``condition`` is true. Raises :class:`AssertionError` with ``message`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)
