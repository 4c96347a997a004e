"""``bench``: what things cost, as ratios within one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from omcda_deploy.commands import console

app = typer.Typer(help="Benchmarks: ratios measured within one run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("train")
def train(
    task: Annotated[str, typer.Option(help="Task whose shapes are used.")] = "mamujoco/halfcheetah-6x1",
    algo: Annotated[list[str] | None, typer.Option(help="Algorithms; all when omitted. Repeatable.")] = None,
    batch_size: Annotated[int, typer.Option()] = 128,
    rounds: Annotated[int, typer.Option(help="Alternating rounds of steps and floors.")] = 7,
    threads: Annotated[int, typer.Option()] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Milliseconds per training step beside its floor: the same matrix products alone, in the same run."""
    import dataclasses

    import torch

    from omcda_deploy import registry
    from omcda_deploy.measurements import machine, write_json
    from omcda_deploy.training.benchmark import step_costs

    torch.set_num_threads(threads)
    spec = registry.team_spec(task)
    names = algo or [
        n for n in registry.algorithms() if spec.action_kind in registry.load_algorithm(n).ACTIONS
    ]
    costs = step_costs(spec, names, batch_size=batch_size, rounds=rounds)
    table = Table(title=f"{task}, batch {batch_size}, {threads} thread(s), {machine()}", title_justify="left")
    for column in ("algorithm", "ms per step", "floor, ms", "ratio", "GFLOP"):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for cost in costs:
        table.add_row(
            cost.algorithm,
            f"{cost.step_ms:.2f}",
            f"{cost.floor_ms:.2f}",
            f"{cost.ratio:.2f}",
            f"{cost.gflop:.2f}",
        )
    console.print(table)
    if json_file:
        rows = [{**dataclasses.asdict(cost), "ratio": cost.ratio} for cost in costs]
        write_json(json_file, {"task": task, "batch_size": batch_size, "threads": threads, "rows": rows})
