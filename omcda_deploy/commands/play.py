"""Commands ``evaluate`` and ``replay``: a team, served or in process, in a simulator or on recorded episodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omcda_deploy.commands import (
    CredentialsFile,
    DatasetTask,
    OwnEnvironment,
    RewardRule,
    SimulatorFactory,
    SimulatorPython,
    Temperature,
    Temperatures,
    addresses,
    console,
    credentials_of,
    play_temperatures,
    print_whole,
    progress_bar,
    require_outputs,
    simulator_options,
    task_of,
    temperature_of,
    temperatures_of,
)
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


OnMissOption = Annotated[
    OnMiss,
    typer.Option(
        help="Action of an agent whose answer is late or whose server is gone: raise ends the run, hold repeats "
        "its last action, behavior takes the behaviour policy of --bundle."
    ),
]


def evaluate(
    task: Annotated[str | None, typer.Argument(help="For instance mamujoco/halfcheetah-6x1.")] = None,
    env: OwnEnvironment = None,
    endpoints: Endpoints = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Play this bundle in process instead; beside endpoints for --on-miss behavior."),
    ] = None,
    episodes: Annotated[int, typer.Option(help="Episodes to play.")] = 20,
    seed: Annotated[int, typer.Option(help="Episode k starts from a seed made of this and k.")] = 0,
    num_envs: Annotated[
        int, typer.Option(help="Episodes played side by side: the batch size of requests.")
    ] = 10,
    workers: Annotated[
        int, typer.Option(help="Processes that step simulators that have no batched form; 0 for none.")
    ] = 0,
    temperature: Temperatures = "0",
    deadline: Annotated[float, typer.Option(help="Seconds a served agent may take to answer.")] = 1.0,
    stream: Annotated[
        bool, typer.Option("--stream", help="One stream per agent, not one call per step.")
    ] = False,
    on_miss: OnMissOption = OnMiss.raise_,
    simulator_python: SimulatorPython = None,
    simulator_factory: SimulatorFactory = None,
    reward: RewardRule = None,
    video: Annotated[Path | None, typer.Option(help="Write the first episode as mp4 (MuJoCo, SMAX).")] = None,
    credentials: CredentialsFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")] = None,
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
    if video is not None and len(temperatures) > 1:
        raise ConfigError(f"--video: expected one --temperature, got {temperature}: film one of them")
    require_outputs(video, json_file, report)
    task = task_of(task, env)
    if endpoints is not None and bundle is not None and on_miss is not OnMiss.behavior:
        raise ConfigError(
            "expected --endpoints (a served team) or --bundle (in process), or both with --on-miss behavior: "
            "leave one of them out"
        )
    with _team(endpoints, bundle, deadline, stream, on_miss, credentials) as team:
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
    several = len(evaluations) > 1
    heading = f"{task}: {count(episodes, 'episode')} at each temperature T"
    print_whole(comparison_table({"": evaluations}, heading) if several else evaluation_table(evaluations[0]))
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
        console.print(f"report: {report}")


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
    deadline: Annotated[float, typer.Option(help="Seconds a served agent may take to answer.")] = 1.0,
    stream: Annotated[
        bool, typer.Option("--stream", help="One stream per agent, not one call per step.")
    ] = False,
    on_miss: OnMissOption = OnMiss.raise_,
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
    with (
        _team(endpoints, bundle, deadline, stream, on_miss, credentials) as team,
        progress_bar(f"replaying {dataset.name}") as progress,
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
    console.print(replay_table(result))
    if json_file:
        write_json(json_file, result.to_json())
    if report:
        write_report(report, f"{episodes_on_file.spec.task}: replay", [replay_section(result)])
        console.print(f"report: {report}")


@contextmanager
def _team(
    endpoints: str | None,
    bundle: Path | None,
    deadline: float,
    stream: bool,
    on_miss: OnMiss,
    credentials: Path | None,
) -> Iterator[TeamPolicy]:
    """Open the served team where ``endpoints`` are set, ``bundle`` in process otherwise.

    Raises :class:`ConfigError` without either, and for ``--on-miss behavior`` without a bundle.
    """
    if endpoints is not None:
        from omcda_deploy.client.fallback import BehaviorTeam, FallbackChoice
        from omcda_deploy.client.remote import RemoteTeam

        fallback: FallbackChoice = "hold" if on_miss is OnMiss.hold else "raise"
        if on_miss is OnMiss.behavior:
            if bundle is None:
                raise ConfigError(
                    "--on-miss behavior: expected --bundle, whose behaviour policy is to stand in"
                )
            fallback = BehaviorTeam(bundle)
        with RemoteTeam(
            addresses(endpoints),
            deadline_s=deadline,
            stream=stream,
            fallback=fallback,
            credentials=credentials_of(credentials),
        ) as team:
            yield team
    elif bundle is not None:
        from omcda_deploy.local import LocalTeam

        yield LocalTeam(bundle)
    else:
        raise ConfigError("expected --endpoints (a served team) or --bundle (in process): give one of them")
