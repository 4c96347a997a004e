"""Training runs: a dataset and an algorithm become a run folder, resumable after any kill.

What a step does depends on the run's configuration and the step's number alone (batches and measurement noise are
drawn by step), and a run uses a fixed number of threads; so a resumed run continues bit for bit as if it had never
stopped.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.batches import Batch, TransitionSampler
from omcda_deploy.training.behavior_model import BehaviorConfig, behavior_model
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.metrics import MetricsWriter, Window
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.recipes import recipe
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
    write_json,
)
from omcda_deploy.training.settings import build

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset

log = logging.getLogger(__name__)

PARITY_ROWS = 1000

OnLog = Callable[[int, Mapping[str, float]], None]
OnSnapshot = Callable[[int], None]


class Algorithm(Protocol):
    """What a file of ``training/algorithms`` defines as ``Algorithm``.

    Beside it stand ``Config`` (a frozen dataclass with at least ``hidden`` and ``batch_size``), ``PAPER``,
    ``SUMMARY``, ``ACTIONS`` (the action kinds it handles), ``DIVERGENCE`` (per action kind, the exported
    ``divergence_kind``) and ``make_policy(config, networks)``.
    """

    step: int
    policy: nn.Module  # what is evaluated and exported
    behavior: nn.Module

    @property
    def budgets(self) -> Tensor | None:
        """d_i [N] in nats, for algorithms that have them."""
        ...

    @property
    def alpha(self) -> Tensor | None:
        """alpha_i [N], for algorithms that have them."""
        ...

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step; returns metrics, scalars or one number per agent [N]."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(
    dataset: Dataset,
    algorithm: str,
    out: Path,
    *,
    dataset_path: str,
    steps: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    behavior: BehaviorConfig | None = None,
    device: str = "cpu",
    threads: int = 1,
    time_limit_is_terminal: bool = False,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    snapshot_every: int = 5000,
    on_behavior: Callable[[int, int, float], None] | None = None,
    on_log: OnLog | None = None,
    on_snapshot: OnSnapshot | None = None,
) -> None:
    """Start a run in the new folder ``out``, with ``settings`` before those of the task's recipe.

    Raises :class:`ConfigError` for settings, folders and devices.
    """
    if out.exists():
        raise ConfigError(
            f"{out} exists already: choose another --out, or continue it with  train --resume {out}"
        )
    for name, value in (("steps", steps), ("log_every", log_every), ("threads", threads)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    for name, value in (("checkpoint_every", checkpoint_every), ("snapshot_every", snapshot_every)):
        if value < 1 or value % log_every:
            raise ConfigError(
                f"{name}: expected a multiple of {log_every}, as metrics are logged, got {value}"
            )
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: expected 0 to {2**32 - 1}, got {seed}")
    module = load_algorithm(algorithm)
    if dataset.spec.action_kind not in module.ACTIONS:
        raise ContractError(
            f"{algorithm} handles {' and '.join(sorted(module.ACTIONS))} actions, {dataset.spec.task} has "
            f"{dataset.spec.action_kind} ones: choose another algorithm"
        )
    sizes = {agent.name: agent.action.size for agent in dataset.spec.agents}
    if dataset.spec.action_kind == "continuous" and len(set(sizes.values())) > 1:
        # Entries that pad a short action would count in densities and divergences.
        raise ContractError(
            f"expected one action size for all agents of a continuous task, {dataset.spec.task} has {sizes}"
        )
    config = build(module.Config, {**recipe(dataset.spec.task, algorithm), **(settings or {})})
    _use_device(device, threads)
    if behavior is None:
        behavior = BehaviorConfig(hidden=config.hidden)
    elif behavior.hidden != config.hidden:
        raise ConfigError(
            f"expected behavior hidden {config.hidden} as the algorithm's, got {behavior.hidden}"
        )
    model, report = behavior_model(dataset, behavior, device=device, progress=on_behavior)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        run = Path(scratch) / out.name  # the scratch folder itself is private to this user
        (run / POLICIES).mkdir(parents=True)
        save_state(run / BEHAVIOR, {"model": model.state_dict(), **_parity_rows(dataset)})
        write_config(
            run,
            RunConfig(
                algorithm=algorithm,
                settings=dataclasses.asdict(config),
                steps=steps,
                seed=seed,
                device=device,
                threads=threads,
                time_limit_is_terminal=time_limit_is_terminal,
                log_every=log_every,
                checkpoint_every=checkpoint_every,
                snapshot_every=snapshot_every,
                dataset=dataset_path,
                dataset_digest=dataset.digest,
                behavior=report,
                team=dataset.spec.to_json(),
                versions=versions(),
            ),
        )
        run.rename(out)
    resume(dataset, out, on_log=on_log, on_snapshot=on_snapshot)


def resume(
    dataset: Dataset, run: Path, *, on_log: OnLog | None = None, on_snapshot: OnSnapshot | None = None
) -> None:
    """Take a run from its newest checkpoint (or its beginning) to its last step."""
    config = read_config(run)
    if dataset.digest != config.dataset_digest:
        raise ConfigError(
            f"{run} was trained on a dataset of digest {config.dataset_digest[:12]}…, got {dataset.digest[:12]}…: "
            "resume with the dataset it began with"
        )
    _use_device(config.device, config.threads)
    learner = make_algorithm(config, _behavior(run, config))
    if (run / RESUME).is_file():
        learner.load_state_dict(load_state(run / RESUME))
        log.info("%s: resumed at step %d", run, learner.step)
    sampler = TransitionSampler(
        dataset,
        config.settings["batch_size"],
        config.seed,
        time_limit_is_terminal=config.time_limit_is_terminal,
        device=config.device,
    )
    agents = config.spec.names
    window = Window(agents)
    writer = MetricsWriter(run, learner.step)
    started = perf_counter() - training_seconds(run)
    try:
        while learner.step < config.steps:
            window.add(learner.update(sampler.sample(learner.step)))
            step = learner.step
            last = step == config.steps
            if step % config.log_every == 0 or last:
                means = window.close(step)
                writer.write(step, means)
                if on_log:
                    on_log(step, means)
            if step % config.snapshot_every == 0 or last:
                _save_snapshot(run, learner, agents)
                if on_snapshot:
                    on_snapshot(step)
            if step % config.checkpoint_every == 0 or last:
                save_state(run / RESUME, learner.state_dict())
                write_json(run / TIMING, {"step": step, "seconds": perf_counter() - started})
    finally:
        writer.close()


def make_algorithm(config: RunConfig, behavior: nn.Module) -> Algorithm:
    """The learner of a run at step 0."""
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
    """A fresh learner; its initial weights depend on ``seed`` alone."""
    module = load_algorithm(name)
    config = build(module.Config, settings)
    torch.manual_seed(seed)
    networks = NetworkFactory(spec, config.hidden)
    learner: Algorithm = module.Algorithm(config, networks, behavior, steps=steps, seed=seed, device=device)
    return learner


def _behavior(run: Path, config: RunConfig) -> nn.Module:
    model = NetworkFactory(config.spec, config.behavior["hidden"]).actor()
    model.load_state_dict(load_state(run / BEHAVIOR)["model"])
    return model.to(config.device)


def _parity_rows(dataset: Dataset) -> dict[str, Tensor | None]:
    """Observations [1000, N, O] and masks of the dataset, drawn evenly over it, with which export is checked."""
    rows = np.linspace(0, len(dataset.observations) - 1, PARITY_ROWS).astype(np.int64)
    masks = dataset.action_masks
    return {
        "observations": torch.from_numpy(dataset.observations[rows]),
        "action_masks": None if masks is None else torch.from_numpy(masks[rows]),
    }


def _save_snapshot(run: Path, learner: Algorithm, agents: tuple[str, ...]) -> None:
    def per_agent(values: Tensor | None) -> dict[str, float] | None:
        return None if values is None else dict(zip(agents, values.tolist(), strict=True))

    save_state(
        snapshot_path(run, learner.step),
        {
            "policy": learner.policy.state_dict(),
            "budgets": per_agent(learner.budgets),
            "alphas": per_agent(learner.alpha),
        },
    )


def _use_device(device: str, threads: int) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device cuda: this torch sees no GPU. Use --device cpu, or install a CUDA build of torch"
        )
    if device != "cpu" and not device.startswith("cuda"):
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    torch.set_num_threads(threads)
