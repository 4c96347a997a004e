"""Prices solved on recorded actions, and the share of the budget that the critics follow, against closed forms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.envs.tabular import ChainGame, Game, OneStepGame, chain_game, one_step_game
from omcda_deploy.errors import ConfigError
from omcda_deploy.training.algorithms.omcda import Algorithm, Config
from omcda_deploy.training.critics import DecoupledCritic
from omcda_deploy.training.prices import WINDOW, BudgetScales, PriceSolver, SolvedPrice, divergence_of
from tests.support import oracles
from tests.support.synthetic import differing
from tests.support.tabular import TabularFactory, behavior_table, exact_batch, policy_table, rational

CONFIG = Config(
    d_eval=1e3,
    allocation="influence",
    clip_targets=False,
    lr=0.05,
    lr_divergence=0.05,
    alpha0=1.0,
    tau=0.05,
    tau_policy=0.05,
    gamma=0.9,
    grad_clip=1e9,
    settled=0.0,
    warmup=0.0,
)


def one_step() -> OneStepGame:
    game = rational(one_step_game(0), 10)
    assert isinstance(game, OneStepGame)
    return game


def trained(game: Game, config: Config, *stages: int) -> Algorithm:
    """Train on the game's expectation, with a tenth of the learning rates from each stage to the next."""
    torch.set_num_threads(1)
    algorithm = Algorithm([config], TabularFactory(game), behavior_table(game), steps=10**9)
    batch = exact_batch(game)
    for stage, steps in enumerate(stages):
        if stage:
            for group in algorithm._optimizer._adam.param_groups:
                group["lr"] *= 0.1
        for _ in range(steps):
            algorithm.update(batch)
    return algorithm


def exponents(game: OneStepGame) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of behaviour's actions whose advantages are the rewards."""
    action = exact_batch(game).action  # [1, B, N]
    rewards = torch.from_numpy(game.rewards).float()
    advantage = torch.stack([rewards[i][action[..., i]] for i in range(len(rewards))], -1)
    return advantage, torch.zeros_like(advantage), torch.ones_like(advantage)


def test_the_divergence_of_an_exponent_is_that_of_the_closed_form() -> None:
    game, alpha = one_step(), np.array([2.0, 1.0, 0.5])
    expected = oracles.one_step_optima(game.rewards, game.behavior, alpha).kl
    found = divergence_of(exponents(game), torch.from_numpy(alpha[None]).float(), z_max=50.0)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("single", [False, True])
def test_a_solved_price_spends_the_budget(single: bool) -> None:
    game = one_step()
    price = SolvedPrice(3, torch.tensor([[1.0]]), single_price=[single], z_max=50.0)
    budgets = torch.tensor([[0.05, 0.1, 0.15]])
    price.solve(exponents(game), budgets, torch.tensor([True]))
    expected = (
        np.full(3, oracles.common_alpha(game.rewards, game.behavior, 0.3))
        if single
        else oracles.alphas_for_budgets(game.rewards, game.behavior, budgets[0].double().numpy())
    )
    np.testing.assert_allclose(price.alpha[0].numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("single", [False, True])
def test_policies_that_cannot_follow_their_prices_spend_their_budgets(single: bool) -> None:
    """A network that spends a part of what is solved for, here a tenth or a half of it, or more than it."""
    game = one_step()
    price = SolvedPrice(3, torch.tensor([[1.0]]), single_price=[single], z_max=50.0)
    scales = BudgetScales(3, single_price=[single], tau_policy=0.05, device="cpu")
    budgets, on = torch.tensor([[0.02, 0.04, 0.03]]), torch.tensor([True])
    part = torch.tensor([[0.1, 0.5, 1.5]])
    spent = torch.zeros_like(budgets)
    for number in range(150):
        price.solve(exponents(game), scales.values * budgets, on)
        spent = part * divergence_of(exponents(game), price.alpha, 50.0)
        scales.correct(budgets, spent, on)
        if number == 0:  # the average has not followed the first price
            assert scales.state_dict(0)["log_scale"].tolist() == [0.0, 0.0, 0.0]
    ours, expected = (spent.sum(), budgets.sum()) if single else (spent, budgets)
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=0)
    before = scales.state_dict(0)["log_scale"].clone()
    scales.correct(budgets, 0.5 * spent, ~on)
    assert torch.equal(scales.state_dict(0)["log_scale"], before)


