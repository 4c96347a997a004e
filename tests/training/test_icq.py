"""ICQ: its closed-form policies with tables, its weights, and one whole step against numpy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.envs.tabular import ChainGame, Game, OneStepGame, chain_game, one_step_game
from omcda_deploy.errors import ConfigError
from omcda_deploy.training.algorithms.icq import Algorithm, Config, batch_weights, effective_share
from omcda_deploy.training.batches import Batch, TransitionSampler
from omcda_deploy.training.distributions import policy_of
from tests.support import oracles
from tests.support.synthetic import continuous_spec, make_learner, random_batch, spec_of, write_dataset
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

TEMPERATURE = 1.5
Array = NDArray[np.float64]


def train(played: Game, steps: tuple[int, int] = (200, 100)) -> Algorithm:
    torch.set_num_threads(1)
    config = Config(policy_temperature=TEMPERATURE, lr=0.05, tau=0.05, gamma=0.9, grad_clip=1e9)
    algorithm = Algorithm([config], TabularFactory(played), behavior_table(played), steps=1)
    batch = exact_batch(played)
    for rate, count in zip((0.05, 0.005), steps, strict=True):
        for group in algorithm._optimizer._adam.param_groups:
            group["lr"] = rate
        for _ in range(count):
            algorithm.update(batch)
    return algorithm


@functools.cache
def bandit() -> ChainGame:
    """One action per episode from one of three local states: a contextual bandit."""
    game = rational(chain_game(4, states=3, actions=3, branching=1, stop=1.0), 6)
    assert isinstance(game, ChainGame)
    return game


@functools.cache
def one_step(state_scales: tuple[float, ...] = (1.0,)) -> OneStepGame:
    game = rational(one_step_game(1, agents=2, state_scales=state_scales), 10)
    assert isinstance(game, OneStepGame)
    return game


def first_rows(tables: list[Array]) -> Array:
    return np.stack([table[0] for table in tables])


def test_policies_are_behavior_times_exp_of_q() -> None:
    """pi ∝ pi_b exp(Q/T), and so better than behaviour in exact expected return."""
    game = one_step()
    optima = oracles.one_step_optima(game.rewards, game.behavior, TEMPERATURE)
    learned = first_rows(policy_table(train(game).policy, game))
    assert (oracles.kl(optima.policy, learned) < 0.002 * optima.kl).all()
    assert optima.kl[0] > 0.1  # not merely pi_b
    assert (learned * game.rewards).sum() > (game.behavior * game.rewards).sum() + 0.5


def test_policies_are_right_at_every_observation_though_the_softmax_is_over_the_batch() -> None:
    learned = policy_table(train(bandit()).policy, bandit())
    for chain, policy in zip(bandit().chains, learned, strict=True):
        optima = oracles.one_step_optima(chain.rewards, chain.behavior, TEMPERATURE)
        assert (oracles.kl(optima.policy, policy) < 0.003 * np.maximum(optima.kl, 0.05)).all()


def test_mixer_weights_scale_the_exponent_of_states_behind_one_observation() -> None:
    """Then pi ∝ pi_b E_s[exp(w(s)(q - v)/T)] with v the policy's own mean of q, by iteration."""
    scales = (0.5, 2.0)
    game = one_step(scales)
    learned = first_rows(policy_table(train(game, (300, 200)).policy, game))
    policy = game.behavior
    for _ in range(1000):
        advantage = game.rewards - (policy * game.rewards).sum(-1, keepdims=True)
        fresh = game.behavior * np.mean([np.exp(w * advantage / TEMPERATURE) for w in scales], axis=0)
        policy = 0.5 * policy + 0.5 * fresh / fresh.sum(-1, keepdims=True)
    raw = game.behavior * np.mean([np.exp(w * game.rewards / TEMPERATURE) for w in scales], axis=0)
    raw /= raw.sum(-1, keepdims=True)
    np.testing.assert_allclose(learned, policy, atol=3e-3)
    assert np.abs(raw - policy).max() > 0.02  # without the baseline it would be another policy


