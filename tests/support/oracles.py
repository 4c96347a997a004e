"""Closed forms of docs/derivation.md in plain numpy, independent of the package's own code.

One-step games: ``rewards`` and ``behavior`` [N, K], ``alpha`` [N]. Chains: ``rewards``, ``behavior`` [X, K] and
``transitions`` [X, K, X] of one agent with its own alpha. All mixers are one (reward) and the identity
(divergence), all biases zero. Actions that behaviour never takes are unavailable: no optimum takes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Table: TypeAlias = NDArray[np.float64]
Tables: TypeAlias = Sequence[Table] | Table  # one per agent; stacked where all have one shape

_ALPHA_RANGE = (1e-6, 1e6)


@dataclass(frozen=True)
class LocalOptima:
    """``pi_i* = pi_b^i exp(r_i / alpha_i) / Z_i`` of a one-step game and what follows from it."""

    policy: Table  # [N, K]
    log_z: Table  # [N]
    kl: Table  # [N], KL(pi_i* || pi_b^i)
    reward: Table  # [N], E_{pi_i*}[r_i]

    @property
    def team_reward(self) -> float:
        return float(self.reward.sum())


def one_step_optima(rewards: ArrayLike, behavior: ArrayLike, alpha: ArrayLike) -> LocalOptima:
    """The local optima given alpha: a scalar for all agents, or [N]."""
    rewards, behavior = np.asarray(rewards, np.float64), np.asarray(behavior, np.float64)
    alpha = np.broadcast_to(np.asarray(alpha, np.float64), rewards.shape[:1])
    exponent = _log(behavior) + rewards / alpha[:, None]
    log_z = _logsumexp(exponent)
    policy = np.exp(exponent - log_z[:, None])
    return LocalOptima(policy, log_z, kl(policy, behavior), (policy * rewards).sum(-1))


def kl(policy: Table, behavior: Table) -> Table:
    """KL over the last axis in nats; zero probabilities count nothing."""
    ratio = np.divide(policy, behavior, out=np.ones_like(policy), where=policy > 0)
    divergence: Table = (policy * np.log(ratio)).sum(-1)
    return divergence


def largest_kl(rewards: Table, behavior: Table) -> Table:
    """Limit of KL_i as alpha_i -> 0: -log pi_b(argmax r), [N]. Budgets above it are unattainable."""
    rewards = np.where(behavior > 0, rewards, -np.inf)
    best = rewards == rewards.max(-1, keepdims=True)
    divergence: Table = -np.log((behavior * best).sum(-1))
    return divergence


def alphas_for_budgets(
    rewards: Table, behavior: Table, budgets: ArrayLike, bounds: tuple[float, float] = _ALPHA_RANGE
) -> Table:
    """alpha_i [N] at which KL_i = d_i; an alpha at its lower bound where the budget is unattainable."""
    budgets = np.broadcast_to(np.asarray(budgets, np.float64), rewards.shape[:1])
    return _bisect(lambda alpha: one_step_optima(rewards, behavior, alpha).kl, budgets, bounds)


def common_alpha(
    rewards: Table, behavior: Table, total: float, bounds: tuple[float, float] = _ALPHA_RANGE
) -> float:
    """The ``optimal`` allocation: the one alpha at which sum_i KL_i = d_tot."""
    alpha = _bisect(
        lambda alpha: one_step_optima(rewards, behavior, alpha).kl.sum(keepdims=True),
        np.array([total]),
        bounds,
    )
    return float(alpha[0])


def reward_under_shares(rewards: Table, behavior: Table, shares: ArrayLike, total: float) -> float:
    """Team reward of the optimum with budgets d_i = share_i d_tot."""
    alpha = alphas_for_budgets(rewards, behavior, total * np.asarray(shares, np.float64))
    return one_step_optima(rewards, behavior, alpha).team_reward


def influence(rewards: Table, policy: Table, behavior: Table, metric: str = "euclidean") -> Table:
    """m_i = dV^r/dKL_i [N] of a one-step game, along the simplex; equals alpha_i at the optimum."""
    ratio = np.log(policy / behavior)
    if metric == "fisher":
        centred = ratio - (policy * ratio).sum(-1, keepdims=True)
        m: Table = (policy * rewards * centred).sum(-1) / (policy * centred**2).sum(-1)
        return m
    value = rewards - rewards.mean(-1, keepdims=True)
    divergence = ratio - ratio.mean(-1, keepdims=True)
    m = (value * divergence).sum(-1) / (divergence**2).sum(-1)
    return m


def joint_reward(rewards: Tables) -> Table:
    """``sum_i r_i(a_i)`` over all joint actions, [K_1, …, K_N]."""
    total = np.zeros(())
    for row in rewards:
        total = total[..., None] + row
    return total


def joint_product(policies: Tables) -> Table:
    """``prod_i pi_i(a_i)``, [K_1, …, K_N]."""
    total = np.ones(())
    for row in policies:
        total = total[..., None] * row
    return total


def regularised_objective(joint: Table, reward: Table, behavior: Tables, alpha: ArrayLike) -> float:
    """``E_p[R] - sum_i alpha_i KL(p_i || pi_b^i)`` of any joint distribution p with marginals p_i."""
    divergences = [float(kl(_marginal(joint, i), b)) for i, b in enumerate(behavior)]
    return float((joint * reward).sum() - np.dot(np.asarray(alpha), divergences))


def joint_optimum(reward: Table, behavior: Tables, alpha: ArrayLike, steps: int = 4000) -> Table:
    """The maximiser of :func:`regularised_objective` over ALL joint distributions on K^n, by mirror ascent.

    The objective is concave, so ascent finds the global optimum; it starts at the product of the behaviour
    policies and knows nothing of the closed form. ``reward`` [K_1, …, K_N] need not be additive.
    """
    alpha = np.asarray(alpha, np.float64)
    log_joint = np.log(joint_product(behavior))
    rate = 0.5 / float(alpha.sum())
    for _ in range(steps):
        joint = np.exp(log_joint)
        gradient = reward.copy()
        for i, b in enumerate(behavior):
            shape = [1] * reward.ndim
            shape[i] = -1
            gradient -= (alpha[i] * np.log(_marginal(joint, i) / b)).reshape(shape)
        log_joint = log_joint + rate * gradient
        log_joint -= _logsumexp(log_joint.reshape(1, -1))[0]
    return np.exp(log_joint)


@dataclass(frozen=True)
class ChainSolution:
    """Fixed point of the soft Bellman equations of one chain, split as BOPAH splits it.

    Source: docs/derivation.md#value-decomposition.
    """

    policy: Table  # [X, K]
    kl: Table  # [X]
    q_r: Table  # [X, K]
    v_r: Table  # [X], E_pi[Q^r]
    q_c: Table  # [X, K], discount * E V^c(x'): no immediate term
    v_c: Table  # [X], E_pi[Q^c] - KL
    advantage_r: Table  # [X, K], Q^r - V^r
    advantage_c: Table  # [X, K], Q^c - V^c

    def exponent(self, alpha: float) -> Table:
        """z [X, K] of docs/derivation.md#local-optimum (1)."""
        return self.advantage_r / alpha + self.advantage_c


