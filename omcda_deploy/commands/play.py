"""Commands ``evaluate`` and ``replay``: a team, served or in process, in a simulator or on recorded episodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omcda_deploy.commands import (
    CredentialsFile,
    DatasetTask,
    Demo,
    OptionalTask,
    OwnEnvironment,
    RewardRule,
    SimulatorFactory,
    SimulatorPython,
    Temperature,
    Temperatures,
    addresses,
    credentials_of,
    print_table,
    print_text,
    require_outputs,
    simulator_options,
    task_of,
    temperature_of,
    temperatures_of,
)
from omcda_deploy.commands.progress import play_temperatures, progress_bar
from omcda_deploy.commands.stopping import when_stopped
from omcda_deploy.errors import ConfigError

if TYPE_CHECKING:
    from omcda_deploy.policy import TeamPolicy

Endpoints = Annotated[
    str | None,
    typer.Option(
        help="Addresses of the served agents in any order, comma-separated, with port ranges: 127.0.0.1:8500-8505; "
        "or one that serves the joint graph."
    ),
]


class OnMiss(StrEnum):
    raise_ = "raise"
    hold = "hold"
    behavior = "behavior"


class Protocol(StrEnum):
    omcda = "omcda"
    oip = "oip"


# Options of a served team are None where they are not given, so that they can be refused where there is none.
ProtocolOption = Annotated[
    Protocol | None,
    typer.Option(
        help="Of the endpoints: omcda (default) for  omcda-deploy serve,  oip for other servers of the Open "
        "Inference Protocol v2 that hold the bundle's models. Those that do not state the team's contract need "
        "--bundle."
    ),
]

OnMissOption = Annotated[
    OnMiss | None,
    typer.Option(
        help="Action of an agent whose answer is late or whose server is gone: raise (default) ends the run, hold "
        "repeats its last action, behavior takes the behaviour policy of --bundle."
    ),
]
Deadline = Annotated[
    float | None, typer.Option(help="Seconds a served agent may take to answer; 1 if omitted.")
]
Stream = Annotated[bool, typer.Option("--stream", help="One stream per agent, not one call per step.")]

Workers = Annotated[
    int, typer.Option(help="Processes that step simulators that have no batched form; 0 for none.")
]
ServedVersion = Annotated[
    str | None,
    typer.Option(help="Version that answers, where the servers hold it; the one that is current if omitted."),
]
Wait = Annotated[
    float | None,
    typer.Option(help="Seconds in which the servers may get ready, and load the version; 0 if omitted."),
]

ReportFolder = Annotated[
    Path | None, typer.Option(help="Folder to record rewards and ends into, for  recordings join.")
]


@when_stopped()
def evaluate(
    task: OptionalTask = None,
    env: OwnEnvironment = None,
    endpoints: Endpoints = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Play this bundle in process instead; beside endpoints for --on-miss behavior and --protocol oip."
        ),
    ] = None,
    demo: Demo = False,
    episodes: Annotated[int, typer.Option(help="Episodes to play.")] = 20,
    seed: Annotated[int, typer.Option(help="Episode k starts from a seed made of this and k.")] = 0,
    num_envs: Annotated[
        int, typer.Option(help="Episodes played side by side: the batch size of requests.")
    ] = 10,
    workers: Workers = 0,
    temperature: Temperatures = "0",
    deadline: Deadline = None,
    stream: Stream = False,
    on_miss: OnMissOption = None,
    protocol: ProtocolOption = None,
    version: ServedVersion = None,
    wait: Wait = None,
    simulator_python: SimulatorPython = None,
    simulator_factory: SimulatorFactory = None,
    reward: RewardRule = None,
    video: Annotated[Path | None, typer.Option(help="Write the first episode as mp4 (MuJoCo, SMAX).")] = None,
    credentials: CredentialsFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")] = None,
    record: ReportFolder = None,
) -> None:
    """Play live episodes of a task against served agents, or against a bundle in process."""
    from omcda_deploy.files import write_json
    from omcda_deploy.formatting import count
    from omcda_deploy.report.evaluation import (
        comparison_section,
        comparison_table,
        evaluation_section,
        evaluation_table,
    )
    from omcda_deploy.report.html import write_report

    temperatures = temperatures_of(temperature)
    several = len(temperatures) > 1
    if video is not None and several:
        raise ConfigError(f"--video: expected one --temperature, got {temperature}: film one of them")
    require_outputs(video, json_file, report)
    service = _Service(endpoints, deadline, stream, on_miss, protocol, version, wait, credentials, record)
    task, bundle = _played(task, env, bundle, demo, service)
    with _team(bundle, service) as team:
        evaluations = play_temperatures(
            team,
            task,
            temperatures,
            f"playing {task}",
            episodes=episodes,
            seed=seed,
            num_envs=num_envs,
            workers=workers,
            video=video,
            options=simulator_options(simulator_python, simulator_factory, reward),
        )
    heading = f"{task}: {count(episodes, 'episode')} at each temperature T"
    if json_file:
        parts = [evaluation.to_json() for evaluation in evaluations]
        write_json(json_file, {"kind": "evaluations", "evaluations": parts} if several else parts[0])
    if report:
        sections = [comparison_section({"": evaluations}, "Temperatures")] if several else []
        sections += [
            evaluation_section(each, f"Temperature {each.temperature:g}" if several else "Evaluation")
            for each in evaluations
        ]
        write_report(report, f"{task}: evaluation", sections)
    print_table(comparison_table({"": evaluations}, heading) if several else evaluation_table(evaluations[0]))
    if report:
        print_text(f"report: {report}")


@when_stopped()
def replay(
    dataset: Annotated[Path, typer.Argument(help="A dataset file.")],
    endpoints: Endpoints = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Local bundle: compared with the endpoints, or played without them.")
    ] = None,
    task: DatasetTask = None,
    episodes: Annotated[int, typer.Option(help="Episodes drawn by --seed.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed that draws the episodes.")] = 0,
    batch: Annotated[int, typer.Option(help="Episodes sent side by side.")] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Hz for deadlines; the task's control rate if omitted.")
    ] = None,
    paced: Annotated[
        bool, typer.Option("--paced", help="Send in real time at the rate, not flat out.")
    ] = False,
    temperature: Temperature = "0",
    deadline: Deadline = None,
    stream: Stream = False,
    on_miss: OnMissOption = None,
    protocol: ProtocolOption = None,
    version: ServedVersion = None,
    wait: Wait = None,
    credentials: CredentialsFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")] = None,
) -> None:
    """Send recorded episodes through a team: agreement, parity, latency, deadline misses. Needs no simulator."""
    from omcda_deploy.files import write_json
    from omcda_deploy.local import LocalTeam
    from omcda_deploy.play.replay import replay as send
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.report.html import write_report
    from omcda_deploy.report.replay import replay_section, replay_table

    factor = temperature_of(temperature)
    require_outputs(json_file, report)
    episodes_on_file = read_dataset(dataset, task)
    local = LocalTeam(bundle) if bundle and endpoints else None
    service = _Service(endpoints, deadline, stream, on_miss, protocol, version, wait, credentials)
    with (
        _team(bundle, service) as team,
        progress_bar(f"replaying {dataset.name}", "calls") as progress,
    ):
        result = send(
            team,
            episodes_on_file,
            episodes=episodes,
            rate=rate,
            batch=batch,
            local=local,
            temperature=factor,
            seed=seed,
            paced=paced,
            progress=progress,
        )
    if json_file:
        write_json(json_file, result.to_json())
    if report:
        write_report(report, f"{episodes_on_file.spec.task}: replay", [replay_section(result)])
    print_table(replay_table(result))
    if report:
        print_text(f"report: {report}")


@dataclass(frozen=True)
class _Service:
    """Options of a served team, None where they were not given."""

    endpoints: str | None
    deadline: float | None
    stream: bool
    on_miss: OnMiss | None
    protocol: Protocol | None
    version: str | None
    wait: float | None
    credentials: Path | None
    record: Path | None = None

    @property
    def uses_bundle(self) -> bool:
        """True where a local bundle plays, stands in, or states the contract."""
        return self.endpoints is None or self.on_miss is OnMiss.behavior or self.protocol is Protocol.oip

    def require_endpoints(self) -> None:
        """Raise :class:`ConfigError` for an option that needs servers where there are none."""
        if self.endpoints is not None:
            return
        for option, value, servers in (
            ("--record", self.record, "whose servers record their answers"),
            ("--protocol", self.protocol, "which speak it"),
            ("--version", self.version, "whose servers hold versions"),
            ("--on-miss", self.on_miss, "whose servers may miss an answer"),
            ("--credentials", self.credentials, "which ask for them"),
            ("--deadline", self.deadline, "which have to keep it"),
            ("--stream", self.stream or None, "which are asked so"),
            ("--wait", self.wait, "which are waited for"),
        ):
            if value is not None:
                given = option if value is True else f"{option} {value}"
                raise ConfigError(f"{given}: expected --endpoints, {servers}, got none: leave it out")


def _require_one_team(bundle: Path | None, service: _Service) -> None:
    """Raise :class:`ConfigError` where a bundle beside endpoints would be of no use."""
    if bundle is None or service.uses_bundle:
        return
    raise ConfigError(
        "expected --endpoints (a served team) or --bundle (in process), or both with --on-miss behavior or "
        "--protocol oip: leave one of them out"
    )


def _played(
    task: str | None, env: str | None, bundle: Path | None, demo: bool, service: _Service
) -> tuple[str, Path | None]:
    """Return the task to play and the bundle to play it with, None for served agents alone.

    Raises :class:`ConfigError` for options that exclude one another.
    """
    from omcda_deploy.bundle import DEMO_TEAM, read_bundle

    if not demo:
        _require_one_team(bundle, service)
        return task_of(task, env), bundle
    for name, value in (("a TASK", task), ("--env", env), ("--bundle", bundle)):
        if value is not None:
            raise ConfigError(
                f"--demo has a task and a bundle of its own, got {name} {value}: leave one of them out"
            )
    return read_bundle(DEMO_TEAM).spec.task, DEMO_TEAM if service.uses_bundle else None


@contextmanager
def _team(bundle: Path | None, service: _Service) -> Iterator[TeamPolicy]:
    """Open the served team where there are endpoints, ``bundle`` in process otherwise.

    Raises :class:`ConfigError` without either, for ``--on-miss behavior`` without a bundle, and for options of a
    served team without endpoints.
    """
    service.require_endpoints()
    if service.endpoints is not None:
        from omcda_deploy.client.fallback import BehaviorTeam, FallbackChoice
        from omcda_deploy.client.remote import RemoteTeam

        fallback: FallbackChoice = "hold" if service.on_miss is OnMiss.hold else "raise"
        if service.on_miss is OnMiss.behavior:
            if bundle is None:
                raise ConfigError(
                    "--on-miss behavior: expected --bundle, whose behaviour policy is to stand in"
                )
            fallback = BehaviorTeam(bundle)
        with RemoteTeam(
            addresses(service.endpoints),
            deadline_s=1.0 if service.deadline is None else service.deadline,
            stream=service.stream,
            fallback=fallback,
            credentials=credentials_of(service.credentials),
            record=service.record,
            protocol="omcda" if service.protocol is None else service.protocol.value,
            version=service.version,
            wait_s=service.wait or 0.0,
            bundle=bundle if service.protocol is Protocol.oip else None,
        ) as team:
            yield team
    elif bundle is not None:
        from omcda_deploy.local import LocalTeam

        yield LocalTeam(bundle)
    else:
        raise ConfigError("expected --endpoints (a served team) or --bundle (in process): give one of them")
