"""OMCDA against closed forms: the eight oracles of its derivation.

The learner is the shipped one; only its networks are tables and its mixers fixed (tests/support/tabular.py), and
its batch holds the game's expectation exactly, so agreement is limited by optimisation alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.envs.tabular import ChainGame, Game, OneStepGame, chain_game, one_step_game
from omcda_deploy.training.algorithms.omcda import Algorithm, Config
from omcda_deploy.training.allocation import STRATEGIES, Allocation
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.critics import DecoupledCritic
from omcda_deploy.training.distributions import policy_of
from omcda_deploy.training.prices import Dual
from tests.support import oracles
from tests.support.synthetic import PAPER
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

SETTINGS: dict[str, Any] = {
    **PAPER,
    "divergence_mixer": "identity",
    "tau": 0.05,
}
CONFIG = Config(
    **SETTINGS,
    lr=0.05,
    lr_divergence=0.05,
    lr_alpha=0.0,  # alpha stays as given, unless a test says otherwise
    alpha0=1.0,
    tau_policy=0.05,
    gamma=0.9,
    grad_clip=1e9,
    settled=0.0,
    warmup=0.0,
)
ALPHA = np.array([2.0, 1.0, 0.15])


def learner(game: Game, config: Config, alpha: NDArray[np.float64] | None = None) -> Algorithm:
    algorithm = Algorithm([config], TabularFactory(game), behavior_table(game), steps=10**9)
    if alpha is not None:
        with torch.no_grad():
            algorithm.dual.log_alpha.copy_(torch.from_numpy(np.log(alpha)))
    return algorithm


def fit(algorithm: Algorithm, batch: Batch, *stages: int) -> Algorithm:
    """Train for the given numbers of steps, with a tenth of the learning rates from each stage to the next."""
    torch.set_num_threads(1)
    for stage, steps in enumerate(stages):
        if stage:
            if isinstance(algorithm.dual, Dual):
                algorithm.dual._lr *= 0.1
            for group in algorithm._optimizer._adam.param_groups:
                group["lr"] *= 0.1
        for _ in range(steps):
            algorithm.update(batch)
    return algorithm


def first_rows(tables: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The policies [N, K] of a one-step game."""
    return np.stack([table[0] for table in tables])


def value_tables(algorithm: Algorithm) -> list[torch.Tensor]:
    """The learned Q^r [N, X, K], V^r [N, X], Q^c and V^c."""
    critic = algorithm.critic
    assert isinstance(critic, DecoupledCritic)
    networks = (critic.q_r, critic.v_r, critic.q_c, critic.v_c)
    return [next(network.parameters())[0].detach().double() for network in networks]


@functools.cache
def game() -> OneStepGame:
    played = rational(one_step_game(0), 10)
    assert isinstance(played, OneStepGame)
    return played


@functools.cache
def trained() -> Algorithm:
    return fit(learner(game(), CONFIG, ALPHA), exact_batch(game()), 250)


def test_1_policies_match_the_closed_form_given_alpha() -> None:
    optima = oracles.one_step_optima(game().rewards, game().behavior, ALPHA)
    distance = oracles.kl(optima.policy, first_rows(policy_table(trained().policy, game())))
    assert (distance < 0.002 * optima.kl).all()


def test_2_exponents_are_normalised() -> None:
    torch.testing.assert_close(
        mean_exp_z(trained(), game(), ALPHA), torch.ones(3, dtype=torch.float64), atol=0.02, rtol=0
    )


def test_2_exponents_are_normalised_over_states_behind_one_observation() -> None:
    hidden = rational(one_step_game(1, state_scales=(0.5, 1.5)), 8)
    alpha = np.array([3.0, 1.0, 0.2])
    algorithm = fit(learner(hidden, CONFIG, alpha), exact_batch(hidden), 250)
    mean = mean_exp_z(algorithm, hidden, alpha)
    torch.testing.assert_close(mean, torch.ones(3, dtype=torch.float64), atol=0.02, rtol=0)


