"""Choice of OMCDA's total budget from a dataset, as a function for notebooks and for the commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import ConfigError
from omcda_deploy.registry import read_dataset

if TYPE_CHECKING:
    from omcda_deploy.training.budget import BudgetChoice


def choose_budget(
    dataset: Dataset | str | Path,
    *,
    steps: int = 5000,
    budgets: Sequence[float] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    task: str | None = None,
    behavior: Mapping[str, Any] | None = None,
    device: str = "cpu",
    time_limit_is_terminal: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BudgetChoice:
    """Choose d_tot in nats from the data alone: on each half of the episodes OMCDA is trained at every budget.

    The arguments are those of :func:`omcda_deploy.train`; ``steps`` are those of one training on one half, and
    ``progress`` is called with (done, total) of them. The choice is 0 where the data support no budget: clone then.

    Raises as :func:`omcda_deploy.train` does, and :class:`ConfigError` for budgets that are not positive and
    ascending, and for d_tot among the settings.
    """
    from omcda_deploy.training.budget import BUDGETS, cached_choice
    from omcda_deploy.training.request import AUTO, TrainRequest

    if (fixed := (settings or {}).get("d_tot", AUTO)) != AUTO:
        raise ConfigError(
            f"d_tot: it is chosen here, got {fixed!r}: leave it out, and name budgets to choose among instead"
        )
    request = TrainRequest(
        "omcda",
        steps,
        seed,
        settings={**(settings or {}), "d_tot": AUTO},
        behavior=behavior or {},
        device=device,
        time_limit_is_terminal=time_limit_is_terminal,
        budgets=BUDGETS if budgets is None else tuple(budgets),
    )
    request.check()
    data = dataset if isinstance(dataset, Dataset) else read_dataset(Path(dataset), task)
    search = dataclasses.replace(request.resolved(data.spec).search, steps=steps, seed=seed)
    return cached_choice(data, search, progress)
