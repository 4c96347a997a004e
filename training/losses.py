"""Densities and divergences of the two policy families, and formulas that several algorithms share.

Shapes as in :mod:`omcda_deploy.training.networks`, ``padding`` as in :mod:`omcda_deploy.training.actions`. Source:
docs/baselines.md#densities-and-divergences.

atanh, softplus and ELU are written with elementary functions: torch's own round the last numbers of a tensor
differently from the others, and which numbers are the last depends on the number of runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omcda_deploy.training.actions import clear, entry_sum

ACTION_LIMIT = 1.0 - 1e-6  # float32 actions nearer to +-1 have atanh values that are all rounding
_HALF_LOG_TAU = 0.5 * math.log(2.0 * math.pi)


def atanh_action(action: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Map ``a -> (u, log|da/du|)``: the Gaussian variable under the tanh, and the summed log-Jacobian [...]."""
    inside = clear(action, padding).clamp(-ACTION_LIMIT, ACTION_LIMIT)
    u = 0.5 * (torch.log1p(inside) - torch.log1p(-inside))  # atanh
    return u, tanh_log_jacobian(u, padding)


def tanh_log_jacobian(u: Tensor, padding: Tensor | None = None) -> Tensor:
    """Return ``log|d tanh(u)/du|`` summed over the last axis."""
    size = u.abs()  # in which it is even, so that its gradient at 0 is exactly 0
    return entry_sum(2.0 * (math.log(2.0) - size - torch.log1p(torch.exp(-2.0 * size))), padding)


def elu(x: Tensor) -> Tensor:
    """Return x above 0, exp(x) - 1 below."""
    return torch.relu(x) + torch.expm1(x.clamp_max(0.0))  # relu's gradient at 0 is 0: the sum's is 1


def gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor, padding: Tensor | None = None) -> Tensor:
    """Return ``log N(u; mean, std)`` summed over the last axis."""
    terms = -0.5 * ((u - mean) * torch.exp(-log_std)).square() - log_std - _HALF_LOG_TAU
    return entry_sum(terms, padding)


def tanh_gaussian_log_prob(
    action: Tensor, mean: Tensor, log_std: Tensor, padding: Tensor | None = None
) -> Tensor:
    """Return ``log pi(a|o)`` [...] of a tanh-Gaussian for actions [..., A] in [-1, 1]."""
    u, jacobian = atanh_action(action, padding)
    return gaussian_log_prob(u, mean, log_std, padding) - jacobian


def gaussian_kl(
    mean: Tensor, log_std: Tensor, mean_b: Tensor, log_std_b: Tensor, padding: Tensor | None = None
) -> Tensor:
    """Return ``KL(N(mean, std) || N(mean_b, std_b))`` summed over the last axis, nats.

    The tanh is a bijection, so this is also the KL of the two tanh-Gaussians.
    """
    ratio = torch.exp(2.0 * (log_std - log_std_b))
    distance = ((mean - mean_b) * torch.exp(-log_std_b)).square()
    return entry_sum(0.5 * (ratio + distance - 1.0) - (log_std - log_std_b), padding)


def categorical_kl(log_prob: Tensor, log_prob_b: Tensor) -> Tensor:
    """Return ``KL(p || p_b)`` over the last axis from log-probabilities, nats; actions with p = 0 add nothing."""
    probability = log_prob.exp()
    terms = torch.where(probability > 0, probability * (log_prob - log_prob_b), torch.zeros_like(log_prob))
    return terms.sum(-1)


def exp_linear(z: Tensor, z_max: float) -> Tensor:
    """Return ``E(z)``: exp(z) up to z_max, its tangent above.

    Source: docs/derivation.md#linear-continuation-of-the-exponential.
    """
    return torch.exp(z.clamp_max(z_max)) * (1.0 + (z - z_max).clamp_min(0.0))


def mix(weights: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Return ``sum_i w_i v_i + b``: [..., N], [..., N], [...] -> [...]."""
    return (weights * values).sum(-1) + bias


def mix_divergence(weights: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Return ``sum_j w^{c,k}_j v_j + b^{c,k}``: [..., N(k), N(j)], [..., N(j)], [..., N(k)] -> [..., N(k)]."""
    return torch.matmul(weights, values.unsqueeze(-1)).squeeze(-1) + bias
