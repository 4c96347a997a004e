"""Training runs: a dataset and an algorithm become a run folder, resumable after any kill.

A step depends on the run's configuration and the step's number alone (batches and measurement noise are drawn by
step), and a run uses a fixed number of threads; so a resumed run continues bit for bit as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omcda_deploy.errors import ConfigError
from omcda_deploy.files import write_json
from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.batches import Batch, TransitionSampler
from omcda_deploy.training.behavior_model import behavior_model
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.evaluation import Evaluator
from omcda_deploy.training.metrics import MetricsWriter, Window
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.observer import TrainObserver
from omcda_deploy.training.request import ResolvedRun, TrainRequest, check_device, check_evaluation
from omcda_deploy.training.run_folder import (
    BEHAVIOR,
    POLICIES,
    RESUME,
    TIMING,
    RunConfig,
    read_config,
    snapshot_path,
    training_seconds,
    versions,
    write_config,
)
from omcda_deploy.training.run_lock import require_unlocked, run_lock
from omcda_deploy.training.settings import build

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset

log = logging.getLogger(__name__)

PARITY_ROWS = 1000


class Algorithm(Protocol):
    """The class ``Algorithm`` of a file of ``training/algorithms``.

    The file also defines ``Config`` (a frozen dataclass with at least ``hidden`` and ``batch_size``), ``PAPER``,
    ``SUMMARY``, ``ACTIONS`` (the action kinds it handles), ``DIVERGENCE`` (per action kind, the exported
    ``divergence_kind``), ``COLUMNS`` (the metrics that training shows), ``make_policy(config, networks)`` and,
    where a comparison shows more of it than returns, ``CURVES`` and ``SCAN`` (:mod:`omcda_deploy.plugins`).
    """

    step: int  # gradient steps taken
    policy: nn.Module  # evaluated and exported
    behavior: nn.Module

    @property
    def budgets(self) -> Tensor | None:
        """Budgets d_i [N] in nats; None for algorithms without them."""
        ...

    @property
    def alpha(self) -> Tensor | None:
        """Prices alpha_i [N]; None for algorithms without them."""
        ...

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one gradient step; return metrics, scalars or one number per agent [N]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a later step depends on: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the step at which ``state`` was taken."""
        ...


