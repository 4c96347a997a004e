"""Densities, divergences and mixing against numpy: quadrature, sums written out, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.training.losses import (
    ACTION_LIMIT,
    categorical_kl,
    exp_linear,
    gaussian_kl,
    mix,
    mix_divergence,
    tanh_gaussian_log_prob,
)
from omcda_deploy.training.networks import CategoricalActor, masked_log_softmax

Array = NDArray[np.float64]
GAUSSIANS = [(0.0, 0.0), (0.8, -1.0), (-1.5, 0.5), (3.0, -2.0)]  # (mean, log_std)


def double(*values: float | list[float]) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def log_density(action: Array, mean: float, log_std: float) -> Array:
    """Return the log density of tanh(u), u ~ N(mean, exp(log_std)), by change of variables."""
    quadratic = -0.5 * ((np.arctanh(action) - mean) / math.exp(log_std)) ** 2
    result: Array = quadratic - log_std - 0.5 * math.log(2 * math.pi) - np.log(1 - action**2)
    return result


@pytest.mark.parametrize(("mean", "log_std"), GAUSSIANS)
def test_tanh_gaussian_log_prob_matches_the_change_of_variables(mean: float, log_std: float) -> None:
    actions = np.linspace(-0.999, 0.999, 41)
    m, s = double([mean], [log_std])
    ours = tanh_gaussian_log_prob(torch.from_numpy(actions)[:, None], m, s)
    np.testing.assert_allclose(ours.numpy(), log_density(actions, mean, log_std), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mean", "log_std"), GAUSSIANS[:3])
def test_tanh_gaussian_density_integrates_to_one(mean: float, log_std: float) -> None:
    u = np.linspace(mean - 8 * math.exp(log_std), mean + 8 * math.exp(log_std), 20_001)
    actions = np.tanh(u)
    inside = np.abs(actions) < ACTION_LIMIT
    m, s = double([mean], [log_std])
    probability = tanh_gaussian_log_prob(torch.from_numpy(actions[inside])[:, None], m, s).exp().numpy()
    np.testing.assert_allclose(np.trapezoid(probability, actions[inside]), 1.0, atol=2e-3)


def test_log_prob_sums_over_action_entries_and_keeps_the_other_axes() -> None:
    generator = np.random.default_rng(0)
    action, mean, log_std = (generator.uniform(-0.9, 0.9, (4, 3, 2)) for _ in range(3))
    ours = tanh_gaussian_log_prob(*(torch.from_numpy(x) for x in (action, mean, log_std)))
    expected = np.zeros((4, 3))
    for index in np.ndindex(4, 3, 2):
        expected[index[:2]] += log_density(action[index], float(mean[index]), float(log_std[index]))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("action", [1.0, -1.0, 1.3, -2.0])
def test_saturated_actions_have_a_finite_density_and_gradient(action: float) -> None:
    """Published files hold actions of exactly +-1 and beyond; they count as the last float32 inside."""
    mean = torch.zeros(1, requires_grad=True)
    log_prob = tanh_gaussian_log_prob(torch.tensor([action]), mean, torch.zeros(1))
    log_prob.backward()  # type: ignore[no-untyped-call]
    limit = tanh_gaussian_log_prob(torch.tensor([math.copysign(ACTION_LIMIT, action)]), mean, torch.zeros(1))
    assert log_prob.item() == limit.item()
    assert math.isfinite(log_prob.item())
    assert mean.grad is not None
    # dlogN/dmean is u itself at mean 0 and std 1; atanh(1 - 1e-6) = 7.25 up to float32's rounding of 1 - 1e-6
    np.testing.assert_allclose(abs(mean.grad.item()), 7.25, atol=0.03)


def test_gaussian_kl_matches_quadrature() -> None:
    for mean, log_std in GAUSSIANS:
        for mean_b, log_std_b in GAUSSIANS:
            u = np.linspace(mean - 12 * math.exp(log_std), mean + 12 * math.exp(log_std), 100_001)

            def log_normal(m: float, s: float, u: Array = u) -> Array:
                return np.asarray(-0.5 * ((u - m) / math.exp(s)) ** 2 - s - 0.5 * math.log(2 * math.pi))

            p = log_normal(mean, log_std)
            expected = np.trapezoid(np.exp(p) * (p - log_normal(mean_b, log_std_b)), u)
            ours = gaussian_kl(*double([mean], [log_std], [mean_b], [log_std_b]))
            np.testing.assert_allclose(ours.item(), expected, rtol=1e-6, atol=1e-9)


def test_gaussian_kl_sums_over_the_last_axis_and_is_zero_for_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(5, 3, 2, generator=generator, dtype=torch.float64) for _ in range(4))
    whole = gaussian_kl(a, b, c, d)
    assert whole.shape == (5, 3)
    parts = gaussian_kl(a[..., :1], b[..., :1], c[..., :1], d[..., :1]) + gaussian_kl(
        a[..., 1:], b[..., 1:], c[..., 1:], d[..., 1:]
    )
    torch.testing.assert_close(whole, parts)
    assert bool((whole > 0).all())
    assert torch.equal(gaussian_kl(a, b, a, b), torch.zeros(5, 3, dtype=torch.float64))


def test_unavailable_actions_have_probability_zero_exactly() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.uint8)
    logits = torch.tensor([[0.5, 90.0, -1.0, 80.0], [3.0, 2.0, 1.0, -40.0], [0.1, 0.2, 0.3, 0.4]])
    log_probs = masked_log_softmax(logits, mask)
    probability = log_probs.exp()
    assert bool((probability[mask == 0] == 0.0).all())
    assert bool(torch.isfinite(log_probs).all())  # minus infinity would make 0 * log p a NaN
    kept = np.exp([0.5, -1.0])
    np.testing.assert_allclose(probability[0, [0, 2]].numpy(), kept / kept.sum(), rtol=1e-6)
    assert probability[1].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_a_row_without_any_action_plays_action_0_and_trains_without_nan() -> None:
    actor = CategoricalActor(3, 4, 2, hidden=8)
    mask = torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 0]]], dtype=torch.uint8)
    log_probs = actor(torch.randn(1, 2, 3), mask)
    assert log_probs[0, 0].exp().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert log_probs[0, 1].exp()[[0, 3]].tolist() == [0.0, 0.0]
    (log_probs[0, 0, 0] + log_probs[0, 1, 1]).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in actor.parameters() if p.grad is not None)


def test_categorical_kl_counts_available_actions_only() -> None:
    mask = torch.tensor([1, 1, 0, 1], dtype=torch.uint8)
    p = masked_log_softmax(torch.tensor([1.0, 2.0, 9.0, 0.0]), mask)
    b = masked_log_softmax(torch.tensor([0.0, 0.5, -9.0, 1.0]), mask)
    weights = np.exp([1.0, 2.0, 0.0]) / np.exp([1.0, 2.0, 0.0]).sum()
    behavior = np.exp([0.0, 0.5, 1.0]) / np.exp([0.0, 0.5, 1.0]).sum()
    expected = (weights * np.log(weights / behavior)).sum()
    np.testing.assert_allclose(categorical_kl(p, b).item(), expected, rtol=1e-6)
    assert categorical_kl(p, p).item() == 0.0


def test_exp_is_continued_by_its_tangent() -> None:
    z = torch.tensor([-30.0, 0.0, 1.9, 2.0, 2.1, 40.0], dtype=torch.float64, requires_grad=True)
    value = exp_linear(z, 2.0)
    top = math.exp(2.0)
    expected = [math.exp(-30), 1.0, math.exp(1.9), top, top * 1.1, top * 39.0]
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), z)
    # A clamp would have slope zero above, and nothing would pull V back.
    np.testing.assert_allclose(
        slope[[0, 1, 2, 4, 5]].numpy(), [math.exp(-30), 1, math.exp(1.9), top, top], rtol=1e-12
    )


def test_mix_weighs_agents_and_adds_the_bias_once() -> None:
    weights, values = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.tensor([[10.0, 1.0], [4.0, 7.0]])
    assert mix(weights, values, torch.tensor([100.0, -1.0])).tolist() == [112.0, 1.0]


def test_mix_divergence_sums_along_the_rows_of_each_constraint() -> None:
    """Row k belongs to the constraint of agent k; the transposed product would give 51 and 73 for 21 and 43."""
    weights = torch.tensor([[[1.0, 2.0], [4.0, 3.0]]])  # [B, k, j]
    values = torch.tensor([[1.0, 10.0]])
    bias = torch.tensor([[0.0, 9.0]])
    assert mix_divergence(weights, values, bias).tolist() == [[21.0, 43.0]]
