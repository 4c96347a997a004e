"""The conservative penalties of CQL, OMAR and CFCQL: pure functions of agent values under a linear mixer.

With ``Q_tot = sum_j w_j q_j + b`` the soft maximum over the joint action splits exactly into one soft maximum per
agent, and so does the counterfactual one, in which agent i alone deviates from the data:

    logsumexp_a Q_tot(s, a) - Q_tot(s, a)               = sum_i penalty_i
    logsumexp_{a_i} Q_tot(s, (a_i, a_-i)) - Q_tot(s, a) = penalty_i
    penalty_i = logsumexp_{a_i} w_i q_i(o_i, .) - w_i q_i(o_i, a_i)

b cancels: published code adds it once per agent and takes it off once, which pushes it down. CQL and OMAR sum the
terms [R, B, N] over agents, CFCQL weighs them. Under a mixer that is not linear in q (``qmix``) the split does not
hold.

Shapes as in :mod:`omcda_deploy.training.networks`; K candidate actions per agent and state. Source:
docs/baselines.md#conservative-penalties.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omcda_deploy.training.distributions import TanhGaussian
from omcda_deploy.training.fleet import Noise
from omcda_deploy.training.losses import tanh_gaussian_log_prob
from omcda_deploy.training.networks import masked_log_softmax


def discrete_penalty(weights: Tensor, values: Tensor, action: Tensor, mask: Tensor) -> Tensor:
    """Return ``penalty_i`` [R, B, N] in closed form, over available actions.

    ``weights`` [R, B, N], ``values`` q_i(o_i, .) [R, B, N, A], recorded ``action`` int64 [R, B, N], ``mask``
    [R, B, N, A].
    """
    # logsumexp(x) - x_a is the cross-entropy of softmax(x) against a.
    log_softmax = masked_log_softmax(weights.unsqueeze(-1) * values, mask)
    return -log_softmax.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def sampled_penalty(
    weights: Tensor, candidates: Tensor, data_values: Tensor, log_density: Tensor | None = None
) -> Tensor:
    """Return ``penalty_i`` [R, B, N] with the soft maximum taken over K candidate actions.

    ``weights`` [R, B, N], ``candidates`` q_i(o_i, a^k) [R, K, B, N], ``data_values`` q_i(o_i, a_i) [R, B, N]. With
    the candidates' ``log_density`` [R, K, B, N] each counts 1/p(a^k), as in single-agent CQL, and the sum, divided
    by K, estimates the integral over actions; the multi-agent codes with a linear mixer leave it out.
    """
    scores = weights.unsqueeze(1) * candidates
    if log_density is not None:
        scores = scores - log_density
    # Over contiguous rows, whose sums do not depend on R.
    return torch.logsumexp(scores.movedim(1, -1).contiguous(), -1) - weights * data_values


@torch.no_grad()
def candidate_actions(
    policy: TanhGaussian, next_policy: TanhGaussian, count: int, noise: Noise, first: Tensor | None = None
) -> Tensor:
    """Draw CQL's candidates [R, 3·count, B, N, A]: uniform in [-1, 1], of the policy at o, of the policy at o'.

    All of them are valued at o. ``first`` [R, B, N, A], the recorded action, is put before them. Without gradient.
    """
    shape = policy.mean.shape[1:]
    uniform = noise.uniform(count, *shape).mul_(2.0).sub_(1.0)
    present, following = policy.sample(count, noise), next_policy.sample(count, noise)
    recorded = () if first is None else (first.unsqueeze(1),)
    return torch.cat((*recorded, uniform, present, following), 1)


@torch.no_grad()
def candidate_log_density(candidates: Tensor, policy: TanhGaussian, next_policy: TanhGaussian) -> Tensor:
    """Return log-densities [R, 3·count, B, N] of :func:`candidate_actions`, each under its own distribution."""
    uniform, present, following = candidates.chunk(3, 1)
    sizes = uniform.shape[-1] if policy.padding is None else (~policy.padding).sum(-1)
    flat = uniform.new_zeros(uniform.shape[:-1]) - sizes * math.log(2.0)
    densities = [
        tanh_gaussian_log_prob(actions, own.mean.unsqueeze(1), own.log_std.unsqueeze(1), own.padding)
        for actions, own in ((present, policy), (following, next_policy))
    ]
    return torch.cat((flat, *densities), 1)
