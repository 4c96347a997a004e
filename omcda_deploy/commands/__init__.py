"""Commands of the command line, one file per group: the roof, which alone may compose several rooms."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()
errors = Console(stderr=True)


@contextmanager
def progress_bar(description: str) -> Iterator[ProgressReport]:
    """A progress bar on a terminal, nothing elsewhere; yields a callable for ``(done, total)``."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as progress:
        yield ProgressReport(progress, description)


class ProgressReport:
    """Callable as ``report(done, total)``."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=min(done, total), total=total)
