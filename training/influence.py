"""Each agent's influence on the team's reward: ``m_i = dV^r_tot/dKL_i`` (the paper's definition).

Both gradients are taken with respect to the parameters theta_i of agent i's action distribution, and the inverse
of dKL_i/dtheta_i is its pseudo-inverse; m_i is a ratio of batch means. Source: docs/derivation.md#influence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omcda_deploy.plugins import CurveSection, Estimate, TrainingCurve
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import Categorical, Distribution, TanhGaussian

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


def weighted_values(q: Any, weights: Tensor, batch: Batch, action: Tensor | None) -> Tensor:
    """Return ``w_i Q_i``.

    With ``action`` [K·B, N, A] the batch is repeated K times: [K·B, N]. None stands for all actions: [B, N, A].
    """
    if action is None:
        values: Tensor = q.values(batch.observation)
        return weights.unsqueeze(-1) * values
    repeats = len(action) // len(batch.observation)
    product: Tensor = weights.repeat(repeats, 1) * q(batch.observation.repeat(repeats, 1, 1), action)
    return product


def value_gradient(
    values: Callable[[Tensor | None], Tensor],
    policy: Distribution,
    samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Return ``d/dtheta_i E_{a~pi_i}[values]`` per state: [B, N, A] for (mean, log_std), or for probabilities.

    ``values`` is :func:`weighted_values` of a critic. Continuous: ``samples`` reparameterised actions per state;
    Q is evaluated outside the data here, for a measurement and never for a target. Discrete: exact.
    """
    if isinstance(policy, Categorical):
        with torch.no_grad():
            return (values(None),)
    mean = policy.mean.detach().requires_grad_()
    log_std = policy.log_std.detach().requires_grad_()
    shape = (samples * mean.shape[0], *mean.shape[1:])
    noise = torch.randn(shape, generator=generator, device=mean.device)
    action = torch.tanh(mean.repeat(samples, 1, 1) + log_std.exp().repeat(samples, 1, 1) * noise)
    return torch.autograd.grad(values(action).sum() / samples, (mean, log_std))


def influence(
    policy: Distribution, behavior: Distribution, value_gradients: tuple[Tensor, ...], metric: str
) -> Tensor:
    """Return ``m_i = E<g_V, g_K> / E<g_K, g_K>`` [N] over the parameters of the action distribution.

    Continuous: theta = (mean, log_std); discrete: probabilities, both gradients projected on the simplex of
    available actions. ``fisher`` weighs with the inverse Fisher matrix: for discrete policies that is
    ``E[Cov_pi(w Q, log pi/pi_b)] / E[Var_pi(log pi/pi_b)]``, a ratio of batch means and not the mean of ratios.
    """
    if isinstance(policy, TanhGaussian):
        assert isinstance(behavior, TanhGaussian)
        variance, variance_b = torch.exp(2 * policy.log_std), torch.exp(2 * behavior.log_std)
        kl_gradients = ((policy.mean - behavior.mean) / variance_b, variance / variance_b - 1.0)
        inverse_fisher = (variance, torch.full_like(variance, 0.5)) if metric == "fisher" else None
        return _ratio(value_gradients, kl_gradients, inverse_fisher)
    assert isinstance(behavior, Categorical)
    probability = policy.log_probs.exp()
    available = policy.log_probs > torch.finfo(policy.log_probs.dtype).min / 2
    ratio = torch.where(available, policy.log_probs - behavior.log_probs, 0.0)
    weight = probability if metric == "fisher" else available.float()
    mean_weight = weight / weight.sum(-1, keepdim=True)

    def tangent(gradient: Tensor) -> Tensor:
        return gradient - (mean_weight * gradient).sum(-1, keepdim=True)

    return _ratio((tangent(value_gradients[0]),), (tangent(ratio),), (weight,))


def _ratio(
    gradient_value: tuple[Tensor, ...],
    gradient_divergence: tuple[Tensor, ...],
    metric: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Return ``m_i = E<g_V, g_K> / E<g_K, g_K>``, a ratio of batch means [N].

    Each tuple holds one gradient [B, N, A] per group of distribution parameters; ``metric`` the inverse Fisher
    matrix's diagonal beside them (Euclidean when None). Single-state ratios explode where KL is near zero.
    """
    weights = metric if metric is not None else tuple(torch.ones_like(g) for g in gradient_value)
    product = sum(
        (w * v * k).sum(-1) for w, v, k in zip(weights, gradient_value, gradient_divergence, strict=True)
    )
    square = sum((w * k * k).sum(-1) for w, k in zip(weights, gradient_divergence, strict=True))
    assert isinstance(product, Tensor)  # the tuples are never empty
    assert isinstance(square, Tensor)
    return product.mean(0) / (square.mean(0) + _EPS)
