"""``recordings``: what servers and clients recorded, joined to a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import print_json, print_table

app = typer.Typer(help="Make datasets of what servers and clients recorded.", no_args_is_help=True)


@app.command("join")
def join(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of servers (serve --record) and of clients.")
    ],
    out: Annotated[Path, typer.Option(help="HDF5 file to write.")],
    rewards: Annotated[
        Path | None,
        typer.Option(
            help="CSV file in place of clients' reports: episode, step, reward, terminated, truncated."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Factor of the actions' noise, where clients did not say.")
    ] = None,
) -> None:
    """Join complete episodes to a dataset, with the exact distributions that acted; print what is left out."""
    from omcda_deploy.datasets.recorded import join as join_recordings
    from omcda_deploy.datasets.writer import require_new_file

    require_new_file(out)
    print_json(join_recordings(folders, out, rewards=rewards, temperature=temperature))


@app.command("list")
def listing(
    folders: Annotated[list[Path], typer.Argument(help="Folders of recordings.")],
) -> None:
    """Print one line per segment: model, version, rows, and whether it is whole."""
    from rich.table import Table

    from omcda_deploy.recordings.reader import find_segments, read_segment

    table = Table(box=None, pad_edge=False)
    for column in ("segment", "of", "version", "rows", "lost", "end"):
        table.add_column(column)
    for path in find_segments(folders):
        segment = read_segment(path)
        if segment is None:
            table.add_row(path.name, path.parent.name, "", "0", "", "torn")
            continue
        end = "torn" if segment.torn else "closed" if segment.closed else "open"
        table.add_row(
            path.name,
            segment.metadata.get("model", path.parent.name),
            segment.metadata.get("version", ""),
            str(segment.rows),
            str(segment.lost),
            end,
        )
    print_table(table)
