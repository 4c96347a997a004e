"""``sweep``: train a grid of runs, resumably."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import TerminalObserver, console
from omcda_deploy.errors import OmcdaError


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file (TOML).")],
    out: Annotated[Path, typer.Option(help="Folder for the runs; runs already in it are continued.")],
    jobs: Annotated[int, typer.Option(help="Runs at the same time, one thread each; 0: one per core.")] = 0,
) -> None:
    """Train every combination of a sweep file; run it again to continue runs that were killed or failed."""
    from omcda_deploy.experiments.sweep import jobs_of, read_sweep, run_queue

    queue = jobs_of(read_sweep(file), out)
    console.print(
        f"{len(queue)} runs, {sum(job.finished for job in queue)} of them finished", highlight=False
    )
    failed = run_queue(queue, jobs, observer=TerminalObserver())
    if failed:
        raise OmcdaError(
            f"{len(failed)} of {len(queue)} runs failed, the first: {failed[0][1]}. Fix it and run the sweep again"
        )
