"""Estimates of what a team would earn, from recorded episodes alone: nobody plays.

Three readings of one dataset, none of which is a promise:

* :func:`effective_sample_size`: which share of the recorded steps speaks for the team at all. One step's joint
  ratios ``rho = prod_i pi_i/pi_b^i``, normalised to mean 1: ``ESS = 1 / mean(rho^2)``.
* :func:`fitted_values`: fitted Q evaluation (Le et al. 2019, "Batch policy learning under constraints"), with one
  member per bootstrap resample of the episodes, all of them one fleet: ``Q_tot <- r + gamma Q_tot(s', a')`` with
  a' of the team.
* :func:`doubly_robust`: the weighted doubly robust estimate (Thomas & Brunskill 2016, "Data-efficient off-policy
  policy evaluation"): fitted values, corrected by what the episodes say. Its weights are products of ratios over
  an episode, so it is for short episodes or small divergences.

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
_SUPPORT = 3.0  # nats of divergence above which a state's recorded actions say next to nothing of the team


@dataclass(frozen=True)
class FittedConfig:
    """Settings of fitted Q evaluation."""

    steps: Annotated[int, Range(1, 10**7)] = 4000
    members: Annotated[int, Range(2, 100)] = 10  # bootstrap resamples of the episodes
    gamma: Unit = 0.99
    batch_size: Count = 256
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
    value: Values  # [M] mean over members, at each transition
    action_value: Values  # [M], of the recorded action
    next_value: Values  # [M], 0 behind a terminal

    @property
    def mean(self) -> Values:
        """Each member's mean over the starts, [K]."""
        members: Values = self.starts.mean(1)
        return members


def effective_sample_size(ratios: Values) -> float:
    """Return ``1 / mean(rho^2)`` in (0, 1], rho being ``ratios`` [M] (logarithms) normalised to mean 1."""
    weights = np.exp(ratios - ratios.max())
    weights /= weights.mean()
    return float(1.0 / np.square(weights).mean())


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


def unsupported_share(dataset: Dataset, team: DistributionTable, behavior: DistributionTable) -> float:
    """Return the share of recorded states in which the team diverges from behaviour by over 3 nats."""
    rows = torch.from_numpy(np.asarray(dataset.transitions, np.int64))
    return float((_divergences(team, behavior, rows) > _SUPPORT).double().mean())


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
    """Evaluate the fitted members at all transitions and starts."""
    value, action_value, next_value = [], [], []
    starts = torch.from_numpy(np.searchsorted(dataset.transitions, dataset.episode_start))
    at_starts = torch.zeros(config.members, len(starts), dtype=torch.float64)
    for positions in torch.split(torch.arange(len(sampler)), _CHUNK // config.members):
        batch = sampler.gather(positions.expand(config.members, -1))
        rows = sampler.rows(positions).expand(config.members, -1)
        weights, bias = mixer(batch.state)
        here = mix(weights, _expected(q, batch.observation, team.at(rows), noise, config.samples), bias)
        value.append(here.mean(0))
        action_value.append(mix(weights, q(batch.observation, batch.action), bias).mean(0))
        weights, bias = mixer(batch.next_state)
        behind = _expected(q, batch.next_observation, team.at(rows + 1), noise, config.samples)
        next_value.append((batch.not_done * mix(weights, behind, bias)).mean(0))
        inside = (starts >= positions[0]) & (starts <= positions[-1])
        at_starts[:, inside] = here[:, starts[inside] - positions[0]].double()
    members = (torch.cat(part).double().numpy() for part in (value, action_value, next_value))
    return Fitted(at_starts.numpy(), *members)


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


@dataclass(frozen=True)
class Weighted:
    """A doubly robust estimate, and how many episodes it really rests on."""

    parts: Values  # [E], each episode's, whose mean is the estimate
    effective_share: float  # 1 / mean(weight^2) over the episodes, the mean over steps


def doubly_robust(
    dataset: Dataset,
    ratios: Values,
    fitted: Fitted,
    gamma: float,
    episodes: NDArray[np.int64] | None = None,
) -> Weighted:
    """Correct fitted values by the recorded episodes of numbers ``episodes`` (all when None).

    ``ratios`` [M] are :func:`log_ratios`. The weight of an episode at step t is the product of its ratios up to t
    over the mean of that product; episodes that have ended keep their last product in that mean.
    """
    first = np.searchsorted(dataset.transitions, dataset.episode_start)
    numbers = np.arange(len(first)) if episodes is None else episodes
    first, length = first[numbers], dataset.episode_length[numbers]
    rewards = dataset.rewards[dataset.transitions].astype(np.float64)
    surprise = rewards + gamma * fitted.next_value - fitted.action_value  # [M]
    parts = fitted.value[first].copy()
    product, shares = np.zeros(len(first)), []
    for t in range(int(length.max())):
        running = t < length
        at = first[running] + t
        product[running] += ratios[at]
        weights = np.exp(product - product.max())
        weights /= weights.mean()
        shares.append(1.0 / np.square(weights).mean())
        parts[running] += gamma**t * weights[running] * surprise[at]
    return Weighted(parts, float(np.mean(shares)))
