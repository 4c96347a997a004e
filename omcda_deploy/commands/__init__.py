"""CLI commands, one file per group: options, checks of input and tables.

The libraries that they call do the work; :mod:`omcda_deploy.experiments` composes training, export and play.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.measure import Measurement

from omcda_deploy.claims import claimed
from omcda_deploy.commands.completion import task_names
from omcda_deploy.errors import ConfigError
from omcda_deploy.files import folder_of, is_stream, require_writable

if TYPE_CHECKING:
    from rich.table import Table

    from omcda_deploy.client.channel import Credentials

WIDE = 10_000  # columns, more than any line has


def is_terminal(stream: TextIO | None) -> bool:
    """Test if a stream, None for one that was closed before this process began, is a terminal."""
    return stream is not None and stream.isatty()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # which the command line ends with, as at every other place that prints


def _console(stream: TextIO | None, **settings: Any) -> Console:
    """Make a console that breaks and shortens lines for a terminal alone: what is piped is whole.

    Nothing in what it prints is markup or an emoji's code: names and paths are the user's.
    """
    return _Console(width=None if is_terminal(stream) else WIDE, markup=False, emoji=False, **settings)


console = _console(sys.stdout)
stderr = _console(sys.stderr, stderr=True)

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

OptionalTask = Annotated[
    str | None,
    typer.Argument(help="For instance mamujoco/halfcheetah-6x1.", autocompletion=task_names),
]
OwnEnvironment = Annotated[
    str | None,
    typer.Option(
        "--env",
        metavar="MODULE:CALLABLE",
        help="Makes an environment of your own, to be played instead of TASK.",
    ),
]

DatasetTask = Annotated[
    str | None,
    typer.Option(
        "--task",
        "--env",
        help="Task of a dataset that does not say: a name, or MODULE:CALLABLE.",
        autocompletion=task_names,
    ),
]


class Reward(StrEnum):
    shared = "shared"
    sum = "sum"
    mean = "mean"


RewardRule = Annotated[
    Reward | None,
    typer.Option(
        help="With --env, the team's reward: the one that all agents share, or the sum or mean of theirs."
    ),
]

CredentialsFile = Annotated[
    Path | None,
    typer.Option("--credentials", help="TOML file with TLS files and a token (docs/serving.md)."),
]


# Read by temperatures_of and temperature_of: typer's own error for a number would not be one line.
Temperatures = Annotated[
    str,
    typer.Option(
        "--temperature",
        metavar="T[,T…]",
        help="Factors of the actions' noise, comma-separated: 0 is deterministic, 1 samples (docs/evaluation.md).",
    ),
]
Temperature = Annotated[
    str,
    typer.Option(
        "--temperature",
        metavar="T",
        help="Factor of the actions' noise: 0 is deterministic, 1 samples (docs/evaluation.md).",
    ),
]


Demo = Annotated[
    bool, typer.Option("--demo", help="The trained team that comes with the package (docs/results/demo.md).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON (docs/command-line.md).")]


def temperatures_of(text: str) -> tuple[float, ...]:
    """Read the value of ``--temperature``, in ascending order.

    Raises :class:`ConfigError` for anything but different numbers of the range.
    """
    from omcda_deploy.policy import checked_temperatures

    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--temperature: expected numbers such as 0,0.5,1, got {text!r}") from None
    return checked_temperatures(values)


def temperature_of(text: str) -> float:
    """Read the value of a ``--temperature`` that takes one number; errors as of :func:`temperatures_of`."""
    temperatures = temperatures_of(text)
    if len(temperatures) > 1:
        raise ConfigError(f"--temperature: expected one number, got {text!r}: call once for each")
    return temperatures[0]


def bundle_of(bundle: Path | None, demo: bool) -> Path:
    """Return the bundle that is named, or the one that comes with the package.

    Raises :class:`ConfigError` unless one of the two is given.
    """
    from omcda_deploy.bundle import DEMO_TEAM

    if (bundle is None) != demo:
        raise ConfigError(
            "expected a BUNDLE, or --demo for the team that comes with the package: give one of them"
        )
    return bundle or DEMO_TEAM


def credentials_of(path: Path | None) -> Credentials | None:
    """Read a credentials file; None for no file."""
    from omcda_deploy.client.channel import read_credentials

    return None if path is None else read_credentials(path)


def task_of(task: str | None, environment: str | None) -> str:
    """Return the task to play: a name, known or not, or a reference of the user's own.

    Raises :class:`ConfigError` unless one of the two is given.
    """
    from omcda_deploy.references import is_reference

    if (task is None) == (environment is None):
        raise ConfigError("expected a TASK, or --env module:callable in its place: give one of them")
    if environment is not None and not is_reference(environment):
        raise ConfigError(f"--env: expected module:callable, such as warehouse:make, got {environment!r}")
    return task or environment or ""


def rule_of(reward: Reward | None, needed: str, given: bool) -> str | None:
    """Return the rule of ``--reward``, None without. Raises :class:`ConfigError` where ``needed`` is not given."""
    if reward is None:
        return None
    if not given:
        raise ConfigError(
            f"--reward {reward}: expected {needed}, whose episodes have rewards, got none: leave it out"
        )
    return reward.value


def simulator_options(
    python: str | None, factory: str | None, reward: Reward | None = None
) -> dict[str, str]:
    """Options of a task's simulator by name, without those left at None."""
    options = {"python": python, "factory": factory, "reward": None if reward is None else reward.value}
    return {name: value for name, value in options.items() if value is not None}


