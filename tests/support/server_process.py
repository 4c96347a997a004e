"""Real server processes for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from omcda_deploy.bundle import Bundle

ROOT = Path(__file__).parents[2]  # from which  python -m tests.…  runs
STOP_LIMIT_S = 15.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server and its address."""

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
    """Yield a ready server of ``models`` on a free port; stop it at the end unless the test has done so.

    ``log``: file for the server's stderr; the test's own stderr if None.
    """
    path = source.path if isinstance(source, Bundle) else source
    command = [sys.executable, *start, str(path), *options]
    command += [argument for model in models for argument in ("--model", model)]
    with (
        log.open("w") if log else nullcontext() as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
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
    """Return a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive ports that are free at this moment.

    Test runs that share a machine begin their search at different ports.
    """
    for offset in range(0, 10_000, count):
        first = 20_000 + (37 * os.getpid() + offset) % 10_000
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def require_ports_free(first: int, count: int) -> None:
    """Raise OSError unless a server could listen on each of ``count`` ports from ``first`` on."""
    for port in range(first, first + count):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            probe.listen()
