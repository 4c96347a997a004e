"""``results``: train and play the runs of a page of docs/results, and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import TerminalObserver, console


def results(
    page: Annotated[Path, typer.Argument(help="A page's TOML file; the table is written beside it as .md.")],
    out: Annotated[Path, typer.Option(help="Folder for datasets, runs and bundles.")] = Path("results"),
    jobs: Annotated[int, typer.Option(help="Runs at the same time; 0: one per core.")] = 0,
) -> None:
    """Train and play every run of a results page, and write its table."""
    from omcda_deploy.experiments.results import write_page

    table = write_page(page, out, jobs, TerminalObserver())
    console.print(f"wrote {table}")
