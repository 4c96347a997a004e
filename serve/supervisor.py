"""A supervisor: one server process per agent, started together, restarted if one dies, stopped together."""

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
from dataclasses import replace
from types import FrameType

from omcda_deploy.errors import EndpointError
from omcda_deploy.serve.config import read_server_config
from omcda_deploy.serve.options import Listen, ServeOptions
from omcda_deploy.serve.releases import Repository
from omcda_deploy.serve.server import NOTICE_S, address_of, print_ready_line, require_startable

log = logging.getLogger(__name__)

START_LIMIT_S = 60.0
POLL_S = 0.1
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 10.0  # before a server that died is started again
HEALTHY_S = 60.0  # a server that lived this long is started again after the first delay
KILL_MARGIN_S = 5.0  # from the end of the grace period until a server is killed


class Backoff:
    """Delays before a server is started again: doubled each time, unless the server had lived for a while."""

    def __init__(self) -> None:
        self._delay_s = FIRST_DELAY_S

    def after(self, lived_s: float) -> float:
        """Return the seconds to wait after a life of ``lived_s`` seconds."""
        if lived_s >= HEALTHY_S:
            self._delay_s = FIRST_DELAY_S
        delay, self._delay_s = self._delay_s, min(2.0 * self._delay_s, LONGEST_DELAY_S)
        return delay


class AgentServer:
    """The process that serves one agent, and its restarts."""

    def __init__(self, agent: str, endpoint: str, command: Sequence[str]) -> None:
        self.agent = agent
        self.endpoint = endpoint
        self._command = command
        self._backoff = Backoff()
        self._restart_at: float | None = None
        self._start()

    def exit_status(self) -> int | None:
        """Return the process' exit status, negative for a signal that killed it; None while it lives."""
        return self._process.poll()

    def keep_alive(self) -> None:
        """Start the process again if it has died and its delay has passed. Never waits."""
        now = time.monotonic()
        if self._restart_at is not None:
            if now >= self._restart_at:
                try:
                    self._start()
                except OSError as error:  # no memory or process left: tried again after the next delay
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
        """True once the process has printed its ready line."""
        return self._ready.is_set()

    def terminate(self) -> None:
        if self.exit_status() is None:
            self._process.terminate()

    def wait(self, limit_s: float) -> None:
        """Return when the process has ended; kill it after ``limit_s`` seconds."""
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            log.error("the server of %s did not stop within its grace and is killed", self.agent)
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        """Start the process, and a thread that waits for its ready line."""
        self._restart_at = None
        self._started = time.monotonic()
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._ready = threading.Event()
        # A server prints its first line when it is ready, whatever its address and certificates are.
        reader = threading.Thread(target=self._listen, args=(self._process, self._ready), daemon=True)
        reader.start()

    @staticmethod
    def _listen(process: subprocess.Popen[bytes], ready: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for _ in lines:
                ready.set()


def serve_team(options: ServeOptions) -> None:
    """Serve every agent of a team in a process of its own until SIGTERM or SIGINT.

    Agent i listens on the ports of ``options.listen`` + i. Prints one line per endpoint as soon as all servers are
    ready. On a signal all servers drain (:func:`serve`) and the function returns. A server that dies later is
    started again (:class:`Backoff`) and the death is logged; the others go on.

    Raises :class:`BundleError`, :class:`ConfigError`, and :class:`EndpointError` if a server does not start the
    first time (the others are then stopped).
    """
    repository = Repository(options.source)
    agents = repository.read(repository.current()[0]).spec.names
    read_server_config(options.config).guards_of(agents)  # one error message rather than one per process
    places = {agent: options.listen.shifted(index) for index, agent in enumerate(agents)}
    if options.listen.port == 0:
        raise EndpointError("--base-port: expected the port of the first agent, from 1 on, got 0")
    require_startable(list(places.values()), options.grace_s)
    with _stop_signal() as stop:
        servers: list[AgentServer] = []
        try:
            for agent, place in places.items():
                endpoint = address_of(place.host, place.port)
                servers.append(AgentServer(agent, endpoint, _command(options, agent, place)))
            _wait_until_ready(servers, stop)
            if not stop.is_set():
                for server in servers:
                    print_ready_line(f"serving {server.agent} on {server.endpoint}")
            while not stop.wait(POLL_S):
                for server in servers:
                    server.keep_alive()
        finally:
            _stop(servers, options.grace_s)


def _command(options: ServeOptions, agent: str, place: Listen) -> list[str]:
    """Return the command line of one agent's server."""
    child = replace(options, models=(agent,), listen=place, supervisor=os.getpid())
    return [sys.executable, "-m", "omcda_deploy.serve", *child.to_argv()]


def _wait_until_ready(servers: Sequence[AgentServer], stop: threading.Event) -> None:
    """Return when all servers are ready, or ``stop`` is set. Raises :class:`EndpointError` if one is not."""
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
    """Yield an event that SIGTERM and SIGINT set instead of ending this process, which then stops its servers."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    handlers = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
