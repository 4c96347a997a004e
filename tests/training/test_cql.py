"""CQL against numpy: its soft maximum by enumeration and quadrature, its targets, its fixed points."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.envs.tabular import OneStepGame, one_step_game
from omcda_deploy.errors import ConfigError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from omcda_deploy.training.algorithms import cql
from omcda_deploy.training.networks import NetworkFactory
from tests.support.synthetic import (
    HIDDEN,
    continuous_spec,
    differing,
    discrete_spec,
    make_learner,
    random_batch,
)
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

Float = NDArray[np.float64]


def learner(spec: TeamSpec, **settings: Any) -> cql.Algorithm:
    algorithm = make_learner("cql", spec, settings)
    assert isinstance(algorithm, cql.Algorithm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # targets unlike the networks they follow, so that taking one for the other shows
        for parameter in algorithm.target.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for module in algorithm.mixer.children():
            assert isinstance(module, nn.Linear)
            module.weight.mul_(3.0)  # weights and biases far from 1 and 0
    return algorithm


def mixed(mixer: nn.Module, state: Tensor) -> tuple[Float, Float]:
    with torch.no_grad():
        w, b = mixer(state)
    return w[0].double().numpy(), b[0].double().numpy()


def available(mask: NDArray[np.uint8]) -> list[int]:
    return [a for a in range(len(mask)) if mask[a]] or [0]


@pytest.mark.parametrize("bias_per_agent", [False, True])
def test_a_discrete_step_is_that_of_the_enumerated_joint_action_space(bias_per_agent: bool) -> None:
    algorithm = learner(discrete_spec(), alpha=2.5, bias_per_agent=bias_per_agent)
    batch = random_batch(discrete_spec())
    assert batch.mask is not None
    assert batch.next_mask is not None
    batch.next_mask[0, 3, 1] = 0  # no action at all: action 0
    with torch.no_grad():
        q, online, target = (
            values[0].double().numpy()
            for values in (
                algorithm.q.values(batch.observation),
                algorithm.q.values(batch.next_observation),
                algorithm.target[0].values(batch.next_observation),  # type: ignore[operator]
            )
        )
    (w, b), (w2, b2) = (
        mixed(algorithm.mixer, batch.state),
        mixed(algorithm.mixer_target, batch.next_state),
    )
    assert np.abs(b).mean() > 0.1
    penalty, errors = np.empty(32), np.empty(32)
    for row in range(32):

        def total(joint: tuple[int, ...], row: int = row) -> float:
            return float(sum(w[row, i] * q[row, i, a] for i, a in enumerate(joint)) + b[row])

        joints = itertools.product(*(available(batch.mask[0, row, i].numpy()) for i in range(2)))
        soft_maximum = np.log(sum(np.exp(total(joint)) for joint in joints))
        data = total(tuple(batch.action[0, row].tolist()))
        penalty[row] = soft_maximum - data + (b[row] if bias_per_agent else 0.0)
        greedy = [
            max(available(batch.next_mask[0, row, i].numpy()), key=lambda a: online[row, i, a])
            for i in range(2)
        ]
        following = sum(w2[row, i] * target[row, i, a] for i, a in enumerate(greedy)) + b2[row]
        y = float(batch.reward[0, row]) + 0.99 * float(batch.not_done[0, row]) * following
        errors[row] = data - y
    metrics = algorithm.update(batch)
    assert float(metrics["loss/conservative"]) == pytest.approx(2.5 * penalty.mean(), rel=1e-5)
    assert float(metrics["loss/critic"]) == pytest.approx((errors**2).mean(), rel=1e-5)


def test_the_corrected_soft_maximum_is_the_integral_over_actions() -> None:
    agents = tuple(AgentSpec(f"agent_{i}", 5, ActionSpec("continuous", 1)) for i in range(3))
    spec = TeamSpec("test/line", agents, state_size=7, control_rate=20.0)
    algorithm = learner(spec, samples=4000, importance_correction=True)
    with torch.no_grad():
        algorithm.q.mlp.last.weight.mul_(20.0)  # far from constant in the action
        # Broad, so that 1/density has a small variance: std near 2 before the tanh.
        # Its mean depends on the observation: densities at o and at o' must not be taken for each other.
        algorithm.policy.mlp.last.weight.mul_(torch.tensor([[10.0], [0.1]]))  # type: ignore[union-attr, operator]
        algorithm.policy.mlp.last.bias.copy_(torch.tensor([0.2, 0.7]))  # type: ignore[union-attr, operator]
    batch = random_batch(spec, size=8)
    grid = torch.linspace(-1.0, 1.0, 401)
    with torch.no_grad():
        actions = grid[:, None, None, None].expand(1, 401, 8, 3, 1)
        [curves] = algorithm.q.candidates(batch.observation, actions)
        [recorded] = algorithm.q(batch.observation, batch.action)
    (w, _), x = mixed(algorithm.mixer, batch.state), grid.double().numpy()
    integral = np.trapezoid(np.exp(w * curves.double().numpy()), x, axis=0)  # [8, 3]
    exact = (np.log(integral) - w * recorded.double().numpy()).sum(-1).mean()
    # The sum over samples is 3 samples times the mean that estimates the integral.
    got = float(algorithm.update(batch)["loss/conservative"]) - 3 * np.log(3 * 4000)
    assert np.std(w * curves.double().numpy()) > 0.3
    assert got == pytest.approx(exact, abs=0.02)


def test_without_correction_actions_of_three_kinds_count_as_they_come() -> None:
    algorithm = learner(continuous_spec(), samples=2000)
    batch = random_batch(continuous_spec(), size=8)
    rng = np.random.default_rng(0)
    draws = [rng.uniform(-1, 1, (2000, 8, 3, 2))]
    with torch.no_grad():
        for observation in (batch.observation, batch.next_observation):
            mean, log_std = (x[0].double().numpy() for x in algorithm.policy(observation))
            draws.append(np.tanh(mean + np.exp(log_std) * rng.normal(size=(2000, 8, 3, 2))))
        actions = torch.from_numpy(np.concatenate(draws)).float()
        values = algorithm.q.candidates(batch.observation, actions[None])[0].double().numpy()
        recorded = algorithm.q(batch.observation, batch.action)[0].double().numpy()
    w, _ = mixed(algorithm.mixer, batch.state)
    penalty = (np.log(np.exp(w * values).sum(0)) - w * recorded).sum(-1).mean()
    assert float(algorithm.update(batch)["loss/conservative"]) == pytest.approx(penalty, abs=0.02)


def test_the_continuous_target_is_of_the_policy_at_the_next_observation() -> None:
    algorithm = learner(continuous_spec())
    batch = random_batch(continuous_spec())
    with torch.no_grad():
        algorithm.policy.mlp.last.weight.mul_(10.0)  # type: ignore[union-attr, operator]
        algorithm.policy.mlp.last.bias[:, 2:] = -50.0  # type: ignore[union-attr, operator]  # std e^-5
        algorithm.target[0].mlp.first.weight[..., -2:].mul_(10.0)  # type: ignore[union-attr, index]
        mean, _ = algorithm.policy(batch.next_observation)
        following = algorithm.target[0](batch.next_observation, torch.tanh(mean))[0].double().numpy()
        q = algorithm.q(batch.observation, batch.action)[0].double().numpy()
    (w, b), (w2, b2) = mixed(algorithm.mixer, batch.state), mixed(algorithm.mixer_target, batch.next_state)
    y = batch.reward[0].numpy() + 0.99 * batch.not_done[0].numpy() * ((w2 * following).sum(-1) + b2)
    loss = (((w * q).sum(-1) + b - y) ** 2).mean()
    assert float(algorithm.update(batch)["loss/critic"]) == pytest.approx(loss, rel=2e-3)


class BellQ(nn.Module):
    """A critic ``Q(o, a)`` without parameters: the log density of a fixed tanh-Gaussian, plus a constant."""

    mean, std, constant = (0.4, -0.8), (0.5, 0.3), 7.0

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        a = action.clamp(-0.999999, 0.999999)
        u = torch.atanh(a)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        log_density: Tensor = (-0.5 * ((u - mean) / std).square() - torch.log(1.0 - a.square())).sum(-1)
        return log_density + self.constant

    def candidates(self, observation: Tensor, actions: Tensor) -> Tensor:
        return self(observation, actions)  # type: ignore[no-any-return]


class BellFactory(NetworkFactory):
    def q(self, zero: bool = False) -> nn.Module:
        return BellQ()


def test_the_soft_policy_goes_to_the_exponential_of_q() -> None:
    spec = continuous_spec()
    torch.manual_seed(0)
    behavior = NetworkFactory(spec, HIDDEN).actor()
    config = cql.Config(mixer="vdn", hidden=HIDDEN, samples=1, lr=0.03)
    algorithm = cql.Algorithm([config], BellFactory(spec, HIDDEN, (0,)), behavior, steps=1000)
    batch = random_batch(spec, size=64)
    for step in range(400):
        if step == 300:
            algorithm._optimizer._adam.param_groups[0]["lr"] = 0.002
        algorithm.update(batch)
    with torch.no_grad():
        mean, log_std = algorithm.policy(batch.observation)
    np.testing.assert_allclose(mean.mean((0, 1, 2)).numpy(), BellQ.mean, atol=0.03)
    np.testing.assert_allclose(log_std.exp().mean((0, 1, 2)).numpy(), BellQ.std, atol=0.03)


def test_the_published_policy_loss_is_raw_values_times_log_likelihood() -> None:
    algorithm = learner(continuous_spec(), improvement="q_weighted_cloning")
    batch = random_batch(continuous_spec())
    with torch.no_grad():
        mean, log_std = (x[0].double().numpy() for x in algorithm.policy(batch.observation))
        q = algorithm.q(batch.observation, batch.action)[0].double().numpy()
    a = batch.action[0].double().numpy()
    normal = -0.5 * ((np.arctanh(a) - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    log_prob = (normal - np.log(1 - a**2)).sum(-1)
    assert (q < 0).any()
    assert float(algorithm.update(batch)["loss/policy"]) == pytest.approx(-(q * log_prob).mean(), rel=1e-4)


def test_the_policy_loss_trains_the_policy_alone() -> None:
    critics, policies = [], []
    for improvement in ("soft_q", "q_weighted_cloning"):
        algorithm = learner(continuous_spec(), improvement=improvement)
        algorithm.update(random_batch(continuous_spec()))
        critics.append(algorithm.online.state_dict())
        policies.append(algorithm.policy.state_dict())
    assert differing(critics[0], critics[1]) == set()
    assert differing(policies[0], policies[1])


def train(game: OneStepGame, alpha: float, steps: int, lr: float = 0.05) -> cql.Algorithm:
    config = cql.Config(alpha=alpha, lr=lr, tau=0.2, gamma=0.9, grad_clip=1e9)
    algorithm = cql.Algorithm([config], TabularFactory(game), behavior_table(game), steps=10**6)
    batch = exact_batch(game)
    torch.set_num_threads(1)
    for _ in range(steps):
        algorithm.update(batch)
    return algorithm


def toy(seed: int) -> OneStepGame:
    game = rational(one_step_game(seed, actions=3), 5)
    assert isinstance(game, OneStepGame)
    return game


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_one_step_game_converges_to_the_stationary_point_of_the_objective(alpha: float) -> None:
    """0 = 2 b_i(a) E[Q_tot - r | a_i = a] + alpha (softmax_i(a) - b_i(a)) for every agent and action."""
    game = toy(0)
    algorithm = train(game, alpha, 600)
    q, b = algorithm.q.table[0, :, 0].detach().double().numpy(), game.behavior
    gap = q - game.rewards  # the rest of the team is independent of a_i under behaviour
    mean = (b * gap).sum(-1, keepdims=True)
    error = gap + mean.sum() - mean
    softmax = np.exp(q) / np.exp(q).sum(-1, keepdims=True)
    residual = 2 * b * error + alpha * (softmax - b)
    np.testing.assert_allclose(residual, 0.0, atol=2e-3)
    if alpha == 0.0:
        np.testing.assert_allclose(error, 0.0, atol=0.02)
    else:
        assert np.abs(error).max() > 0.3  # the penalty matters


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_greedy_team_beats_the_behavior_and_falls_back_to_its_mode_under_a_great_penalty(
    seed: int,
) -> None:
    game = toy(seed)
    tables = policy_table(train(game, 1.0, 200).policy, game)
    reward = sum(float(table[0] @ row) for table, row in zip(tables, game.rewards, strict=True))
    assert reward > float((game.behavior * game.rewards).sum())
    cautious = policy_table(train(game, 1e4, 300, lr=0.1).policy, game)
    for table, behavior in zip(cautious, game.behavior, strict=True):
        assert behavior[table[0].argmax()] == behavior.max()


def test_a_mixer_without_a_weight_per_agent_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="got 'qmix': the soft maximum over joint actions is a sum over agents only"
    ):
        cql.Config(mixer="qmix")
    with pytest.raises(ConfigError, match="improvement: expected one of soft_q, q_weighted_cloning"):
        cql.Config(improvement="sac")
