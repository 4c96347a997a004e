"""One server process: one or more models of a bundle behind gRPC.

Run as ``python -m omcda_deploy.serve BUNDLE --model agent_0 --port 8500``; the supervisor starts one such
process per agent.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc

from omcda_deploy.errors import ConfigError, EndpointError, OmcdaError
from omcda_deploy.serve import event_loop, introspection, oip, policy_service
from omcda_deploy.serve.admin import AdminService
from omcda_deploy.serve.config import Limits, ServerConfig, read_server_config
from omcda_deploy.serve.handlers import Traffic
from omcda_deploy.serve.logs import log_as_json, log_as_text
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.security import Tls, TokenInterceptor, Tokens
from omcda_deploy.serve.tracing import Tracing

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
GRACE_S = 5.0
ORPHANED_S = 1.0  # between two looks at whether the supervisor lives
# gRPC shares a port between servers by default: a second one would take half of the first one's calls.
_OPTIONS = (("grpc.so_reuseport", 0),)
NOTICE_S = 0.1  # between NOT_SERVING and the first refusal: watchers are told, requests on their way arrive


@dataclass(frozen=True)
class Listen:
    """Where a server listens; port 0 takes a free one, None is not listened on.

    ``metrics_port``: ``/metrics`` for Prometheus, on ``host``. ``admin_port``: AdminService, on loopback whatever
    ``host`` is. ``health_port``: ``grpc.health.v1`` alone, on ``host``, for probes that know no TLS and must be
    answered at any load, as those of Kubernetes: plaintext always, and without limits.
    """

    host: str = LOOPBACK
    port: int = 0
    metrics_port: int | None = None
    admin_port: int | None = None
    health_port: int | None = None


def serve(
    source: str | Path,
    models: Sequence[str],
    listen: Listen | None = None,
    *,
    config: ServerConfig | None = None,
    trace: bool = False,
    grace_s: float = GRACE_S,
    supervisor: int | None = None,
) -> None:
    """Serve ``models`` (agents, or ``team``; none: all) until SIGTERM or SIGINT.

    ``source`` is a bundle, or a folder of bundles by version (:mod:`omcda_deploy.serve.releases`). The line printed
    when the server is ready says on which port. On a signal, health turns NOT_SERVING, what is in flight is
    answered for up to ``grace_s`` seconds, and the function returns. So it does when ``supervisor``, a process id,
    is not this process' parent any more.

    ``trace`` sends OpenTelemetry spans (:mod:`omcda_deploy.serve.tracing`).

    Raises :class:`BundleError`, :class:`UnknownNameError` for a model that the bundle has not,
    :class:`ConfigError` for a guard that it cannot have, and :class:`EndpointError` where an address cannot be
    taken.
    """
    listen, config = listen or Listen(), config or ServerConfig()
    tracing = Tracing() if trace else None
    traffic = Traffic(config.limits, tracing)
    secured = _Security.of(config, traffic)
    require_startable([listen], grace_s)
    releases = Releases(source, models, config)
    try:
        event_loop.run(_serve(releases, listen, traffic, config.limits, secured, grace_s, supervisor))
    finally:
        if tracing is not None:
            tracing.close()


def require_startable(places: Sequence[Listen], grace_s: float) -> None:
    """Raise :class:`EndpointError` where nobody could listen at ``places``, :class:`ConfigError` for the grace."""
    if not 0.0 <= grace_s < math.inf:
        raise ConfigError(f"--grace: expected seconds from 0 on, got {grace_s}")
    asked = [
        (host, port)
        for place in places
        for host, port in (
            (place.host, place.port),
            (place.host, place.metrics_port),
            (LOOPBACK, place.admin_port),
            (place.host, place.health_port),
        )
        if port is not None
    ]
    numbers = [port for _, port in asked if port]
    for host, port in asked:
        require_free(host, port)
        if numbers.count(port) > 1:
            raise EndpointError(
                f"expected a port for each purpose, got {port} twice: choose others for metrics, admin or "
                "health"
            )


def require_free(host: str, port: int) -> None:
    """Raise :class:`EndpointError` unless a server could listen there."""
    if not 0 <= port <= 65535:
        raise EndpointError(
            f"cannot listen on {address_of(host, port)}: expected a port from 0 to 65535, got {port}"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise EndpointError(
            f"cannot listen on {host}: {error.strerror}. Name an address of this machine with --host"
        ) from error
    try:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()  # two sockets may be bound with SO_REUSEADDR, but only one listens
    except OSError as error:
        raise EndpointError(
            f"cannot listen on {address_of(host, port)}: {error.strerror}. Choose another port or stop what uses it"
        ) from error


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class _Security:
    tls: Tls | None
    interceptors: tuple[TokenInterceptor, ...]

    @classmethod
    def of(cls, config: ServerConfig, traffic: Traffic) -> _Security:
        tokens: tuple[TokenInterceptor, ...] = ()
        if config.token_file is not None:
            tokens = (TokenInterceptor(Tokens(config.token_file), traffic.deny),)
        if config.tls is not None:
            config.tls.credentials()  # refuses now what cannot be read
        return cls(config.tls, tokens)

    def add_port(self, server: grpc.aio.Server, host: str, port: int) -> int:
        address = address_of(host, port)
        try:
            if self.tls is None:
                return server.add_insecure_port(address)
            # Of its own for every port: gRPC asks for the first files once per credentials.
            return server.add_secure_port(address, self.tls.credentials())
        except RuntimeError as error:
            raise EndpointError(
                f"cannot listen on {address}: choose another port, and check that the files of [tls] fit together"
            ) from error


async def _serve(
    releases: Releases,
    listen: Listen,
    traffic: Traffic,
    limits: Limits,
    security: _Security,
    grace_s: float,
    supervisor: int | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = grpc.aio.server(
        interceptors=security.interceptors,
        options=(*_OPTIONS, ("grpc.max_receive_message_length", limits.message_bytes)),
        maximum_concurrent_rpcs=limits.concurrent_calls + limits.streams,
    )
    inference = oip.InferenceService(releases)
    policy = policy_service.PolicyService(releases)
    server.add_generic_rpc_handlers((inference.handlers(traffic), policy.handlers(traffic)))
    services = (oip.SERVICE, policy_service.SERVICE)
    health = introspection.Health(services, traffic)
    server.add_generic_rpc_handlers((health.handlers(),))
    introspection.add_reflection(server, (*services, introspection.HEALTH))
    port = security.add_port(server, listen.host, listen.port)
    async with AsyncExitStack() as beside:
        if supervisor is not None:
            beside.callback(asyncio.create_task(_orphaned(supervisor, stop)).cancel)
        if listen.admin_port is not None:
            service = AdminService(releases, lambda: inference.ready)
            await _start_admin(beside, service, listen.admin_port, security)
        if listen.metrics_port is not None:
            from omcda_deploy.serve.metrics import ServerCollector, serve_metrics

            collector = ServerCollector(traffic, releases)
            beside.callback(serve_metrics(collector, listen.host, listen.metrics_port))
        await server.start()
        if listen.health_port is not None:
            await _start_health(beside, health, listen.host, listen.health_port)
        gc.collect()
        gc.freeze()  # what is loaded stays: no later collection walks over it
        say(f"serving {', '.join(releases.models().sessions)} on {address_of(listen.host, port)}")
        await stop.wait()
        inference.ready = False
        await health.enter_graceful_shutdown()
        await asyncio.sleep(min(NOTICE_S, grace_s))
        await traffic.quiet(grace_s / 2)
        await traffic.stop()
        await server.stop(grace_s / 2)


async def _orphaned(supervisor: int, stop: asyncio.Event) -> None:
    """Set ``stop`` when this process has lost its supervisor: nobody would start it again, or stop it."""
    while os.getppid() == supervisor:
        await asyncio.sleep(ORPHANED_S)
    log.error("the supervisor of this server has died: stopping")
    stop.set()


async def _start_admin(beside: AsyncExitStack, service: AdminService, port: int, security: _Security) -> None:
    server = grpc.aio.server(interceptors=security.interceptors, options=_OPTIONS)
    server.add_generic_rpc_handlers((service.handlers(),))
    security.add_port(server, LOOPBACK, port)
    await server.start()
    beside.push_async_callback(server.stop, 0)
    retiring = asyncio.create_task(service.retire())
    beside.callback(retiring.cancel)


async def _start_health(beside: AsyncExitStack, health: introspection.Health, host: str, port: int) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((health.handlers(),))
    _Security(None, ()).add_port(server, host, port)
    await server.start()
    beside.push_async_callback(server.stop, 0)


def say(line: str) -> None:
    """One line for whoever started the server, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m omcda_deploy.serve", description="Serve a bundle.")
    parser.add_argument("source", type=Path, help="a bundle, or a folder of bundles named by version")
    parser.add_argument(
        "--model", action="append", default=[], help="agent or 'team'; repeatable; default all"
    )
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--config", type=Path, help="TOML file: guard, limits")
    parser.add_argument("--metrics-port", type=int, help="where Prometheus may scrape /metrics")
    parser.add_argument("--admin-port", type=int, help="where this machine may load and switch versions")
    parser.add_argument("--health-port", type=int, help="where plaintext probes may ask for health alone")
    parser.add_argument("--trace", action="store_true", help="send OpenTelemetry spans (OTEL_… variables)")
    parser.add_argument("--log-json", action="store_true", help="log JSON lines to stderr")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds for what is in flight")
    parser.add_argument("--supervisor", type=int, help="process to stop with: this one's parent")
    given = parser.parse_args(arguments)
    log_as_json() if given.log_json else log_as_text()
    try:
        config = read_server_config(given.config)
        listen = Listen(given.host, given.port, given.metrics_port, given.admin_port, given.health_port)
        serve(
            given.source,
            given.model,
            listen,
            config=config,
            trace=given.trace,
            grace_s=given.grace,
            supervisor=given.supervisor,
        )
    except OmcdaError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the server handles signals itself
        return 130
    return 0
