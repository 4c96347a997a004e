"""The conservative penalties against enumeration of joint actions and against integrals."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from omcda_deploy.training.conservative import (
    candidate_actions,
    candidate_log_density,
    discrete_penalty,
    sampled_penalty,
)
from omcda_deploy.training.distributions import TanhGaussian
from omcda_deploy.training.fleet import Noise

AGENTS, ACTIONS = 3, 4


def test_the_discrete_penalties_sum_to_that_of_the_joint_action() -> None:
    """And its gradient for q and w is autograd's through the enumeration; b has none."""
    generator = np.random.default_rng(0)
    mask = np.array([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]])
    action = np.array([3, 1, 0])
    q, w = generator.normal(size=(AGENTS, ACTIONS)), generator.uniform(0.2, 2.0, AGENTS)
    b = 0.7
    totals = [
        sum(w[i] * q[i, a] for i, a in enumerate(joint)) + b
        for joint in itertools.product(range(ACTIONS), repeat=AGENTS)
        if all(mask[i, a] for i, a in enumerate(joint))
    ]
    assert len(totals) == 3 * 2 * 4
    recorded = sum(w[i] * q[i, a] for i, a in enumerate(action)) + b
    expected = np.log(np.sum(np.exp(totals))) - recorded
    penalty = discrete_penalty(
        torch.from_numpy(w)[None, None],
        torch.from_numpy(q)[None, None],
        torch.from_numpy(action)[None, None],
        torch.from_numpy(mask)[None, None],
    )
    assert penalty.shape == (1, 1, AGENTS)
    [penalty] = penalty
    np.testing.assert_allclose(penalty.sum().item(), expected, rtol=1e-12)
    for i in range(AGENTS):  # the counterfactual one: agent i alone deviates
        alone = [recorded + w[i] * (q[i, a] - q[i, action[i]]) for a in range(ACTIONS) if mask[i, a]]
        np.testing.assert_allclose(penalty[0, i].item(), np.log(np.sum(np.exp(alone))) - recorded, rtol=1e-12)


def test_a_row_without_an_available_action_has_action_zero_alone() -> None:
    penalty = discrete_penalty(
        torch.ones(1, 1, 1),
        torch.randn(1, 1, 1, 4),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.zeros(1, 1, 1, 4),
    )
    assert penalty.item() == 0.0


def test_the_sampled_penalty_is_a_soft_maximum_over_candidates() -> None:
    generator = np.random.default_rng(1)
    w, q, recorded = (
        generator.uniform(size=(2, 3)),
        generator.normal(size=(5, 2, 3)),
        generator.normal(size=(2, 3)),
    )
    expected = np.log(np.exp(w * q).sum(0)) - w * recorded
    penalty = sampled_penalty(*(torch.from_numpy(values)[None] for values in (w, q, recorded)))
    np.testing.assert_allclose(penalty[0].numpy(), expected, rtol=1e-12)


def policies(actions: int, log_std: float = -0.7) -> tuple[TanhGaussian, TanhGaussian]:
    mean = torch.tensor([[[[0.3], [-0.5]]]], dtype=torch.float64).expand(1, 1, 2, actions)
    width = torch.full_like(mean, log_std)
    return TanhGaussian(mean, width), TanhGaussian(-mean, width + 0.4)


def test_candidates_are_uniform_then_the_policies_own() -> None:
    candidates = candidate_actions(*policies(1), 20000, Noise((0,)).at(0))[..., 0]
    assert candidates.shape == (1, 60000, 1, 2)
    uniform, present, following = candidates.double().numpy().reshape(3, 20000, 2)
    np.testing.assert_allclose(
        np.quantile(uniform, [0.0, 0.25, 0.5, 0.75, 1.0], axis=0)[:, 0], [-1, -0.5, 0, 0.5, 1], atol=0.02
    )
    np.testing.assert_allclose(np.arctanh(present).mean(0), [0.3, -0.5], atol=0.02)
    np.testing.assert_allclose(np.arctanh(present).std(0), np.exp(-0.7), rtol=0.03)
    np.testing.assert_allclose(np.arctanh(following).mean(0), [-0.3, 0.5], atol=0.02)
    np.testing.assert_allclose(np.arctanh(following).std(0), np.exp(-0.3), rtol=0.03)


def test_weighed_by_density_each_kind_estimates_the_integral_over_actions() -> None:
    """integral over [-1, 1]^2 of exp(w q), q = a_1 - a_2: sinh products in closed form."""
    count, w = 100000, 0.8
    present, following = policies(2, log_std=0.1)  # narrower ones estimate it with infinite variance
    candidates = candidate_actions(present, following, count, Noise((0,)).at(0))
    density = candidate_log_density(candidates, present, following)
    q = candidates[..., 0] - candidates[..., 1]
    exact = np.log((2.0 * np.sinh(w) / w) ** 2)
    for part in range(3):
        chosen = slice(part * count, (part + 1) * count)
        penalty = sampled_penalty(
            torch.full((1, 1, 2), w), q[:, chosen], torch.zeros(1, 1, 2), density[:, chosen]
        )
        np.testing.assert_allclose(penalty.numpy() - np.log(count), exact, atol=0.03, err_msg=str(part))


def test_the_recorded_action_comes_before_the_candidates() -> None:
    recorded = torch.rand(1, 1, 2, 1, dtype=torch.float64)
    together = candidate_actions(*policies(1), 4, Noise((0,)).at(0), recorded)
    assert torch.equal(together[:, 0], recorded)
    assert torch.equal(together[:, 1:], candidate_actions(*policies(1), 4, Noise((0,)).at(0)))