def solve_chain(
    rewards: Table, transitions: Table, behavior: Table, alpha: float, discount: float
) -> ChainSolution:
    """Exact soft value iteration; ``discount`` is gamma times the probability of not terminating."""
    v = np.zeros(len(rewards))
    while True:
        q = rewards + discount * transitions @ v
        new = alpha * _logsumexp(_log(behavior) + q / alpha)
        converged = np.abs(new - v).max() <= 1e-13 * max(1.0, np.abs(new).max())
        v = new
        if converged:
            break
    policy = behavior * np.exp(np.where(behavior > 0, q - v[:, None], 0.0) / alpha)
    return evaluate_chain(policy / policy.sum(-1, keepdims=True), rewards, transitions, behavior, discount)


def evaluate_chain(
    policy: Table, rewards: Table, transitions: Table, behavior: Table, discount: float
) -> ChainSolution:
    """Split values of any policy, each by one linear solve."""
    step = np.einsum("xk,xky->xy", policy, transitions)
    resolvent = np.linalg.inv(np.eye(len(policy)) - discount * step)
    divergence = kl(policy, behavior)
    v_r, v_c = resolvent @ (policy * rewards).sum(-1), -resolvent @ divergence
    q_r, q_c = rewards + discount * transitions @ v_r, discount * transitions @ v_c
    return ChainSolution(policy, divergence, q_r, v_r, q_c, v_c, q_r - v_r[:, None], q_c - v_c[:, None])


