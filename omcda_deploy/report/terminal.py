"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table


def terminal_table(title: str, name_column: str, number_columns: Iterable[str]) -> Table:
    """An empty table: one column of names, then columns of numbers, aligned right and never wrapped."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(name_column)
    for column in number_columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
