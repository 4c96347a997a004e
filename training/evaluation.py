"""Returns measured beside training, off its hot path: each snapshot is played in a process of its own.

``python -m omcda_deploy.training.evaluation RUN STEP`` plays one snapshot and adds a line to the run's
``evaluations.jsonl``; :class:`Evaluator` starts that, at low priority, for snapshots as they are written. These
numbers are for watching a run: results come from the exported bundle, evaluated by  omcda-deploy evaluate.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omcda_deploy.errors import OmcdaError
from omcda_deploy.processes import end_with_parent, start_child

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"


class Evaluator:
    """Evaluates snapshots beside training, every so many steps. The evaluations end when training is killed.

    ``reward`` joins the agents' own rewards in an environment of the user's own.
    """

    MOST = 2  # processes at once

    def __init__(self, run: Path, every: int, reward: str | None = None) -> None:
        self._run, self._every = run, every
        self._options = [] if reward is None else ["--reward", reward]
        self._due: list[int] = []  # steps
        self._running: list[subprocess.Popen[bytes]] = []
        self._ended = self._failed = 0

    def catch_up(self, step: int) -> None:
        """Begin at ``step``: forget what was measured beyond it, and start what was not measured up to it."""
        from omcda_deploy.training.run_folder import snapshot_steps  # imports torch, which takes seconds

        measured: set[int] = set()
        if (self._run / EVALUATIONS).exists():
            with _lines(self._run) as lines:
                for beyond in [number for number in lines if number > step]:
                    del lines[beyond]
                measured = set(lines)
        for kept in snapshot_steps(self._run):
            if kept <= step and kept not in measured:
                self.start(kept)

    def start(self, step: int) -> None:
        """Start the evaluation of a snapshot, if one is due, or have it wait for others; return at once."""
        if step % self._every == 0:
            self._due.append(step)
        self._go_on()

    def wait(self) -> None:
        """Wait for all evaluations; log how many failed."""
        while self._running:
            self._running[0].wait()
            self._go_on()
        if self._failed:
            log.warning("%d of %d evaluations failed; their own messages say why", self._failed, self._ended)

    def _go_on(self) -> None:
        """Count the evaluations that have ended, and start as many of those that are due."""
        ended = [process.returncode for process in self._running if process.poll() is not None]
        self._running = [process for process in self._running if process.returncode is None]
        self._ended += len(ended)
        self._failed += sum(status != 0 for status in ended)
        while self._due and len(self._running) < self.MOST:
            number = str(self._due.pop(0))
            command = [sys.executable, "-m", "omcda_deploy.training.evaluation", str(self._run), number]
            self._running.append(start_child([*command, *self._options], niceness=10))


@contextmanager
def _lines(run: Path) -> Iterator[dict[int, dict[str, Any]]]:
    """Yield what was measured by step, and write it back in the order of steps; processes wait for one another."""
    with (run / EVALUATIONS).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines: dict[int, dict[str, Any]] = {}
        for text in file:
            with suppress(ValueError):  # a kill cut the last line short
                line = json.loads(text)
                lines[line["step"]] = line
        yield lines
        file.truncate(0)
        file.writelines(json.dumps(lines[step]) + "\n" for step in sorted(lines))


def main() -> None:
    """Play one snapshot, as a program."""
    end_with_parent()  # before torch is imported, which takes seconds
    parser = argparse.ArgumentParser(
        description="Play one snapshot of a run and note it in its evaluations.jsonl."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward")
    arguments = parser.parse_args()

    import torch

    from omcda_deploy.play.evaluate import evaluate
    from omcda_deploy.training.snapshot_team import SnapshotTeam

    torch.set_num_threads(1)
    try:
        team = SnapshotTeam(arguments.run, arguments.step)
        options = {} if arguments.reward is None else {"reward": arguments.reward}
        result = evaluate(
            team, team.spec.task, episodes=arguments.episodes, seed=arguments.seed, options=options
        )
    except OmcdaError as error:
        sys.exit(f"error: evaluation of step {arguments.step}: {error}")
    with _lines(arguments.run) as lines:
        lines[arguments.step] = {
            "step": arguments.step,
            "mean": result.mean,
            "std": result.std,
            "returns": result.to_json()["returns"],
        }


if __name__ == "__main__":
    main()
