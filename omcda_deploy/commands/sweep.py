"""``sweep``: train a grid of runs, resumably."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import TerminalObserver, console, named_values
from omcda_deploy.errors import ConfigError, OmcdaError

EngineName = Annotated[
    str, typer.Option("--engine", help="local (processes here), slurm or ray (docs/sweeps.md).")
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
    options = named_values("--engine-option", pairs)
    if address is not None:
        options["address"] = address
    return options


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
    """Train every combination of a sweep file; run it again to continue runs that were killed or failed."""
    from omcda_deploy.experiments.engines import make_engine
    from omcda_deploy.experiments.sweep import check_jobs, jobs_of, read_sweep

    run_jobs = make_engine(engine, engine_options(engine_option, address), out)
    queue = jobs_of(read_sweep(file), out)
    check_jobs(queue)
    console.print(
        f"{len(queue)} runs, {sum(job.finished for job in queue)} of them finished", highlight=False
    )
    failed = run_jobs(queue, jobs, TerminalObserver())
    if failed:
        raise OmcdaError(
            f"{len(failed)} of {len(queue)} runs failed, the first: {failed[0][1]}. Fix it and run the sweep again"
        )


def train_jobs(
    jobs: Annotated[str, typer.Argument(help="Jobs whose runs can be trained side by side (JSON).")],
) -> None:
    """Train jobs of a sweep in this process: what a sweep starts, for itself alone."""
    from omcda_deploy.commands.training_view import TrainingView
    from omcda_deploy.experiments import sweep as sweeps

    try:
        queue = [sweeps.Job.from_json(values) for values in json.loads(jobs)]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"expected jobs as a sweep writes them, got {jobs!r}: call  omcda-deploy sweep"
        ) from error
    if not queue:
        raise ConfigError("expected one or more jobs, got none: call  omcda-deploy sweep")
    with TrainingView() as view:
        sweeps.train_jobs(queue, view)
