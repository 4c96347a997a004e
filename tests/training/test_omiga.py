"""OMIGA: its closed-form optimum with tables, and one whole step against numpy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.envs.tabular import Game, OneStepGame, one_step_game
from omcda_deploy.training.algorithms.omiga import Algorithm, Config, value_loss
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import policy_of
from tests.support import oracles
from tests.support.synthetic import continuous_spec, discrete_spec, make_learner, random_batch
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

ALPHA = 1.5
Array = NDArray[np.float64]


@functools.cache
def game() -> OneStepGame:
    played = rational(one_step_game(0), 10)
    assert isinstance(played, OneStepGame)
    return played


@functools.cache
def trained(state_scales: tuple[float, ...]) -> tuple[Algorithm, Game]:
    torch.set_num_threads(1)
    played = game() if len(state_scales) == 1 else rational(one_step_game(1, state_scales=state_scales), 8)
    config = Config(alpha=ALPHA, lr=0.05, tau=0.05, gamma=0.9, grad_clip=1e9)
    algorithm = Algorithm([config], TabularFactory(played), behavior_table(played), steps=1)
    batch = exact_batch(played)
    for rate, steps in ((0.05, 250), (0.005, 100)):
        for group in algorithm._optimizer._adam.param_groups:
            group["lr"] = rate
        for _ in range(steps):
            algorithm.update(batch)
    return algorithm, played


@pytest.mark.parametrize("state_scales", [(1.0,), (0.5, 1.5)])
def test_the_values_minimiser_normalises_z(state_scales: tuple[float, ...]) -> None:
    """E[exp z_i | o] = 1 under behaviour. Over states behind one observation it is their mean weighted by w, as
    the published loss does not divide by w (OMCDA's divides by kappa)."""
    algorithm, played = trained(state_scales)
    q = next(algorithm.q.parameters())[0, :, 0].detach().double().numpy()
    v = next(algorithm.v.parameters())[0, :, 0].detach().double().numpy()
    behavior = np.stack([chain.behavior[0] for chain in played.chains])
    means = [(behavior * np.exp(w / ALPHA * (q - v[:, None]))).sum(-1) for w in state_scales]
    np.testing.assert_allclose(np.average(means, axis=0, weights=state_scales), 1.0, atol=0.005)


def test_policies_match_the_closed_form_of_one_price() -> None:
    algorithm, played = trained((1.0,))
    optima = oracles.one_step_optima(game().rewards, game().behavior, np.full(3, ALPHA))
    learned = np.stack([table[0] for table in policy_table(algorithm.policy, played)])
    assert (oracles.kl(optima.policy, learned) < 0.002 * optima.kl).all()
    assert optima.kl[0] > 0.1  # not merely pi_b


@pytest.mark.parametrize(("level", "shift"), [(0.0, 0.0), (-4.0, -1.0), (6.0, 6.0)])
def test_the_value_loss_is_shifted_by_the_largest_z_but_not_below_minus_one(
    level: float, shift: float
) -> None:
    z = level + torch.tensor([[-2.0, -0.5], [0.0, -1.0]], dtype=torch.float64)
    weighted = torch.tensor([[0.3, -0.2], [0.1, 0.7]], dtype=torch.float64)
    expected = np.mean(np.exp(z.numpy() - shift) + np.exp(-shift) * weighted.numpy())
    loss = value_loss(z.unsqueeze(0), weighted.unsqueeze(0))  # of one run
    assert loss.shape == (1,)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_one_step_of_losses_against_numpy(kind: str) -> None:
    spec = continuous_spec() if kind == "continuous" else discrete_spec()
    # A small alpha drives z beyond its clamp, so both sides of it are in the batch.
    algorithm = make_learner("omiga", spec, {"alpha": 0.01, "z_max": 2.0})
    assert isinstance(algorithm, Algorithm)
    generator = torch.Generator().manual_seed(3)
    for parameter in algorithm.target.parameters():
        parameter.mul_(1.0 + 0.5 * torch.randn(parameter.shape, generator=generator))
    batch = random_batch(spec)
    losses, z, clamped = expected_losses(algorithm, batch, alpha=0.01, z_max=2.0, gamma=0.99)
    assert 0.1 < clamped < 0.9
    metrics = algorithm.update(batch)
    for name, expected in losses.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"].item(), expected, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(metrics["z/mean_exp"].item(), np.exp(z).mean(), rtol=2e-5)
    np.testing.assert_allclose(metrics["z/clamped"].item(), clamped, rtol=1e-6)


def expected_losses(
    algorithm: Algorithm, batch: Batch, alpha: float, z_max: float, gamma: float
) -> tuple[dict[str, float], Array, float]:
    def numbers(*tensors: torch.Tensor) -> list[Array]:
        return [tensor[0].detach().double().numpy() for tensor in tensors]  # of the only run

    o, a = batch.observation, batch.action
    reward, not_done = numbers(batch.reward, batch.not_done)
    w, b = numbers(*algorithm.mixer(batch.state))
    w_target, _ = numbers(*algorithm.mixer_target(batch.state))
    w_next, b_next = numbers(*algorithm.mixer_target(batch.next_state))
    q, q_target, v, v_next = numbers(
        algorithm.q(o, a),
        algorithm.q_target(o, a),
        algorithm.v(o),
        algorithm.v_target(batch.next_observation),
    )
    [log_prob] = numbers(policy_of(algorithm.policy, o, batch.mask).log_prob(a))
    y = reward + gamma * not_done * ((w_next * v_next).sum(1) + b_next)
    free = w_target / alpha * (q_target - v)
    z = np.clip(free, -z_max, z_max)
    m = max(-1.0, z.max())
    losses = {
        "critic": np.mean(((w * q).sum(1) + b - y) ** 2),
        "value": np.mean(np.exp(z - m) + np.exp(-m) * w_target * v / alpha),
        "policy": -np.mean(np.exp(z) * log_prob),
    }
    return losses, z, float(np.mean(np.abs(free) > z_max))


def test_each_loss_moves_only_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses are descended at once, which is right only while they share no parameter."""
    algorithm = make_learner("omiga", continuous_spec())
    assert isinstance(algorithm, Algorithm)
    losses: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(algorithm._optimizer, "descend", losses.update)
    algorithm.update(random_batch(continuous_spec()))
    networks = {name: getattr(algorithm, name) for name in ("policy", "q", "v", "mixer", "target")}
    expected = {"policy": {"policy"}, "critic": {"q", "mixer"}, "value": {"v"}}
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        moved = {
            key for key, network in networks.items() if any(p.grad is not None for p in network.parameters())
        }
        assert moved == expected[name], name
