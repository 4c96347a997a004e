"""CLI commands, one file per group: options, checks of input, progress and tables.

The libraries that they call do the work; :mod:`omcda_deploy.experiments` composes training, export and play.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.observer import Observer

if TYPE_CHECKING:
    from omcda_deploy.client.channel import Credentials

console = Console()
stderr = Console(stderr=True)

SimulatorPython = Annotated[
    str | None,
    typer.Option(help="SMAC only: the bin/python of the virtual environment that SMAC is installed in."),
]
SimulatorFactory = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:CALLABLE", help="SMAC only: makes the environment there, in place of SMAC itself."
    ),
]

CredentialsFile = Annotated[
    Path | None,
    typer.Option("--credentials", help="TOML file with TLS files and a token (docs/serving.md)."),
]


def credentials_of(path: Path | None) -> Credentials | None:
    """Read a credentials file; None for no file."""
    from omcda_deploy.client.channel import read_credentials

    return None if path is None else read_credentials(path)


def simulator_options(python: str | None, factory: str | None) -> dict[str, str]:
    """Options of a task's simulator by name, without those left at None."""
    return {name: value for name, value in (("python", python), ("factory", factory)) if value is not None}


def named_values(option: str, pairs: Sequence[str] | None) -> dict[str, str]:
    """Collect the values of a repeatable ``option`` name=value. Raises :class:`ConfigError` for one without =."""
    values = {}
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"{option}: expected name=value, got {pair!r}")
        values[name] = value
    return values


@contextmanager
def progress_bar(description: str) -> Iterator[ProgressReport]:
    """Show a progress bar on a terminal, and nothing elsewhere; yields a callable for ``(done, total)``."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as progress:
        yield ProgressReport(progress, description)


class ProgressReport:
    """Updates a progress bar when called as ``report(done, total)``."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=min(done, total), total=total)


class TerminalObserver(Observer):
    """Prints the progress of an experiment to stderr."""

    def progress(self, label: str) -> AbstractContextManager[ProgressReport]:
        return progress_bar(label)

    def recorded(self, dataset: Path) -> None:
        self._print(f"recorded {dataset}")

    def ended(self, run: Path, error: OmcdaError | None) -> None:
        self._print(f"done: {run}" if error is None else f"failed: {error}")

    def left_out(self, run: Path, error: OmcdaError) -> None:
        self._print(f"left out: {run}: {error}")

    def _print(self, line: str) -> None:
        stderr.print(line, highlight=False, soft_wrap=True, markup=False)


def addresses(endpoints: str) -> list[str]:
    """Expand ranges of ports: ``a:1,b:5-7`` becomes ``[a:1, b:5, b:6, b:7]``."""
    expanded = []
    for part in filter(None, (word.strip() for word in endpoints.split(","))):
        host, _, ports = part.rpartition(":")
        first, dash, last = ports.partition("-")
        if dash and first.isdigit() and last.isdigit():
            if int(first) > int(last):
                raise ConfigError(
                    f"{part}: expected ports from the lower to the higher, got {first} to {last}"
                )
            expanded += [f"{host}:{port}" for port in range(int(first), int(last) + 1)]
        else:
            expanded.append(part)
    return expanded
