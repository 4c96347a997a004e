"""CFCQL: its penalty against enumeration, its weights and one whole step against numpy, and what it learns."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.envs.tabular import ChainGame, Game, OneStepGame, chain_game, one_step_game
from omcda_deploy.spec import ActionKind
from omcda_deploy.training.algorithms.cfcql import (
    Algorithm,
    Config,
    FixedDeviationActor,
    agent_weights,
    counterfactual_change,
)
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import Categorical, TanhGaussian
from omcda_deploy.training.fleet import Noise
from omcda_deploy.training.networks import GaussianActor, LinearMixer, QmixMixer, VdnMixer, total_value
from omcda_deploy.training.settings import build
from tests.support import oracles
from tests.support.synthetic import continuous_spec, discrete_spec, make_learner, random_batch, spec_of
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

Array = NDArray[np.float64]
KINDS: tuple[ActionKind, ...] = ("continuous", "discrete")


def numbers(tensor: torch.Tensor) -> Array:
    """Numbers of the one run."""
    array: Array = tensor[0].detach().double().numpy()
    return array


def logsumexp(values: Array) -> float:
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def learner(kind: ActionKind, settings: dict[str, Any]) -> Algorithm:
    """Small networks whose targets are not the online ones, with values spread enough for the softmaxes to bite."""
    algorithm = make_learner("cfcql", spec_of(kind), settings)
    assert isinstance(algorithm, Algorithm)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for critic in algorithm.critics:
            critic.mlp.last.weight.mul_(30.0)
            critic.mlp.last.bias[:, :1].sub_(6.0)  # action 0, always available, must not always be best
        for parameter in algorithm.target.parameters():
            parameter.mul_(1.0 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return algorithm


@pytest.mark.parametrize("mixer", [LinearMixer(6, 3, 8), VdnMixer(3), QmixMixer(6, 3, 8, 5)])
def test_the_counterfactual_change_is_the_mixers_own(mixer: torch.nn.Module) -> None:
    """Against the mixer run on every list of values in which one agent's is replaced."""
    generator = torch.Generator().manual_seed(0)
    values, recorded = torch.randn(4, 5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    state = torch.randn(5, 6, generator=generator)
    with torch.no_grad():
        [change] = counterfactual_change(mixer, values[None], recorded[None], state[None])
        for k, i in itertools.product(range(4), range(3)):
            replaced = recorded.clone()
            replaced[:, i] = values[k, :, i]
            expected = total_value(mixer, replaced, state) - total_value(mixer, recorded, state)
            torch.testing.assert_close(change[k, :, i], expected, atol=1e-5, rtol=1e-5)


def test_uniform_weights_make_it_the_joint_penalty_divided_by_the_agents() -> None:
    """Exact joint LSE by enumeration of all available joint actions, under masks and a linear mixer."""
    algorithm = learner("discrete", {"lambda_tau": 0.0, "twin": False, "alpha": 3.0})
    batch = random_batch(discrete_spec())
    assert batch.mask is not None
    q = numbers(algorithm.critics[0].values(batch.observation))
    w, bias = map(numbers, algorithm.mixer(batch.state))
    joint = []
    for b in range(len(q)):
        available = [np.flatnonzero(batch.mask[0, b, i].numpy()) for i in range(q.shape[1])]
        totals = [
            sum(w[b, i] * q[b, i, u] for i, u in enumerate(actions)) + bias[b]
            for actions in itertools.product(*available)
        ]
        recorded = sum(w[b, i] * q[b, i, int(a)] for i, a in enumerate(batch.action[0, b])) + bias[b]
        joint.append(logsumexp(np.array(totals)) - recorded)
    metrics = algorithm.update(batch)
    np.testing.assert_allclose(metrics["loss/conservative"].item(), 3.0 * np.mean(joint) / 2, rtol=1e-5)
    assert metrics["lambda"].tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_the_weights_of_agents(sign: str) -> None:
    kl = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9.0
    scores = np.exp((0.7 if sign == "positive" else -0.7) * kl.numpy())
    strength = torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    weights = agent_weights(kl[None], strength, sign)[0].numpy()
    np.testing.assert_allclose(weights, scores / scores.sum(-1, keepdims=True), rtol=1e-12)
    most = kl.argmax(-1) if sign == "positive" else kl.argmin(-1)
    assert (weights.argmax(-1) == most.numpy()).all()


@pytest.mark.parametrize("sign", ["positive", "negative"])
@pytest.mark.parametrize("mixer", ["linear", "qmix"])
def test_one_discrete_step_against_numpy(sign: str, mixer: str) -> None:
    settings = {"lambda_tau": 1.3, "lambda_sign": sign, "mixer": mixer, "alpha": 0.8, "gamma": 0.9}
    algorithm, batch = learner("discrete", settings), random_batch(discrete_spec())
    assert batch.mask is not None
    assert batch.next_mask is not None
    mask, next_mask = batch.mask[0].numpy().astype(bool), batch.next_mask[0].numpy().astype(bool)
    q, next_q = (
        [numbers(critic.values(o)) for critic in algorithm.critics]
        for o in (batch.observation, batch.next_observation)
    )
    next_q_bar = [numbers(critic.values(batch.next_observation)) for critic in algorithm.critics_target]
    assert isinstance(batch.behavior, Categorical)
    log_b = numbers(batch.behavior.log_probs)
    _, rows, agents = batch.action.shape
    action = batch.action[0].numpy()

    def totals(network: torch.nn.Module, values: Array, states: torch.Tensor) -> Array:
        with torch.no_grad():
            return numbers(total_value(network, torch.from_numpy(values)[None].float(), states))

    def taken(table: Array, choice: NDArray[np.int64]) -> Array:
        return np.take_along_axis(table, choice[..., None], -1)[..., 0]

    chosen = np.where(next_mask, next_q[0], -np.inf).argmax(-1)
    assert (chosen != next_q[0].argmax(-1)).any()
    following = [totals(algorithm.mixer_target, taken(t, chosen), batch.next_state) for t in next_q_bar]
    y = numbers(batch.reward) + 0.9 * numbers(batch.not_done) * np.minimum(*following)

    scores = []  # Q^i(s, u) of each critic [B, N, A]
    for table in q:
        recorded = taken(table, action)
        replaced = np.full(table.shape, -np.inf)
        for i, u in itertools.product(range(agents), range(table.shape[-1])):
            values = recorded.copy()
            values[:, i] = table[:, i, u]
            changed = totals(algorithm.mixer, values, batch.state)
            replaced[:, i, u] = np.where(mask[:, i, u], changed, -np.inf)
        scores.append(replaced)
    kl = np.zeros((rows, agents))
    for b, i in itertools.product(range(rows), range(agents)):
        available = mask[b, i]
        log_mu = scores[0][b, i, available] - logsumexp(scores[0][b, i, available])
        kl[b, i] = (np.exp(log_mu) * (log_mu - log_b[b, i, available])).sum()
    weights = np.exp((1.3 if sign == "positive" else -1.3) * kl)
    weights /= weights.sum(-1, keepdims=True)
    critic_loss, conservative = 0.0, 0.0
    for table, score in zip(q, scores, strict=True):
        total = totals(algorithm.mixer, taken(table, action), batch.state)
        critic_loss += float(np.mean((total - y) ** 2))
        for b in range(rows):
            lse = np.array([logsumexp(score[b, i, mask[b, i]]) for i in range(agents)])
            conservative += 0.8 * float((weights[b] * lse).sum() - total[b]) / rows
    metrics = algorithm.update(batch)
    np.testing.assert_allclose(metrics["loss/critic"].item(), critic_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/conservative"].item(), conservative, rtol=1e-4)
    np.testing.assert_allclose(metrics["lambda"][0].numpy(), weights.mean(0), rtol=1e-4)
    assert weights.std(0).max() > 0.05
    greedy = np.where(mask, q[0], -np.inf).argmax(-1)
    assert (greedy != q[0].argmax(-1)).any()
    np.testing.assert_allclose(metrics["kl"][0].numpy(), -taken(log_b, greedy).mean(0), rtol=1e-4)


@pytest.mark.parametrize("mixer", ["linear", "qmix"])
def test_one_continuous_step_against_numpy(mixer: str) -> None:
    settings = {"candidates": 4, "lambda_tau": 0.3, "alpha": 0.8, "gamma": 0.9, "mixer": mixer}
    algorithm, batch = learner("continuous", settings), random_batch(continuous_spec(), size=12)
    with torch.no_grad():
        policy = TanhGaussian(*algorithm.policy(batch.observation))
        following = TanhGaussian(*algorithm.policy(batch.next_observation))
        behavior = batch.behavior
        assert isinstance(behavior, TanhGaussian)
        generator = torch.Generator().manual_seed(0)  # seed 0, step 0
        noise = Noise((0,))
        noise.generators = [generator]
        next_action = following.sample(1, noise).squeeze(1)
        uniform = torch.rand((1, 4, 12, 3, 2), generator=generator) * 2 - 1
        candidates = [uniform, policy.sample(4, noise), following.sample(4, noise)]
    np.testing.assert_allclose(numbers(policy.log_std), np.log(0.2), rtol=1e-6)

    def total(network: torch.nn.Module, values: torch.Tensor, state: torch.Tensor) -> Array:
        with torch.no_grad():
            return numbers(total_value(network, values, state))

    def log_density(action: torch.Tensor, policy: TanhGaussian) -> Array:
        a = numbers(action)
        deviation = (np.arctanh(a) - numbers(policy.mean)) / 0.2
        gaussian = -(deviation**2) / 2 - np.log(0.2 * np.sqrt(2 * np.pi))
        return np.asarray((gaussian - np.log(1 - a**2)).sum(-1))

    density = [
        np.full((4, 12, 3), np.log(0.25)),
        log_density(candidates[1], policy),
        log_density(candidates[2], following),
    ]
    mean, mean_b, log_std_b = map(numbers, (policy.mean, behavior.mean, behavior.log_std))
    variance_b = np.exp(2 * log_std_b)
    kl = ((0.04 + (mean - mean_b) ** 2) / variance_b - 1 - np.log(0.04 / variance_b)).sum(-1) / 2
    weights = np.exp(0.3 * kl) / np.exp(0.3 * kl).sum(-1, keepdims=True)
    assert np.ptp(weights) > 0.02
    bars = [
        total(algorithm.mixer_target, critic(batch.next_observation, next_action), batch.next_state)
        for critic in algorithm.critics_target
    ]
    y = numbers(batch.reward) + 0.9 * numbers(batch.not_done) * np.minimum(*bars)
    critic_loss, conservative = 0.0, 0.0
    for critic in algorithm.critics:
        recorded = critic(batch.observation, batch.action)
        q_tot = total(algorithm.mixer, recorded, batch.state)
        critic_loss += float(np.mean((q_tot - y) ** 2))
        scores = np.empty((12, 12, 3))  # [K, B, N]
        for k, i in itertools.product(range(12), range(3)):
            replaced = torch.where(
                torch.arange(3) == i, critic(batch.observation, torch.cat(candidates, 1)[:, k]), recorded
            )
            scores[k, :, i] = total(algorithm.mixer, replaced, batch.state) - np.concatenate(density)[k, :, i]
        for b in range(12):
            lse = np.array([logsumexp(scores[:, b, i]) for i in range(3)]) - np.log(12)
            conservative += 0.8 * float((weights[b] * lse).sum() - q_tot[b]) / 12
    metrics = algorithm.update(batch)
    np.testing.assert_allclose(metrics["loss/critic"].item(), critic_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/conservative"].item(), conservative, rtol=2e-3)
    np.testing.assert_allclose(metrics["kl"][0].numpy(), kl.mean(0), rtol=1e-4)
    np.testing.assert_allclose(metrics["lambda"][0].numpy(), weights.mean(0), rtol=1e-4)


@pytest.mark.parametrize("mixer", ["linear", "qmix"])
def test_the_policy_climbs_the_total_value_and_trains_nothing_else(
    mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"policy_std": 0.01, "action_penalty": 0.3, "mixer": mixer}
    algorithm, batch = learner("continuous", settings), random_batch(continuous_spec())
    losses: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(algorithm._optimizer, "descend", losses.update)
    algorithm.update(batch)
    with torch.no_grad():
        action = torch.tanh(algorithm.policy(batch.observation)[0])
        values, recorded = (algorithm.critics[0](batch.observation, a) for a in (action, batch.action))
        gains = []
        for i in range(3):
            replaced = torch.where(torch.arange(3) == i, values, recorded)
            gains.append(
                total_value(algorithm.mixer, replaced, batch.state)
                - total_value(algorithm.mixer, recorded, batch.state)
            )
        expected = -torch.stack(gains).mean() + 0.3 * action.square().mean()
    np.testing.assert_allclose(losses["policy"].item(), expected.item(), atol=0.01)
    networks = {"policy": algorithm.policy, "online": algorithm.online, "target": algorithm.target}
    moves = {"policy": {"policy"}, "critic": {"online"}, "conservative": {"online"}}
    assert losses.keys() == moves.keys()
    for name, loss in losses.items():
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        moved = {key for key, net in networks.items() if any(p.grad is not None for p in net.parameters())}
        assert moved == moves[name], name


def test_the_target_is_the_smaller_of_two_critics() -> None:
    """With one of the target critics far below, y follows it, whichever it is."""
    for kind in KINDS:
        batch = random_batch(spec_of(kind))
        targets = []
        for lowered in (None, 0, 1):
            algorithm = learner(kind, {"mixer": "vdn", "gamma": 0.5})
            if lowered is not None:
                with torch.no_grad():
                    algorithm.critics_target[lowered].mlp.last.bias.sub_(1e3)
            targets.append(algorithm.update(batch)["value/target"].item())
        fall = 0.5 * 1e3 * float(batch.not_done.mean()) * batch.action.shape[2]
        for lowered_target in targets[1:]:
            np.testing.assert_allclose(targets[0] - lowered_target, fall, rtol=0.02)


def test_the_deviation_is_fixed_but_the_mean_is_the_actors() -> None:
    actor = GaussianActor(5, 2, 3, 8)
    o = random_batch(continuous_spec()).observation
    mean, log_std = FixedDeviationActor(actor, 0.3)(o)
    assert torch.equal(mean, actor(o)[0])
    np.testing.assert_allclose(log_std.numpy(), np.log(0.3), rtol=1e-6)


def fit(game: Game, batch: Batch, settings: dict[str, Any], steps: int) -> Algorithm:
    torch.set_num_threads(1)
    config = build(Config, {"lr": 0.05, "tau": 0.1, "gamma": 0.9, "grad_clip": 1e9, **settings})
    algorithm = Algorithm([config], TabularFactory(game), behavior_table(game), steps=1)
    for _ in range(steps):
        algorithm.update(batch)
    return algorithm


def test_a_one_step_game_is_solved_and_the_penalty_is_counted() -> None:
    """Each agent's marginal minimises ``(q - r)^2 + alpha lambda LSE - …``: solved here by descent in numpy."""
    game = rational(one_step_game(0, agents=2), 10)
    assert isinstance(game, OneStepGame)
    alpha = 0.5
    batch = exact_batch(game)
    algorithm = fit(game, batch, {"alpha": alpha, "lambda_tau": 0.0, "twin": False}, 250)
    q = numbers(next(algorithm.critics[0].parameters()))[:, 0]
    # d/dQ_tot of the squared error and of the penalty vanish together: exact over all joint actions.
    total = q[0][:, None] + q[1][None]
    reward = oracles.joint_reward(game.rewards)
    probability = oracles.joint_product(game.behavior)
    for i in range(2):
        soft = np.exp(q[i] - logsumexp(q[i]))
        error = 2 * (probability * (total - reward)).sum(1 - i)
        np.testing.assert_allclose(error + alpha / 2 * (soft - game.behavior[i]), 0.0, atol=2e-3)
    policies = np.stack([table[0] for table in policy_table(algorithm.policy, game)])
    value = float((policies * game.rewards).sum())
    assert value > float((game.behavior * game.rewards).sum()) + 0.3
    np.testing.assert_allclose(policies.max(-1), 1.0)
    np.testing.assert_allclose(policies.sum(-1), 1.0)


def test_a_strong_penalty_keeps_to_the_data_and_a_weak_one_finds_the_optimum() -> None:
    game = rational(chain_game(2, agents=1, states=3, actions=3, branching=1, stop=0.0), 6)
    assert isinstance(game, ChainGame)
    [chain] = game.chains
    value = np.zeros(3)
    for _ in range(100):
        q = chain.rewards + 0.5 * chain.transitions @ value
        value = q.max(-1)
    likeliest = chain.behavior >= chain.behavior.max(-1, keepdims=True) - 1e-9
    assert not likeliest[np.arange(3), q.argmax(-1)].all()
    batch = exact_batch(game)
    common = {"gamma": 0.5, "lr": 0.2, "tau": 0.2}
    [greedy] = policy_table(fit(game, batch, {"alpha": 1e-3, **common}, 150).policy, game)
    [conservative] = policy_table(fit(game, batch, {"alpha": 1e3, **common}, 40).policy, game)
    np.testing.assert_array_equal(greedy.argmax(-1), q.argmax(-1))
    assert (conservative * likeliest).sum(-1).tolist() == [1.0, 1.0, 1.0]
