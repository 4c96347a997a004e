"""``results``: train and play the runs of a page of docs/results, and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import TerminalObserver, console
from omcda_deploy.commands.sweep import Address, EngineName, EngineOptions, engine_options


def results(
    page: Annotated[Path, typer.Argument(help="A page's TOML file; the table is written beside it as .md.")],
    out: Annotated[Path, typer.Option(help="Folder for datasets, runs and bundles.")] = Path("results"),
    jobs: Annotated[
        int,
        typer.Option(min=0, help="Training processes at a time, up to five runs each; 0: one per core."),
    ] = 0,
    engine: EngineName = "local",
    engine_option: EngineOptions = None,
    address: Address = None,
) -> None:
    """Train and play every run of a results page, and write its table. The engine trains; the rest happens here."""
    from omcda_deploy.experiments.engines import make_engine
    from omcda_deploy.experiments.results import write_page

    run_jobs = make_engine(engine, engine_options(engine_option, address), out)
    table = write_page(page, out, jobs, TerminalObserver(), run_jobs)
    console.print(f"wrote {table}")
