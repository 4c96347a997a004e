"""The progress of a training run on a terminal, or as lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from omcda_deploy.commands import is_terminal, print_note, stderr
from omcda_deploy.commands.progress import PACE
from omcda_deploy.plugins import Column, columns_of
from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.observer import TrainObserver


class TrainingView(TrainObserver):
    """A bar and a table of the algorithm's columns on a terminal, lines elsewhere: a twentieth apart, or 10 s."""

    def __init__(self) -> None:
        self._steps = 0
        self._agents: Sequence[str] = ()
        self._columns: Sequence[Column] = ()
        self._printed = -1  # twentieths of the run
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=stderr,
        )
        self._cloning = self._bar.add_task("cloning the behaviour policy", visible=False)
        self._training = self._bar.add_task("training", total=None)
        self._live: Live | None = None  # on a terminal, once there is something to show

    def __enter__(self) -> TrainingView:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.__exit__(*error)

    def started(self, spec: TeamSpec, algorithm: str, steps: int, recipe: Mapping[str, Any]) -> None:
        """Announce the recipe and show the bar."""
        if recipe:
            settings = " ".join(f"{name}={value}" for name, value in recipe.items())
            print_note(f"recipe of {spec.task.partition('/')[0]}: {settings}")
        self.show(steps, spec.names, columns_of(load_algorithm(algorithm)))

    def show(self, steps: int, agents: Sequence[str], columns: Sequence[Column]) -> None:
        """Show the progress of ``steps`` steps, and of the metrics in ``columns``."""
        self._steps, self._agents, self._columns = steps, agents, columns
        if is_terminal(sys.stderr):
            self._bar.update(self._training, total=steps)
            self._live = Live(self._bar, console=stderr, auto_refresh=False)
            self._live.__enter__()

    def cloning(self, step: int, steps: int, loss: float) -> None:
        """Show the progress of cloning."""
        if self._live:
            text = f"cloning the behaviour policy, held-out NLL {loss:.3f} nats"
            self._bar.update(self._cloning, completed=step, total=steps, description=text, visible=True)
            self._live.refresh()
        else:
            print_note(
                f"cloning the behaviour policy: step {step} of at most {steps}, held-out NLL {loss:.3f}"
            )

    def choosing(self, step: int, steps: int) -> None:
        """Show the progress of the trainings from which the budget is chosen."""
        if self._live:
            text = "training on halves of the data, to choose d_tot"
            self._bar.update(self._cloning, completed=step, total=steps, description=text, visible=True)
            self._live.refresh()
        elif step in (1, steps // 2, steps) or PACE.due():
            print_note(f"training on halves of the data, to choose d_tot: step {step} of {steps}")

    def chosen(self, advice: str) -> None:
        """Print the choice."""
        print_note(f"d_tot auto: {advice}")

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the losses and the algorithm's columns."""
        losses = "  ".join(f"{k.removeprefix('loss/')} {v:.3g}" for k, v in metrics.items() if "loss/" in k)
        if self._live:
            self._bar.update(self._cloning, visible=False)
            self._bar.update(self._training, completed=step)
            lines = (Text(f"losses: {losses}", "dim"), Text("  ".join(self._team_numbers(metrics)), "dim"))
            self._live.update(Group(self._bar, self._table(metrics), *lines), refresh=True)
        elif (twentieth := 20 * step // self._steps) > self._printed or PACE.due():
            self._printed = twentieth
            print_note("  ".join([f"step {step} of {self._steps}: {losses}", *self._sums(metrics)]))

    def _team_numbers(self, metrics: Mapping[str, float]) -> list[str]:
        """Format the metrics of the whole team."""
        words = []
        for column in self._columns:
            if not column.per_agent and column.metric in metrics:
                value = metrics[column.metric]
                if column.flag is None:
                    words.append(f"{column.title} {value:.3g}")
                elif (value > 0.5) == column.flag:
                    words.append(column.title)
        return words

    def _sums(self, metrics: Mapping[str, float]) -> list[str]:
        """Format the sums over agents of the columns that have a unit."""
        return [
            f"sum of {column.title} {sum(values):.{column.digits}f} {column.unit}"
            for column in self._columns
            if column.unit and (values := self._per_agent(column, metrics))
        ]

    def _per_agent(self, column: Column, metrics: Mapping[str, float]) -> list[float]:
        """List the metric's value of each agent; empty where it was not logged."""
        keys = [f"{column.metric}/{agent}" for agent in self._agents]
        return [metrics[key] for key in keys] if all(key in metrics for key in keys) else []

    def _table(self, metrics: Mapping[str, float]) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("agent")
        rows = [[agent] for agent in self._agents]
        for column in self._columns:
            values = self._per_agent(column, metrics) if column.per_agent else []
            if values and column.flag is None:
                table.add_column(column.title, justify="right")
            for row, value in zip(rows, values, strict=False):
                if column.flag is None:
                    row.append(f"{value:.{column.digits}f}")
                elif (value > 0.5) == column.flag:
                    row[0] += f" ({column.title})"
        for row in rows:
            table.add_row(*row)
        return table
