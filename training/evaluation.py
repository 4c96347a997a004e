"""Returns measured beside training, off its hot path: each snapshot is played in a process of its own.

``python -m omcda_deploy.training.evaluation RUN STEP`` plays one snapshot and appends a line to the run's
``evaluations.jsonl``; :class:`Evaluator` starts that, at low priority, for snapshots as they are written. These
numbers are for watching a run: results come from the exported bundle, evaluated by  omcda-deploy evaluate.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from omcda_deploy.errors import OmcdaError
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.policy import Decision, Float
from omcda_deploy.training.distributions import TanhGaussian, divergence, policy_of
from omcda_deploy.training.run_folder import read_config, read_snapshot

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"


class SnapshotTeam:
    """A run's policy at one step, acting deterministically in torch."""

    def __init__(self, run: Path, step: int) -> None:
        self.spec = read_config(run).spec
        self._snapshot = read_snapshot(run, step)

    def reset(self) -> None:
        """Do nothing: the policy has no state."""

    @torch.no_grad()
    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        """Act with the mode of each agent's policy; ``noise`` is not used."""
        agents = self.spec.agents
        rows = np.zeros(
            (len(observations[agents[0].name]), len(agents), self.spec.observation_size), np.float32
        )
        for i, agent in enumerate(agents):
            rows[:, i, : agent.observation_size] = observations[agent.name]
        mask = None
        if action_masks is not None:
            mask = torch.zeros(len(rows), len(agents), self.spec.action_size, dtype=torch.uint8)
            for i, agent in enumerate(agents):
                mask[:, i, : agent.action.size] = torch.from_numpy(action_masks[agent.name])
        x = torch.from_numpy(rows)
        policy = policy_of(self._snapshot.policy, x, mask)
        kl = divergence(policy, policy_of(self._snapshot.behavior, x, mask)).numpy()
        if isinstance(policy, TanhGaussian):
            actions = torch.tanh(policy.mean).numpy()
            return {a.name: Decision(actions[:, i, : a.action.size], kl[:, i]) for i, a in enumerate(agents)}
        choices = policy.log_probs.argmax(-1).numpy()
        return {a.name: Decision(choices[:, i], kl[:, i]) for i, a in enumerate(agents)}


class Evaluator:
    """Evaluates snapshots beside training, every so many steps."""

    def __init__(self, run: Path, every: int) -> None:
        self._run, self._every = run, every
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, step: int) -> None:
        """Start the evaluation of a new snapshot, if one is due, and return at once."""
        if step % self._every == 0:
            command = [sys.executable, "-m", "omcda_deploy.training.evaluation", str(self._run), str(step)]
            self._running.append(subprocess.Popen(command, preexec_fn=lambda: os.nice(10)))

    def wait(self) -> None:
        """Wait for all evaluations; log how many failed."""
        failures = sum(process.wait() != 0 for process in self._running)
        if failures:
            log.warning(
                "%d of %d evaluations failed; their own messages say why", failures, len(self._running)
            )


def main() -> None:
    """Play one snapshot, as a program."""
    parser = argparse.ArgumentParser(
        description="Play one snapshot of a run and append to its evaluations.jsonl."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        team = SnapshotTeam(arguments.run, arguments.step)
        result = evaluate(team, team.spec.task, episodes=arguments.episodes, seed=arguments.seed)
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
