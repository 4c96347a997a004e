"""``sweep``: train a grid of runs, resumably."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import named_values, print_text, require_folder
from omcda_deploy.commands.completion import engine_names
from omcda_deploy.commands.progress import TerminalObserver
from omcda_deploy.commands.stopping import this_command, when_stopped
from omcda_deploy.errors import ConfigError, OmcdaError

EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help="local (processes here), slurm or ray (docs/sweeps.md).",
        autocompletion=engine_names,
    ),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option("--engine-option", metavar="NAME=VALUE", help="An option of the engine; repeatable."),
]
Address = Annotated[
    str | None, typer.Option(help="Ray: the running cluster; one is started here when omitted.")
]


def engine_options(pairs: list[str] | None, address: str | None) -> dict[str, str]:
    """Collect the options of ``--engine-option`` and ``--address``."""
    return named_values("--engine-option", pairs, address=address)


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file (TOML).")],
    out: Annotated[Path, typer.Option(help="Folder for the runs; runs already in it are continued.")],
    jobs: Annotated[
        int,
        typer.Option(min=0, help="Training processes at a time, up to five runs each; 0: one per core."),
    ] = 0,
    engine: EngineName = "local",
    engine_option: EngineOptions = None,
    address: Address = None,
) -> None:
    """Train every combination of a sweep file; run it again to continue runs that were killed or failed.

    FILE lists datasets (paths), algorithms and seeds, and says how many steps a run has. It may say snapshot_every
    (steps between policies that are kept), behavior_steps (most steps for cloning) and device (cpu, cuda, cuda:N).
    Tables grid.ALGORITHM list values for settings of an algorithm. docs/sweeps.md has an example.
    """
    from omcda_deploy.experiments.engines import make_engine
    from omcda_deploy.experiments.sweep import check_jobs, jobs_of, read_sweep
    from omcda_deploy.experiments.watching import watching

    run_jobs = make_engine(engine, engine_options(engine_option, address), out)
    queue = jobs_of(read_sweep(file), out)
    observer = TerminalObserver()

    def kept() -> str:
        finished = f"{sum(job.finished for job in queue)} of {len(queue)} runs are finished"
        if engine == "slurm":
            return f"{finished}, SLURM goes on with the others (scancel --name omcda-deploy ends them)"
        return f"{finished}, the others go on from their last states with  {this_command()}"

    with when_stopped(kept):
        check_jobs(queue)
        require_folder(out)
        print_text(f"{len(queue)} runs, {sum(job.finished for job in queue)} of them finished")
        with watching(queue, observer):
            failed = run_jobs(queue, jobs, observer)
    if failed:
        raise OmcdaError(
            f"{len(failed)} of {len(queue)} runs failed, the first: {failed[0][1]}. Fix it and run the sweep again"
        )


def train_jobs(
    jobs: Annotated[str, typer.Argument(help="Jobs whose runs can be trained side by side (JSON).")],
) -> None:
    """Train jobs of a sweep in this process: what a sweep starts, for itself alone."""
    from omcda_deploy.commands.training_view import TrainingView
    from omcda_deploy.experiments import fleets
    from omcda_deploy.experiments.sweep import Job

    try:
        queue = [Job.from_json(values) for values in json.loads(jobs)]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"expected jobs as a sweep writes them, got {jobs!r}: call  omcda-deploy sweep"
        ) from error
    if not queue:
        raise ConfigError("expected one or more jobs, got none: call  omcda-deploy sweep")
    with TrainingView() as view:
        fleets.train_jobs(queue, view)
