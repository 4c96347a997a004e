"""One run of a fleet: its folder, and everything that training writes there."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from omcda_deploy.files import write_json
from omcda_deploy.training.algorithm import Algorithm
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.evaluation import Evaluator
from omcda_deploy.training.fleet import run_state
from omcda_deploy.training.metrics import DivergedError, MetricsWriter, require_finite
from omcda_deploy.training.run_folder import RESUME, TIMING, read_config, snapshot_path, training_seconds

log = logging.getLogger(__name__)


class Member:
    """One run of a fleet. ``failure`` is set once its metrics are not finite; nothing more is written then."""

    def __init__(self, run: Path, evaluate_every: int | None, reward: str | None) -> None:
        self.run, self.config = run, read_config(run)
        self.failure: DivergedError | None = None
        self.state = load_state(run / RESUME) if (run / RESUME).is_file() else None
        self.step: int = 0 if self.state is None else self.state["step"]
        self._seconds = training_seconds(run)
        self._evaluator = Evaluator(run, evaluate_every, reward) if evaluate_every else None
        self._writer: MetricsWriter | None = None

    def evaluate_kept(self) -> None:
        """Start the evaluations that are due for policies up to the newest checkpoint and were not made."""
        if self._evaluator:
            self._evaluator.catch_up(self.step)

    def open(self) -> None:
        """Open the metrics; lines beyond the newest checkpoint are dropped."""
        self._writer = MetricsWriter(self.run, self.step)
        if self.step:
            log.info("%s: resumed at step %d", self.run, self.step)

    def log(self, step: int, means: dict[str, float]) -> None:
        """Write a line of metrics; note a failure where one is not finite."""
        assert self._writer is not None
        try:
            require_finite(means, step)
        except DivergedError as error:
            self.failure = error
            self.close()
            return
        self._writer.write(step, means)

    def keep_policy(self, algorithm: Algorithm, index: int) -> None:
        """Write the policy of the present step."""
        names = self.config.spec.names

        def per_agent(values: Tensor | None) -> dict[str, float] | None:
            return None if values is None else dict(zip(names, values[index].tolist(), strict=True))

        save_state(
            snapshot_path(self.run, algorithm.step),
            {
                "policy": run_state(algorithm.policy, index),
                "budgets": per_agent(algorithm.budgets),
                "alphas": per_agent(algorithm.alpha),
            },
        )
        if self._evaluator:
            self._evaluator.start(algorithm.step)

    def save(self, algorithm: Algorithm, index: int, seconds: float) -> None:
        """Write the training state, and this run's share of the ``seconds`` since :meth:`open`."""
        save_state(self.run / RESUME, algorithm.state_dict(index))
        write_json(self.run / TIMING, {"step": algorithm.step, "seconds": self._seconds + seconds})

    def close(self) -> None:
        """Close the metrics."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def wait(self) -> None:
        """Wait for evaluations that run beside training."""
        if self._evaluator:
            self._evaluator.wait()
