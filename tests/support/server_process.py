"""Real server processes for tests."""

from __future__ import annotations

import itertools
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
    """Return a port that is free at this moment, in this process another one each time."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive ports that are free at this moment, each time other ones.

    They lie below those that the system gives to outgoing connections, any of which could take one before a server
    does. Test runs that share a machine begin their search at different ports.
    """
    for _ in range(10_000 // count):
        ports = [20_000 + next(_searched) % 10_000 for _ in range(count)]
        if ports[-1] < ports[0]:  # began again from below
            continue
        try:
            require_ports_free(ports[0], count)
        except OSError:
            continue
        return ports[0]
    raise AssertionError("no free ports")


_searched = itertools.count(37 * os.getpid())


def require_ports_free(first: int, count: int) -> None:
    """Raise OSError unless a server could listen on each of ``count`` ports from ``first`` on."""
    for port in range(first, first + count):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", port))  # a server may listen on every address
            probe.listen()
