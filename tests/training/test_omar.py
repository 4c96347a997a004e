"""OMAR: its search and losses against numpy, its conservative critic's stationary point with tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from omcda_deploy.envs.tabular import OneStepGame, one_step_game
from omcda_deploy.errors import ConfigError
from omcda_deploy.training.algorithms.omar import (
    Algorithm,
    Config,
    continuous_policy_loss,
    discrete_policy_loss,
    greedy,
    search,
)
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import policy_of
from omcda_deploy.training.fleet import Noise
from omcda_deploy.training.networks import masked_log_softmax
from tests.support.synthetic import continuous_spec, discrete_spec, make_learner, random_batch, spec_of
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

Array = NDArray[np.float64]
SHAPE = (6, 3, 2)  # B, N, A


def rugged(actions: torch.Tensor) -> torch.Tensor:
    """Values [..., B, N] with several local maxima, other ones for each state and agent."""
    generator = torch.Generator().manual_seed(7)
    frequency, phase = (3.0 * torch.rand(SHAPE, generator=generator).double() + 1.0 for _ in range(2))
    return torch.sin(frequency * actions * 2.0 + phase).sum(-1) - 0.3 * actions.square().sum(-1)


def numpy_search(
    values: Callable[[Array], Array], noise: Array, elites: int, std: float
) -> tuple[Array, Array]:
    """The cross-entropy method for one state and agent; ``noise`` [iterations, K, A]."""
    mean, sigma = np.zeros(noise.shape[-1]), np.full(noise.shape[-1], std)
    kept = np.empty((0, noise.shape[-1]))
    for sample in noise:
        pool = np.concatenate([kept, np.clip(mean + sigma * sample, -1.0, 1.0)])
        kept = pool[np.argsort(-values(pool), kind="stable")[:elites]]
        mean, sigma = kept.mean(0), kept.std(0, ddof=1)
    return kept[0], values(kept)[0]


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_the_search_is_the_cross_entropy_method(iterations: int) -> None:
    config = Config(iterations=iterations, search_samples=15, elites=4, search_std=0.8)
    like = torch.zeros(1, *SHAPE, dtype=torch.float64)
    [action], [value] = search(rugged, like, config, Noise((0,)).at(5))
    generator = torch.Generator().manual_seed(5)
    noise = np.stack([torch.randn((15, *SHAPE), generator=generator).numpy() for _ in range(iterations)])
    for state in range(SHAPE[0]):
        for agent in range(SHAPE[1]):

            def values(pool: Array, state: int = state, agent: int = agent) -> Array:
                filled = torch.zeros(len(pool), *SHAPE, dtype=torch.float64)
                filled[:, state, agent] = torch.from_numpy(pool)
                return rugged(filled)[:, state, agent].numpy()

            expected, best = numpy_search(values, noise[:, :, state, agent].astype(np.float64), 4, 0.8)
            np.testing.assert_allclose(action[state, agent].numpy(), expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(value[state, agent].item(), best, rtol=1e-5)


def test_the_search_returns_the_best_of_all_it_drew() -> None:
    pools: list[torch.Tensor] = []

    def watched(actions: torch.Tensor) -> torch.Tensor:
        pools.append(actions)
        return rugged(actions)

    config = Config(iterations=6)
    action, value = search(watched, torch.zeros(1, *SHAPE), config, Noise((0,)).at(1))
    samples = torch.cat(pools, 1)
    assert samples.shape[1] == 6 * config.search_samples
    assert samples.abs().max() == 1.0
    torch.testing.assert_close(value, rugged(samples).max(1).values)
    torch.testing.assert_close(rugged(action.unsqueeze(1))[:, 0], value)
    # Later iterations search near the best of earlier ones.
    assert pools[-1].std(1).mean() < 0.5 * pools[0].std(1).mean()


def test_the_policy_is_never_drawn_to_a_worse_action_by_the_critic() -> None:
    """If the search finds less than the policy's own action, a* is that action, and the loss does not move it."""
    action = torch.zeros(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    searched = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    value = torch.zeros(1, *SHAPE[:2], dtype=torch.float64)
    better = torch.arange(18).reshape(1, *SHAPE[:2]) % 3 == 0
    best_value = torch.where(better, 1.0, -1.0).double()
    loss = continuous_policy_loss(action, value, searched, best_value, torch.ones(1))
    [gradient] = torch.autograd.grad(loss, action)
    assert (gradient[~better] == 0.0).all()
    assert (gradient[better] < 0.0).all()
    np.testing.assert_allclose(loss.item(), 0.25 * 6 / 18, rtol=1e-12)


def test_the_search_beats_its_start_on_the_learners_own_critic() -> None:
    algorithm = make_learner("omar", continuous_spec())
    assert isinstance(algorithm, Algorithm)
    o = random_batch(continuous_spec()).observation
    policy = policy_of(algorithm.policy, o, None)
    action = policy.sample(1, Noise((0,)).at(0)).squeeze(1)  # type: ignore[union-attr]
    with torch.no_grad():
        start = algorithm.q(o, action)
        searched, value = search(
            lambda a: algorithm.q.candidates(o, a), action, Config(iterations=4), Noise((0,))
        )
        torch.testing.assert_close(algorithm.q(o, searched), value, rtol=1e-5, atol=1e-6)
        best = torch.where((value > start).unsqueeze(-1), searched, action)
        assert (algorithm.q(o, best) >= start - 1e-6).all()
        assert (value > start).float().mean() > 0.8


def test_the_discrete_policys_loss_against_numpy() -> None:
    generator = np.random.default_rng(0)
    mask = np.array([[[1, 1, 0, 1], [0, 1, 1, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
    q, logits = generator.normal(size=(2, 2, 2, 4))
    q[0, 0, 2] = q[0, 1, 0] = 9.0  # the best actions are not available
    action = np.array([[3, 1], [0, 0]])
    available = mask.copy()
    available[1, 1, 0] = 1  # a row without any falls back to action 0
    best = np.where(available, q, -np.inf).argmax(-1)
    assert best[0, 1] == (1 if q[0, 1, 1] > q[0, 1, 2] else 2)

    def probabilities(at: Array) -> Array:
        weights = np.exp(at) * available
        normalised: Array = weights / weights.sum(-1, keepdims=True)
        return normalised

    def chosen(table: Array) -> Array:
        return np.take_along_axis(table, action[..., None], -1)[..., 0]

    advantage = chosen(q) - (probabilities(logits) * q).sum(-1)

    def expected(at: Array) -> float:
        """With the advantage held fixed: it carries no gradient."""
        p = probabilities(at)
        climb = (advantage * np.log(chosen(p) + 1e-5)).mean()
        return float(0.3 * ((p - np.eye(4)[best]) ** 2).mean() - 0.7 * climb)

    q_, action_, mask_ = (torch.from_numpy(values)[None] for values in (q, action, mask))
    free = torch.from_numpy(logits).requires_grad_()
    ratio = torch.tensor([0.3], dtype=torch.float64)
    loss = discrete_policy_loss(masked_log_softmax(free[None], mask_), q_, action_, mask_, ratio)
    np.testing.assert_allclose(loss.item(), expected(logits), rtol=1e-9)
    assert torch.equal(greedy(q_, mask_)[0], torch.from_numpy(best))
    [gradient] = torch.autograd.grad(loss, free)
    slopes = [
        (expected(logits + step) - expected(logits - step)) / 2e-5
        for step in 1e-5 * np.eye(logits.size).reshape(-1, *logits.shape)
    ]
    np.testing.assert_allclose(gradient.numpy().reshape(-1), slopes, atol=1e-8)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("bias_per_agent", [False, True])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_one_step_of_losses_against_numpy(kind: Any, bias_per_agent: bool) -> None:
    algorithm = make_learner(
        "omar", spec_of(kind), {"alpha": 2.0, "coefficient": 0.3, "bias_per_agent": bias_per_agent}, seed=3
    )
    assert isinstance(algorithm, Algorithm)
    generator = torch.Generator().manual_seed(3)
    for parameter in algorithm.target.parameters():
        parameter.mul_(1.0 + 0.5 * torch.randn(parameter.shape, generator=generator))
    batch = random_batch(spec_of(kind))
    expected = (continuous_losses if kind == "continuous" else discrete_losses)(algorithm, batch)
    [b] = numbers(algorithm.mixer(batch.state)[1])
    if bias_per_agent:
        expected["conservative"] += 2.0 * (batch.action.shape[2] - 1) * b.mean()
    metrics = algorithm.update(batch)
    for name, loss in expected.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"].item(), loss, rtol=1e-4, atol=1e-5, err_msg=name)


def numbers(*tensors: torch.Tensor) -> list[Array]:
    """Numbers of the one run."""
    return [tensor[0].detach().double().numpy() for tensor in tensors]


def bellman_error(algorithm: Algorithm, batch: Batch, q: Array, q_next: Array) -> float:
    w, b = numbers(*algorithm.mixer(batch.state))
    w_next, b_next = numbers(*algorithm.mixer_target(batch.next_state))
    reward, not_done = numbers(batch.reward, batch.not_done)
    y = reward + 0.99 * not_done * ((w_next * q_next).sum(1) + b_next)
    return float(np.mean(((w * q).sum(1) + b - y) ** 2))


def continuous_losses(algorithm: Algorithm, batch: Batch) -> dict[str, float]:
    o, o2 = batch.observation, batch.next_observation
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    (mean, log_std), (mean2, log_std2) = (numbers(*algorithm.policy(x)) for x in (o, o2))

    def sample(count: int, mean: Array, log_std: Array) -> torch.Tensor:
        noise = torch.randn((count, *mean.shape), generator=generator).numpy()
        return torch.from_numpy(np.tanh(mean + np.exp(log_std) * noise)).float()

    def q(actions: torch.Tensor) -> Array:
        return np.stack(numbers(*(algorithm.q(o, action[None]) for action in actions)))

    next_action = sample(1, mean2, log_std2)[0]
    uniform = 2.0 * torch.rand((10, *mean.shape), generator=generator) - 1.0
    candidates = torch.cat((uniform, sample(10, mean, log_std), sample(10, mean2, log_std2)))
    [w] = numbers(algorithm.mixer(batch.state)[0])
    [recorded] = q(batch.action)
    penalty = np.log(np.exp(w * q(candidates)).sum(0)) - w * recorded
    action = sample(1, mean, log_std)
    [value] = q(action)
    noise = Noise((3,))
    noise.generators = [generator]  # whose next numbers are the search's
    with torch.no_grad():
        searched, _ = search(lambda a: torch.from_numpy(q(a[0])).float()[None], action, Config(), noise)
    [best_value] = q(searched)
    assert 0 < (best_value > value).mean() < 1 or (best_value > value).all()
    a, target = action[0].double().numpy(), searched[0].double().numpy()
    best = np.where((best_value > value)[..., None], target, a)
    return {
        "critic": bellman_error(
            algorithm, batch, recorded, numbers(algorithm.q_target(o2, next_action[None]))[0]
        ),
        "conservative": 2.0 * penalty.sum(1).mean(),
        "policy": 0.3 * ((a - best) ** 2).mean() - 0.7 * value.mean(),
    }


def discrete_losses(algorithm: Algorithm, batch: Batch) -> dict[str, float]:
    assert batch.mask is not None
    assert batch.next_mask is not None
    q, q_next = numbers(algorithm.q.values(batch.observation), algorithm.q.values(batch.next_observation))
    q_target: Any = algorithm.q_target
    [target] = numbers(q_target.values(batch.next_observation))
    [w] = numbers(algorithm.mixer(batch.state)[0])
    mask, next_mask = batch.mask[0].numpy(), batch.next_mask[0].numpy()
    choice = np.where(next_mask, q_next, -np.inf).argmax(-1)
    recorded = np.take_along_axis(q, batch.action[0].numpy()[..., None], -1)[..., 0]
    soft = np.log((np.exp(w[..., None] * q) * mask).sum(-1))
    log_probs = algorithm.policy(batch.observation, batch.mask).double()
    ratio = torch.tensor([0.3], dtype=torch.float64)
    policy = discrete_policy_loss(log_probs, torch.from_numpy(q)[None], batch.action, batch.mask, ratio)
    following = np.take_along_axis(target, choice[..., None], -1)[..., 0]
    return {
        "critic": bellman_error(algorithm, batch, recorded, following),
        "conservative": 2.0 * (soft - w * recorded).sum(1).mean(),
        "policy": policy.item(),
    }


@pytest.mark.parametrize("spec", [continuous_spec(), discrete_spec()])
def test_each_loss_moves_only_what_it_is_for(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses are descended at once, which is right only while the policy's does not train the critic."""
    algorithm = make_learner("omar", spec)
    assert isinstance(algorithm, Algorithm)
    losses: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(algorithm._optimizer, "descend", losses.update)
    algorithm.update(random_batch(spec))
    networks = (algorithm.policy, algorithm.q, algorithm.mixer, algorithm.target)
    for name, loss in losses.items():
        for network in networks:
            network.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        moved = [any(p.grad is not None for p in network.parameters()) for network in networks]
        critic = name != "policy"
        assert moved == [not critic, critic, critic, False], name


def test_the_policys_loss_follows_the_critics_gradient() -> None:
    """With c = 0 the policy's mean climbs q: the gradient is -dq/da da/dmean, from autograd of q alone."""
    algorithm = make_learner("omar", continuous_spec(), {"coefficient": 0.0})
    assert isinstance(algorithm, Algorithm)
    o = random_batch(continuous_spec()).observation
    action = torch.tanh(
        torch.randn(1, o.shape[1], 3, 2, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    value = algorithm.q(o, action)
    loss = continuous_policy_loss(action, value, action + 1.0, value + 1.0, torch.zeros(1))
    [ours] = torch.autograd.grad(loss, action, retain_graph=True)
    [climb] = torch.autograd.grad(value.sum(), action)
    torch.testing.assert_close(ours, -climb / value.numel())


@functools.cache
def game() -> OneStepGame:
    game = rational(one_step_game(1, agents=2), 10)
    assert isinstance(game, OneStepGame)
    return game


@functools.cache
def trained(alpha: float) -> Algorithm:
    torch.set_num_threads(1)
    config = Config(alpha=alpha, lr=0.1, tau=0.05, gamma=0.9, grad_clip=1e9)
    algorithm = Algorithm([config], TabularFactory(game()), behavior_table(game()), steps=1)
    batch = exact_batch(game())
    for rate, count in ((0.1, 250), (0.01, 150)):
        for group in algorithm._optimizer._adam.param_groups:
            group["lr"] = rate
        for _ in range(count):
            algorithm.update(batch)
    return algorithm


def test_the_critic_rests_where_the_bellman_error_meets_the_penalty() -> None:
    """d/dq_i(a): 2 pi_b(a)(q_i(a) - r_i(a) + const) + alpha (softmax(q_i)(a) - pi_b(a)) = 0."""
    alpha = 1.5
    q = next(trained(alpha).q.parameters())[0, :, 0].detach().double().numpy()
    soft = np.exp(q) / np.exp(q).sum(-1, keepdims=True)
    constant = q - game().rewards + alpha / 2 * (soft / game().behavior - 1.0)
    np.testing.assert_allclose(constant - constant.mean(-1, keepdims=True), 0.0, atol=0.01)
    assert np.abs(q - game().rewards - (q - game().rewards).mean(-1, keepdims=True)).max() > 0.3


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_policies_go_to_the_best_action_of_the_critic_and_beat_behavior(alpha: float) -> None:
    algorithm = trained(alpha)
    q = next(algorithm.q.parameters())[0, :, 0].detach().numpy()
    learned = np.stack([table[0] for table in policy_table(algorithm.policy, game())])
    assert (learned.argmax(-1) == q.argmax(-1)).all()
    assert (learned.max(-1) > 0.9).all()
    gain = (learned * game().rewards).sum() - (game().behavior * game().rewards).sum()
    assert gain > 1.0
    if alpha == 0.0:
        assert (learned.argmax(-1) == game().rewards.argmax(-1)).all()


def test_the_searchs_sizes_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"elites: expected 2 to 4"):
        Config(search_samples=4, elites=5)
    with pytest.raises(ConfigError, match=r"omar\.mixer: expected linear or vdn, got 'qmix'"):
        Config(mixer="qmix")


def test_mimicking_draws_a_categorical_policy_to_the_best_available_action() -> None:
    q = torch.tensor([[[[1.0, 3.0, 2.0, 9.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[[1, 1, 1, 0]]]])
    logits = torch.zeros(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    loss = discrete_policy_loss(
        masked_log_softmax(logits, mask), q, torch.tensor([[[0]]]), mask, torch.ones(1)
    )
    probability = F.one_hot(torch.tensor([1]), 4).double() - torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0])
    np.testing.assert_allclose(loss.item(), probability.square().mean().item(), rtol=1e-12)