def weights_of(scores: Array, valid: Array | None = None) -> Array:
    """:func:`batch_weights` of one run."""
    rows = None if valid is None else torch.from_numpy(valid)[None]
    weights: Array = batch_weights(torch.from_numpy(scores)[None], rows)[0].numpy()
    return weights


@pytest.mark.parametrize("scale", [0.1, 1e4])
def test_weights_average_to_one_over_the_rows_that_count(scale: float) -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(64, 3)) * scale
    weights = weights_of(scores)
    exponentials = np.exp(scores - scores.max(0))
    np.testing.assert_allclose(weights, exponentials / exponentials.mean(0), rtol=1e-10)
    np.testing.assert_allclose(weights.mean(0), 1.0, rtol=1e-12)
    counted = (generator.random(64) > 0.5).astype(np.float64)
    some = weights_of(scores[:, 0], counted)
    np.testing.assert_allclose(some[counted == 1].mean(), 1.0, rtol=1e-12)
    assert (some[counted == 0] == 0.0).all()
    np.testing.assert_allclose(
        some[counted == 1], weights_of(scores[counted == 1, 0]), rtol=1e-10, atol=1e-300
    )


def test_weights_of_a_run_know_nothing_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, valid = torch.randn(4, 32, generator=generator), torch.rand(4, 32, generator=generator).round()
    together = batch_weights(scores, valid)
    assert len(set(valid.sum(1).tolist())) > 1
    for run in range(4):
        assert torch.equal(together[run], batch_weights(scores[run : run + 1], valid[run : run + 1])[0])


def test_a_batch_in_which_nothing_counts_has_no_weight() -> None:
    assert batch_weights(torch.randn(1, 5), torch.zeros(1, 5)).tolist() == [[0.0] * 5]


