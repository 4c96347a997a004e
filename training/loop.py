"""Training runs: a dataset and an algorithm become run folders, resumable after any kill.

A step depends on the run's configuration and the step's number alone (batches and measurement noise are drawn by
step), and a run uses a fixed number of threads; so a resumed run continues bit for bit as if it had never stopped.
Runs of equal shapes are trained side by side as a fleet (:mod:`omcda_deploy.training.fleet`); each has a folder,
metrics and checkpoints of its own, and the same bits as alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from omcda_deploy.datasets import DIGEST_VERSION
from omcda_deploy.datasets.fingerprints import TrainingEpisodes
from omcda_deploy.errors import ConfigError
from omcda_deploy.files import atomic_folder, folder_of, refusal, require_writable
from omcda_deploy.plugins import per_run_settings
from omcda_deploy.references import require_trusted
from omcda_deploy.registry import load_algorithm
from omcda_deploy.training.algorithm import Algorithm, create_algorithm
from omcda_deploy.training.batches import TransitionSampler
from omcda_deploy.training.behavior_model import BehaviorConfig, behavior_model
from omcda_deploy.training.budget import LEAST_BUDGET, BudgetChoice, cached_choice
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.member import Member
from omcda_deploy.training.metrics import DivergedError, Window
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.observer import TrainObserver
from omcda_deploy.training.request import ResolvedRun, TrainRequest, check_device, check_evaluation
from omcda_deploy.training.run_folder import (
    BEHAVIOR,
    POLICIES,
    RunConfig,
    read_config,
    versions,
    write_config,
)
from omcda_deploy.training.run_lock import require_unlocked, run_lock

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset

log = logging.getLogger(__name__)

PARITY_ROWS = 1000


def train_fleet(
    dataset: Dataset,
    runs: Sequence[tuple[TrainRequest, Path]],
    *,
    dataset_path: str = "",
    observer: TrainObserver | None = None,
) -> None:
    """Start a run, or runs of equal shapes side by side, in new folders, and take them to their last step.

    ``dataset_path`` is where a run will look for its dataset when it is resumed. Raises :class:`ConfigError` where
    a folder exists, another process creates it, or the runs cannot share their steps; as
    :meth:`TrainRequest.resolved` does; and :class:`DivergedError` after the last step for runs that diverged; the
    others are finished.
    """
    observer = observer or TrainObserver()
    for _, out in runs:
        require_new(out)
    plans = [request.resolved(dataset.spec) for request, _ in runs]
    request, plan = runs[0][0], plans[0]
    configs = [_run_config(dataset, plan, dataset_path, dataclasses.asdict(plan.behavior)) for plan in plans]
    require_one_fleet(configs, [out for _, out in runs])
    torch.set_num_threads(request.threads)
    observer.started(dataset.spec, request.algorithm, request.steps, plan.recipe)
    folders = [out for _, out in runs]
    with _locks(folders):
        for out in folders:
            if out.exists():  # another process created it meanwhile
                raise _exists(out)
        known = {**_parity_rows(dataset), "episodes": TrainingEpisodes.of(dataset).to_text()}
        clones = _clones(dataset, [plan.behavior for plan in plans], request.device, observer)
        with ExitStack() as unless_all:  # a resumed fleet is the one that was asked for
            for plan, out in zip(plans, folders, strict=True):
                plan, choice = _with_budget(dataset, plan, observer)
                model, report = clones[plan.behavior]
                try:
                    config = _run_config(dataset, plan, dataset_path, report, choice)
                    _create({"model": model.state_dict(), **known}, config, out)
                except OSError as error:
                    raise ConfigError(f"{out} cannot be written {refusal(error)}") from error
                unless_all.callback(shutil.rmtree, out, ignore_errors=True)
            unless_all.pop_all()
        watched = {out: (request.evaluate_every, request.reward) for request, out in runs}
        _train_on(dataset, watched, observer)


def _clones(
    dataset: Dataset, clonings: Iterable[BehaviorConfig], device: str, observer: TrainObserver
) -> dict[BehaviorConfig, tuple[nn.Module, dict[str, Any]]]:
    """Clone the behaviour policy in each way that runs ask for; the observer sees one count of all their steps."""
    distinct = list(dict.fromkeys(clonings))
    total = sum(cloning.steps for cloning in distinct)
    clones: dict[BehaviorConfig, tuple[nn.Module, dict[str, Any]]] = {}
    before = 0

    def progress(step: int, _: int, loss: float) -> None:
        observer.cloning(before + step, total, loss)

    for cloning in distinct:
        clones[cloning] = behavior_model(dataset, cloning, device=device, progress=progress)
        before += cloning.steps
    return clones


@contextmanager
def _locks(runs: Sequence[Path]) -> Iterator[None]:
    """Hold the locks of all runs, and make the folders above them."""
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(folder_of(run))
            stack.enter_context(run_lock(run))
        yield


def _create(known: dict[str, Any], config: RunConfig, out: Path) -> None:
    """Write a run folder of step 0, which appears whole. ``known``: the clone and what exports know of data."""
    with atomic_folder(out) as run:
        (run / POLICIES).mkdir()
        save_state(run / BEHAVIOR, known)
        write_config(run, config)


def resume_fleet(
    dataset: Dataset | Callable[[RunConfig], Dataset],
    runs: Sequence[Path],
    *,
    evaluate_every: int | None = None,
    reward: str | None = None,
    observer: TrainObserver | None = None,
) -> None:
    """Take runs from their newest checkpoints (or their beginnings) to their last step.

    Runs that stand at the same step are trained side by side; they need not have been before. A function in place
    of the dataset reads it, once the runs were checked. Raises :class:`ConfigError` for a folder that is no run or
    that another process trains, for another dataset than a run began with, and for runs that cannot share their
    steps; :class:`DivergedError` as :func:`train_fleet` does.
    """
    observer = observer or TrainObserver()
    configs = [read_config(run) for run in runs]
    for config in configs:
        check_evaluation(evaluate_every, config.snapshot_every)
        if evaluate_every is not None:
            require_trusted(config.spec.task)
    require_one_fleet(configs, runs)
    config = configs[0]
    check_device(config.device)
    if callable(dataset):
        dataset = dataset(config)
    if not config.began_with(dataset.digests):
        begun, got = config.dataset_digest, dataset.digest
        if begun == got:  # of version 1, which does not cover what differs
            begun, got = config.dataset_content, dataset.digests[DIGEST_VERSION]
        raise ConfigError(
            f"{runs[0]} was trained on a dataset of digest {begun[:12]}…, got {got[:12]}…: resume with the dataset "
            "it began with"
        )
    torch.set_num_threads(config.threads)
    observer.started(config.spec, config.algorithm, config.steps, {})
    with _locks(runs):
        _train_on(dataset, dict.fromkeys(runs, (evaluate_every, reward)), observer)


def require_new(out: Path) -> None:
    """Raise :class:`ConfigError` where ``out`` exists, is being trained or cannot be written, and say which."""
    if os.path.lexists(out):
        require_unlocked(out)
        raise _exists(out)
    require_writable(out)


def _exists(out: Path) -> ConfigError:
    return ConfigError(
        f"{out} exists already: choose another --out, or continue it with  train --resume {out}"
    )


def fleet_key(config: RunConfig) -> str:
    """Return what runs of one fleet have in common: everything but seeds, clones and the settings per run."""
    per_run = per_run_settings(load_algorithm(config.algorithm))
    shared = {name: value for name, value in config.settings.items() if name not in per_run}
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("seed", "settings", "versions", "dataset", "budget", "behavior")
    }
    return json.dumps([shared, fields], sort_keys=True)


def require_one_fleet(configs: Sequence[RunConfig], runs: Sequence[Path]) -> None:
    """Raise :class:`ConfigError` unless all runs can be trained side by side."""
    first = fleet_key(configs[0])
    for config, run in zip(configs, runs, strict=True):
        if fleet_key(config) != first:
            raise ConfigError(
                f"{run} and {runs[0]} cannot be trained side by side: expected runs that differ in their seed, "
                "their clone and the algorithm's PER_RUN settings alone; train them one after the other"
            )


def _with_budget(
    dataset: Dataset, plan: ResolvedRun, observer: TrainObserver
) -> tuple[ResolvedRun, BudgetChoice | None]:
    """Choose d_tot from the dataset where the request leaves it to that; where nothing is supported, clone."""
    if not plan.chooses_budget:
        return plan, None
    choice = cached_choice(dataset, plan.search, observer.choosing)
    observer.chosen(choice.advice)
    config = dataclasses.replace(plan.config, d_tot=choice.d_tot or LEAST_BUDGET)
    return dataclasses.replace(plan, config=config), choice


def _run_config(
    dataset: Dataset,
    plan: ResolvedRun,
    dataset_path: str,
    report: dict[str, Any],
    choice: BudgetChoice | None = None,
) -> RunConfig:
    request = plan.request
    return RunConfig(
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
        dataset_content=dataset.digests[DIGEST_VERSION],
        behavior=report,
        team=dataset.spec.to_json(),
        versions=versions(),
        budget=None if choice is None else choice.to_json(),
        recipe=request.recipe or "",
    )


def _train_on(
    dataset: Dataset, runs: Mapping[Path, tuple[int | None, str | None]], observer: TrainObserver
) -> None:
    """Train runs from the newest checkpoints to the last step, those at one step side by side.

    ``runs``: the steps between evaluations of each, and how agents' own rewards join in them.
    """
    members = [Member(run, *evaluations) for run, evaluations in runs.items()]
    by_step: dict[int, list[Member]] = {}
    for member in members:
        member.evaluate_kept()
        by_step.setdefault(member.step, []).append(member)
    for step, group in sorted(by_step.items()):
        if step < group[0].config.steps:
            try:
                _train_together(dataset, group, observer)
            except OSError as error:
                first = members[0].run
                folder = first if len(members) == 1 else first.parent
                raise ConfigError(
                    f"training stopped, as {folder} cannot be written ({error.strerror}): correct that, then "
                    f"continue from the last checkpoint with  train --resume {folder}"
                ) from error
    for member in members:
        member.wait()
    failures = [f"{member.run}: {member.failure}" for member in members if member.failure]
    if len(failures) == len(members) == 1:
        raise DivergedError(str(members[0].failure))
    if failures:
        raise DivergedError(f"{len(failures)} of {len(members)} runs failed: {'; '.join(failures)}")


def _train_together(dataset: Dataset, members: Sequence[Member], observer: TrainObserver) -> None:
    """Train runs that stand at one step to their last."""
    config = members[0].config
    behaviors = _behaviors(members)
    algorithm = make_algorithm([member.config for member in members], behaviors)
    if states := [member.state for member in members if member.state is not None]:
        algorithm.load_state_dicts(states)
    sampler = TransitionSampler(
        dataset,
        config.settings["batch_size"],
        [member.config.seed for member in members],
        time_limit_is_terminal=config.time_limit_is_terminal,
        device=config.device,
        behaviors=behaviors,
        gamma=config.settings.get("gamma", 0.99),
        standardize_states=config.settings.get("standardize_states", False),
    )
    take_step = _steps(algorithm, sampler, config.device)
    window = Window(config.spec.names)
    started = perf_counter()
    for member in members:
        member.open()
    try:
        while algorithm.step < config.steps and not all(member.failure for member in members):
            window.add(take_step(algorithm.step % config.log_every == 0))
            step = algorithm.step
            last = step == config.steps
            if step % config.log_every == 0 or last:
                lines = window.close()
                for member, means in zip(members, lines, strict=True):
                    if not member.failure:
                        member.log(step, means)
                living = [means for member, means in zip(members, lines, strict=True) if not member.failure]
                if living:
                    observer.logged(step, {k: sum(m[k] for m in living) / len(living) for k in living[0]})
            for index, member in enumerate(members):
                if member.failure:
                    continue
                if step % config.snapshot_every == 0 or last:
                    member.keep_policy(algorithm, index)
                if step % config.checkpoint_every == 0 or last:
                    member.save(algorithm, index, (perf_counter() - started) / len(members))
    finally:
        for member in members:
            member.close()


def _steps(
    algorithm: Algorithm, sampler: TransitionSampler, device: str
) -> Callable[[bool], dict[str, Tensor]]:
    """Return the function that takes the next step, watched or not, and returns its metrics."""
    if device != "cpu":
        from omcda_deploy.training.cuda_graph import CudaRecorder, GraphedSteps

        return GraphedSteps(algorithm, sampler, CudaRecorder(device))
    return lambda watched: algorithm.update(sampler.sample(algorithm.step), watched)


def make_algorithm(configs: Sequence[RunConfig], behaviors: Sequence[nn.Module]) -> Algorithm:
    """Make the algorithm of runs at step 0."""
    config = configs[0]
    return create_algorithm(
        config.algorithm,
        config.spec,
        behaviors,
        settings=[config.settings for config in configs],
        steps=config.steps,
        seeds=[config.seed for config in configs],
        device=config.device,
    )


def _behaviors(members: Sequence[Member]) -> list[nn.Module]:
    """Read the runs' frozen behaviour models, equal ones as one object."""
    distinct: list[tuple[dict[str, Tensor], nn.Module]] = []
    models = []
    for member in members:
        config, state = member.config, load_state(member.run / BEHAVIOR)["model"]
        same = (model for known, model in distinct if all(torch.equal(known[k], state[k]) for k in state))
        model = next(same, None)
        if model is None:
            model = NetworkFactory(config.spec, config.behavior["hidden"]).actor()
            model.load_state_dict(state)
            model.to(config.device)
            distinct.append((state, model))
        models.append(model)
    return models


def _parity_rows(dataset: Dataset) -> dict[str, Tensor | None]:
    """Take observations [1000, N, O] and masks evenly from the dataset, for the parity check of an export."""
    rows = np.linspace(0, len(dataset.observations) - 1, PARITY_ROWS).astype(np.int64)
    masks = dataset.action_masks
    return {
        "observations": torch.from_numpy(dataset.observations[rows]),
        "action_masks": None if masks is None else torch.from_numpy(masks[rows]),
    }
