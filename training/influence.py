"""Each agent's influence on the team's reward: ``m_i = dV^r_tot/dKL_i`` (the paper's definition).

Both gradients are taken with respect to the parameters theta_i of agent i's action distribution, and the inverse
of dKL_i/dtheta_i is its pseudo-inverse; m_i is a ratio of batch means (omcda.md section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import Categorical, Distribution, TanhGaussian

_EPS = 1e-12


def weighted_values(q: Any, weights: Tensor, batch: Batch, action: Tensor | None) -> Tensor:
    """``w_i Q_i``: with ``action`` [K·B, N, A], the batch is repeated K times; without, all actions [B, N, A]."""
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
    """``d/dtheta_i E_{a~pi_i}[values]`` per state: [B, N, A] for (mean, log_std), or for probabilities.

    ``values`` is :func:`weighted_values` of some critic. Continuous: ``samples`` reparameterised actions per state;
    this reads Q off the data, to measure and never for a target. Discrete: exact.
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
    """``m_i = E<g_V, g_K> / E<g_K, g_K>`` [N] over the parameters of the action distribution.

    Continuous: theta = (mean, log_std); discrete: probabilities, both gradients projected on the simplex of
    available actions. ``fisher`` weighs with the inverse Fisher matrix: for discrete policies that is
    ``Cov_pi(w Q, log pi/pi_b) / Var_pi(log pi/pi_b)``.
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
    """``m_i = E<g_V, g_K> / E<g_K, g_K>``: a ratio of batch means [N].

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
