"""``serve``: policy servers of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import Demo, bundle_of
from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.serve.options import GRACE_S, HELP, LOOPBACK, Listen, ServeOptions

PORT = 8500
_SHIFT = " With one process per agent, agent i has this port + i."


def serve(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle, or a folder of bundles named 1, 2, …: versions.")
    ] = None,
    demo: Demo = False,
    agent: Annotated[str | None, typer.Option(help="Serve this agent alone, on --port.")] = None,
    team: Annotated[
        bool, typer.Option("--team", help="Serve the joint graph of all agents, on --port.")
    ] = False,
    base_port: Annotated[
        int | None, typer.Option(help=f"One process per agent: agent i on base port + i; {PORT} if omitted.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help=f"Port of --agent or --team; 0 takes a free one, {PORT} if omitted.")
    ] = None,
    host: Annotated[str, typer.Option(help=HELP["host"])] = LOOPBACK,
    admin_port: Annotated[int | None, typer.Option(help=HELP["admin_port"] + _SHIFT)] = None,
    metrics_port: Annotated[int | None, typer.Option(help=HELP["metrics_port"] + _SHIFT)] = None,
    health_port: Annotated[int | None, typer.Option(help=HELP["health_port"] + _SHIFT)] = None,
    config: Annotated[Path | None, typer.Option(help=HELP["config"])] = None,
    record: Annotated[Path | None, typer.Option(help=HELP["record"])] = None,
    trace: Annotated[bool, typer.Option("--trace", help=HELP["trace"])] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help=HELP["log_json"])] = False,
    grace: Annotated[float, typer.Option(help=HELP["grace_s"])] = GRACE_S,
) -> None:
    """Serve every agent of a bundle in a process of its own, one agent alone, or the team's joint graph."""
    from omcda_deploy.bundle import TEAM

    if agent and team:
        raise ConfigError("expected --agent or --team, got both: serve them with two commands")
    model = agent or (TEAM if team else None)
    if model and base_port is not None:
        raise ConfigError(
            f"expected --port with --agent or --team, got --base-port {base_port}: take that one"
        )
    if not model and port is not None:
        raise ConfigError(
            f"expected --base-port, as each agent has a process, got --port {port}: take that one, or serve one "
            "model with --agent or --team"
        )
    first = port if model else base_port
    options = ServeOptions(
        bundle_of(bundle, demo),
        models=(model,) if model else (),
        listen=Listen(host, PORT if first is None else first, metrics_port, admin_port, health_port),
        config=config,
        record=record,
        trace=trace,
        log_json=log_json,
        grace_s=grace,
    )
    if model:  # answered by this process
        from omcda_deploy.serve.event_loop import choose_poller

        choose_poller(json_lines=log_json)  # before anything imports grpc
    from omcda_deploy.serve.logs import configure_logging

    configure_logging(json_lines=log_json)
    from omcda_deploy.serve.server import print_error
    from omcda_deploy.serve.server import serve as serve_models
    from omcda_deploy.serve.supervisor import serve_team

    try:
        (serve_models if model else serve_team)(options)
    except OmcdaError as error:
        if not log_json:
            raise
        print_error(error, json_lines=True)
        raise typer.Exit(2) from None
