"""Divergence budgets of tabular games, against closed forms and against other policies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from omcda_deploy.envs import tabular
from omcda_deploy.envs.tabular import Game, Table
from omcda_deploy.errors import ConfigError, ContractError

GAMES = ("toy/one-step", "toy/one-step-hidden", "toy/chain", "toy/masked", "toy/chain-mixed")


def discounted(game: Game, policies: Sequence[Table], gamma: float, price: float = 0.0) -> float:
    """The discounted return from the local states in turn, each step's divergence charged at ``price``."""
    total = 0.0
    for chain, policy in zip(game.chains, policies, strict=True):
        ratio = np.where(policy > 0, policy, 1.0) / np.where(policy > 0, chain.behavior, 1.0)
        reward = (policy * (game.state_scales.mean() * chain.rewards - price * np.log(ratio))).sum(-1)
        moves = gamma * (1.0 - game.stop) * np.einsum("xk,xky->xy", policy, chain.transitions)
        total += float(np.linalg.solve(np.eye(len(reward)) - moves, reward).sum())
    return total


def test_one_step_policies_are_the_behavior_reweighted_by_one_price() -> None:
    game = tabular.game("toy/one-step")
    policies = tabular.budget_optimum(game, 0.7)
    prices = []
    for chain, policy in zip(game.chains, policies, strict=True):
        gains = np.log(policy[0] / chain.behavior[0])
        slope = np.polyfit(chain.rewards[0], gains, 1)[0]
        prices.append(1.0 / slope)
        np.testing.assert_allclose(np.ptp(gains - slope * chain.rewards[0]), 0.0, atol=1e-8)
    np.testing.assert_allclose(prices, prices[0], rtol=1e-6)


@pytest.mark.parametrize("task", GAMES)
@pytest.mark.parametrize("nats", [0.05, 1.0])
def test_the_whole_budget_is_spent(task: str, nats: float) -> None:
    game = tabular.game(task)
    policies = tabular.budget_optimum(game, nats)
    assert tabular.divergences(game, policies).sum() == pytest.approx(nats, rel=1e-6)
    more = tabular.budget_optimum(game, 1.2 * nats)
    assert tabular.exact_return(game, more) > tabular.exact_return(game, policies)


@pytest.mark.parametrize("task", ["toy/chain", "toy/masked"])
def test_no_other_policy_is_better_at_its_price(task: str) -> None:
    """The price is read off one state's exponents; other policies are random ones and small changes."""
    game = tabular.game(task)
    gamma, generator = 0.9, np.random.default_rng(0)
    policies = tabular.budget_optimum(game, 0.5, gamma)
    prices = np.geomspace(0.05, 50.0, 2000)
    price = min(
        prices,
        key=lambda p: sum(np.abs(a - b).max() for a, b in zip(policies, soft(game, p, gamma), strict=True)),
    )
    best = discounted(game, policies, gamma, price)
    for scale in (0.02, 0.3, 3.0):
        for _ in range(50):
            other = []
            for table in policies:
                moved = table * np.exp(scale * generator.standard_normal(table.shape))
                other.append(moved / moved.sum(-1, keepdims=True))
            assert discounted(game, other, gamma, price) < best + 1e-3


def soft(game: Game, price: float, gamma: float) -> list[Table]:
    """Soft policy iteration: evaluate exactly, then reweight; another way to the same policies."""
    policies = [chain.behavior for chain in game.chains]
    for _ in range(40):
        for i, chain in enumerate(game.chains):
            policy = policies[i]
            ratio = np.where(policy > 0, policy, 1.0) / np.where(policy > 0, chain.behavior, 1.0)
            reward = (policy * (chain.rewards - price * np.log(ratio))).sum(-1)
            discount = gamma * (1.0 - game.stop)
            moves = discount * np.einsum("xk,xky->xy", policy, chain.transitions)
            value = np.linalg.solve(np.eye(len(reward)) - moves, reward)
            exponents = (chain.rewards + discount * chain.transitions @ value) / price
            mass = chain.behavior * np.exp(exponents - exponents.max(-1, keepdims=True))
            policies[i] = mass / mass.sum(-1, keepdims=True)
    return policies


def test_divergences_are_averages_over_recorded_states() -> None:
    """Against a long recording of the behaviour policies."""
    game = tabular.game("toy/chain-single")
    [chain] = game.chains
    policy = np.full_like(chain.behavior, 1.0 / chain.behavior.shape[1])
    generator = np.random.default_rng(0)
    counts = np.zeros(len(chain.start))
    for _ in range(4000):
        x = generator.choice(len(chain.start), p=chain.start)
        for _ in range(tabular.team_spec("toy/chain-single", game).episode_limit):
            counts[x] += 1
            if generator.random() < game.stop:
                break
            a = generator.choice(chain.behavior.shape[1], p=chain.behavior[x])
            x = generator.choice(len(chain.start), p=chain.transitions[x, a])
    expected = counts / counts.sum() @ (policy * np.log(policy / chain.behavior)).sum(-1)
    assert tabular.divergences(game, [policy])[0] == pytest.approx(expected, rel=0.03)
    assert tabular.divergences(game, [chain.behavior])[0] == pytest.approx(0.0, abs=1e-12)


def test_what_cannot_be_is_refused() -> None:
    game = tabular.game("toy/chain")
    for nats in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="nats: expected more than 0"):
            tabular.budget_optimum(game, nats)
    with pytest.raises(ContractError):
        tabular.divergences(game, [game.chains[0].behavior])
