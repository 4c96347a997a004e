"""One server process: one or more models of a bundle behind gRPC.

Run as ``python -m omcda_deploy.serve.server BUNDLE --model agent_0 --port 8500``; the supervisor starts one such
process per agent.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from omcda_deploy.bundle import read_bundle
from omcda_deploy.errors import EndpointError, OmcdaError
from omcda_deploy.serve import introspection, oip, policy_service
from omcda_deploy.serve.config import Limits, ServerConfig, read_server_config
from omcda_deploy.serve.handlers import Traffic
from omcda_deploy.serve.logs import log_json
from omcda_deploy.serve.session import Models

LOOPBACK = "127.0.0.1"
GRACE_S = 5.0
NOTICE_S = 0.1  # between NOT_SERVING and the first refusal: watchers are told, requests on their way arrive


def serve(
    bundle_path: str | Path,
    models: Sequence[str],
    host: str = LOOPBACK,
    port: int = 0,
    *,
    config: ServerConfig | None = None,
    metrics_port: int | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Serve ``models`` (agents, or ``team``; none: all) of a bundle until SIGTERM or SIGINT.

    Port 0 takes a free one; the line printed when the server is ready says which. ``metrics_port``: where
    Prometheus may scrape ``/metrics``, on the same host; nowhere where it is None. On a signal, health turns
    NOT_SERVING, what is in flight is answered for up to ``grace_s`` seconds, and the function returns.

    Raises :class:`BundleError`, :class:`UnknownNameError` for a model that the bundle has not,
    :class:`ConfigError` for a guard that it cannot have, and :class:`EndpointError` where the address cannot be
    taken.
    """
    require_free(host, port)
    config = config or ServerConfig()
    bundle = read_bundle(bundle_path)
    loaded = Models(bundle, models, config.guards_of(bundle.spec.names))
    asyncio.run(_serve(loaded, host, port, config.limits, metrics_port, grace_s))


def require_free(host: str, port: int) -> None:
    """Raise :class:`EndpointError` unless a server could listen there."""
    if not 0 <= port <= 65535:
        raise EndpointError(
            f"cannot listen on {address_of(host, port)}: expected a port from 0 to 65535, got {port}"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
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


async def _serve(
    models: Models, host: str, port: int, limits: Limits, metrics_port: int | None, grace_s: float
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    traffic = Traffic(limits)
    server = grpc.aio.server(
        options=(
            # gRPC shares a port between servers by default: a second one would take half of the first one's calls
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.message_bytes),
        ),
        maximum_concurrent_rpcs=limits.concurrent_calls + limits.streams,
    )
    inference = oip.InferenceService(models)
    policy = policy_service.PolicyService(models)
    server.add_generic_rpc_handlers((inference.handlers(traffic), policy.handlers(traffic)))
    services = (oip.SERVICE, policy_service.SERVICE)
    health = introspection.add_health(server, services, traffic)
    introspection.add_reflection(server, (*services, introspection.HEALTH))
    try:
        port = server.add_insecure_port(address_of(host, port))
    except RuntimeError as error:
        raise EndpointError(f"cannot listen on {address_of(host, port)}: choose another port") from error
    await server.start()
    stop_metrics = _start_metrics(traffic, models, host, metrics_port)
    say(f"serving {', '.join(models.sessions)} on {address_of(host, port)}")
    await stop.wait()
    inference.ready = False
    await health.enter_graceful_shutdown()
    await asyncio.sleep(min(NOTICE_S, grace_s))
    await traffic.quiet(grace_s / 2)
    await traffic.stop()
    await server.stop(grace_s / 2)
    stop_metrics()


def _start_metrics(traffic: Traffic, models: Models, host: str, port: int | None) -> Callable[[], None]:
    if port is None:
        return lambda: None
    from omcda_deploy.serve.metrics import ServerCollector, serve_metrics

    return serve_metrics(ServerCollector(traffic, lambda: [models]), host, port)


def say(line: str) -> None:
    """One line for whoever started the server, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m omcda_deploy.serve.server", description="Serve a bundle."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--model", action="append", default=[], help="agent or 'team'; repeatable; default all"
    )
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--config", type=Path, help="TOML file: guard, limits")
    parser.add_argument("--metrics-port", type=int, help="where Prometheus may scrape /metrics")
    parser.add_argument("--log-json", action="store_true", help="log JSON lines to stderr")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds for what is in flight")
    given = parser.parse_args(arguments)
    if given.log_json:
        log_json()
    try:
        config = read_server_config(given.config)
        serve(
            given.bundle,
            given.model,
            given.host,
            given.port,
            config=config,
            metrics_port=given.metrics_port,
            grace_s=given.grace,
        )
    except OmcdaError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the server handles signals itself
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
