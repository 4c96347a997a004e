"""Divergence budgets of tabular games: what policies spend, and the best that a budget buys.

A policy's divergence is that which training sees: ``KL(pi_i(.|x) || pi_b^i(.|x))`` in nats per step, averaged over
the local states in which the behaviour policies act. Returns are discounted as in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omcda_deploy.envs import Float
from omcda_deploy.envs.tabular.games import Chain, Game, Table, team_spec
from omcda_deploy.envs.tabular.solutions import require_policies
from omcda_deploy.errors import ConfigError

_HALVINGS = 60  # of an interval of log price
_SWEEPS = 100_000  # of value iteration, at most
_PRECISION = 1e-12  # of values, relative to the price


def divergences(game: Game, policies: Sequence[Table]) -> Float:
    """Return each agent's divergence from its behaviour policy, nats per step [N].

    Raises :class:`ContractError` for tables that are no policies of the game.
    """
    require_policies(game, policies)
    return np.array([_divergence(game, i, table) for i, table in enumerate(policies)])


def budget_optimum(game: Game, nats: float, gamma: float = 0.99) -> list[Table]:
    """Return the policies [X, K] of the best discounted return among those that spend ``nats`` together.

    At the optimum all agents pay one price: agent i's policy solves its own chain with the divergence of every step
    charged at that price (soft value iteration), and the price is found by bisection. In a game with hidden states
    each agent earns its mean reward over them. Raises :class:`ConfigError` for a budget that is not positive.
    """
    if not nats > 0:
        raise ConfigError(f"nats: expected more than 0, got {nats}")
    low, high = -20.0, 20.0  # log price: greedy, and the behaviour policies
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        spent = divergences(game, _priced(game, float(np.exp(middle)), gamma)).sum()
        low, high = (middle, high) if spent > nats else (low, middle)
    return _priced(game, float(np.exp(high)), gamma)


def _priced(game: Game, price: float, gamma: float) -> list[Table]:
    return [_soft_optimum(game, chain, price, gamma) for chain in game.chains]


def _soft_optimum(game: Game, chain: Chain, price: float, gamma: float) -> Table:
    """Return ``pi_b exp(Q / price)``, normalised, where Q is of the policy itself and charges its divergence."""
    discount = gamma * (1.0 - game.stop)
    rewards = float(game.state_scales.mean()) * chain.rewards
    with np.errstate(divide="ignore"):
        prior = np.log(chain.behavior)
    value = np.zeros(len(chain.start))
    for _ in range(_SWEEPS):
        logits = prior + (rewards + discount * chain.transitions @ value) / price
        peak = logits.max(-1, keepdims=True)
        mass = np.exp(logits - peak)
        total = mass.sum(-1, keepdims=True)
        improved = price * (peak + np.log(total))[:, 0]
        change = np.abs(improved - value).max()
        value = improved
        if change <= _PRECISION * max(price, np.abs(value).max()):
            break
    policy: Table = mass / total
    return policy


def _divergence(game: Game, agent: int, policy: Table) -> float:
    chain = game.chains[agent]
    ratio = np.where(policy > 0, policy, 1.0) / np.where(chain.available & (policy > 0), chain.behavior, 1.0)
    return float(_visits(game, chain) @ (policy * np.log(ratio)).sum(-1))


def _visits(game: Game, chain: Chain) -> Table:
    """Return the share of the behaviour policy's steps that begin in each local state [X]."""
    limit = team_spec("", game).episode_limit
    step = (1.0 - game.stop) * np.einsum("xk,xky->xy", chain.behavior, chain.transitions)
    visits, running = np.zeros_like(chain.start), chain.start
    for _ in range(limit):
        visits = visits + running
        running = running @ step
    shares: Table = visits / visits.sum()
    return shares
