"""A supervisor: one server process per agent, started together, restarted if one dies or hangs, stopped together.

The supervisor asks each server every second whether it is well, on the server's standard input. The server's event
loop, which also answers steps, answers on standard output: this needs no port, certificate or token. The answer
says which version it has, so that a server which is started again gets that of its own team.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType

from omcda_deploy.errors import EndpointError, OmcdaError
from omcda_deploy.recordings.segments import require_recordable
from omcda_deploy.serve.config import ServerConfig, read_server_config
from omcda_deploy.serve.options import Listen, ServeOptions
from omcda_deploy.serve.repository import Pin, Repository
from omcda_deploy.serve.server import (
    NOTICE_S,
    WELL,
    address_of,
    print_line,
    record_folder,
    require_startable,
)

log = logging.getLogger(__name__)

START_LIMIT_S = 60.0
POLL_S = 0.1
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 10.0  # before a server that died is started again
HEALTHY_S = 60.0  # a server that lived this long is started again after the first delay
KILL_MARGIN_S = 3.0  # from the end of the grace period until a server is killed
LOOK_S = 1.0  # between two questions to a server
HUNG, SILENT = (
    5,
    3,
)  # questions without an answer after which a server is restarted; on a stop, not waited for
QUESTION = b"?\n"


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
    """The process that serves one agent, and its restarts.

    ``command``: of the next start. ``said``: what it told last of the version that answers; None before the first.
    """

    def __init__(self, agent: str, endpoint: str, command: Sequence[str]) -> None:
        self.agent = agent
        self.endpoint = endpoint
        self.command = command
        self.said: Pin | None = None
        self._backoff = Backoff()
        self._restart_at: float | None = None
        self._start()

    def exit_status(self) -> int | None:
        """Return the process' exit status, negative for a signal that killed it; None while it lives."""
        return self._process.poll()

    def look(self) -> None:
        """Ask the process whether it is well, and kill it if it has not answered for long."""
        if self._restart_at is not None:
            return
        if self._unanswered >= HUNG:
            self._kill(f"has not answered for {HUNG * LOOK_S:.0f} s")
        elif self.ready:
            self._unanswered += 1
            assert self._process.stdin is not None
            with suppress(OSError):  # it has died, or the pipe is full of questions
                os.write(self._process.stdin.fileno(), QUESTION)
        elif time.monotonic() - self._started > START_LIMIT_S:
            self._kill(f"was not ready within {START_LIMIT_S:.0f} s")

    def _kill(self, why: str) -> None:
        log.error("the server of %s on %s %s and is killed", self.agent, self.endpoint, why)
        self._unanswered = 0
        self._process.kill()

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
            self._close_pipe()
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

    def reload(self) -> None:
        """Let the process, which must be ready, read its configuration again."""
        if self.exit_status() is None:
            self._process.send_signal(signal.SIGHUP)

    def terminate(self) -> None:
        """Let the process drain; one that hangs would not."""
        if self.exit_status() is None:
            (self._process.kill if self._unanswered >= SILENT else self._process.terminate)()

    def wait(self, limit_s: float) -> None:
        """Return when the process has ended; kill it after ``limit_s`` seconds."""
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            log.error("the server of %s did not stop within its grace and is killed", self.agent)
            self._process.kill()
            self._process.wait()
        self._close_pipe()

    def _close_pipe(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _start(self) -> None:
        """Start the process, and a thread that reads its lines."""
        self._restart_at = None
        self._started = time.monotonic()
        self._unanswered = 0
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._ready = threading.Event()
        reader = threading.Thread(target=self._listen, args=(self._process, self._ready), daemon=True)
        reader.start()

    def _listen(self, process: subprocess.Popen[bytes], ready: threading.Event) -> None:
        """Read lines: the first one comes when the server is ready, and one for every question."""
        assert process.stdout is not None
        with process.stdout as lines:
            while line := lines.readline():
                if line.startswith(f"{WELL} ".encode()):
                    self.said = Pin.parse(line.decode().split()[1])
                ready.set()
                self._unanswered = 0


def serve_team(options: ServeOptions) -> None:
    """Serve every agent of a team in a process of its own until SIGTERM or SIGINT.

    Agent i listens on the ports of ``options.listen`` + i. Prints one line per endpoint as soon as all servers are
    ready. On SIGHUP they read the configuration again, if it is a right one. On a signal to stop all servers drain
    (:func:`serve`) and the function returns. A server that dies later is
    started again (:class:`Backoff`) and the death is logged; the others go on.

    Raises :class:`BundleError`, :class:`ConfigError`, and :class:`EndpointError` if a server does not start the
    first time (the others are then stopped).
    """
    options = replace(options, listen=options.listen.usable())
    repository = Repository(options.source)
    pin = repository.pin()
    agents = repository.read(pin.version).spec.names
    config = read_server_config(options.config)  # one error message rather than one per process
    config.guards_of(agents)
    if (folder := record_folder(options, config)) is not None:
        require_recordable(folder)
    places = {agent: options.listen.shifted(index) for index, agent in enumerate(agents)}
    if options.listen.port == 0:
        raise EndpointError("--base-port: expected the port of the first agent, from 1 on, got 0")
    require_startable(list(places.values()), options.grace_s)
    with _signals(reloads=options.config is not None) as (stop, reload):
        servers: list[AgentServer] = []
        try:
            for agent, place in places.items():
                endpoint = address_of(place.host, place.port)
                servers.append(AgentServer(agent, endpoint, _command(options, agent, place, pin)))
            _wait_until_ready(servers, stop)
            if not stop.is_set():
                for server in servers:
                    print_line(f"serving {server.agent} on {server.endpoint}")
            look_at, outdated = 0.0, set[AgentServer]()
            while not stop.wait(POLL_S):
                if reload.is_set():
                    reload.clear()
                    outdated.update(servers if _reloadable(options, config, agents) else ())
                for server in [server for server in outdated if server.ready]:
                    server.reload()
                    outdated.discard(server)
                if (now := time.monotonic()) >= look_at:
                    look_at = now + LOOK_S
                    for server in servers:
                        server.look()
                for server in servers:
                    if server.exit_status() is not None:  # only then it will be started again
                        last = _last_of(server, servers) or pin
                        server.command = _command(options, server.agent, places[server.agent], last)
                    server.keep_alive()
        finally:
            _stop(servers, options.grace_s)


def _reloadable(options: ServeOptions, config: ServerConfig, agents: Sequence[str]) -> bool:
    """Return whether servers can take over what the configuration file says by now; the log says why not."""
    try:
        changed = read_server_config(options.config)
        config.require_reloadable(changed)
        changed.guards_of(agents)
    except OmcdaError as error:
        log.error("the configuration of all servers stays as it was: %s", error)
        return False
    return True


def _last_of(server: AgentServer, servers: Sequence[AgentServer]) -> Pin | None:
    """Return what a server has to start with: what the others that live agree on, or else what it said itself.

    Not what the folder says: that may be another team's switch, or nobody's.
    """
    others = {
        other.said for other in servers if other is not server and other.exit_status() is None and other.said
    }
    return others.pop() if len(others) == 1 else server.said


def _command(options: ServeOptions, agent: str, place: Listen, pin: Pin) -> list[str]:
    """Return the command line of one agent's server."""
    child = replace(options, models=(agent,), listen=place, pin=str(pin), supervisor=os.getpid())
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
def _signals(*, reloads: bool) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Yield an event that SIGTERM and SIGINT set instead of ending this process, which then stops its servers.

    And one that SIGHUP sets, if it ``reloads``.
    """
    stop, reload = threading.Event(), threading.Event()
    events = {signal.SIGTERM: stop, signal.SIGINT: stop} | ({signal.SIGHUP: reload} if reloads else {})

    def handle(number: int, frame: FrameType | None) -> None:
        events[signal.Signals(number)].set()

    handlers = {number: signal.signal(number, handle) for number in events}
    try:
        yield stop, reload
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
