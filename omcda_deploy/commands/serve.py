"""``serve``: policy servers of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.errors import ConfigError


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or a folder of bundles named 1, 2, …: versions.")],
    agent: Annotated[str | None, typer.Option(help="Serve this agent alone, on --port.")] = None,
    team: Annotated[
        bool, typer.Option("--team", help="Serve the joint graph of all agents, on --port.")
    ] = False,
    base_port: Annotated[int, typer.Option(help="One process per agent: agent i on base port + i.")] = 8500,
    port: Annotated[int, typer.Option(help="Port of --agent or --team; 0 takes a free one.")] = 8500,
    host: Annotated[
        str, typer.Option(help="Address to listen on; loopback unless told otherwise.")
    ] = "127.0.0.1",
    admin_port: Annotated[
        int | None,
        typer.Option(help="Where this machine may load and switch versions; agent i at this + i."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Where Prometheus may scrape /metrics; agent i at this + i.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file: divergence guard, limits (docs/serving.md).")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Send OpenTelemetry spans, as its OTEL_… variables say.")
    ] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log JSON lines to stderr.")] = False,
    grace: Annotated[
        float, typer.Option(help="Seconds that SIGTERM leaves to answer what is in flight.")
    ] = 5.0,
) -> None:
    """Serve every agent of a bundle in a process of its own, one agent alone, or the team's joint graph."""

    if agent and team:
        raise ConfigError("expected --agent or --team, got both: serve them with two commands")
    if agent or team:  # answered by this process
        from omcda_deploy.serve.event_loop import choose_poller

        choose_poller()
    from omcda_deploy.serve.server import Listen

    if agent or team:
        from omcda_deploy.bundle import TEAM
        from omcda_deploy.serve.config import read_server_config
        from omcda_deploy.serve.logs import log_as_json, log_as_text
        from omcda_deploy.serve.server import serve as serve_models

        log_as_json() if log_json else log_as_text()
        settings = read_server_config(config)
        serve_models(
            bundle,
            [agent or TEAM],
            Listen(host, port, metrics_port, admin_port),
            config=settings,
            trace=trace,
            grace_s=grace,
        )
    else:
        from omcda_deploy.serve.supervisor import serve_team

        listen = Listen(host, base_port, metrics_port, admin_port)
        serve_team(bundle, listen, config_path=config, trace=trace, json_logs=log_json, grace_s=grace)