def named_values(option: str, pairs: Sequence[str] | None, **own: str | None) -> dict[str, str]:
    """Collect the values of a repeatable ``option`` name=value, and of names with options of their ``own``.

    Raises :class:`ConfigError` for one without =, and for a name that is given twice.
    """
    stated = {name: value for name, value in own.items() if value is not None}
    values = dict(stated)
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"{option}: expected name=value, got {pair!r}")
        if name in stated:
            raise ConfigError(
                f"expected --{name.replace('_', '-')} or {option} {name}=, got both: leave one of them out"
            )
        if name in values:
            raise ConfigError(
                f"{option}: expected {name} once, got {values[name]!r} and {value!r}: leave one of them out"
            )
        values[name] = value
    return values


def print_text(text: str, style: str = "") -> None:
    """Print text as it is: no line is broken."""
    console.print(text, style=style or None, highlight=False, soft_wrap=True)


def print_note(text: str) -> None:
    """Print text as it is to stderr, beside the results of a command."""
    stderr.print(text, highlight=False, soft_wrap=True)


def print_json(values: Any) -> None:
    """Print JSON values."""
    console.print_json(json.dumps(values))


def print_table(table: Table) -> None:
    """Print a table with all its columns, also where the terminal seems too narrow for them, its title above it."""
    if table.title:  # which rich would break where it is longer than the table
        print_text(str(table.title), style="bold")
        table.title = None
    needed = Measurement.get(console, console.options.update(max_width=WIDE), table).maximum
    wide = _console(sys.stdout)
    wide.width = max(console.width, needed)
    wide.print(table)  # print's own width is at most the terminal's


def require_outputs(*files: Path | None) -> None:
    """Raise :class:`ConfigError` for a file that cannot be written, before any time is spent on its content.

    And for one that is asked for twice, in whatever words.
    """
    asked_for: dict[str, Path] = {}
    for file in filter(None, files):
        other = asked_for.setdefault(os.path.realpath(file), file)
        if other is not file and not is_stream(file):
            raise ConfigError(f"{file}: expected a file for each output, got this one twice: name another")
        if file.is_dir():
            raise ConfigError(f"{file} is a folder: expected a name for the file, such as {file / 'result'}")
        if not file.parent.is_dir():
            raise ConfigError(f"{file}: the folder {file.parent} does not exist, create it first")
        require_writable(file)


def require_folder(out: Path) -> None:
    """Raise :class:`ConfigError` where no folder can be written, before any time is spent on its content."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: expected a folder to write to")
    require_writable(out)


@contextmanager
def claimed_folder(out: Path) -> Iterator[None]:
    """Hold the folder ``out``, which need not exist, while the block writes into it.

    Raises :class:`ConfigError` where it cannot be written, and where another process writes it.
    """
    require_folder(out)
    with folder_of(out), claimed(out):
        yield


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
