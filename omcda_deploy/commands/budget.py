"""``choose-budget``: OMCDA's total divergence budget, from a dataset alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from omcda_deploy.commands import named_values, print_table, print_text, require_outputs
from omcda_deploy.commands.progress import progress_bar
from omcda_deploy.commands.stopping import when_stopped
from omcda_deploy.errors import ConfigError

if TYPE_CHECKING:
    from omcda_deploy.training.budget import BudgetChoice


@when_stopped()
def choose_budget(
    dataset: Annotated[Path, typer.Argument(help="A dataset file.")],
    steps: Annotated[
        int, typer.Option(help="Gradient steps of a training on one half of the episodes.")
    ] = 5000,
    budgets: Annotated[
        str | None, typer.Option(help="Budgets to choose among in nats, ascending, as 0.1,0.3,1.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of omcda, name=value; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the halves, the weights and the batches.")] = 0,
    task: Annotated[str | None, typer.Option(help="Task of a dataset that does not say.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    behavior_steps: Annotated[int, typer.Option(help="Most steps for cloning on each half.")] = 10_000,
    time_limit_is_terminal: Annotated[
        bool,
        typer.Option("--time-limit-is-terminal", help="Count time limits as ends, as published code does."),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Say which d_tot the data support: train on each half of the episodes, measure on the other."""
    from omcda_deploy.experiments.budget import choose_budget as choose
    from omcda_deploy.files import write_json

    require_outputs(json)
    with progress_bar("training at every budget", "steps") as report:
        choice = choose(
            dataset,
            steps=steps,
            budgets=None if budgets is None else _numbers(budgets),
            seed=seed,
            settings=named_values("--set", settings),
            task=task,
            behavior={"steps": behavior_steps},
            device=device,
            time_limit_is_terminal=time_limit_is_terminal,
            progress=report,
        )
    if json is not None:
        write_json(json, choice.to_json())
    print_table(_table(choice))
    print_text(choice.advice)


def _numbers(budgets: str) -> list[float]:
    try:
        return [float(number) for number in budgets.split(",")]
    except ValueError:
        raise ConfigError(f"--budgets: expected numbers such as 0.1,0.3,1, got {budgets!r}") from None


def _table(choice: BudgetChoice) -> Table:
    """One row per budget."""
    valued = any(row.gain is not None for row in choice.rows)
    table = Table(box=None, pad_edge=False)
    columns = ["d_tot", "in an episode", "spent", "held-out steps that count"]
    if valued:
        columns += ["fitted gain ± its deviation", "beyond the data"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in choice.rows:
        cells = [
            f"{row.d_tot:g}",
            f"{row.per_episode:.3g}",
            f"{row.spent:.3g}",
            f"{100 * row.effective_share:.0f} %",
        ]
        if row.gain is not None:
            cells += [f"{row.gain:.3g} ± {row.deviation:.2g}", "yes" if row.beyond_data else "no"]
        table.add_row(*cells)
    return table