def mean_exp_z(algorithm: Algorithm, game: Game, alpha: NDArray[np.float64]) -> torch.Tensor:
    """Return ``E[exp z_i]`` [N] under behaviour and hidden states, from the learned tables and z's definition."""
    q_r, v_r, q_c, v_c = (table[:, 0] for table in value_tables(algorithm))
    behavior = torch.from_numpy(np.stack([chain.behavior[0] for chain in game.chains]))
    means = [
        (
            behavior
            * torch.exp(scale / torch.from_numpy(alpha)[:, None] * (q_r - v_r[:, None]) + q_c - v_c[:, None])
        ).sum(-1)
        for scale in game.state_scales
    ]
    return torch.stack(means).mean(0)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_3_influence_is_the_shadow_price(metric: str) -> None:
    algorithm = fit(
        learner(game(), dataclasses.replace(CONFIG, metric=metric, influence_decay=0.9), ALPHA),
        exact_batch(game()),
        200,
    )
    np.testing.assert_allclose(algorithm.allocation.mean_influence[0].numpy(), ALPHA, rtol=0.05)


def test_4_the_dual_meets_the_budget_or_rests_at_its_bound() -> None:
    config = dataclasses.replace(
        CONFIG, lr=0.02, lr_divergence=0.02, lr_alpha=0.02, allocation="uniform", d_tot=0.6
    )
    algorithm = fit(learner(game(), config), exact_batch(game()), 600, 500)
    divergence = oracles.kl(first_rows(policy_table(algorithm.policy, game())), game().behavior)
    attainable = oracles.largest_kl(game().rewards, game().behavior) > 0.2
    expected = oracles.alphas_for_budgets(game().rewards, game().behavior, 0.2)
    inside = attainable & (expected > algorithm.dual.low.item()) & (expected < algorithm.dual.high.item())
    assert inside.sum() >= 2
    np.testing.assert_allclose(divergence[inside], 0.2, rtol=0.05)
    np.testing.assert_allclose(algorithm.alpha[0].numpy()[inside], expected[inside], rtol=0.1)


def test_4_an_unattainable_budget_drives_alpha_to_its_bound_and_says_so() -> None:
    config = dataclasses.replace(CONFIG, lr_alpha=0.5, allocation="uniform", d_tot=15.0)
    algorithm = learner(game(), config)
    batch = exact_batch(game())
    metrics = [algorithm.update(batch) for _ in range(100)][-1]
    assert (oracles.largest_kl(game().rewards, game().behavior) < 5.0).all()
    np.testing.assert_allclose(algorithm.alpha[0].numpy(), algorithm.dual.low.item(), rtol=1e-4)
    assert metrics["alpha_at_bound"].tolist() == [[1.0, 1.0, 1.0]]


def settled_reward(strategy: str, game: OneStepGame, total: float, temperature: float, seed: int) -> float:
    """Exact team reward once the shipped allocation and the exact dual have come to rest.

    Oracle 3 shows that the influence a learner measures at its optimum is alpha_i, so alpha_i is fed back.
    """
    allocation = Allocation(
        [strategy],
        3,
        torch.tensor([[total]]),
        [seed],
        temperature=torch.tensor([[temperature]]),
        decay=0.3,
    )
    if STRATEGIES[strategy].single_price:
        alpha = oracles.common_alpha(game.rewards, game.behavior, total)
        return oracles.one_step_optima(game.rewards, game.behavior, alpha).team_reward
    for _ in range(15 if STRATEGIES[strategy].follows_influence else 1):
        budgets = allocation.budgets[0].double().numpy()
        prices = oracles.alphas_for_budgets(game.rewards, game.behavior, budgets)
        divergence = oracles.one_step_optima(game.rewards, game.behavior, prices).kl
        allocation.observe(torch.from_numpy(prices[None]).float(), torch.from_numpy(divergence[None]).float())
    shares = allocation.shares[0].double().numpy()
    return oracles.reward_under_shares(game.rewards, game.behavior, shares, total)


def test_5_influence_lies_between_uniform_and_optimal_and_beats_random() -> None:
    gains: dict[str, list[float]] = {name: [] for name in ("uniform", "random", "influence", "optimal")}
    for seed in range(32):
        one = one_step_game(seed)
        base = float((one.behavior * one.rewards).sum())
        for name, values in gains.items():
            values.append(settled_reward(name, one, 0.6, 1.0, seed) - base)
    mean = {name: np.mean(values) for name, values in gains.items()}
    assert all(a <= b + 1e-6 for a, b in zip(gains["influence"], gains["optimal"], strict=True))
    assert all(a >= b - 1e-6 for a, b in zip(gains["influence"], gains["uniform"], strict=True))
    assert mean["random"] < mean["influence"]


