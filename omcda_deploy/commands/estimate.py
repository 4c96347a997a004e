"""``estimate``: what bundles would earn, from recorded episodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from omcda_deploy.commands import (
    AsJson,
    DatasetTask,
    Temperature,
    print_json,
    print_note,
    print_table,
    print_text,
    temperature_of,
)
from omcda_deploy.commands.stopping import when_stopped
from omcda_deploy.formatting import count, percent, significant

if TYPE_CHECKING:
    from omcda_deploy.estimation import Bounds
    from omcda_deploy.experiments.estimate import Estimates

Confidence = Annotated[
    float, typer.Option(help="With which each bound holds alone, from 0.5 to below 1.", metavar="SHARE")
]
# Where episodes repeat each other, or the bundle is without the names of those that trained it.
NOT_KNOWN = "whether these episodes trained {}, which would flatter it, is not known: estimate on others"


@when_stopped()
def estimate(
    dataset: Annotated[Path, typer.Argument(help="Recorded episodes (docs/recording.md), or other ones.")],
    bundles: Annotated[list[Path], typer.Argument(help="Bundles of the same team.", metavar="BUNDLE...")],
    temperature: Temperature = "1",
    confidence: Confidence = 0.95,
    behavior: Annotated[
        Path | None,
        typer.Option(
            help="Bundle whose behaviour policy stands for what acted, where that is not on record; cloned from "
            "the dataset if omitted.",
            metavar="BUNDLE",
        ),
    ] = None,
    task: DatasetTask = None,
    as_json: AsJson = False,
) -> None:
    """Say what bundles would earn, and how sure that is, from recorded episodes: nobody plays."""
    from omcda_deploy.experiments.estimate import estimate as estimate_bundles

    found = estimate_bundles(
        dataset,
        bundles,
        temperature=temperature_of(temperature),
        confidence=confidence,
        behavior=behavior,
        task=task,
    )
    if as_json:
        print_json(found.to_json())
        return
    exact = "what acted is on record" if found.exact else "what acted is cloned"
    print_text(f"{count(found.episodes, 'recorded episode')} earned {_bounds(found.recorded)}; {exact}")
    print_table(_table(found))
    for name, comparison in found.bundles.items():
        if comparison.silence:
            print_text(f"{name}: the data cannot tell: {comparison.silence}")
    for name, share in found.trained.items():
        if share is None:
            print_note(NOT_KNOWN.format(name))
        elif share > 0:
            print_note(
                f"{percent(share)} of these episodes trained {name}, which flatters it: estimate on others"
            )
    if not found.exact:
        print_note("the bounds do not know the clone's error: record with  serve --record  for exact ones")


def _table(found: Estimates) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("bundle")
    for column in (
        "return",
        "above what was recorded",
        "episodes that count",
        "mean weight",
        "states beyond the data",
        "nats",
    ):
        table.add_column(column, justify="right")
    for name, comparison in found.bundles.items():
        table.add_row(
            name,
            _bounds(comparison.value),
            _bounds(comparison.improvement),
            f"{comparison.effective_episodes:.0f}",
            significant(comparison.mean_weight),
            percent(comparison.unsupported),
            significant(comparison.divergence),
        )
    return table


def _bounds(bounds: Bounds) -> str:
    return f"{significant(bounds.estimate)} ({significant(bounds.low)} to {significant(bounds.high)})"