def train(
    dataset: Dataset,
    request: TrainRequest,
    out: Path,
    *,
    dataset_path: str = "",
    observer: TrainObserver | None = None,
) -> None:
    """Start a run in the new folder ``out`` and take it to its last step.

    ``dataset_path`` is where the run will look for its dataset when it is resumed. Raises :class:`ConfigError`
    where ``out`` exists or another process creates it, and as :meth:`TrainRequest.resolved` does.
    """
    observer = observer or TrainObserver()
    require_new(out)
    plan = request.resolved(dataset.spec)
    torch.set_num_threads(request.threads)
    observer.started(dataset.spec, request.algorithm, request.steps, plan.recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    with run_lock(out):
        if out.exists():  # another process created it meanwhile
            raise _exists(out)
        _create(dataset, request, plan, out, dataset_path, observer)
        _train_on(dataset, out, read_config(out), observer, request.evaluate_every)


def _create(
    dataset: Dataset,
    request: TrainRequest,
    plan: ResolvedRun,
    out: Path,
    dataset_path: str,
    observer: TrainObserver,
) -> None:
    """Write a run folder of step 0, which appears whole."""
    model, report = behavior_model(dataset, plan.behavior, device=request.device, progress=observer.cloning)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        run = Path(scratch) / out.name  # the scratch folder itself is private to this user
        (run / POLICIES).mkdir(parents=True)
        save_state(run / BEHAVIOR, {"model": model.state_dict(), **_parity_rows(dataset)})
        write_config(
            run,
            RunConfig(
                algorithm=request.algorithm,
                settings=dataclasses.asdict(plan.config),
                steps=request.steps,
                seed=request.seed,
                device=request.device,
                threads=request.threads,
                time_limit_is_terminal=request.time_limit_is_terminal,
                log_every=request.log_every,
                checkpoint_every=request.checkpoint_every,
                snapshot_every=request.kept_every,
                dataset=dataset_path,
                dataset_digest=dataset.digest,
                behavior=report,
                team=dataset.spec.to_json(),
                versions=versions(),
            ),
        )
        run.rename(out)


def resume(
    dataset: Dataset,
    run: Path,
    *,
    evaluate_every: int | None = None,
    observer: TrainObserver | None = None,
) -> None:
    """Take a run from its newest checkpoint (or its beginning) to its last step.

    Raises :class:`ConfigError` for a folder that is no run or that another process trains, and for another dataset
    than the run began with.
    """
    observer = observer or TrainObserver()
    config = read_config(run)
    check_evaluation(evaluate_every, config.snapshot_every)
    if dataset.digest != config.dataset_digest:
        raise ConfigError(
            f"{run} was trained on a dataset of digest {config.dataset_digest[:12]}…, got {dataset.digest[:12]}…: "
            "resume with the dataset it began with"
        )
    check_device(config.device)
    torch.set_num_threads(config.threads)
    observer.started(config.spec, config.algorithm, config.steps, {})
    with run_lock(run):
        _train_on(dataset, run, config, observer, evaluate_every)


def require_new(out: Path) -> None:
    """Raise :class:`ConfigError` where ``out`` exists; the message says so where a process trains it."""
    if out.exists():
        require_unlocked(out)
        raise _exists(out)


def _exists(out: Path) -> ConfigError:
    return ConfigError(
        f"{out} exists already: choose another --out, or continue it with  train --resume {out}"
    )


def _train_on(
    dataset: Dataset, run: Path, config: RunConfig, observer: TrainObserver, evaluate_every: int | None
) -> None:
    """Train from the newest checkpoint to the last step."""
    algorithm = make_algorithm(config, _behavior(run, config))
    if (run / RESUME).is_file():
        algorithm.load_state_dict(load_state(run / RESUME))
        log.info("%s: resumed at step %d", run, algorithm.step)
    sampler = TransitionSampler(
        dataset,
        config.settings["batch_size"],
        config.seed,
        time_limit_is_terminal=config.time_limit_is_terminal,
        device=config.device,
    )
    agents = config.spec.names
    evaluator = Evaluator(run, evaluate_every) if evaluate_every else None
    window = Window(agents)
    writer = MetricsWriter(run, algorithm.step)
    started = perf_counter() - training_seconds(run)
    try:
        while algorithm.step < config.steps:
            window.add(algorithm.update(sampler.sample(algorithm.step)))
            step = algorithm.step
            last = step == config.steps
            if step % config.log_every == 0 or last:
                means = window.close(step)
                writer.write(step, means)
                observer.logged(step, means)
            if step % config.snapshot_every == 0 or last:
                _save_snapshot(run, algorithm, agents)
                if evaluator:
                    evaluator.start(step)
            if step % config.checkpoint_every == 0 or last:
                save_state(run / RESUME, algorithm.state_dict())
                write_json(run / TIMING, {"step": step, "seconds": perf_counter() - started})
    finally:
        writer.close()
    if evaluator:
        evaluator.wait()


def make_algorithm(config: RunConfig, behavior: nn.Module) -> Algorithm:
    """Make the algorithm of a run at step 0."""
    return create_algorithm(
        config.algorithm,
        config.spec,
        behavior,
        settings=config.settings,
        steps=config.steps,
        seed=config.seed,
        device=config.device,
    )


def create_algorithm(
    name: str,
    spec: TeamSpec,
    behavior: nn.Module,
    *,
    settings: Mapping[str, Any],
    steps: int,
    seed: int,
    device: str = "cpu",
) -> Algorithm:
    """Make an algorithm at step 0; its initial weights depend on ``seed`` alone."""
    module = load_algorithm(name)
    config = build(module.Config, settings)
    torch.manual_seed(seed)
    networks = NetworkFactory(spec, config.hidden)
    algorithm: Algorithm = module.Algorithm(config, networks, behavior, steps=steps, seed=seed, device=device)
    return algorithm


def _behavior(run: Path, config: RunConfig) -> nn.Module:
    model = NetworkFactory(config.spec, config.behavior["hidden"]).actor()
    model.load_state_dict(load_state(run / BEHAVIOR)["model"])
    return model.to(config.device)


def _parity_rows(dataset: Dataset) -> dict[str, Tensor | None]:
    """Take observations [1000, N, O] and masks evenly from the dataset, for the parity check of an export."""
    rows = np.linspace(0, len(dataset.observations) - 1, PARITY_ROWS).astype(np.int64)
    masks = dataset.action_masks
    return {
        "observations": torch.from_numpy(dataset.observations[rows]),
        "action_masks": None if masks is None else torch.from_numpy(masks[rows]),
    }


def _save_snapshot(run: Path, algorithm: Algorithm, agents: tuple[str, ...]) -> None:
    def per_agent(values: Tensor | None) -> dict[str, float] | None:
        return None if values is None else dict(zip(agents, values.tolist(), strict=True))

    save_state(
        snapshot_path(run, algorithm.step),
        {
            "policy": algorithm.policy.state_dict(),
            "budgets": per_agent(algorithm.budgets),
            "alphas": per_agent(algorithm.alpha),
        },
    )