@pytest.mark.parametrize("single", [False, True])
def test_evaluated_policies_stay_within_their_budget_however_much_the_trained_are_allowed(
    single: bool,
) -> None:
    """A network that spends a tenth of what is solved for: its price falls, that of evaluated policies does not."""
    game, d_eval = one_step(), 0.12
    solver = PriceSolver(
        3,
        torch.tensor([[1.0]]),
        torch.tensor([[0.09]]),
        torch.tensor([[d_eval]]),
        single_price=[single],
        z_max=50.0,
        tau_policy=0.05,
    )
    budgets, on = torch.tensor([[0.02, 0.04, 0.03]]), torch.tensor([True])
    spent, sums, capped = torch.zeros_like(budgets), [], []
    for _ in range(WINDOW):
        solver.exponents.add(*exponents(game))
    for _ in range(40):
        solver.solve(budgets, spent, on)
        spent = 0.1 * divergence_of(exponents(game), solver.price.alpha, 50.0)
        sums.append(float(divergence_of(exponents(game), solver.eval_alpha, 50.0).sum()))
        capped.append(bool(solver.capped))
        assert float(solver.eval_budgets(budgets).sum()) >= sums[-1] - 1e-3
    assert capped == sorted(capped)
    assert set(capped) == {False, True}
    np.testing.assert_allclose(sums[0], 0.09, rtol=1e-3)
    np.testing.assert_allclose(sums[-1], d_eval, rtol=1e-3)
    assert max(sums) <= d_eval * 1.001
    assert float(10 * spent.sum()) > 2 * d_eval
    state = solver.state_dict(0)
    assert state["capped"] is True


def test_agents_without_a_choice_count_nothing() -> None:
    advantage, correction, weight = exponents(one_step())
    idle = (torch.cat([v, torch.full_like(v, 3.0)], 1) for v in (advantage, correction))
    with_idle = (*idle, torch.cat([weight, torch.zeros_like(weight)], 1))
    alpha = torch.tensor([[2.0, 1.0, 0.5]])
    torch.testing.assert_close(
        divergence_of((with_idle[0], with_idle[1], with_idle[2]), alpha, 50.0),
        divergence_of((advantage, correction, weight), alpha, 50.0),
    )


def test_the_trained_policies_meet_their_budgets() -> None:
    game = one_step()
    config = dataclasses.replace(CONFIG, allocation="uniform", d_tot=0.6)
    algorithm = trained(game, config, 400, 300)
    policies = np.stack([table[0] for table in policy_table(algorithm.policy, game)])
    attainable = oracles.largest_kl(game.rewards, game.behavior) > 0.2
    expected = oracles.alphas_for_budgets(game.rewards, game.behavior, 0.2)
    assert attainable.sum() >= 2
    np.testing.assert_allclose(oracles.kl(policies, game.behavior)[attainable], 0.2, rtol=0.05)
    np.testing.assert_allclose(algorithm.alpha[0].numpy()[attainable], expected[attainable], rtol=0.1)


def test_a_budget_beyond_the_data_ends_at_the_lower_bound_and_says_so() -> None:
    game = one_step()
    algorithm = trained(game, dataclasses.replace(CONFIG, allocation="uniform", d_tot=100.0), 150)
    metrics = algorithm.update(exact_batch(game))
    assert metrics["alpha_at_bound"].tolist() == [[1.0, 1.0, 1.0]]


def chains() -> ChainGame:
    game = rational(chain_game(2, states=3, actions=3, branching=1, stop=0.0), 6)
    assert isinstance(game, ChainGame)
    return game


def behavior_values(game: ChainGame) -> list[NDArray[np.float64]]:
    """V_b [X] of each agent's chain by linear equations."""
    values = []
    for chain in game.chains:
        rewards = (chain.behavior * chain.rewards).sum(-1)
        moves = np.einsum("xk,xky->xy", chain.behavior, chain.transitions)
        values.append(np.linalg.solve(np.eye(len(rewards)) - 0.9 * moves, rewards))
    return values


def test_without_an_evaluation_budget_the_critics_are_those_of_behavior() -> None:
    """The actor leaves behaviour by d_tot all the same."""
    game = chains()
    config = dataclasses.replace(CONFIG, d_eval=0.0, d_tot=0.4, allocation="uniform", lr=0.1, tau=0.2)
    algorithm = trained(game, config, 500, 300)
    critic = algorithm.critic
    assert isinstance(critic, DecoupledCritic)
    v_r, v_c = (next(v.parameters())[0].detach().double().numpy() for v in (critic.v_r, critic.v_c))
    exact = behavior_values(game)
    joint = oracles.joint_reward  # constants move between agents
    np.testing.assert_allclose(joint(list(v_r)), joint(exact), rtol=0.01)
    np.testing.assert_allclose(v_c, 0.0, atol=0.01)
    kl = algorithm.update(exact_batch(game))["kl"][0].numpy()
    assert (kl > 0.1).all()


def test_an_evaluation_budget_above_the_total_changes_nothing() -> None:
    game = chains()
    ours = trained(game, dataclasses.replace(CONFIG, d_tot=0.3, d_eval=0.3), 120)
    other = trained(game, dataclasses.replace(CONFIG, d_tot=0.3), 120)
    assert differing(ours.state_dict(0), other.state_dict(0)) == set()
    less = trained(game, dataclasses.replace(CONFIG, d_tot=0.3, d_eval=0.1), 120)
    assert differing(less.state_dict(0), other.state_dict(0)) > {"dual/log_alpha"}


def test_an_evaluation_budget_needs_solved_prices() -> None:
    with pytest.raises(ConfigError, match="set price=solved"):
        Config(d_tot=1.0, d_eval=0.3, price="gradient")
