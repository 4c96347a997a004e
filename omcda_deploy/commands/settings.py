"""``settings``: what can be set of an algorithm, with defaults, a task's recipe, ranges and meanings."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from omcda_deploy.commands import AsJson, print_json, print_table
from omcda_deploy.commands.completion import algorithm_names, task_names


def settings(
    algorithm: Annotated[
        str,
        typer.Argument(metavar="ALGO", help="See  omcda-deploy algorithms.", autocompletion=algorithm_names),
    ],
    task: Annotated[
        str | None, typer.Argument(help="Task whose recipe is shown beside.", autocompletion=task_names)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the settings of an algorithm, which  train --set NAME=VALUE  changes."""
    from omcda_deploy import registry
    from omcda_deploy.training.recipes import families, recipe
    from omcda_deploy.training.settings import describe

    described = describe(registry.load_algorithm(algorithm).Config)
    if task is not None and task.partition("/")[0] not in families():
        registry.require_task(task)
    published = {} if task is None else recipe(task, algorithm)
    if as_json:
        rows = [{**setting.to_json(), "recipe": published.get(setting.name)} for setting in described]
        print_json({"algorithm": algorithm, "task": task, "settings": rows})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "default", *([f"recipe of {task}"] if task else []), "range", "meaning"):
        table.add_column(column)
    for setting in described:
        own = [_text(published[setting.name]) if setting.name in published else ""] if task else []
        table.add_row(setting.name, _text(setting.default), *own, setting.range, setting.meaning)
    print_table(table)


def _text(value: Any) -> str:
    """Write a value as ``--set`` takes it."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
