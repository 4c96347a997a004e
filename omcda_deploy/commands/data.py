"""Commands ``tasks``, ``collect``, ``merge`` and ``inspect``: list tasks, record and join datasets, print files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import (
    SimulatorFactory,
    SimulatorPython,
    console,
    progress_bar,
    simulator_options,
)
from omcda_deploy.errors import ConfigError, DatasetError, UnknownNameError

inspect_app = typer.Typer(help="Look at a dataset or a bundle.", no_args_is_help=True)


def tasks() -> None:
    """List the tasks, and the tiers of behaviour policies that datasets can be recorded with."""
    from omcda_deploy import registry
    from omcda_deploy.play.shipped import tiers

    for task in registry.tasks():
        names = ", ".join(tiers(task))
        line = f"{task}  (behaviour policies: {names})" if names else task
        console.print(line, highlight=False, soft_wrap=True)


def collect(
    task: Annotated[str, typer.Argument(help="For instance mamujoco/halfcheetah-6x1.")],
    out: Annotated[Path, typer.Option(help="HDF5 file to write.")],
    tier: Annotated[
        str | None,
        typer.Option(
            help="medium (default), expert, medium-replay or medium-expert; smax/…: good, medium, poor; "
            "toy/…: behavior."
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Record this bundle's policy instead of a tier.")
    ] = None,
    transitions: Annotated[int, typer.Option(help="At least so many, in whole episodes.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Seed of the episodes and of the actions.")] = 0,
    num_envs: Annotated[int, typer.Option(help="Environments stepped together.")] = 32,
    workers: Annotated[
        int, typer.Option(help="Processes that step simulators that have no batched form; 0 for none.")
    ] = 2,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Record mean actions.")] = False,
    simulator_python: SimulatorPython = None,
    simulator_factory: SimulatorFactory = None,
) -> None:
    """Record a dataset in OMIGA's HDF5 format with the task's behaviour policies, acting stochastically."""
    from omcda_deploy import registry
    from omcda_deploy.play.collect import collect_mixture
    from omcda_deploy.play.shipped import sources

    if out.exists():
        raise DatasetError(f"{out} exists already: choose another --out, or remove it first")
    if task not in registry.tasks():
        raise UnknownNameError("task", task, registry.tasks())
    if bundle is not None and tier is not None:
        raise ConfigError("expected --tier or --bundle, got both: leave one out")
    policies = sources(task, tier or "medium", bundle)
    with progress_bar(f"recording {task}") as report:
        summary = collect_mixture(
            task,
            policies,
            out,
            transitions=transitions,
            seed=seed,
            behavior=policies[0].behavior if bundle else tier or "medium",
            num_envs=num_envs,
            workers=workers,
            stochastic=not deterministic,
            progress=report,
            options=simulator_options(simulator_python, simulator_factory),
        )
    console.print_json(json.dumps(summary))


def merge(
    files: Annotated[
        list[Path], typer.Argument(help="Datasets of one task, recorded with other --seed each.")
    ],
    out: Annotated[Path, typer.Option(help="HDF5 file to write.")],
    behavior: Annotated[
        str | None,
        typer.Option(help="Label of the behaviour; those of the files, joined by +, when omitted."),
    ] = None,
) -> None:
    """Join datasets of one task, recorded on several machines for instance; the files must fit together."""
    from omcda_deploy.datasets.summary import summarize
    from omcda_deploy.datasets.writer import concatenate
    from omcda_deploy.registry import read_dataset

    if out.exists():
        raise DatasetError(f"{out} exists already: choose another --out, or remove it first")
    digests: dict[str, Path] = {}
    for file in files:
        digest = read_dataset(file).digest
        if digest in digests:
            raise DatasetError(
                f"{digests[digest]} and {file} hold the same episodes: record each with a --seed of its own"
            )
        digests[digest] = file
    concatenate(files, out, behavior)
    console.print_json(json.dumps(summarize(read_dataset(out))))


@inspect_app.command("dataset")
def inspect_dataset(
    file: Annotated[Path, typer.Argument(help="A dataset file.")],
    task: Annotated[str | None, typer.Option(help="Its task, for a file that does not say.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print shapes, episodes, returns, actions and digest of a dataset."""
    from omcda_deploy.datasets.summary import render_table, summarize
    from omcda_deploy.registry import read_dataset

    summary = summarize(read_dataset(file, task))
    if as_json:
        console.print_json(json.dumps(summary))
    else:
        console.print(render_table(summary))


@inspect_app.command("bundle")
def inspect_bundle(folder: Annotated[Path, typer.Argument(help="A bundle.")]) -> None:
    """Verify a bundle and print its manifest."""
    from omcda_deploy.bundle import read_bundle

    console.print_json(json.dumps(dict(read_bundle(folder).manifest)))
