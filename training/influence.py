"""Each agent's influence on the team's reward: ``m_i = dV^r_tot/dKL_i`` (the paper's definition).

Both gradients are taken with respect to the parameters theta_i of agent i's action distribution, and the inverse of
dKL_i/dtheta_i is its pseudo-inverse; m_i is a ratio of batch means (docs/derivation.md#influence).

Shapes: R runs, B batch, N agents, A action, K sampled actions per state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from omcda_deploy.plugins import CurveSection, Estimate, TrainingCurve
from omcda_deploy.training.actions import clear
from omcda_deploy.training.distributions import Categorical, Distribution, TanhGaussian
from omcda_deploy.training.fleet import Noise, batch_mean

_EPS = 1e-12

# The paper's Figure 3: the influence of each agent, its share of the budget and its part of the reward.
INFLUENCE_CURVES = CurveSection(
    "Influence and reward",
    "influence.csv",
    (
        TrainingCurve("influence", "influence", "influence m"),
        TrainingCurve("budget", "budget"),
        TrainingCurve("share", "budget", "share of the budget, d / d_tot", share=True),
        TrainingCurve("kl", "kl"),
        TrainingCurve(
            "contribution",
            "value/reward",
            "reward value w V",
            against="influence",
            note="w V is agent i's weighted part of the team's reward value.",
            estimate=Estimate(
                ("influence", "kl"),
                "contribution m · KL",
                "These runs did not log the agents' reward values: the contribution shown is the influence times "
                "the divergence spent, a first-order estimate of the reward value gained. It contains m, so the "
                "last panel is no evidence that influence follows reward.",
            ),
        ),
    ),
)

Gradient: TypeAlias = tuple[Tensor, ...]  # [R, B, N, A] per group of distribution parameters
ValuesOf: TypeAlias = Callable[[Tensor | None], Tensor]


def weighted_values(q: Any, weights: Tensor, observation: Tensor, action: Tensor | None) -> Tensor:
    """Return ``w_i Q_i`` [R, K, B, N] at ``action`` [R, K, B, N, A]; without, of all discrete actions [R, B, N, A].

    ``weights`` [R, B, N], ``observation`` [R, B, N, O].
    """
    if action is None:
        values: Tensor = q.values(observation)
        return weights.unsqueeze(-1) * values
    candidates: Tensor = q.candidates(observation, action)
    return weights.unsqueeze(1) * candidates


def value_gradients(policy: Distribution, samples: int, noise: Noise, *values: ValuesOf) -> list[Gradient]:
    """Return ``d/dtheta_i E_{a~pi_i}[values]`` per state, for each of ``values``.

    Each is :func:`weighted_values` of some critic. Continuous, theta_i = (mean, log_std): by ``samples``
    reparameterised actions per state, the same for all ``values``. They lie off the data, so Q is read there to
    measure, and never for a target. Discrete, theta_i = the probabilities: exact.
    """
    if isinstance(policy, Categorical):
        with torch.no_grad():
            return [(value(None),) for value in values]
    spread = policy.log_std.exp().unsqueeze(1) * noise.normal(samples, *policy.mean.shape[1:])
    action = torch.tanh(policy.mean.unsqueeze(1) + spread).detach().requires_grad_()  # [R, K, B, N, A]
    gradients: list[Gradient] = []
    for value in values:
        with torch.enable_grad():
            (of_action,) = torch.autograd.grad(value(action).sum(), action)
        of_mean = of_action * (1.0 - action.detach().square()) / samples  # through the tanh
        # Sample by sample: a sum over an axis may be taken in another order when the number of runs changes.
        gradients.append((_sum(of_mean), _sum(of_mean * spread)))
    return gradients


def influence(policy: Distribution, behavior: Distribution, value_gradient: Gradient, metric: str) -> Tensor:
    """Return ``m_i = E<g_V, g_K> / E<g_K, g_K>`` [R, N] over the parameters of the action distribution.

    Continuous: theta = (mean, log_std); discrete: probabilities, both gradients projected on the simplex of
    available actions. ``fisher`` weighs with the inverse Fisher matrix: for discrete policies that is the ratio of
    the batch means of ``Cov_pi(w Q, log pi/pi_b)`` and ``Var_pi(log pi/pi_b)``.
    """
    if isinstance(policy, TanhGaussian):
        assert isinstance(behavior, TanhGaussian)
        variance, variance_b = torch.exp(2 * policy.log_std), torch.exp(2 * behavior.log_std)
        kl_gradients = (
            clear((policy.mean - behavior.mean) / variance_b, policy.padding),
            clear(variance / variance_b - 1.0, policy.padding),
        )
        inverse_fisher = (variance, torch.full_like(variance, 0.5)) if metric == "fisher" else None
        return _ratio(value_gradient, kl_gradients, inverse_fisher)
    assert isinstance(behavior, Categorical)
    probability = policy.log_probs.exp()
    available = policy.log_probs > torch.finfo(policy.log_probs.dtype).min / 2
    log_ratio = torch.where(available, policy.log_probs - behavior.log_probs, 0.0)
    weight = probability if metric == "fisher" else available.float()
    mean_weight = weight / weight.sum(-1, keepdim=True)

    def tangent(gradient: Tensor) -> Tensor:
        return gradient - (mean_weight * gradient).sum(-1, keepdim=True)

    return _ratio((tangent(value_gradient[0]),), (tangent(log_ratio),), (weight,))


def _ratio(value: Gradient, divergence: Gradient, metric: Gradient | None = None) -> Tensor:
    """Return ``E<g_V, g_K> / E<g_K, g_K>`` [R, N]: a ratio of batch means.

    ``metric``: diagonal of the inverse Fisher matrix (Euclidean when None). Single-state ratios explode where KL is
    near zero.
    """
    weights = metric if metric is not None else tuple(torch.ones_like(g) for g in value)
    product = sum((w * v * k).sum(-1) for w, v, k in zip(weights, value, divergence, strict=True))
    square = sum((w * k * k).sum(-1) for w, k in zip(weights, divergence, strict=True))
    assert isinstance(product, Tensor)  # the tuples are never empty
    assert isinstance(square, Tensor)
    return batch_mean(product) / (batch_mean(square) + _EPS)


def _sum(values: Tensor) -> Tensor:
    """``[R, K, ...] -> [R, ...]``, in the order of K."""
    return functools.reduce(torch.add, values.unbind(1))