def test_6_the_product_of_local_optima_is_the_joint_optimum() -> None:
    joint = oracles.joint_optimum(oracles.joint_reward(game().rewards), game().behavior, ALPHA)
    product = oracles.joint_product(policy_table_rows(trained()))
    np.testing.assert_allclose(product, joint, atol=2e-3)
    assert np.abs(product - oracles.joint_product(game().behavior)).max() > 0.05  # not merely pi_b


def policy_table_rows(algorithm: Algorithm) -> NDArray[np.float64]:
    return first_rows(policy_table(algorithm.policy, game()))


@functools.cache
def chains() -> ChainGame:
    played = rational(chain_game(2, states=3, actions=3, branching=1, stop=0.0), 6)
    assert isinstance(played, ChainGame)
    return played


CHAIN_ALPHA = np.array([4.0, 1.5])
CHAIN_CONFIG = dataclasses.replace(CONFIG, lr=0.1, lr_divergence=0.1, tau=0.2, tau_policy=0.2)


@functools.cache
def trained_on_chains() -> Algorithm:
    return fit(learner(chains(), CHAIN_CONFIG, CHAIN_ALPHA), exact_batch(chains()), 800, 400)


def solutions(game: ChainGame, alpha: NDArray[np.float64]) -> list[oracles.ChainSolution]:
    discount = game.gamma * (1.0 - game.stop)
    return [
        oracles.solve_chain(chain.rewards, chain.transitions, chain.behavior, float(a), discount)
        for chain, a in zip(game.chains, alpha, strict=True)
    ]


def test_7_chains_match_soft_value_iteration() -> None:
    check_chain(trained_on_chains(), chains(), CHAIN_ALPHA)


def test_7_a_single_agent_reproduces_bopahs_split() -> None:
    single = ChainGame(chains().chains[:1], chains().gamma, chains().stop)
    alpha = CHAIN_ALPHA[:1]
    config = dataclasses.replace(CHAIN_CONFIG, lr=0.2, lr_divergence=0.2)
    algorithm = fit(learner(single, config, alpha), exact_batch(single), 900, 400, 100)
    check_chain(algorithm, single, alpha)
    q_r, v_r, q_c, v_c = (table[0].numpy() for table in value_tables(algorithm))
    [exact] = solutions(single, alpha)
    # With one agent nothing can move between agents, so each value is identified by itself.
    np.testing.assert_allclose(q_r, exact.q_r, rtol=0.005)
    np.testing.assert_allclose(v_r, exact.v_r, rtol=0.005)
    np.testing.assert_allclose(q_c, exact.q_c, atol=0.02)
    np.testing.assert_allclose(v_c, exact.v_c, atol=0.02)


def check_chain(algorithm: Algorithm, game: ChainGame, alpha: NDArray[np.float64]) -> None:
    exact = solutions(game, alpha)
    q_r, v_r, q_c, v_c = (table.numpy() for table in value_tables(algorithm))
    policies = policy_table(algorithm.policy, game)
    for i, solution in enumerate(exact):
        np.testing.assert_allclose(
            (q_r[i] - v_r[i][:, None]) / alpha[i], solution.advantage_r / alpha[i], atol=0.05
        )
        np.testing.assert_allclose(q_c[i] - v_c[i][:, None], solution.advantage_c, atol=0.03)
        assert (oracles.kl(solution.policy, policies[i]) < 0.002 * np.maximum(solution.kl, 0.05)).all()
    # Constants move between agents, so totals over joint states are compared: [X_1, …, X_N].
    joint = oracles.joint_reward
    np.testing.assert_allclose(joint(list(v_r)), joint([s.v_r for s in exact]), rtol=0.005)
    np.testing.assert_allclose(
        joint([a * v for a, v in zip(alpha, v_c, strict=True)]),
        joint([a * s.v_c for a, s in zip(alpha, exact, strict=True)]),
        atol=0.08,
    )
    pairs = [table.reshape(-1) for table in q_r]
    np.testing.assert_allclose(joint(pairs), joint([s.q_r.reshape(-1) for s in exact]), rtol=0.005)


