"""Training of one run, as a function for notebooks and for the command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import ConfigError
from omcda_deploy.registry import read_dataset

if TYPE_CHECKING:
    from omcda_deploy.training.observer import TrainObserver


def train(
    dataset: Dataset | str | Path,
    algorithm: str,
    out: str | Path,
    *,
    steps: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    task: str | None = None,
    behavior: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int = 1,
    time_limit_is_terminal: bool = False,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    snapshot_every: int | None = None,
    evaluate_every: int | None = None,
    observer: TrainObserver | None = None,
) -> Path:
    """Train ``algorithm`` on ``dataset`` for ``steps`` gradient steps; return the run folder ``out``.

    ``settings`` are those of the algorithm and override the recipe of the dataset's task; ``task`` names it where
    a dataset file does not. ``behavior`` are settings of cloning, such as ``{"steps": 2000}``. ``device`` is cpu,
    cuda or cuda:N. With ``time_limit_is_terminal`` time limits count as ends, as in published code. Metrics are
    logged, states saved, policies kept and kept policies evaluated every so many steps; by default policies are
    kept as often as they are evaluated, else every 5000 steps, and never evaluated.

    Raises :class:`UnknownNameError` and :class:`ConfigError`, before the dataset is read, for names and numbers and
    where ``out`` exists; :class:`DatasetError` for the dataset; :class:`ContractError` where the algorithm does not
    handle its team; DivergedError where a loss is no longer a finite number.
    """
    from omcda_deploy.training import loop
    from omcda_deploy.training.request import TrainRequest

    request = TrainRequest(
        algorithm=algorithm,
        steps=steps,
        seed=seed,
        settings=settings or {},
        behavior=behavior or {},
        device=device,
        threads=threads,
        time_limit_is_terminal=time_limit_is_terminal,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        snapshot_every=snapshot_every,
        evaluate_every=evaluate_every,
    )
    request.check()
    run = Path(out)
    loop.require_new(run)
    path = "" if isinstance(dataset, Dataset) else str(dataset)
    loop.train(_dataset(dataset, task), request, run, dataset_path=path, observer=observer)
    return run


def resume(
    run: str | Path,
    dataset: Dataset | str | Path | None = None,
    *,
    evaluate_every: int | None = None,
    observer: TrainObserver | None = None,
) -> Path:
    """Take a run that was stopped or killed to its last step; return its folder.

    ``dataset`` is needed only where the file has moved or the run began with a :class:`Dataset`. Raises
    :class:`ConfigError` for a folder that is no run, and for another dataset.
    """
    from omcda_deploy.training import loop
    from omcda_deploy.training.request import check_evaluation
    from omcda_deploy.training.run_folder import read_config

    run = Path(run)
    config = read_config(run)
    check_evaluation(evaluate_every, config.snapshot_every)
    if dataset is None:
        if not config.dataset:
            raise ConfigError(f"{run} did not begin with a dataset file: expected its dataset, got none")
        dataset = config.dataset
    loop.resume(_dataset(dataset, config.spec.task), run, evaluate_every=evaluate_every, observer=observer)
    return run


def _dataset(dataset: Dataset | str | Path, task: str | None) -> Dataset:
    return dataset if isinstance(dataset, Dataset) else read_dataset(Path(dataset), task)
