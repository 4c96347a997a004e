"""One server process: one or more models of a bundle, served over gRPC.

Run as ``python -m omcda_deploy.serve BUNDLE --model agent_0 --port 8500``. The supervisor starts one such process
per agent.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from omcda_deploy.errors import ConfigError, EndpointError, OmcdaError
from omcda_deploy.serve import event_loop, introspection, oip, policy_service
from omcda_deploy.serve.admin import AdminService
from omcda_deploy.serve.batches import return_free_memory, return_large_memory
from omcda_deploy.serve.config import ServerConfig, read_server_config
from omcda_deploy.serve.handlers import CallTracker
from omcda_deploy.serve.logs import configure_logging
from omcda_deploy.serve.options import LOOPBACK, Listen, ServeOptions
from omcda_deploy.serve.places import Context
from omcda_deploy.serve.recording import FlightRecorder
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.reloading import Reloader
from omcda_deploy.serve.repository import Pin
from omcda_deploy.serve.security import Access, Tls, TokenInterceptor, Tokens
from omcda_deploy.serve.tracing import Tracing

log = logging.getLogger(__name__)

SUPERVISOR_CHECK_S = 1.0  # between two checks that the supervisor is alive
WELL = "well"  # begins each line that a supervisor is told
NOTICE_S = 0.1  # from NOT_SERVING to the first refusal, in which watchers hear of it and requests arrive
_CHANNEL_OPTIONS = (
    # By default gRPC shares a port between servers: a second server would take half of the first one's calls.
    ("grpc.so_reuseport", 0),
    # Peers that vanished without a word are noticed in half a minute, and their streams end.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # By default gRPC widens the windows of clients that send fast, and holds what they send while they never read.
    ("grpc.http2.bdp_probe", 0),
)


def serve(options: ServeOptions) -> None:
    """Serve the models of ``options`` until SIGTERM or SIGINT.

    Prints one line with the port when the server is ready. On a signal, health turns NOT_SERVING, calls that have
    arrived are answered for up to ``grace_s`` seconds, and the function returns. It also returns when the process
    ``supervisor`` is no longer this process' parent.

    Raises :class:`BundleError`, :class:`UnknownNameError` for a model that the bundle does not have,
    :class:`ConfigError` for a configuration or a guard that the bundle cannot have, and :class:`EndpointError` if
    an address cannot be used.
    """
    config = read_server_config(options.config)
    options = replace(options, listen=options.listen.usable())
    return_large_memory()
    tracing = Tracing() if options.trace else None
    tracker = CallTracker(config.limits, tracing)
    access = Access.of(config.token_file, config.admin_token_file)
    security = _Security.of(config)
    require_startable([options.listen], options.grace_s)
    recorder = FlightRecorder(config.recording)
    if (folder := record_folder(options, config)) is not None:
        recorder.start(folder)
    pin = None if options.pin is None else Pin.parse(options.pin)
    releases = Releases(options.source, options.models, config, pin)
    releases.answered = None if tracing is None else tracing.answered
    releases.recorder = recorder

    def release_memory() -> None:
        releases.release_memory()
        return_free_memory()

    tracker.batches.release_memory = release_memory
    try:
        event_loop.run(_serve(options, config, releases, recorder, tracker, security, access))
    finally:
        recorder.stop()
        if tracing is not None:
            tracing.close()


def record_folder(options: ServeOptions, config: ServerConfig) -> Path | None:
    """Return the folder that is to be recorded into; that of the command line comes first."""
    folder = options.record or config.record_folder
    return None if folder is None else folder.absolute()


def require_startable(places: Sequence[Listen], grace_s: float) -> None:
    """Check the grace period and that every address is free.

    Raises :class:`ConfigError` for the grace period and :class:`EndpointError` for an address.
    """
    if not 0.0 <= grace_s < math.inf:
        raise ConfigError(f"--grace: expected seconds from 0 on, got {grace_s}")
    addresses = [
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
    ports = [port for _, port in addresses if port]
    for host, port in addresses:
        require_free(host, port)
        if ports.count(port) > 1:
            raise EndpointError(
                f"expected a port for each purpose, got {port} twice: choose others for metrics, admin or "
                "health"
            )


def require_free(host: str, port: int) -> None:
    """Check that a server could listen on an address. Raises :class:`EndpointError`."""
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
            probe.listen()  # with SO_REUSEADDR two sockets may be bound, but only one may listen
    except OSError as error:
        raise EndpointError(
            f"cannot listen on {address_of(host, port)}: {error.strerror}. Choose another port or stop what uses it"
        ) from error


def address_of(host: str, port: int) -> str:
    """Return the address as gRPC writes it, with brackets for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class _Security:
    """TLS and tokens of a port; neither for that of health."""

    tls: Tls | None = None
    interceptors: tuple[TokenInterceptor, ...] = ()

    @classmethod
    def of(cls, config: ServerConfig) -> _Security:
        """Read the files of [tls]. Raises :class:`ConfigError` for one that cannot be read."""
        if config.tls is not None:
            config.tls.credentials()
        return cls(config.tls)

    def with_tokens(
        self, tokens: Callable[[], Tokens | None], denied: Callable[[str, Context], object]
    ) -> _Security:
        """Return the same with tokens; the arguments are those of :class:`TokenInterceptor`."""
        return replace(self, interceptors=(TokenInterceptor(tokens, denied),))

    def add_port(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Let ``server`` listen on an address, and return its port. Raises :class:`EndpointError`."""
        address = address_of(host, port)
        try:
            if self.tls is None:
                return server.add_insecure_port(address)
            # New credentials for every port, as gRPC asks each of them for the first files only once.
            return server.add_secure_port(address, self.tls.credentials())
        except RuntimeError as error:
            raise EndpointError(f"cannot listen on {address}: choose another port") from error


async def _serve(
    options: ServeOptions,
    config: ServerConfig,
    releases: Releases,
    recorder: FlightRecorder,
    tracker: CallTracker,
    security: _Security,
    access: Access,
) -> None:
    """Start all services, wait for a signal, and stop them in order."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reloader = Reloader(options.config, config, releases, tracker, access)
    if options.config is not None:
        loop.add_signal_handler(signal.SIGHUP, lambda: asyncio.ensure_future(reloader.hang_up()))
    limits, listen, operators = config.limits, options.listen, security
    if access.steps is not None:  # looking at each call has a price
        security = security.with_tokens(lambda: access.steps, lambda *_: tracker.deny())
    server = grpc.aio.server(
        interceptors=security.interceptors,
        options=(
            *_CHANNEL_OPTIONS,
            ("grpc.max_receive_message_length", limits.message_bytes),
            ("grpc.max_concurrent_streams", limits.connection_calls),
        ),
    )
    inference = oip.InferenceService(releases)
    policy = policy_service.PolicyService(releases)
    server.add_generic_rpc_handlers((inference.handlers(tracker), policy.handlers(tracker)))
    services = (oip.SERVICE, policy_service.SERVICE)
    health = introspection.Health(services, tracker)
    server.add_generic_rpc_handlers((health.handlers(),))
    introspection.add_reflection(server, (*services, introspection.HEALTH), tracker)
    port = security.add_port(server, listen.host, listen.port)
    async with AsyncExitStack() as stack:
        if options.supervisor is not None:
            stack.callback(asyncio.create_task(_stop_with(options.supervisor, stop)).cancel)
            stack.callback(_answer_supervisor(releases))
        stack.callback(asyncio.create_task(tracker.sweep()).cancel)
        if listen.admin_port is not None:
            admin = AdminService(
                releases, recorder, tracker.streams, reloader, access.operator, lambda: inference.ready
            )

            def deny(method: str, context: Context) -> None:
                tracker.deny()
                admin.deny(method, context)

            operators = operators.with_tokens(lambda: access.operators, deny)
            await _start_beside(stack, admin.handlers(), operators, LOOPBACK, listen.admin_port)
            stack.callback(asyncio.create_task(admin.retire()).cancel)
        if listen.metrics_port is not None:
            from omcda_deploy.serve.metrics import ServerCollector, serve_metrics

            collector = ServerCollector(tracker, releases, recorder)
            stack.callback(serve_metrics(collector, listen.host, listen.metrics_port))
        await server.start()
        if listen.health_port is not None:
            await _start_beside(stack, health.handlers(), _Security(), listen.host, listen.health_port)
        gc.collect()
        gc.freeze()  # the loaded objects stay, so later collections need not visit them
        print_line(f"serving {', '.join(releases.models().sessions)} on {address_of(listen.host, port)}")
        await stop.wait()
        inference.ready = False
        await health.enter_graceful_shutdown()
        await asyncio.sleep(min(NOTICE_S, options.grace_s))
        await tracker.stop(server, options.grace_s)


async def _stop_with(supervisor: int, stop: asyncio.Event) -> None:
    """Set ``stop`` when the supervisor has died, as nobody would restart or stop this process any more."""
    while os.getppid() == supervisor:
        await asyncio.sleep(SUPERVISOR_CHECK_S)
    log.error("the supervisor of this server has died: stopping")
    stop.set()


def _answer_supervisor(releases: Releases) -> Callable[[], object]:
    """Answer each question on standard input from the event loop; returns a function that ends this.

    An answer says which version answers, and so does a line after each switch.
    """
    loop, questions = asyncio.get_running_loop(), sys.stdin.fileno()

    def tell() -> None:
        print_line(f"{WELL} {releases.pin}")

    def answer() -> None:
        if os.read(questions, 1 << 12):
            tell()
        else:
            loop.remove_reader(questions)

    loop.add_reader(questions, answer)
    releases.switched = tell
    return lambda: loop.remove_reader(questions)


async def _start_beside(
    stack: AsyncExitStack, handlers: grpc.GenericRpcHandler, security: _Security, host: str, port: int
) -> None:
    """Serve one more service on a port of its own until ``stack`` closes."""
    server = grpc.aio.server(interceptors=security.interceptors, options=_CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((handlers,))
    security.add_port(server, host, port)
    await server.start()
    stack.push_async_callback(server.stop, 0)


def print_line(line: str) -> None:
    """Print one line and flush it, as the supervisor waits for it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def print_error(error: OmcdaError, *, json_lines: bool) -> None:
    """Print the one line of an error that ends this process, in the form of its logs."""
    if json_lines:
        log.critical("%s", error)
    else:
        sys.stderr.write(f"error: {error}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve as a command line says; returns the exit status, 2 after an error message."""
    options = ServeOptions.parse(arguments)
    configure_logging(json_lines=options.log_json)
    try:
        serve(options)
    except OmcdaError as error:
        print_error(error, json_lines=options.log_json)
        return 2
    except KeyboardInterrupt:  # before the server handles signals itself
        return 130
    return 0
