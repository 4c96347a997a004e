"""The behaviour model of a dataset: pi_b^i cloned by maximum likelihood, once, then frozen.

A dataset that knows the distributions which acted (:mod:`omcda_deploy.datasets.recorded`) is its own pi_b where it
has rows. The clone, fitted to these distributions, then stands in at other observations: for the policies that
OMCDA starts from, at final rows, and in what is exported.

Every algorithm measures divergence against it and OMCDA starts from it, so there is one per dataset and network
size. It is kept in a cache (``$OMCDA_CACHE``, else ``~/.cache/omcda-deploy``) under the dataset's digest.

Source: docs/baselines.md#behaviour-model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy import formatting
from omcda_deploy.datasets import DIGEST_VERSION, Dataset
from omcda_deploy.errors import DatasetError
from omcda_deploy.files import cached, refusal
from omcda_deploy.training.batches import Batch, DistributionTable, TransitionSampler, episode_of
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.distributions import Categorical, Distribution, divergence, policy_of
from omcda_deploy.training.fleet import mean_per_run, run_state
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, JointOptimizer, parameters_of
from omcda_deploy.training.settings import Count, Range, check

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BehaviorConfig:
    """Settings of cloning, which stops early once the held-out likelihood no longer improves."""

    steps: Annotated[int, Range(1, 10**8)] = 10_000  # at most
    batch_size: Count = 256
    lr: float = 5e-4
    hidden: int = 256
    held_out: Annotated[float, Range(0.0, 0.5)] = 0.05  # share of the episodes
    check_every: Count = 500  # steps between checks of the held-out likelihood
    patience: int = 4  # checks without improvement before stopping
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)

    def key(self, dataset: Dataset) -> str:
        """Name of the cached model of ``dataset``."""
        content = dataset.digests[DIGEST_VERSION]  # a file's own may be of a version that covers less
        settings = json.dumps([content, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:32]


def behavior_model(
    dataset: Dataset,
    config: BehaviorConfig,
    *,
    device: str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the dataset's behaviour actor and a report on it, from the cache or cloned now.

    ``progress`` is called with (step, steps, held-out negative log-likelihood per agent and step, nats).
    """
    with cached(f"behavior/{config.key(dataset)}.pt") as path:
        if path.is_file():
            state = load_state(path)
            model = NetworkFactory(dataset.spec, config.hidden).actor()
            model.load_state_dict(state["model"])
            return model.to(device), state["report"]
        model, report = fit(dataset, config, device=device, progress=progress)
        try:
            save_state(path, {"model": model.state_dict(), "report": report})
        except OSError as error:  # this run has it all the same
            log.warning("%s is not kept for other runs, as it cannot be written %s", path, refusal(error))
    return model, report


def cloned_rows(dataset: Dataset, config: BehaviorConfig) -> dict[str, NDArray[np.float32]]:
    """Return the clone's distributions at every row, as a dataset holds exact ones: by name, [R, N, A]."""
    model, _ = behavior_model(dataset, config)
    masks = dataset.action_masks
    table = DistributionTable.of(
        model,
        torch.from_numpy(dataset.observations),
        None if masks is None else torch.from_numpy(masks),
    )
    whole = table.at(torch.arange(len(dataset.observations)))
    if isinstance(whole, Categorical):
        return {"logits": whole.log_probs.numpy()}
    return {"mean": whole.mean.numpy(), "log_std": whole.log_std.numpy()}


def fit(
    dataset: Dataset,
    config: BehaviorConfig,
    *,
    device: str = "cpu",
    subset: NDArray[np.int64] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Clone the behaviour policy; return the model with the best held-out likelihood, and a report.

    ``subset``: positions in ``dataset.transitions`` that alone are seen; all when None.
    """
    train, held_out = _split(dataset, config, subset)
    seeds = (config.seed,)
    model = NetworkFactory(dataset.spec, config.hidden, seeds).actor().to(device)  # a fleet of one
    optimizer = JointOptimizer([Group(parameters_of(model), config.lr)], grad_clip=1.0, modules={})
    sampler = TransitionSampler(dataset, config.batch_size, seeds, device=device, subset=train)
    unseen = TransitionSampler(dataset, 1, seeds, device=device, subset=held_out)
    positions = np.random.default_rng(config.seed).choice(len(unseen), min(4096, len(unseen)), replace=False)
    probe = unseen.gather(torch.from_numpy(positions).to(device).unsqueeze(0))

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(_loss(probe, policy_of(model, probe.observation, probe.mask)).mean())

    best, best_state, best_step, misses = held_out_loss(), run_state(model, 0), 0, 0
    step = 0
    while step < config.steps and misses < config.patience:
        batch = sampler.sample(step)
        policy = policy_of(model, batch.observation, batch.mask)
        optimizer.descend({"policy": mean_per_run(_loss(batch, policy))})
        step += 1
        if step % config.check_every == 0 or step == config.steps:
            current = held_out_loss()
            misses += 1
            if current < best:
                best, best_state, best_step, misses = current, run_state(model, 0), step, 0
            if progress:
                progress(step, config.steps, current)
    clone = NetworkFactory(dataset.spec, config.hidden).actor().to(device)
    clone.load_state_dict(best_state)
    measure = "held_out_nll" if dataset.behavior is None else "held_out_kl"
    report = {measure: best, "best_step": best_step, "last_step": step, **dataclasses.asdict(config)}
    log.info("behaviour model: held-out loss %.3f nats at step %d of %d", best, best_step, step)
    return clone, report


def _loss(batch: Batch, policy: Distribution) -> Tensor:
    """Return what cloning minimises, per agent and step [R, B, N], in nats.

    The negative log-likelihood of the recorded actions; or, where the distributions that acted are known, the
    divergence of these from the clone, which needs no samples.
    """
    return -batch.log_prob(policy) if batch.behavior is None else divergence(batch.behavior, policy)


def _split(
    dataset: Dataset, config: BehaviorConfig, subset: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split positions of transitions into trained and held out: by episode, or by transition where there is one."""
    positions = np.arange(len(dataset.transitions)) if subset is None else subset
    if len(positions) < 2:
        raise DatasetError(
            f"the dataset holds {formatting.count(len(positions), 'transition')} in all: expected at least 2, as "
            "cloning learns from some and is measured on others: record more"
        )
    generator = np.random.default_rng([config.seed, 1])
    episode = episode_of(dataset)[positions]
    groups = episode if episode[-1] > episode[0] else positions
    names = np.unique(groups)
    held_out = generator.choice(names, max(1, round(config.held_out * len(names))), replace=False)
    mask = np.isin(groups, held_out)
    return positions[~mask], positions[mask]
