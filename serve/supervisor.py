"""One server process per agent, started, watched and stopped together."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omcda_deploy.bundle import read_bundle
from omcda_deploy.connection import open_channel
from omcda_deploy.errors import EndpointError
from omcda_deploy.serve.config import read_server_config
from omcda_deploy.serve.server import GRACE_S, LOOPBACK, NOTICE_S, address_of, require_free, say

log = logging.getLogger(__name__)

START_LIMIT_S = 60.0
POLL_S = 0.1
KILL_MARGIN_S = 5.0  # a server that outlives its grace by this much is killed


@dataclass(frozen=True)
class AgentServer:
    """The process that serves one agent."""

    agent: str
    endpoint: str
    process: subprocess.Popen[bytes]


def serve_team(
    bundle_path: str | Path,
    host: str = LOOPBACK,
    base_port: int = 8500,
    *,
    config_path: Path | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Serve every agent of a bundle in a process of its own, agent i on ``base_port`` + i, until SIGTERM or SIGINT.

    Prints one line per endpoint as soon as all are ready. On a signal all servers drain (:func:`serve`) and the
    function returns. A server that dies later is reported, and the others go on.

    Raises :class:`BundleError`, and :class:`EndpointError` where a server cannot be started (the others are then
    stopped) or all have died.
    """
    bundle = read_bundle(bundle_path)
    read_server_config(config_path).guards_of(bundle.spec.names)  # one complaint rather than one per process
    ports = {name: base_port + index for index, name in enumerate(bundle.spec.names)}
    for port in ports.values():
        require_free(host, port)
    with _stop_signal() as stop:
        servers: list[AgentServer] = []
        try:
            for agent, port in ports.items():
                servers.append(_start(bundle.path, agent, host, port, config_path, grace_s))
            _wait_until_ready(servers, stop)
            if not stop.is_set():
                for server in servers:
                    say(f"serving {server.agent} on {server.endpoint}")
            _watch(servers, stop)
        finally:
            _stop(servers, grace_s)


def _start(
    bundle: Path, agent: str, host: str, port: int, config_path: Path | None, grace_s: float
) -> AgentServer:
    command = [sys.executable, "-m", "omcda_deploy.serve.server", str(bundle)]
    command += ["--model", agent, "--host", host, "--port", str(port), "--grace", str(grace_s)]
    if config_path is not None:
        command += ["--config", str(config_path)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return AgentServer(agent, address_of(host, port), process)


def _wait_until_ready(servers: Sequence[AgentServer], stop: threading.Event) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    for server in servers:
        with open_channel(server.endpoint) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not (stop.is_set() or _is_serving(health)):
                for other in servers:
                    if (status := other.process.poll()) is not None:
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


def _is_serving(health: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0, wait_for_ready=True)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _watch(servers: Sequence[AgentServer], stop: threading.Event) -> None:
    alive = list(servers)
    while not stop.wait(POLL_S):
        for server in tuple(alive):
            if (status := server.process.poll()) is not None:
                alive.remove(server)
                log.error(
                    "the server of %s on %s exited with status %s", server.agent, server.endpoint, status
                )
        if not alive:
            raise EndpointError("all servers have exited: start them again with  omcda-deploy serve")


def _stop(servers: Sequence[AgentServer], grace_s: float) -> None:
    for server in servers:
        if server.process.poll() is None:
            server.process.terminate()
    deadline = time.monotonic() + NOTICE_S + grace_s + KILL_MARGIN_S
    for server in servers:
        try:
            server.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("the server of %s did not stop within its grace and is killed", server.agent)
            server.process.kill()
            server.process.wait()


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
