"""``compare``: play the last policy of trained runs and compare them over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from omcda_deploy.commands import TerminalObserver, console
from omcda_deploy.errors import ConfigError

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders with run folders anywhere below.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.md and the CSV files.")],
    episodes: Annotated[int, typer.Option(help="Episodes per run.")] = 20,
    seed: Annotated[
        int, typer.Option(help="Seed of the evaluation; episode k's seed is a function of it and k.")
    ] = 0,
    num_envs: Annotated[int, typer.Option(help="Environments stepped side by side.")] = 10,
    workers: Annotated[
        int, typer.Option(help="Processes that step simulators that have no batched form; 0 for none.")
    ] = 0,
) -> None:
    """Export and play the last policy of every run, and write tables and figures over seeds."""
    from omcda_deploy.experiments.compare import compare_runs, find_runs
    from omcda_deploy.play.measurements import require_at_least
    from omcda_deploy.report.comparison_report import write_comparison

    for value, least, name in ((episodes, 1, "episodes"), (seed, 0, "seed"), (num_envs, 1, "num_envs")):
        require_at_least(value, least, name)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: expected a folder to write to")
    comparison = compare_runs(
        find_runs(runs),
        episodes,
        seed,
        num_envs,
        workers,
        observer=TerminalObserver(),
    )
    write_comparison(comparison, out)
    print_comparison(comparison)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def print_comparison(comparison: Comparison) -> None:
    """Print a table per dataset, and the runs that were left out."""
    for (task, _), summaries in comparison.datasets.items():
        title = f"{task}, {comparison.dataset(summaries[0].variant)}"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("runs of", "seeds", "mean", "std over seeds"):
            table.add_column(column)
        for summary in summaries:
            spread = f"{summary.std:.4g}" if summary.values.size > 1 else "one seed"
            table.add_row(
                comparison.name(summary.variant), str(summary.values.size), f"{summary.mean:.5g}", spread
            )
        console.print(table)
    for left in comparison.left_out:
        console.print(
            f"left out of the means: {left.run}: {left.reason}", highlight=False, soft_wrap=True, markup=False
        )