@dataclass(frozen=True)
class JointSolution:
    """Values of a product policy in the joint MDP, indexed by joint state in ``itertools.product`` order."""

    v_r: Table  # [X_1 * … * X_N]
    penalty: Table  # sum_k alpha_k V^{c,k}


def evaluate_joint(
    policies: Tables,
    rewards: Tables,
    transitions: Tables,
    behavior: Tables,
    alpha: ArrayLike,
    discount: float,
) -> JointSolution:
    """Policy evaluation by enumeration of the joint MDP, which knows nothing of the chains' independence."""
    states = list(itertools.product(*(range(len(r)) for r in rewards)))
    index = {state: i for i, state in enumerate(states)}
    step = np.zeros((len(states), len(states)))
    reward, penalty = np.zeros(len(states)), np.zeros(len(states))
    for state in states:
        row = index[state]
        for action in itertools.product(*(range(r.shape[1]) for r in rewards)):
            cells = list(zip(state, action, strict=True))
            probability = float(np.prod([p[c] for p, c in zip(policies, cells, strict=True)]))
            reward[row] += probability * sum(float(r[c]) for r, c in zip(rewards, cells, strict=True))
            successors = joint_product([t[c] for t, c in zip(transitions, cells, strict=True)])
            step[row] += probability * successors.reshape(-1)
        divergences = [float(kl(p[x], b[x])) for p, b, x in zip(policies, behavior, state, strict=True)]
        penalty[row] = -np.dot(np.asarray(alpha), divergences)
    resolvent = np.linalg.inv(np.eye(len(states)) - discount * step)
    return JointSolution(resolvent @ reward, resolvent @ penalty)


def _marginal(joint: Table, axis: int) -> Table:
    marginal: Table = joint.sum(axis=tuple(i for i in range(joint.ndim) if i != axis))
    return marginal


def _bisect(divergence: Callable[[Table], Table], targets: Table, bounds: tuple[float, float]) -> Table:
    """alpha [M] with ``divergence(alpha) = targets``, for divergences that fall in alpha; else the nearer bound.

    Halves each interval of log alpha until its ends are neighbouring numbers.
    """
    low, high = (np.full(targets.shape, np.log(bound)) for bound in bounds)
    below, above = divergence(np.exp(low)) <= targets, divergence(np.exp(high)) >= targets
    while True:
        middle = 0.5 * (low + high)
        if ((middle <= low) | (middle >= high)).all():
            break
        falls = divergence(np.exp(middle)) > targets
        low, high = np.where(falls, middle, low), np.where(falls, high, middle)
    return np.where(below, bounds[0], np.where(above, bounds[1], np.exp(high)))


def _log(probabilities: Table) -> Table:
    with np.errstate(divide="ignore"):
        logarithms: Table = np.log(probabilities)
    return logarithms


def _logsumexp(values: Table) -> Table:
    top = values.max(-1)
    total: Table = top + np.log(np.exp(values - top[..., None]).sum(-1))
    return total
