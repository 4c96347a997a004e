"""Off-policy estimates against exact values of tabular games, from behaviour's recorded episodes alone."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset
from omcda_deploy.envs.tabular import ChainGame, game
from omcda_deploy.estimation import effective_sample_size
from omcda_deploy.play.collect import collect_mixture
from omcda_deploy.play.shipped import sources
from omcda_deploy.registry import read_dataset
from omcda_deploy.training.batches import DistributionTable, returns_to_go, standardized
from omcda_deploy.training.distributions import Categorical, TanhGaussian
from omcda_deploy.training.estimation import (
    FittedConfig,
    fitted_values,
    log_ratios,
)

GAME = cast(ChainGame, game("toy/chain"))
BEHAVIOR = [chain.behavior for chain in GAME.chains]
Tables = list[NDArray[np.float64]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path: Path = tmp_path_factory.mktemp("toy") / "chain.hdf5"
    collect_mixture(
        "toy/chain", sources("toy/chain", "behavior"), path, transitions=4000, seed=0, behavior="behavior"
    )
    return read_dataset(path)


def table(dataset: Dataset, policies: Tables) -> DistributionTable:
    """The distributions of tabular policies at every row."""
    local = dataset.observations.argmax(-1)  # [rows, N]
    rows = np.stack([policy[local[:, i]] for i, policy in enumerate(policies)], 1)
    lowest = np.finfo(np.float32).min
    logs = np.where(rows > 0, np.log(np.maximum(rows, 1e-300)), lowest)
    return DistributionTable(Categorical(torch.from_numpy(logs.astype(np.float32))))


def tilted(size: float) -> Tables:
    """Policies at some distance from behaviour, towards reward."""
    raw = [chain.behavior * np.exp(size * chain.rewards) for chain in GAME.chains]
    return [policy / policy.sum(-1, keepdims=True) for policy in raw]


def exact_value(policies: Tables) -> float:
    """Expected discounted return from the starts, episodes going on beyond the limit."""
    total = 0.0
    for chain, policy in zip(GAME.chains, policies, strict=True):
        moves = (1.0 - GAME.stop) * np.einsum("xk,xky->xy", policy, chain.transitions)
        values = np.linalg.solve(np.eye(len(moves)) - GAME.gamma * moves, (policy * chain.rewards).sum(-1))
        total += float(chain.start @ values)
    return total


def test_a_team_that_is_behavior_has_every_step_behind_it(dataset: Dataset) -> None:
    behavior = table(dataset, BEHAVIOR)
    ratios = log_ratios(dataset, behavior, behavior)
    assert (ratios == 0.0).all()
    assert effective_sample_size(ratios) == 1.0


def test_the_effective_sample_size_is_that_of_the_ratios(dataset: Dataset) -> None:
    """Two equally likely ratios r and 2 - r: ESS = 1 / (1 + (r - 1)^2); a factor on all changes nothing."""
    ratios = np.log(np.tile([0.5, 1.5], 500))
    assert effective_sample_size(ratios + 7.0) == pytest.approx(1.0 / 1.25)
    behavior = table(dataset, BEHAVIOR)
    sizes = [
        effective_sample_size(log_ratios(dataset, table(dataset, tilted(size)), behavior))
        for size in (0.05, 0.2, 0.5)
    ]
    assert 1.0 > sizes[0] > sizes[1] > sizes[2] > 0.0


def test_estimates_come_near_the_exact_value(dataset: Dataset) -> None:
    torch.set_num_threads(1)
    policies = tilted(0.15)
    team = table(dataset, policies)
    config = FittedConfig(steps=500, members=4, gamma=GAME.gamma, lr=5e-3, tau=0.05, hidden=32)
    fitted = fitted_values(dataset, team, config)
    exact, of_behavior = exact_value(policies), exact_value(BEHAVIOR)
    starts = np.searchsorted(dataset.transitions, dataset.episode_start)
    error = returns_to_go(dataset, GAME.gamma)[starts].std() / np.sqrt(len(dataset.episode_start))
    assert exact - of_behavior > 2 * error, "the policies differ by less than the data can tell"
    assert abs(fitted.mean.mean() - exact) < 0.2 * (exact - of_behavior) + error


def test_members_differ_by_their_episodes_and_repeat(dataset: Dataset) -> None:
    config = FittedConfig(steps=30, members=3, hidden=8, mixer_hidden=4, batch_size=32)
    team = table(dataset, BEHAVIOR)
    first, again = (fitted_values(dataset, team, config) for _ in range(2))
    assert len(np.unique(first.mean)) == 3
    np.testing.assert_array_equal(first.starts, again.starts)
    some = fitted_values(dataset, team, config, episodes=np.arange(10))
    assert not np.array_equal(some.mean, first.mean)


def test_returns_to_go_are_discounted_sums_and_go_on_behind_a_time_limit(dataset: Dataset) -> None:
    values = returns_to_go(dataset, 0.5)
    rewards = dataset.rewards[dataset.transitions].astype(np.float64)
    first = int(np.searchsorted(dataset.transitions, dataset.episode_start[0]))
    last = first + int(dataset.episode_length[0]) - 1
    assert dataset.terminal[last] or dataset.timeout[last]
    beyond = 0.0 if dataset.terminal[last] else rewards[max(first, last - 199) : last + 1].mean() / 0.5
    powers = 0.5 ** np.arange(last - first + 1)
    assert values[first] == pytest.approx(
        float(powers @ rewards[first : last + 1]) + powers[-1] * 0.5 * beyond
    )
    cut = np.flatnonzero(dataset.timeout)
    assert len(cut) > 0
    np.testing.assert_array_equal(returns_to_go(dataset, 0.5, True)[cut], rewards[cut])


def test_standardized_states_do_not_depend_on_units() -> None:
    values = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    values[:, 2] = 7.0
    rows = np.arange(0, 200, 2)
    scaled = standardized(values, rows)
    assert (scaled[:, 2] == 0.0).all()
    assert np.abs(scaled).max() <= 3.0
    np.testing.assert_allclose(scaled[rows, :2].mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose(standardized(100.0 * values + 3.0, rows), scaled, atol=1e-4)


def test_density_ratios_of_continuous_actions_are_those_of_their_gaussians() -> None:
    mean = torch.zeros(4, 2, 1)
    narrow, wide = (TanhGaussian(mean, torch.full_like(mean, log_std)) for log_std in (-1.0, 0.0))
    action = torch.tanh(torch.tensor([[[0.3], [-0.2]]])).expand(4, 2, 1)
    ratio = (narrow.log_prob(action) - wide.log_prob(action)).sum(-1)
    u = np.array([0.3, -0.2])
    expected = (-0.5 * (u / np.exp(-1.0)) ** 2 + 1.0 + 0.5 * u**2).sum()
    np.testing.assert_allclose(ratio.numpy(), expected, rtol=1e-4)
