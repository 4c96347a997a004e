"""Progress of commands that take a while, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from omcda_deploy.commands import is_terminal, print_note, stderr
from omcda_deploy.errors import OmcdaError
from omcda_deploy.experiments.observer import Observer

if TYPE_CHECKING:
    from omcda_deploy.play.evaluate import Evaluation
    from omcda_deploy.policy import TeamPolicy

MOST_S = 1e9  # that are told to be left

Report: TypeAlias = Callable[[float, float], None]  # (done, total)


class Pace:
    """When lines are due: every 10 s, and in the long run whenever a tenth more time has passed.

    A command has one pace for all of its parts, so that a hundred short ones are no hundred lines.
    """

    LEAST_S = 10.0
    SHARE = 0.1  # of the time so far

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._begun = self._last = time.monotonic()

    def due(self) -> bool:
        """Test if a line is due; the next one is due later."""
        now = time.monotonic()
        if now - self._last < max(self.LEAST_S, self.SHARE * (now - self._begun)):
            return False
        self._last = now
        return True


PACE = Pace()  # started by each command


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Report]:
    """Show how far something is, counted in ``unit`` (a plural), and yield what is told ``(done, total)``."""
    if not is_terminal(sys.stderr):
        yield _lines(description, unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(description, total=None, amount="")

        def report(done: float, total: float) -> None:
            progress.update(task, completed=done, total=total, amount=_amount(done, total, unit))

        yield report


def _lines(description: str, unit: str) -> Report:
    """Return a report that prints a line when one is due."""
    # Time and amount of the first report: what was there before took none of the time.
    begun: tuple[float, float] | None = None

    def report(done: float, total: float) -> None:
        nonlocal begun
        now = time.monotonic()
        since, before = begun = begun or (now, done)
        if PACE.due():
            left = (now - since) * (total - done) / (done - before) if done > before else None
            estimate = "" if left is None else f", {timedelta(seconds=round(min(left, MOST_S)))} left"
            print_note(f"{description}: {_amount(done, total, unit)} ({done / total:.0%}{estimate})")

    return report


def _amount(done: float, total: float, unit: str) -> str:
    # Units are counted whole but for the share of those under way, such as episodes played side by side.
    return f"{done:,.1f}".removesuffix(".0") + f" of {total:,} {unit}"


class TerminalObserver(Observer):
    """Prints the progress of an experiment to stderr."""

    def progress(self, label: str, unit: str) -> AbstractContextManager[Report]:
        return progress_bar(label, unit)

    def recorded(self, dataset: Path) -> None:
        print_note(f"recorded {dataset}")

    def ended(self, run: Path, error: OmcdaError | None) -> None:
        print_note(f"done: {run}" if error is None else f"failed: {error}")

    def left_out(self, run: Path, error: OmcdaError) -> None:
        print_note(f"left out: {run}: {error}")


def play_temperatures(
    team: TeamPolicy, task: str, temperatures: Sequence[float], label: str, **settings: Any
) -> list[Evaluation]:
    """Evaluate ``team`` at one temperature after another, and show the progress of each.

    ``settings`` are those of :func:`omcda_deploy.play.evaluate.evaluate`, whose errors are raised.
    """
    from omcda_deploy.play.evaluate import evaluate

    evaluations = []
    for temperature in temperatures:
        with progress_bar(f"{label}, temperature {temperature:g}", "episodes") as progress:
            evaluations.append(evaluate(team, task, temperature=temperature, progress=progress, **settings))
    return evaluations
