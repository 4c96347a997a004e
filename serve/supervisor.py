"""One server process per agent: started together, watched, started again where one dies, and stopped together."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from omcda_deploy.errors import EndpointError
from omcda_deploy.serve.config import read_server_config
from omcda_deploy.serve.releases import Repository
from omcda_deploy.serve.server import GRACE_S, NOTICE_S, Listen, address_of, require_startable, say

log = logging.getLogger(__name__)

START_LIMIT_S = 60.0
POLL_S = 0.1
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 10.0  # before a server that died is started again
HEALTHY_S = 60.0  # of life, after which the next delay is the first again
KILL_MARGIN_S = 5.0  # a server that outlives its grace by this much is killed


class Backoff:
    """How long to wait before a server is started again: longer each time, unless it had lived a while."""

    def __init__(self) -> None:
        self._delay_s = FIRST_DELAY_S

    def after(self, lived_s: float) -> float:
        """Seconds to wait after a life of ``lived_s`` seconds."""
        if lived_s >= HEALTHY_S:
            self._delay_s = FIRST_DELAY_S
        delay, self._delay_s = self._delay_s, min(2.0 * self._delay_s, LONGEST_DELAY_S)
        return delay


class AgentServer:
    """The process that serves one agent, or its place while there is none."""

    def __init__(self, agent: str, endpoint: str, command: Sequence[str]) -> None:
        self.agent = agent
        self.endpoint = endpoint
        self._command = command
        self._backoff = Backoff()
        self._restart_at: float | None = None
        self._start()

    def exit_status(self) -> int | None:
        """The process' exit status, minus the signal's number where one killed it; None while it lives."""
        return self._process.poll()

    def keep_alive(self) -> None:
        """Start the process again where it has died, after a pause; does not wait for either."""
        now = time.monotonic()
        if self._restart_at is not None:
            if now >= self._restart_at:
                try:
                    self._start()
                except OSError as error:  # no memory or no process left: perhaps next time
                    log.error("the server of %s cannot be started: %s", self.agent, error.strerror)
        elif (status := self.exit_status()) is not None:
            delay = self._backoff.after(now - self._started)
            self._restart_at = now + delay
            log.error(
                "the server of %s on %s exited with status %s and is started again in %.1f s",
                self.agent,
                self.endpoint,
                status,
                delay,
            )

    @property
    def ready(self) -> bool:
        """Whether the process has said that it serves."""
        return self._ready.is_set()

    def terminate(self) -> None:
        if self.exit_status() is None:
            self._process.terminate()

    def wait(self, limit_s: float) -> None:
        """Return when the process has ended; after ``limit_s`` it is killed."""
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            log.error("the server of %s did not stop within its grace and is killed", self.agent)
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._restart_at = None
        self._started = time.monotonic()
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._ready = threading.Event()
        # Its first line, which it prints when it is ready, whatever its address and certificates are.
        reader = threading.Thread(target=self._listen, args=(self._process, self._ready), daemon=True)
        reader.start()

    @staticmethod
    def _listen(process: subprocess.Popen[bytes], ready: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout as said:
            for _ in said:
                ready.set()


def serve_team(
    source: str | Path,
    listen: Listen,
    *,
    config_path: Path | None = None,
    trace: bool = False,
    json_logs: bool = False,
    grace_s: float = GRACE_S,
) -> None:
    """Serve every agent of a team in a process of its own until SIGTERM or SIGINT.

    ``source`` is :func:`serve`'s; agent i listens on the ports of ``listen`` + i. Prints one line per endpoint as
    soon as all are ready. On a signal all servers drain (:func:`serve`) and the function returns. A server that
    dies later is started again (:class:`Backoff`) and that is logged; the others go on.

    Raises :class:`BundleError`, and :class:`EndpointError` where a server cannot be started the first time (the
    others are then stopped).
    """
    flags = [*(["--trace"] if trace else []), *(["--log-json"] if json_logs else [])]
    repository = Repository(Path(source))
    agents = repository.read(repository.current()[0]).spec.names
    read_server_config(config_path).guards_of(agents)  # one complaint rather than one per process
    places = {agent: _shifted(listen, index) for index, agent in enumerate(agents)}
    if listen.port == 0:
        raise EndpointError("--base-port: expected the port of the first agent, from 1 on, got 0")
    require_startable(list(places.values()), grace_s)
    with _stop_signal() as stop:
        servers: list[AgentServer] = []
        try:
            for agent, place in places.items():
                command = [*_command(Path(source), agent, place, config_path, grace_s), *flags]
                servers.append(AgentServer(agent, address_of(place.host, place.port), command))
            _wait_until_ready(servers, stop)
            if not stop.is_set():
                for server in servers:
                    say(f"serving {server.agent} on {server.endpoint}")
            while not stop.wait(POLL_S):
                for server in servers:
                    server.keep_alive()
        finally:
            _stop(servers, grace_s)


def _shifted(listen: Listen, by: int) -> Listen:
    def port(first: int | None) -> int | None:
        return None if first is None else first + by

    return Listen(
        listen.host,
        listen.port + by,
        port(listen.metrics_port),
        port(listen.admin_port),
        port(listen.health_port),
    )


def _command(source: Path, agent: str, place: Listen, config_path: Path | None, grace_s: float) -> list[str]:
    command = [sys.executable, "-m", "omcda_deploy.serve", str(source)]
    command += ["--model", agent, "--host", place.host, "--port", str(place.port), "--grace", str(grace_s)]
    command += ["--supervisor", str(os.getpid())]
    for option, value in (
        ("--metrics-port", place.metrics_port),
        ("--admin-port", place.admin_port),
        ("--health-port", place.health_port),
        ("--config", config_path),
    ):
        if value is not None:
            command += [option, str(value)]
    return command


def _wait_until_ready(servers: Sequence[AgentServer], stop: threading.Event) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    for server in servers:
        while not (stop.is_set() or server.ready):
            for other in servers:
                if (status := other.exit_status()) is not None:
                    raise EndpointError(
                        f"the server of {other.agent} on {other.endpoint} did not start: it exited with status "
                        f"{status} and said why above. All servers are stopped"
                    )
            if time.monotonic() > deadline:
                raise EndpointError(
                    f"the server of {server.agent} on {server.endpoint} was not ready within "
                    f"{START_LIMIT_S:.0f} s: look at the load of this machine. All servers are stopped"
                )
            stop.wait(POLL_S)


def _stop(servers: Sequence[AgentServer], grace_s: float) -> None:
    for server in servers:
        server.terminate()
    deadline = time.monotonic() + NOTICE_S + grace_s + KILL_MARGIN_S
    for server in servers:
        server.wait(max(0.0, deadline - time.monotonic()))


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set instead of ending this process, so that it can stop its servers."""
    stop = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
