"""Estimates of what a team would earn, from recorded episodes alone: nobody plays.

Two readings of one dataset, neither of which is a promise:

* the effective sample size of one step's joint ratios ``rho = prod_i pi_i/pi_b^i`` (:func:`log_ratios`): which
  share of the recorded steps speaks for the team at all.
* :func:`fitted_values`: fitted Q evaluation (Le et al. 2019, "Batch policy learning under constraints"), with one
  member per bootstrap resample of the episodes, all of them one fleet: ``Q_tot <- r + gamma Q_tot(s', a')`` with
  a' of the team.

:mod:`omcda_deploy.estimation` estimates with bounds where what acted is known.

Shapes: M transitions, E episodes, K members, N agents, A actions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.training.batches import DistributionTable, TransitionSampler
from omcda_deploy.training.distributions import Categorical, Distribution, divergence
from omcda_deploy.training.fleet import Noise, mean_per_run
from omcda_deploy.training.losses import mix
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, JointOptimizer, parameters_of
from omcda_deploy.training.settings import Count, LearningRate, Range, Tau, Unit, Width, check

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset

Values: TypeAlias = NDArray[np.float64]
_CHUNK = 4096  # rows that networks see at once


@dataclass(frozen=True)
class FittedConfig:
    """Settings of fitted Q evaluation."""

    steps: Annotated[int, Range(1, 10**7)] = 4000
    members: Annotated[int, Range(2, 100)] = 5  # bootstrap resamples of the episodes
    gamma: Unit = 0.99
    batch_size: Count = 128
    lr: LearningRate = 1e-3
    tau: Tau = 0.02  # step of target networks
    hidden: Width = 64
    mixer_hidden: Width = 64
    samples: Annotated[int, Range(1, 64)] = 4  # actions per state whose values are averaged (continuous)
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Fitted:
    """Values of one team by K members, discounted."""

    starts: Values  # [K, E] at the first row of each episode

    @property
    def mean(self) -> Values:
        """Each member's mean over the starts, [K]."""
        members: Values = self.starts.mean(1)
        return members


def log_ratios(dataset: Dataset, team: DistributionTable, behavior: DistributionTable) -> Values:
    """Return ``sum_i log pi_i/pi_b^i`` [M] of the recorded actions."""
    rows = np.asarray(dataset.transitions, np.int64)
    actions = torch.from_numpy(dataset.spec.squashed(dataset.actions))
    parts = []
    for first in range(0, len(rows), _CHUNK):
        at = torch.from_numpy(rows[first : first + _CHUNK])
        ratio = team.at(at).log_prob(actions[at]) - behavior.at(at).log_prob(actions[at])
        parts.append(ratio.sum(-1).double().numpy())
    return np.concatenate(parts)


def mean_divergence(team: DistributionTable, behavior: DistributionTable, rows: Tensor) -> float:
    """Return the mean of ``sum_i KL(pi_i || pi_b^i)`` over ``rows`` [M], in nats."""
    return float(_divergences(team, behavior, rows).double().mean())


def _divergences(team: DistributionTable, behavior: DistributionTable, rows: Tensor) -> Tensor:
    """``sum_i KL(pi_i || pi_b^i)`` [M]."""
    return torch.cat([divergence(team.at(at), behavior.at(at)).sum(-1) for at in torch.split(rows, _CHUNK)])


def fitted_values(
    dataset: Dataset,
    team: DistributionTable,
    config: FittedConfig,
    *,
    episodes: NDArray[np.int64] | None = None,
    time_limit_is_terminal: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fit the values of ``team`` on the episodes of numbers ``episodes`` (all when None).

    Members differ in their resample of the episodes and their first weights. ``progress`` is called with
    (step, steps).
    """
    seeds = [config.seed * 1009 + member for member in range(config.members)]
    networks = NetworkFactory(dataset.spec, config.hidden, seeds)
    q, mixer = networks.q(zero=True), networks.mixer(config.mixer_hidden)
    q_target, mixer_target = (copy.deepcopy(module).requires_grad_(False) for module in (q, mixer))
    optimizer = JointOptimizer(
        [Group(parameters_of(q, mixer), config.lr)],
        10.0,
        modules={},
        averages=[(q_target, q), (mixer_target, mixer)],
        tau=config.tau,
    )
    sampler = TransitionSampler(
        dataset,
        config.batch_size,
        seeds,
        time_limit_is_terminal=time_limit_is_terminal,
        standardize_states=True,
    )
    draws = _resamples(dataset, config, episodes, seeds)
    noise = Noise(seeds)
    for step in range(config.steps):
        positions = draws(step)
        batch = sampler.gather(positions)
        with torch.no_grad():
            following = team.at(sampler.rows(positions) + 1)
            weights, bias = mixer_target(batch.next_state)
            values = _expected(q_target, batch.next_observation, following, noise.at(step), config.samples)
            target = batch.reward + config.gamma * batch.not_done * mix(weights, values, bias)
        weights, bias = mixer(batch.state)
        error = mix(weights, q(batch.observation, batch.action), bias) - target
        optimizer.descend({"critic": mean_per_run(error.square())})
        if progress and (step + 1) % 100 == 0:
            progress(step + 1, config.steps)
    return _read(dataset, team, q, mixer, sampler, noise.at(config.steps), config)


def _expected(q: nn.Module, observation: Tensor, policy: Distribution, noise: Noise, samples: int) -> Tensor:
    """Return ``E_{a~pi_i}[Q_i(o_i, a)]`` [K, B, N]: exact for discrete actions, else a mean over ``samples``."""
    if isinstance(policy, Categorical):
        values: Tensor = q.values(observation)  # type: ignore[operator]
        probability = policy.log_probs.exp()
        return (probability * torch.where(probability > 0, values, 0.0)).sum(-1)
    candidates: Tensor = q.candidates(observation, policy.sample(samples, noise))  # type: ignore[operator]
    return candidates.mean(1)


@torch.no_grad()
def _read(
    dataset: Dataset,
    team: DistributionTable,
    q: nn.Module,
    mixer: nn.Module,
    sampler: TransitionSampler,
    noise: Noise,
    config: FittedConfig,
) -> Fitted:
    """Evaluate the fitted members at all starts."""
    starts = torch.from_numpy(np.searchsorted(dataset.transitions, dataset.episode_start))
    values = []
    for positions in torch.split(starts, _CHUNK // config.members):
        batch = sampler.gather(positions.expand(config.members, -1))
        rows = sampler.rows(positions).expand(config.members, -1)
        weights, bias = mixer(batch.state)
        policy = team.at(rows)
        values.append(mix(weights, _expected(q, batch.observation, policy, noise, config.samples), bias))
    return Fitted(torch.cat(values, 1).double().numpy())


def _resamples(
    dataset: Dataset, config: FittedConfig, episodes: NDArray[np.int64] | None, seeds: list[int]
) -> Callable[[int], Tensor]:
    """Return a function of a step to positions [K, B], member k's from its own resample of the episodes."""
    first = np.searchsorted(dataset.transitions, dataset.episode_start)
    numbers = np.arange(len(first)) if episodes is None else episodes
    pools = []
    for seed in seeds:
        drawn = np.random.default_rng([seed, 7]).choice(numbers, len(numbers))
        pools.append(np.concatenate([first[e] + np.arange(dataset.episode_length[e]) for e in drawn]))

    def draw(step: int) -> Tensor:
        rows = [
            pool[np.random.default_rng([seed, step]).integers(len(pool), size=config.batch_size)]
            for pool, seed in zip(pools, seeds, strict=True)
        ]
        return torch.from_numpy(np.stack(rows))

    return draw
