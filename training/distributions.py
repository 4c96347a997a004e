"""The two policy families behind one small interface: a batch of distributions, one per agent and state.

Source: docs/baselines.md#densities-and-divergences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from omcda_deploy.training.fleet import Noise
from omcda_deploy.training.losses import categorical_kl, gaussian_kl, tanh_gaussian_log_prob


@dataclass(frozen=True)
class TanhGaussian:
    """``a = tanh(u)``, ``u ~ N(mean, exp(log_std))``; both [..., B, N, A]; ``padding`` [N, A] counts nowhere."""

    mean: Tensor
    log_std: Tensor
    padding: Tensor | None = None

    def log_prob(self, action: Tensor) -> Tensor:
        """Return log-densities [..., B, N] of actions [..., B, N, A] in [-1, 1]."""
        return tanh_gaussian_log_prob(action, self.mean, self.log_std, self.padding)

    def sample(self, count: int, noise: Noise) -> Tensor:
        """Draw reparameterised actions [R, K, B, N, A], ``count`` per state."""
        normal = noise.normal(count, *self.mean.shape[1:])
        return torch.tanh(self.mean.unsqueeze(1) + self.log_std.exp().unsqueeze(1) * normal)

    def kl(self, other: TanhGaussian) -> Tensor:
        """Return ``KL(self || other)`` [..., B, N], nats, in closed form."""
        return gaussian_kl(self.mean, self.log_std, other.mean, other.log_std, self.padding)


@dataclass(frozen=True)
class Categorical:
    """Normalised log-probabilities [..., B, N, A]; unavailable actions hold the lowest float."""

    log_probs: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        """Return log-probabilities [..., B, N] of actions int64 [..., B, N]."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def kl(self, other: Categorical) -> Tensor:
        """Return ``KL(self || other)`` [..., B, N], nats, over the available actions."""
        return categorical_kl(self.log_probs, other.log_probs)


Distribution: TypeAlias = TanhGaussian | Categorical


def gaussian_of(actor: nn.Module, observation: Tensor) -> TanhGaussian:
    """Return a continuous actor's distributions at ``observation`` [..., B, N, O]."""
    mean, log_std = actor(observation)
    return TanhGaussian(mean, log_std, getattr(actor, "padding", None))


def policy_of(actor: nn.Module, observation: Tensor, mask: Tensor | None) -> Distribution:
    """Return an actor's distributions at ``observation`` [..., B, N, O]; categorical with a mask [..., B, N, A]."""
    if mask is None:
        return gaussian_of(actor, observation)
    return Categorical(actor(observation, mask))


def divergence(policy: Distribution, behavior: Distribution) -> Tensor:
    """Return ``KL(pi_i || pi_b^i)`` [..., B, N], nats; both are of one family."""
    if isinstance(policy, TanhGaussian):
        assert isinstance(behavior, TanhGaussian)
        return policy.kl(behavior)
    assert isinstance(behavior, Categorical)
    return policy.kl(behavior)
