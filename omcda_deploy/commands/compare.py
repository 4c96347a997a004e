"""``compare``: play the last policies of trained runs and compare them over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omcda_deploy.commands import (
    RewardRule,
    Temperatures,
    claimed_folder,
    print_table,
    print_text,
    rule_of,
    temperatures_of,
)
from omcda_deploy.commands.progress import TerminalObserver
from omcda_deploy.commands.stopping import this_command, when_stopped
from omcda_deploy.references import trust

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison


@when_stopped(lambda: f"the scores of the runs that were played are kept, go on with  {this_command()}")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders with run folders anywhere below.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.md and the CSV files.")],
    episodes: Annotated[
        int,
        typer.Option(
            help="Episodes per policy and temperature; a quarter as many of another seed select it."
        ),
    ] = 20,
    temperature: Temperatures = "0,0.25,0.5,0.75,1",
    seed: Annotated[
        int, typer.Option(help="Seed of the evaluation; a run's episodes are of its sum with the run's.")
    ] = 0,
    num_envs: Annotated[
        int, typer.Option(help="Episodes played side by side, per temperature: the batch size of policies.")
    ] = 20,
    workers: Annotated[
        int, typer.Option(help="Processes that step simulators that have no batched form; 0 for none.")
    ] = 0,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:CALLABLE", help="Environment of your own that runs were recorded in; repeatable."
        ),
    ] = None,
    reward: RewardRule = None,
) -> None:
    """Export and play the last policies of every run, and write tables and figures over seeds."""
    from omcda_deploy.experiments.compare import compare_runs, find_runs
    from omcda_deploy.experiments.scores import Conditions
    from omcda_deploy.report.comparison_report import write_comparison

    rule = rule_of(reward, "--env", bool(env))
    conditions = Conditions(episodes, seed, num_envs, temperatures_of(temperature), workers, rule)
    for reference in env or ():
        trust(reference)
    with claimed_folder(out):
        comparison = compare_runs(find_runs(runs), conditions, observer=TerminalObserver())
        write_comparison(comparison, out)
    print_comparison(comparison)
    print_text(f"report: {out / 'report.html'}")


def print_comparison(comparison: Comparison) -> None:
    """Print a table per dataset, and the runs that were left out."""
    from omcda_deploy.report.comparison_report import terminal_tables

    for table in terminal_tables(comparison):
        print_table(table)
    for left in comparison.left_out:
        print_text(f"left out of the means: {left.run}: {left.reason}")
