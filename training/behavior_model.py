"""The behaviour model of a dataset: pi_b^i cloned by maximum likelihood, once, then frozen.

Every algorithm measures divergence against it and OMCDA starts from it, so there is one per dataset and network
size. It is kept in a cache (``$OMCDA_CACHE``, else ``~/.cache/omcda-deploy``) under the dataset's digest.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from omcda_deploy.files import cache_folder
from omcda_deploy.training.batches import TransitionSampler
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.distributions import policy_of
from omcda_deploy.training.learner import Group, Learner, parameters_of
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.settings import require

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BehaviorConfig:
    """How pi_b is cloned. Cloning stops early once the held-out likelihood no longer improves."""

    steps: int = 10_000
    batch_size: int = 256
    lr: float = 5e-4
    hidden: int = 256
    held_out: float = 0.05  # share of the episodes
    check_every: int = 500  # steps between looks at the held-out episodes
    patience: int = 4  # looks without improvement before stopping
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, steps=(1, 10**8), batch_size=(1, 10**6), held_out=(0.0, 0.5), check_every=(1, 10**6))

    def key(self, dataset: Dataset) -> str:
        settings = json.dumps([dataset.digest, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:32]


def behavior_model(
    dataset: Dataset,
    config: BehaviorConfig,
    *,
    device: str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The dataset's behaviour actor and a report on it, from the cache or cloned now.

    ``progress`` is called with (step, steps, held-out negative log-likelihood per agent and step, nats).
    """
    path = cache_folder() / "behavior" / f"{config.key(dataset)}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Runs that start together on one dataset wait here for the first, which clones for all; the system drops the
    # lock of a process that is killed.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            saved = load_state(path)
            model = NetworkFactory(dataset.spec, config.hidden).actor()
            model.load_state_dict(saved["model"])
            return model.to(device), saved["report"]
        model, report = fit(dataset, config, device=device, progress=progress)
        save_state(path, {"model": model.state_dict(), "report": report})
    return model, report


def fit(
    dataset: Dataset,
    config: BehaviorConfig,
    *,
    device: str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Clone the behaviour policy; returns the model of the best held-out look."""
    train, held_out = _split(dataset, config)
    torch.manual_seed(config.seed)
    model = NetworkFactory(dataset.spec, config.hidden).actor().to(device)
    learner = Learner([Group(parameters_of(model), config.lr)], grad_clip=1.0)
    sampler = TransitionSampler(dataset, config.batch_size, config.seed, device=device, subset=train)
    look = TransitionSampler(dataset, 1, config.seed, device=device, subset=held_out)
    probe = look.gather(
        np.random.default_rng(config.seed).choice(len(look), min(4096, len(look)), replace=False)
    )

    def held_out_loss() -> float:
        with torch.no_grad():
            return -float(policy_of(model, probe.observation, probe.mask).log_prob(probe.action).mean())

    best, best_state, best_step, looks = held_out_loss(), copy.deepcopy(model.state_dict()), 0, 0
    step = 0
    while step < config.steps and looks < config.patience:
        batch = sampler.sample(step)
        loss = -policy_of(model, batch.observation, batch.mask).log_prob(batch.action).mean()
        learner.descend({"policy": loss})
        step += 1
        if step % config.check_every == 0 or step == config.steps:
            current = held_out_loss()
            looks += 1
            if current < best:
                best, best_state, best_step, looks = current, copy.deepcopy(model.state_dict()), step, 0
            if progress:
                progress(step, config.steps, current)
    model.load_state_dict(best_state)
    report = {"held_out_nll": best, "best_step": best_step, "last_step": step, **dataclasses.asdict(config)}
    log.info("behaviour model: held-out NLL %.3f nats at step %d of %d", best, best_step, step)
    return model, report


def _split(dataset: Dataset, config: BehaviorConfig) -> tuple[Any, Any]:
    """Positions of transitions to train on and to hold out: by episode, or by transition when there is one."""
    generator = np.random.default_rng([config.seed, 1])
    count = len(dataset.transitions)
    episode = np.searchsorted(dataset.episode_start, dataset.transitions, side="right") - 1
    groups = episode if episode[-1] > 0 else np.arange(count)
    names = np.unique(groups)
    held = generator.choice(names, max(1, round(config.held_out * len(names))), replace=False)
    mask = np.isin(groups, held)
    return np.flatnonzero(~mask), np.flatnonzero(mask)
