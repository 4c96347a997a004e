"""Training metrics as JSON lines and TensorBoard events, both resumable."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from omcda_deploy.errors import OmcdaError
from omcda_deploy.files import write_text
from omcda_deploy.plugins import Column
from omcda_deploy.processes import postponing_signals

KL = Column("kl", "KL", digits=4, unit="nats")  # KL(pi_i || pi_b^i), or the algorithm's own measure of it


class DivergedError(OmcdaError):
    """A loss or a policy statistic is no longer a finite number."""


class Window:
    """Means of metrics of R runs over the steps since the last :meth:`close`.

    Tensors per agent become one entry each.
    """

    def __init__(self, agents: Sequence[str]) -> None:
        self._agents = agents
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's metrics: one number per run [R], or per run and agent [R, N]."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.detach().clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def close(self) -> list[dict[str, float]]:
        """Return the means of each run and empty the window."""
        runs: list[dict[str, float]] = [{} for _ in range(len(next(iter(self._sums.values()), ())))]
        for name, total in self._sums.items():
            for means, mean in zip(runs, (total / self._counts[name]).tolist(), strict=True):
                if isinstance(mean, list):
                    means |= {
                        f"{name}/{agent}": value for agent, value in zip(self._agents, mean, strict=True)
                    }
                else:
                    means[name] = mean
        self._sums, self._counts = {}, {}
        return runs


def require_finite(means: Mapping[str, float], step: int) -> None:
    """Raise :class:`DivergedError` naming the first mean that is not finite."""
    for name, value in means.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"training diverged before step {step}: {name} is {value}. "
                "Lower the learning rate or the budget, or check the dataset's rewards and actions"
            )


class MetricsWriter:
    """``metrics.jsonl`` and ``tensorboard/`` of a run folder; opening drops what was written beyond ``step``."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        if path.exists():
            lines = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] > step:
                        break
                except ValueError:  # a kill cut the last line short
                    break
                lines.append(line + "\n")
            write_text(path, "".join(lines))
        self._file = path.open("a")
        with postponing_signals():
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl and a point per value to TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        with postponing_signals():  # else TensorBoard's queue stays locked, and closing it waits for ever
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        with postponing_signals():
            self._board.close()
