"""Returns measured beside training, off its hot path: each snapshot is played in a process of its own.

``python -m omcda_deploy.training.evaluation RUN STEP`` plays one snapshot and appends a line to the run's
``evaluations.jsonl``; :class:`Evaluator` starts that, at low priority, for snapshots as they are written. These
numbers are for watching a run: results come from the exported bundle, evaluated by  omcda-deploy evaluate.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

from omcda_deploy.errors import OmcdaError
from omcda_deploy.processes import end_with_parent, start_child

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"


class Evaluator:
    """Evaluates snapshots beside training, every so many steps. The evaluations end when training is killed.

    ``reward`` joins the agents' own rewards in an environment of the user's own.
    """

    def __init__(self, run: Path, every: int, reward: str | None = None) -> None:
        self._run, self._every = run, every
        self._options = [] if reward is None else ["--reward", reward]
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, step: int) -> None:
        """Start the evaluation of a new snapshot, if one is due, and return at once."""
        if step % self._every == 0:
            command = [sys.executable, "-m", "omcda_deploy.training.evaluation", str(self._run), str(step)]
            self._running.append(start_child([*command, *self._options], niceness=10))

    def wait(self) -> None:
        """Wait for all evaluations; log how many failed."""
        failures = sum(process.wait() != 0 for process in self._running)
        if failures:
            log.warning(
                "%d of %d evaluations failed; their own messages say why", failures, len(self._running)
            )


def main() -> None:
    """Play one snapshot, as a program."""
    end_with_parent()  # before torch is imported, which takes seconds
    parser = argparse.ArgumentParser(
        description="Play one snapshot of a run and append to its evaluations.jsonl."
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
    line = {
        "step": arguments.step,
        "mean": result.mean,
        "std": result.std,
        "returns": result.to_json()["returns"],
    }
    with (arguments.run / EVALUATIONS).open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
