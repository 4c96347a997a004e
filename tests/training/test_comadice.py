"""ComaDICE: its f-divergences and gradients, one whole step against numpy, and its optimum with tables.

The optimum is solved here as a convex programme over occupancies, by Newton's method on its dual in numpy, which
knows nothing of critics, targets or agents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.envs.tabular import Chain, ChainGame, OneStepGame, chain_game, one_step_game
from omcda_deploy.errors import ConfigError
from omcda_deploy.spec import ActionKind
from omcda_deploy.training.algorithms.comadice import (
    F_DIVERGENCES,
    Algorithm,
    Config,
    dual_loss,
    f_value,
    occupancy_ratio,
)
from omcda_deploy.training.batches import Batch, TransitionSampler
from omcda_deploy.training.distributions import policy_of
from tests.support.synthetic import (
    continuous_spec,
    differing,
    make_learner,
    random_batch,
    spec_of,
    write_dataset,
)
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

Array = NDArray[np.float64]

# w(x), w'(x) and f(w) of docs/baselines.md#comadice, a second time.
RATIO: dict[str, Callable[[Array], Array]] = {
    "soft_chi2": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), x + 1),
    "chi2": lambda x: np.maximum(x + 1, 0),
    "kl": lambda x: np.exp(x - 1),
}
SLOPE: dict[str, Callable[[Array], Array]] = {
    "soft_chi2": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), 1.0),
    "chi2": lambda x: (x > -1).astype(float),
    "kl": lambda x: np.exp(x - 1),
}
F_OF_RATIO: dict[str, Callable[[Array], Array]] = {
    "soft_chi2": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)) * (x - 1) + 1, x**2 / 2),
    "chi2": lambda x: np.maximum(x, -1) ** 2 / 2,
    "kl": lambda x: (x - 1) * np.exp(x - 1),
}


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_the_ratio_maximises_its_dual(kind: str) -> None:
    x = np.linspace(-3.0, 3.0, 25)
    w = np.linspace(0.0, 12.0, 60_001)
    f = f_value(torch.from_numpy(w), kind).numpy()
    best = (w * x[:, None] - f).argmax(-1)
    np.testing.assert_allclose(occupancy_ratio(torch.from_numpy(x), kind).numpy(), w[best], atol=2e-4)
    np.testing.assert_allclose(f[best], F_OF_RATIO[kind](x), atol=2e-3)


@pytest.mark.parametrize("paper_code", [False, True])
@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_gradients_of_the_dual(kind: str, paper_code: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    e = (6.0 * torch.randn(1, 16, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    lagrange, alpha = torch.full((1,), 0.7, dtype=torch.float64, requires_grad=True), 2.5
    prices = torch.full((1, 1, 1), alpha, dtype=torch.float64)
    loss, ratio = dual_loss(e, lagrange, prices, kind, paper_code)
    by_e, by_lagrange = torch.autograd.grad(loss, (e, lagrange))
    numbers = e.detach().numpy()
    x = (numbers - 0.7) / alpha
    w, slope = RATIO[kind](x), SLOPE[kind](x)
    np.testing.assert_allclose(ratio.numpy(), w)
    assert not ratio.requires_grad
    np.testing.assert_allclose(loss.item(), np.mean(w * alpha * x - alpha * F_OF_RATIO[kind](x)) + 0.7)
    if paper_code:
        np.testing.assert_allclose(by_e.numpy() * e.numel(), x * slope, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(by_lagrange.item(), 1.0 - np.mean(w + x * slope))
    else:
        np.testing.assert_allclose(by_e.numpy() * e.numel(), w, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(by_lagrange.item(), 1.0 - np.mean(w))


@pytest.mark.parametrize(
    "settings",
    [
        {"initial_states": "first"},
        {"initial_states": "data"},
        {"initial_states": "first", "paper_code_vloss": True},
        {"paper_code_weights": True, "f_divergence": "kl"},
    ],
)
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_one_step_of_losses_against_numpy(kind: ActionKind, settings: dict[str, object]) -> None:
    spec = spec_of(kind)
    # A small alpha spreads the ratios, so both sides of the cap are in the batch.
    algorithm = make_learner("comadice", spec, {"alpha": 0.1, "weight_max": 1.5, **settings})
    assert isinstance(algorithm, Algorithm)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in algorithm.target.parameters():
            parameter.mul_(1.0 + 0.5 * torch.randn(parameter.shape, generator=generator))
        algorithm.lambdas["v"].fill_(0.03)
        algorithm.lambdas["e"].fill_(-0.02)
    first = random_batch(spec, seed=8)
    batch = random_batch(spec)
    batch.initial_observation, batch.initial_state = first.observation, first.state
    losses, free = expected_losses(algorithm, batch)
    assert 0.02 < np.mean(free > 1.5) < 0.98
    metrics = algorithm.update(batch)
    for name, expected in losses.items():
        np.testing.assert_allclose(
            metrics[f"loss/{name}"].item(), expected, rtol=1e-4, atol=1e-6, err_msg=name
        )
    np.testing.assert_allclose(metrics["ratio/mean"].item(), free.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio/capped"].item(), np.mean(free > 1.5), rtol=1e-6)


def expected_losses(algorithm: Algorithm, batch: Batch) -> tuple[dict[str, float], Array]:
    def numbers(*tensors: torch.Tensor) -> list[Array]:
        return [tensor[0].detach().double().numpy() for tensor in tensors]

    c = algorithm.config
    assert batch.initial_observation is not None
    assert batch.initial_state is not None
    o, a = batch.observation, batch.action
    reward, not_done = numbers(batch.reward, batch.not_done)
    w, b = numbers(*algorithm.mixer(batch.state))
    w2, _ = numbers(*algorithm.mixer(batch.next_state))
    anywhere = c.initial_states == "data"
    w0, _ = numbers(*algorithm.mixer(batch.state if anywhere else batch.initial_state))
    w_bar, _ = numbers(*algorithm.mixer_target(batch.state))
    w2_bar, b2_bar = numbers(*algorithm.mixer_target(batch.next_state))
    q, q_bar = numbers(algorithm.q(o, a), algorithm.q_target(o, a))
    v, v0, v2_bar = numbers(
        algorithm.v(o),
        algorithm.v(o if anywhere else batch.initial_observation),
        algorithm.v_target(batch.next_observation),
    )
    [log_prob] = numbers(policy_of(algorithm.policy, o, batch.mask).log_prob(a))
    y = reward + c.gamma * not_done * ((w2_bar * v2_bar).sum(1) + b2_bar)

    def dual(e: Array, lagrange: float) -> tuple[float, Array]:
        x = (e - lagrange) / c.alpha
        ratio = RATIO[c.f_divergence](x)
        terms = ratio * (e - lagrange) - c.alpha * F_OF_RATIO[c.f_divergence](x)
        return float(terms.mean()) + lagrange, ratio

    value, ratio = dual(w * (q - v), 0.03)
    if c.paper_code_vloss:
        value += (1 - c.gamma) * v0.mean()
    else:
        for i in range(v.shape[1]):
            leaves = np.mean(ratio[:, i] * (w[:, i] - c.gamma * not_done * w2[:, i])) / ratio[:, i].mean()
            value += leaves * np.mean(w0[:, i] * v0[:, i]) / np.mean(w0[:, i]) / v.shape[1]
    normaliser, free = dual(w_bar * (q_bar - v), -0.02)
    cloning = np.minimum(free, c.weight_max)
    if c.paper_code_weights:
        cloning = np.tile(cloning.sum(1)[:, None], (1, v.shape[1]))
    losses = {
        "policy": -np.mean(cloning * log_prob),
        "critic": np.mean(((w * q).sum(1) + b - y) ** 2),
        "value": value,
        "normaliser": normaliser,
    }
    return losses, free


def test_each_loss_moves_only_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses are descended at once, which is right only while they share no parameter."""
    algorithm = make_learner("comadice", continuous_spec())
    assert isinstance(algorithm, Algorithm)
    losses: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(algorithm._optimizer, "descend", losses.update)
    algorithm.update(random_batch(continuous_spec()))
    parameters = {
        name: list(getattr(algorithm, name).parameters()) for name in ("policy", "q", "v", "mixer", "target")
    } | {f"lambda_{name}": [value] for name, value in algorithm.lambdas.items()}
    expected = {
        "policy": {"policy"},
        "critic": {"q", "mixer"},
        "value": {"v", "lambda_v"},
        "normaliser": {"lambda_e"},
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        for group in parameters.values():
            for parameter in group:
                parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        moved = {key for key, group in parameters.items() if any(p.grad is not None for p in group)}
        assert moved == expected[name], name


def train(
    game: OneStepGame | ChainGame, batch: Batch, config: Config, *stages: tuple[float, int]
) -> Algorithm:
    torch.set_num_threads(1)
    algorithm = Algorithm([config], TabularFactory(game), behavior_table(game), steps=1)
    for rate, steps in stages:
        for group in algorithm._optimizer._adam.param_groups:
            group["lr"] = rate
        for _ in range(steps):
            algorithm.update(batch)
    return algorithm


@functools.cache
def one_step() -> OneStepGame:
    game = rational(one_step_game(0, agents=2), 10)
    assert isinstance(game, OneStepGame)
    return game


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_one_step_policies_match_the_closed_form(kind: str) -> None:
    """w = ratio((r - nu)/alpha) with nu such that E_b[w] = 1; every transition is terminal here."""
    config = Config(alpha=1.5, f_divergence=kind, tau=0.1, gamma=0.9, grad_clip=1e9)
    batch = exact_batch(one_step())
    algorithm = train(one_step(), batch, config, (0.05, 200), (0.005, 60))
    metrics = algorithm.update(batch)
    np.testing.assert_allclose(metrics["ratio/mean"].item(), 1.0, atol=1e-3)  # lambda_e ensures it
    [learned, expected, behavior] = (
        np.stack(rows)
        for rows in (
            [table[0] for table in policy_table(algorithm.policy, one_step())],
            [
                b * normalised_ratio(r / 1.5, b, kind)
                for r, b in zip(one_step().rewards, one_step().behavior, strict=True)
            ],
            list(one_step().behavior),
        )
    )
    np.testing.assert_allclose(learned, expected, atol=3e-3)
    assert np.abs(expected - behavior).max() > 0.1
    gains = ((learned - behavior) * one_step().rewards).sum(-1)
    assert (gains > 0.2).all()


def normalised_ratio(scores: Array, behavior: Array, kind: str) -> Array:
    low, high = -100.0, 100.0
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if (behavior * RATIO[kind](scores - level)).sum() > 1.0 else (low, level)
    return RATIO[kind](scores - low)


@pytest.mark.parametrize("initial_states", ["first", "data"])
def test_chains_match_the_optimal_regularised_occupancy(initial_states: str) -> None:
    """Many steps, started in one state only, which the batch's own rows know nothing of, or in any of them."""
    game = rational(chain_game(2, states=3, actions=3, branching=1, stop=0.0), 6)
    assert isinstance(game, ChainGame)
    batch = exact_batch(game)
    start = torch.zeros_like(batch.observation)
    start[..., 0] = 1.0
    batch.initial_observation, batch.initial_state = start, batch.state
    config = Config(alpha=2.0, tau=0.2, gamma=0.9, grad_clip=1e9, initial_states=initial_states)
    begin = np.eye(3)[0] if initial_states == "first" else np.full(3, 1 / 3)
    algorithm = train(game, batch, config, (0.1, 300), (0.02, 300), (0.004, 100))
    learned = policy_table(algorithm.policy, game)
    for policy, chain in zip(learned, game.chains, strict=True):
        ratio = optimal_ratio(chain, begin, discount=0.9, alpha=2.0)
        expected = chain.behavior * ratio
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(policy, expected, atol=0.01)
        assert np.abs(expected - chain.behavior).max() > 0.1
        if initial_states == "first":
            assert np.abs(ratio.sum(-1) / ratio.sum() - 1 / 3).max() > 0.05  # s_0 is felt


def optimal_ratio(chain: Chain, start: Array, discount: float, alpha: float) -> Array:
    """``argmax_w E_d[w r - alpha f(w)]`` [X, K] over occupancies ``w d`` of the flow from ``start``, soft chi2.

    d is the behaviour with uniform states. Newton's method on the convex dual in one multiplier per state.
    """
    states, actions = chain.rewards.shape
    data = (chain.behavior / states).reshape(-1)
    rewards = chain.rewards.reshape(-1)
    flow = discount * chain.transitions.reshape(-1, states) - np.repeat(np.eye(states), actions, axis=0)
    value = np.zeros(states)

    def conjugate(x: Array) -> Array:
        return np.where(x < 0, np.exp(np.minimum(x, 0)) - 1, x**2 / 2 + x)

    def objective(v: Array) -> float:
        x = (rewards + flow @ v) / alpha
        return float(alpha * (data * conjugate(x)).sum() + (1 - discount) * start @ v)

    for _ in range(100):
        x = (rewards + flow @ value) / alpha
        gradient = flow.T @ (data * RATIO["soft_chi2"](x)) + (1 - discount) * start
        hessian = flow.T @ (flow * (data * SLOPE["soft_chi2"](x) / alpha)[:, None])
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while length > 1e-8 and objective(value - length * step) > objective(value):
            length /= 2
        value = value - length * step
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
    ratio = RATIO["soft_chi2"]((rewards + flow @ value) / alpha)
    np.testing.assert_allclose((data * ratio).sum(), 1.0, atol=1e-8)
    return ratio.reshape(states, actions)


def test_batches_carry_first_rows_of_episodes_drawn_evenly(tmp_path: Path) -> None:
    spec = continuous_spec()
    dataset = read(write_dataset(tmp_path / "data.hdf5", spec, [7, 3, 6, 4]))
    batch = TransitionSampler(dataset, 8, [0]).gather(torch.arange(20)[None])
    assert batch.initial_observation is not None
    assert batch.initial_state is not None
    firsts = torch.from_numpy(dataset.observations[dataset.episode_start])
    matches = (batch.initial_observation[0, :, None] == firsts[None]).all(-1).all(-1)  # [20, 4]
    assert matches.sum(0).tolist() == [5, 5, 5, 5]
    states = torch.from_numpy(dataset.states[dataset.episode_start])
    assert torch.equal(batch.initial_state[0], states[matches.int().argmax(-1)])


def test_a_run_s_lambdas_are_numbers_in_its_state() -> None:
    algorithm = make_learner("comadice", continuous_spec())
    algorithm.update(random_batch(continuous_spec()))
    state = algorithm.state_dict(0)
    assert {value.shape for value in state["lambdas"].values()} == {()}
    *_, v, e = state["learner"]["state"].values()
    assert {value.shape for moments in (v, e) for value in moments.values()} == {()}
    resumed = make_learner("comadice", continuous_spec(), seed=1)
    resumed.load_state_dicts([state])
    assert differing(state, resumed.state_dict(0)) == set()


def test_a_nonlinear_mixer_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"comadice\.mixer: expected linear or vdn, got 'qmix': .* weight per"
    ):
        Config(mixer="qmix")
