"""Real server processes for tests."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from omcda_deploy.bundle import Bundle

STOP_LIMIT_S = 15.0


@dataclass(frozen=True)
class ServerProcess:
    endpoint: str
    process: subprocess.Popen[str]


@contextmanager
def server_process(
    source: Bundle | Path,
    *models: str,
    start: Sequence[str] = ("-m", "omcda_deploy.serve"),
    options: Sequence[str] = (),
    log: Path | None = None,
) -> Iterator[ServerProcess]:
    """A server of ``models`` on a free port, ready; stopped at the end unless the test has done so.

    What it writes to stderr goes into ``log``, or to the test's own.
    """
    path = source.path if isinstance(source, Bundle) else source
    command = [sys.executable, *start, str(path), *options]
    command += [argument for model in models for argument in ("--model", model)]
    with (
        log.open("w") if log else nullcontext() as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()  # empty when the process ends first
            assert ready.startswith("serving "), f"the server did not start: {ready!r}"
            yield ServerProcess(ready.split()[-1], process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