def test_effective_share_of_even_and_of_single_weights() -> None:
    weights = torch.tensor([[1.0, 4.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert effective_share(weights.unsqueeze(0)).tolist() == [[1.0, 0.25]]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_one_step_of_losses_against_numpy(kind: Any, released: bool) -> None:
    spec = spec_of(kind)
    settings = {
        "critic_temperature": 0.05,
        "policy_temperature": 0.1,
        "rho_max": 1.2,
        "as_released": released,
    }
    algorithm = make_learner("icq", spec, settings)
    assert isinstance(algorithm, Algorithm)
    generator = torch.Generator().manual_seed(3)
    for parameter in [*algorithm.target.parameters(), *algorithm.online.parameters()]:
        with torch.no_grad():
            parameter.mul_(1.0 + 0.5 * torch.randn(parameter.shape, generator=generator))
    batch = random_batch(spec)
    assert (batch.not_done * (1 - batch.next_action_known)).sum() > 0
    losses, rho = expected_losses(algorithm, batch, released)
    metrics = algorithm.update(batch)
    for name, expected in losses.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"].item(), expected, rtol=3e-5, err_msg=name)
    capped = metrics["weights/rho_capped"].item()
    np.testing.assert_allclose(capped, np.mean(rho >= 1.2), rtol=1e-6)
    assert released or 0 < capped < 1  # both sides of the cap are in the batch


def expected_losses(algorithm: Algorithm, batch: Batch, released: bool) -> tuple[dict[str, float], Array]:
    def numbers(*tensors: torch.Tensor) -> list[Array]:
        return [tensor[0].detach().double().numpy() for tensor in tensors]

    def values(
        critic: Any, observation: torch.Tensor, action: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[Array, Array]:
        """The smaller critic's q and its baseline v, both [B, N]."""
        if mask is None:
            mode = torch.tanh(algorithm.policy(observation)[0])
            both = (critic.first, critic.second)
            q = np.min(numbers(*(one(observation, action) for one in both)), axis=0)
            v = np.min(numbers(*(one(observation, mode) for one in both)), axis=0)
            return q, v
        [probability] = numbers(algorithm.policy(observation, mask).exp())
        assert (probability[mask[0].numpy() == 0] == 0).all()
        least = np.min(numbers(critic.first.values(observation), critic.second.values(observation)), axis=0)
        q = np.take_along_axis(least, action[0].numpy()[..., None], -1)[..., 0]
        return q, (probability * least).sum(-1)

    reward, not_done, has_action = numbers(batch.reward, batch.not_done, batch.next_action_known)
    w, b = numbers(*algorithm.mixer(batch.state))
    w_next, b_next = numbers(*algorithm.mixer_target(batch.next_state))
    q, v = values(algorithm.q, batch.observation, batch.action, batch.mask)
    q_next, v_next = values(algorithm.q_target, batch.next_observation, batch.next_action, batch.next_mask)
    policy = policy_of(algorithm.policy, batch.observation, batch.mask)
    [log_prob] = numbers(policy.log_prob(batch.action))
    total_next = (w_next * q_next).sum(1) + b_next
    use = np.array([n == 0 or k == 1 for n, k in zip(not_done, has_action, strict=True)])
    decay = np.ones(len(reward))
    if released:
        rho = np.exp(total_next / 0.05 - np.max(total_next / 0.05))
        rho /= rho.sum()
        weights = np.exp(w * q / 0.1 - np.max(w * q / 0.1, axis=0))
        weights /= weights.sum(0)
        index = 0
        for j in range(len(reward)):
            index = 0 if j == 0 or not_done[j] == 0 else index + 1
            decay[j] = (0.8 * 0.99) ** index
    else:
        exponent = (w_next * (q_next - v_next)).sum(1) / 0.05
        alive = (not_done == 1) & (has_action == 1)
        rho = np.where(alive, np.exp(exponent - exponent[alive].max()), 0.0)
        rho = np.minimum(rho / rho[alive].mean(), 1.2)
        weights = np.exp(w * (q - v) / 0.1)
        weights /= weights.mean(0)
    y = reward + 0.99 * not_done * rho * total_next
    error = (decay * ((w * q).sum(1) + b - y)) ** 2
    return {"critic": error[use].mean(), "policy": -np.mean(weights * log_prob)}, rho


def test_each_loss_moves_only_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses are descended at once, which is right only while they share no parameter."""
    algorithm = make_learner("icq", continuous_spec())
    assert isinstance(algorithm, Algorithm)
    losses: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(algorithm._optimizer, "descend", losses.update)
    algorithm.update(random_batch(continuous_spec()))
    for name, loss in losses.items():
        networks = (algorithm.policy, algorithm.online, algorithm.target)
        for network in networks:
            network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        moved = [any(p.grad is not None for p in network.parameters()) for network in networks]
        assert moved == [name == "policy", name == "critic", False]


def test_batches_carry_the_next_action_and_say_where_there_is_none(tmp_path: Path) -> None:
    dataset = read(write_dataset(tmp_path / "data.hdf5", continuous_spec(), [4, 1, 3]))
    batch = TransitionSampler(dataset, 8, [0]).gather(torch.arange(8)[None])
    assert batch.next_action_known.tolist() == [[1, 1, 1, 0, 0, 1, 1, 0]]
    has_action = batch.next_action_known.bool()
    following = np.array([1, 2, 3, 6, 7])  # transitions, in order, that follow those with a next action
    assert torch.equal(batch.next_action[has_action], batch.action[0, following])
    some = TransitionSampler(dataset, 8, [0], subset=np.array([0, 3, 5])).gather(torch.arange(3)[None])
    assert some.next_action_known.tolist() == [[1, 0, 1]]  # the next row may be outside the subset


def test_a_nonlinear_mixer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"icq\.mixer: expected linear or vdn, got 'qmix'"):
        Config(mixer="qmix")
