"""``toy-results``: record, train, and write the table of docs/toy-results.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omcda_deploy.commands import print_note, print_text
from omcda_deploy.commands.stopping import when_stopped

if TYPE_CHECKING:
    from omcda_deploy.experiments.toy_games import Row


@when_stopped()
def toy_results(
    table: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/toy-results.md"),
    games: Annotated[list[str] | None, typer.Option("--game", help="Only these; repeatable.")] = None,
    algorithms: Annotated[list[str] | None, typer.Option("--algo", help="Only these; repeatable.")] = None,
    transitions: Annotated[int, typer.Option(min=1, help="Transitions recorded per game.")] = 200_000,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps per run.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of the datasets and of training.")] = 0,
) -> None:
    """Train every discrete algorithm on the toy games and write the table of exact expected returns."""
    from omcda_deploy.experiments.toy_games import GAMES, play_games, write_table
    from omcda_deploy.files import require_writable

    require_writable(table)
    results = play_games(
        games or GAMES,
        algorithms or (),
        transitions=transitions,
        steps=steps,
        seed=seed,
        on_row=_print_row,
    )
    write_table(table, results, transitions=transitions, steps=steps, seed=seed)
    print_text(f"wrote {table}")
    for line in (line for result in results for line in result.violations()):
        print_note(f"not as expected: {line}")


def _print_row(task: str, row: Row) -> None:
    outcome = row.failure if row.outcome is None else f"{row.outcome.sampled:.3f}"
    print_note(f"{task}: {row.algorithm} {outcome}")