def recorded_batch(game: ChainGame, exact: Sequence[oracles.ChainSolution]) -> Batch:
    """An exact batch with the expected return-to-go of every row under behaviour."""
    batch = exact_batch(game)
    states, actions = batch.observation.argmax(-1).numpy(), batch.action.numpy()
    returns: Any = sum(s.q_r[states[..., i], actions[..., i]] for i, s in enumerate(exact))
    batch.return_to_go = torch.from_numpy(np.asarray(returns, np.float32))
    batch.return_range = torch.stack(batch.return_to_go.aminmax()).expand(*batch.reward.shape[:-1], 2)
    return batch


def test_7_values_that_begin_at_the_data_are_those_of_behaviour_first() -> None:
    """While the prices wait, Q and V are behaviour's; from there on the solution is the same as from zero."""
    game = chains()
    discount = game.gamma * (1.0 - game.stop)
    exact = [
        oracles.evaluate_chain(c.behavior, c.rewards, c.transitions, c.behavior, discount)
        for c in game.chains
    ]
    batch = recorded_batch(game, exact)
    waiting = dataclasses.replace(CHAIN_CONFIG, value_start="data", warmup=1.0)
    algorithm = fit(learner(game, waiting, np.full(2, 1e4)), batch, 2000, 300)  # at no divergence
    q_r, v_r, _, _ = (table.numpy() for table in value_tables(algorithm))
    joint = oracles.joint_reward
    np.testing.assert_allclose(joint(list(v_r)), joint([s.v_r for s in exact]), rtol=0.005)
    pairs = [table.reshape(-1) for table in q_r]
    np.testing.assert_allclose(joint(pairs), joint([s.q_r.reshape(-1) for s in exact]), rtol=0.005)
    begun = dataclasses.replace(waiting, warmup=3e-7)  # 300 steps
    check_chain(fit(learner(game, begun, CHAIN_ALPHA), batch, 1100, 400), game, CHAIN_ALPHA)


def test_7_influence_with_divergence_is_the_price_over_many_steps() -> None:
    algorithm = trained_on_chains()
    batch = exact_batch(chains())
    metrics: dict[str, torch.Tensor] = {}
    while "influence_with_divergence" not in metrics:
        metrics = algorithm.update(batch)
    np.testing.assert_allclose(metrics["influence_with_divergence"][0].numpy(), CHAIN_ALPHA, rtol=0.05)
    # The paper's m_i leaves the divergence out and differs: this is what is logged, never required.
    assert np.abs(algorithm.allocation.mean_influence[0].numpy() / CHAIN_ALPHA - 1.0).max() > 0.05


def test_8_scaling_rewards_and_prices_leaves_policies_unchanged() -> None:
    scaled = OneStepGame(10.0 * game().rewards, game().behavior)
    config = dataclasses.replace(CONFIG, alpha0=10.0, lr=0.3)
    algorithm = fit(learner(scaled, config, 10.0 * ALPHA), exact_batch(scaled), 200, 50, 50)
    np.testing.assert_allclose(
        first_rows(policy_table(algorithm.policy, scaled)), policy_table_rows(trained()), atol=2e-3
    )


def test_8_permuting_agents_permutes_everything() -> None:
    order = [2, 0, 1]
    permuted = OneStepGame(game().rewards[order], game().behavior[order])
    algorithm = fit(learner(permuted, CONFIG, ALPHA[order]), exact_batch(permuted), 250)
    np.testing.assert_allclose(
        first_rows(policy_table(algorithm.policy, permuted)), policy_table_rows(trained())[order], atol=1e-4
    )
    np.testing.assert_allclose(
        algorithm.allocation.mean_influence[0].numpy(),
        trained().allocation.mean_influence[0].numpy()[order],
        rtol=0.01,
    )


def test_the_trained_policy_is_the_average_and_the_actor_agrees() -> None:
    """The Polyak average is what is exported; at rest it equals the network it averages."""
    batch = exact_batch(game())
    algorithm = trained()
    average = policy_of(algorithm.policy, batch.observation, batch.mask)
    raw = policy_of(algorithm.actor, batch.observation, batch.mask)
    with torch.no_grad():
        difference = average.log_prob(batch.action) - raw.log_prob(batch.action)
    assert float(difference.abs().max()) < 0.02
