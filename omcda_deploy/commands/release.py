"""``release`` and ``status``: versions of a team's bundle, on all its servers together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from omcda_deploy.commands import (
    AsJson,
    CredentialsFile,
    Temperature,
    addresses,
    credentials_of,
    print_json,
    print_note,
    print_table,
    print_text,
    temperature_of,
)
from omcda_deploy.commands.estimate import NOT_KNOWN, Confidence
from omcda_deploy.commands.stopping import when_stopped
from omcda_deploy.formatting import UNKNOWN, percent, significant

if TYPE_CHECKING:
    from omcda_deploy.client.admin import Statuses, TeamAdmin
    from omcda_deploy.protos.admin_pb2 import ServerStatus

app = typer.Typer(
    help="Load, switch and roll back the versions that servers answer with.", no_args_is_help=True
)

Admin = Annotated[
    str, typer.Option(help="Admin ports of all servers of the team, with ranges: 127.0.0.1:9500-9505.")
]
Version = Annotated[str, typer.Argument(help="Name of the bundle's folder: 1, 2, …")]


@app.command("load")
def load(version: Version, admin: Admin, credentials: CredentialsFile = None) -> None:
    """Load a version on all servers and warm it up; the current one goes on answering."""
    with _team(admin, credentials) as team:
        _print_versions(team.load(version))


@app.command("switch")
def switch(
    version: Version,
    admin: Admin,
    replacing: Annotated[
        str | None,
        typer.Option(help="Version that must be current on all servers; otherwise nothing changes."),
    ] = None,
    credentials: CredentialsFile = None,
) -> None:
    """Make a version the current one, on all servers or on none; running episodes keep theirs."""
    with _team(admin, credentials) as team:
        _print_versions(team.switch(version, replacing))


@app.command("promote")
@when_stopped(
    lambda: "look at  omcda-deploy status: what had begun is undone, unless all servers had switched"
)
def promote(
    version: Version,
    admin: Admin,
    dataset: Annotated[
        Path, typer.Option("--estimate", help="Recorded episodes, joined (docs/recording.md).")
    ],
    releases: Annotated[
        Path, typer.Option(help="Folder of the bundles that the servers hold, by version.")
    ] = Path("releases"),
    at_least: Annotated[
        float, typer.Option(help="Improvement of the return that the lower bound must exceed.")
    ] = 0.0,
    confidence: Confidence = 0.95,
    temperature: Temperature = "1",
    shadow_first: Annotated[
        float, typer.Option(help="Seconds for which the version runs beside the current one before.")
    ] = 0.0,
    credentials: CredentialsFile = None,
) -> None:
    """Switch to a version only if recorded episodes show that it earns more than the current one."""
    from omcda_deploy.experiments.promote import Demand, promote

    demand = Demand(at_least, confidence, temperature_of(temperature), shadow_first)
    with _team(admin, credentials) as team:
        evidence, statuses = promote(team, version, dataset, releases, demand)
    if evidence["trained_share"] is None:
        print_note(NOT_KNOWN.format(f"version {version}"))
    _print_versions(statuses)
    print_text(f"version {version} answers: {_reason(evidence)}")


@app.command("rollback")
def rollback(admin: Admin, credentials: CredentialsFile = None) -> None:
    """Switch back to the version that answered before."""
    with _team(admin, credentials) as team:
        before = team.status()
        _print_versions(team.rollback())
    for version, text in sorted({(status.current, status.evidence) for status in before.values()}):
        if text:
            print_text(f"version {version} had been promoted: {_reason(json.loads(text))}")


def _reason(evidence: Mapping[str, Any]) -> str:
    """Say in a sentence on what evidence a version was promoted; evidence of others than ``promote`` as it is."""
    try:
        gain = evidence["improvement"]
        return (
            f"estimated to earn {significant(gain['estimate'])} more than version {evidence['over']}, at least "
            f"{significant(gain['low'])} with {100 * evidence['confidence']:g} % confidence, from "
            f"{evidence['episodes']} episodes of dataset {evidence['dataset'][:12]}"
        )
    except (KeyError, TypeError, ValueError):
        return json.dumps(evidence)


@app.command("unload")
def unload(version: Version, admin: Admin, credentials: CredentialsFile = None) -> None:
    """Unload a version at once, even if episodes still use it."""
    with _team(admin, credentials) as team:
        _print_versions(team.unload(version))


@app.command("shadow")
def shadow(
    admin: Admin,
    version: Annotated[str, typer.Argument(help="Version to run beside the current one; none ends it.")] = "",
    credentials: CredentialsFile = None,
) -> None:
    """Run a version beside the current one and measure how their actions differ; it answers no request."""
    with _team(admin, credentials) as team:
        _print_versions(team.shadow(version))


@app.command("streams")
def streams(
    admin: Admin,
    end: Annotated[
        str | None, typer.Option(help="End the streams of this client: its address, its host, or 'all'.")
    ] = None,
    credentials: CredentialsFile = None,
) -> None:
    """List the open control streams, or end those of a client; it may open new ones."""
    with _team(admin, credentials) as team:
        found = team.streams() if end is None else team.end_streams(end)
    table = Table(box=None, pad_edge=False)
    for column in ("server", "client", "open", "idle s", "steps"):
        table.add_column(column)
    for endpoint, streams in found.items():
        for stream in streams:
            age = timedelta(seconds=int(stream.age_s))
            table.add_row(endpoint, stream.client, str(age), f"{stream.idle_s:.1f}", str(stream.steps))
    print_table(table)
    if end is not None:
        print_text(f"ended {sum(map(len, found.values()))} streams")


@app.command("record")
def record(
    folder: Annotated[
        str, typer.Argument(help="Absolute path on the servers' machines; 'off' ends recording.")
    ],
    admin: Admin,
    credentials: CredentialsFile = None,
) -> None:
    """Let all servers record the steps that they answer into a folder, or none; until they are restarted."""
    with _team(admin, credentials) as team:
        _print_versions(team.record("" if folder == "off" else folder))


@app.command("reload-config")
def reload_config(admin: Admin, credentials: CredentialsFile = None) -> None:
    """Let all servers read their configuration files again; if one file is wrong, nothing changes anywhere."""
    with _team(admin, credentials) as team:
        _print_status(team.reload_config(), {})


def status(admin: Admin, credentials: CredentialsFile = None, as_json: AsJson = False) -> None:
    """Print health, version, rate, latency, divergence and guard of every agent. Status 1 unless all serve."""
    with _team(admin, credentials) as team:
        statuses, down = team.survey()
    if as_json:
        print_json(
            {"servers": {name: _values(served) for name, served in statuses.items()}, "down": dict(down)}
        )
    else:
        _print_status(statuses, down)
    if down or not all(served.serving for served in statuses.values()):
        raise typer.Exit(1)


def _values(message: Any) -> Any:
    """Return a protobuf message's fields, and theirs, by name; null for a number that is not known."""
    if isinstance(message, float):
        return message if math.isfinite(message) else None
    if isinstance(message, str | int):
        return message
    if hasattr(message, "DESCRIPTOR"):
        return {field.name: _values(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}
    return [_values(entry) for entry in message]


def _print_status(statuses: Mapping[str, ServerStatus], down: Mapping[str, str]) -> None:
    _print_versions(statuses)
    for endpoint, reason in down.items():
        print_text(f"{endpoint} told no status: {reason}")
    table = Table(box=None, pad_edge=False)
    table.add_column("agent", no_wrap=True)
    for column in ("answers/s", "p50, p99 ms", "divergence, budget", "guard", "above, replaced", "shadow"):
        table.add_column(column)
    for served in statuses.values():
        for row in _agent_rows(served):
            table.add_row(*row)
    print_table(table)


def _agent_rows(served: ServerStatus) -> Iterator[list[str]]:
    for model in served.models:
        for agent in model.agents:
            yield [
                agent.agent if agent.agent == model.model else f"{model.model}: {agent.agent}",
                f"{model.answers_per_s:.1f}",
                f"{significant(model.p50_ms)}, {significant(model.p99_ms)}",
                f"{significant(agent.divergence)}, {significant(agent.budget)}",
                f"{agent.guard} {significant(agent.threshold)}",
                f"{percent(agent.exceeded)}, {percent(agent.replaced)}",
                significant(model.shadow_difference),
            ]


def _print_versions(statuses: Statuses | Mapping[str, ServerStatus]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("server", "health", "up", "current", "held", "previous", "shadow"):
        table.add_column(column)
    recording = any(served.recording for served in statuses.values())
    if recording:
        table.add_column("recorded, lost")
    for endpoint, served in statuses.items():
        health, up = "SERVING" if served.serving else "NOT_SERVING", timedelta(seconds=int(served.uptime_s))
        held = ", ".join(f"{held.version} {held.bundle_digest[:12]}" for held in served.versions)
        table.add_row(
            endpoint,
            health,
            str(up),
            served.current,
            held,
            served.previous or UNKNOWN,
            served.shadow or UNKNOWN,
            *([f"{served.recorded_rows}, {served.lost_rows}"] if recording else []),
        )
    print_table(table)
    for endpoint, served in statuses.items():
        for version in served.versions:
            if version.HasField("folder_digest") and version.folder_digest != version.bundle_digest:
                print_text(
                    f"{endpoint} holds version {version.version} as bundle {version.bundle_digest[:12]}, on disk "
                    f"it is {version.folder_digest[:12] or 'no bundle'}: restore it before a server starts again"
                )


@contextmanager
def _team(admin: str, credentials: Path | None) -> Iterator[TeamAdmin]:
    from omcda_deploy.client.admin import TeamAdmin

    with TeamAdmin(addresses(admin), credentials_of(credentials)) as team:
        yield team
