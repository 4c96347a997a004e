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
    SimulatorFactory,
    SimulatorPython,
    addresses,
    console,
    credentials_of,
    progress_bar,
    simulator_options,
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
    task: Annotated[str, typer.Argument(help="For instance mamujoco/halfcheetah-6x1.")],
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
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Sample actions, seeded by --seed.")
    ] = False,
    deadline: Annotated[float, typer.Option(help="Seconds a served agent may take to answer.")] = 1.0,
    stream: Annotated[
        bool, typer.Option("--stream", help="One stream per agent, not one call per step.")
    ] = False,
    on_miss: OnMissOption = OnMiss.raise_,
    simulator_python: SimulatorPython = None,
    simulator_factory: SimulatorFactory = None,
    video: Annotated[Path | None, typer.Option(help="Write the first episode as mp4 (MuJoCo, SMAX).")] = None,
    credentials: CredentialsFile = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")] = None,
) -> None:
    """Play live episodes of a task against served agents, or against a bundle in process."""
    from omcda_deploy.files import write_json
    from omcda_deploy.play.evaluate import evaluate as play
    from omcda_deploy.report.evaluation import evaluation_section, evaluation_table
    from omcda_deploy.report.html import write_report

    _require_folders(video, json_file, report)
    if endpoints is not None and bundle is not None and on_miss is not OnMiss.behavior:
        raise ConfigError(
            "expected --endpoints (a served team) or --bundle (in process), or both with --on-miss behavior: "
            "leave one of them out"
        )
    with (
        _team(endpoints, bundle, deadline, stream, on_miss, credentials) as team,
        progress_bar(f"playing {task}") as progress,
    ):
        evaluation = play(
            team,
            task,
            episodes=episodes,
            seed=seed,
            num_envs=num_envs,
            stochastic=stochastic,
            workers=workers,
            progress=progress,
            video=video,
            options=simulator_options(simulator_python, simulator_factory),
        )
    console.print(evaluation_table(evaluation))
    if json_file:
        write_json(json_file, evaluation.to_json())
    if report:
        write_report(report, f"{task}: evaluation", [evaluation_section(evaluation)])
        console.print(f"report: {report}")


def replay(
    dataset: Annotated[Path, typer.Argument(help="A dataset file.")],
    endpoints: Endpoints = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Local bundle: compared with the endpoints, or played without them.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of a dataset that does not say.")] = None,
    episodes: Annotated[int, typer.Option(help="Episodes drawn by --seed.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed that draws the episodes.")] = 0,
    batch: Annotated[int, typer.Option(help="Episodes sent side by side.")] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Hz for deadlines; the task's control rate if omitted.")
    ] = None,
    paced: Annotated[
        bool, typer.Option("--paced", help="Send in real time at the rate, not flat out.")
    ] = False,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Sample actions, seeded by --seed.")
    ] = False,
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

    _require_folders(json_file, report)
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
            stochastic=stochastic,
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


def _require_folders(*files: Path | None) -> None:
    """Raise :class:`ConfigError` for an output in a folder that does not exist, before any time is spent on it."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file}: the folder {file.parent} does not exist, create it first")
