"""The toy games against independent arithmetic, and the oracles against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.envs import tabular, toy
from omcda_deploy.errors import ConfigError, ContractError, UnknownNameError
from omcda_deploy.policy import NoiseSource
from tests.support import oracles

ALPHA = np.array([2.0, 0.7, 0.3])


# --- the oracles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_product_of_local_optima_is_the_joint_optimum(seed: int) -> None:
    game = tabular.one_step_game(seed)
    reward = oracles.joint_reward(game.rewards)
    joint = oracles.joint_optimum(reward, game.behavior, ALPHA)
    optima = oracles.one_step_optima(game.rewards, game.behavior, ALPHA)
    product = oracles.joint_product(optima.policy)
    assert joint.shape == (5, 5, 5)
    np.testing.assert_allclose(joint, product, atol=1e-9)
    value = oracles.regularised_objective(product, reward, game.behavior, ALPHA)
    assert value == pytest.approx(float(ALPHA @ optima.log_z), abs=1e-9)  # V = sum_i alpha_i log Z_i
    rng = np.random.default_rng(seed)
    for _ in range(50):  # correlated policies, too
        other = 0.9 * product + 0.1 * rng.dirichlet(np.ones(product.size)).reshape(product.shape)
        assert oracles.regularised_objective(other, reward, game.behavior, ALPHA) < value


def test_one_common_alpha_is_the_softmax_of_the_joint_reward() -> None:
    game = tabular.one_step_game(5)
    reward, prior = oracles.joint_reward(game.rewards), oracles.joint_product(game.behavior)
    joint = prior * np.exp(reward / 0.8)
    optima = oracles.one_step_optima(game.rewards, game.behavior, 0.8)
    np.testing.assert_allclose(oracles.joint_product(optima.policy), joint / joint.sum(), atol=1e-12)


def test_value_is_reward_minus_priced_divergence() -> None:
    game = tabular.one_step_game(1)
    optima = oracles.one_step_optima(game.rewards, game.behavior, ALPHA)
    np.testing.assert_allclose(optima.reward - ALPHA * optima.kl, ALPHA * optima.log_z, rtol=1e-12)
    scaled = oracles.one_step_optima(10 * game.rewards, game.behavior, 10 * ALPHA)
    np.testing.assert_allclose(scaled.policy, optima.policy, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_alphas_spend_the_budgets_or_stay_at_their_minimum(seed: int) -> None:
    game = tabular.one_step_game(seed)
    limit = oracles.largest_kl(game.rewards, game.behavior)
    budgets = np.array([0.5 * limit[0], 0.2 * limit[1], 1.1 * limit[2]])
    alpha = oracles.alphas_for_budgets(game.rewards, game.behavior, budgets)
    spent = oracles.one_step_optima(game.rewards, game.behavior, alpha).kl
    np.testing.assert_allclose(spent[:2], budgets[:2], rtol=1e-9)
    assert alpha[2] == 1e-6
    assert spent[2] == pytest.approx(limit[2], rel=1e-6)
    total = 0.3 * limit.sum()
    common = oracles.common_alpha(game.rewards, game.behavior, total)
    assert oracles.one_step_optima(game.rewards, game.behavior, common).kl.sum() == pytest.approx(total)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_influence_at_the_optimum_is_the_shadow_price(metric: str) -> None:
    game = tabular.one_step_game(7)
    policy = oracles.one_step_optima(game.rewards, game.behavior, ALPHA).policy
    measured = oracles.influence(game.rewards, policy, game.behavior, metric)
    np.testing.assert_allclose(measured, ALPHA, rtol=1e-9)
    # The price is the reward that a little more divergence buys.
    budgets = oracles.kl(policy, game.behavior)
    for i in range(3):
        more = budgets.copy()
        more[i] += 1e-5
        alpha = oracles.alphas_for_budgets(game.rewards, game.behavior, more)
        gain = oracles.one_step_optima(game.rewards, game.behavior, alpha).team_reward
        base = float((policy * game.rewards).sum())
        assert (gain - base) / 1e-5 == pytest.approx(ALPHA[i], rel=1e-3)


def test_one_alpha_for_all_beats_every_other_division_of_the_budget() -> None:
    rng = np.random.default_rng(0)
    for seed in range(8):
        game = tabular.one_step_game(seed)
        alpha = oracles.common_alpha(game.rewards, game.behavior, 0.6)
        best = oracles.one_step_optima(game.rewards, game.behavior, alpha).team_reward
        for shares in [np.full(3, 1 / 3), *rng.dirichlet(np.ones(3), 5)]:
            reward = oracles.reward_under_shares(game.rewards, game.behavior, shares, 0.6)
            assert reward <= best + 1e-9


def _solve(game: tabular.ChainGame, alpha: NDArray[np.float64]) -> list[oracles.ChainSolution]:
    discount = game.gamma * (1 - game.stop)
    return [
        oracles.solve_chain(c.rewards, c.transitions, c.behavior, a, discount)
        for c, a in zip(game.chains, alpha, strict=True)
    ]


def test_chain_values_solve_the_split_bellman_equations() -> None:
    game = tabular.chain_game(4, agents=3)
    discount = game.gamma * (1 - game.stop)
    for chain, alpha, solution in zip(game.chains, ALPHA, _solve(game, ALPHA), strict=True):
        policy, q, v = (
            solution.policy,
            solution.q_r + alpha * solution.q_c,
            solution.v_r + alpha * solution.v_c,
        )
        np.testing.assert_allclose(solution.v_r, (policy * solution.q_r).sum(-1), atol=1e-10)
        np.testing.assert_allclose(solution.v_c, (policy * solution.q_c).sum(-1) - solution.kl, atol=1e-10)
        np.testing.assert_allclose(solution.q_c, discount * chain.transitions @ solution.v_c, atol=1e-10)
        # V = alpha log Z, the normalisation, and equation (1) of docs/derivation.md#local-optimum.
        np.testing.assert_allclose(v, alpha * np.log((chain.behavior * np.exp(q / alpha)).sum(-1)), atol=1e-9)
        z = solution.exponent(alpha)
        np.testing.assert_allclose((chain.behavior * np.exp(z)).sum(-1), 1.0, atol=1e-9)
        np.testing.assert_allclose(policy, chain.behavior * np.exp(z), atol=1e-9)
        assert (solution.v_c <= 0).all()


def test_chain_optimum_beats_other_policies_in_every_state() -> None:
    game = tabular.chain_game(6)
    discount = game.gamma * (1 - game.stop)
    rng = np.random.default_rng(0)
    for chain, alpha, best in zip(game.chains, ALPHA[:2], _solve(game, ALPHA[:2]), strict=True):
        for scale in (1e-3, 0.1, 1.0, 1.0, 3.0):
            logits = np.log(best.policy) + scale * rng.standard_normal(best.policy.shape)
            policy = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            other = oracles.evaluate_chain(policy, chain.rewards, chain.transitions, chain.behavior, discount)
            assert (best.v_r + alpha * best.v_c > other.v_r + alpha * other.v_c).all()


@pytest.mark.parametrize("branching", [1, 2])
def test_sums_of_chain_values_are_values_of_the_joint_mdp(branching: int) -> None:
    game = tabular.chain_game(8, branching=branching)
    solutions = _solve(game, ALPHA[:2])
    joint = oracles.evaluate_joint(
        [s.policy for s in solutions],
        [c.rewards for c in game.chains],
        [c.transitions for c in game.chains],
        [c.behavior for c in game.chains],
        ALPHA[:2],
        game.gamma * (1 - game.stop),
    )
    first, second = solutions
    reward = first.v_r[:, None] + second.v_r
    penalty = ALPHA[0] * first.v_c[:, None] + ALPHA[1] * second.v_c
    np.testing.assert_allclose(joint.v_r, reward.reshape(-1), atol=1e-9)
    np.testing.assert_allclose(joint.penalty, penalty.reshape(-1), atol=1e-9)


def test_a_chain_that_always_stops_is_a_one_step_game() -> None:
    game = tabular.one_step_game(3)
    optima = oracles.one_step_optima(game.rewards, game.behavior, ALPHA)
    for i, chain in enumerate(game.chains):
        solution = oracles.solve_chain(chain.rewards, chain.transitions, chain.behavior, ALPHA[i], 0.0)
        np.testing.assert_allclose(solution.policy[0], optima.policy[i], atol=1e-12)
        np.testing.assert_allclose(solution.v_c, -optima.kl[i], atol=1e-12)


# --- games and transitions -------------------------------------------------------------------------------------


def test_games_are_drawn_from_their_seed() -> None:
    first, again, other = tabular.one_step_game(3), tabular.one_step_game(3), tabular.one_step_game(4)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    assert not np.allclose(first.rewards, other.rewards)
    many = np.concatenate([tabular.one_step_game(seed).rewards for seed in range(200)], axis=1)
    np.testing.assert_allclose(many.std(-1), tabular.SCALES, rtol=0.1)
    chain, chain_again = tabular.chain_game(3), tabular.chain_game(3)
    np.testing.assert_array_equal(chain.chains[1].transitions, chain_again.chains[1].transitions)


def test_single_chain_is_the_first_of_the_pair() -> None:
    pair, single = tabular.game("toy/chain").chains, tabular.game("toy/chain-single").chains
    assert (len(pair), len(single)) == (2, 1)
    np.testing.assert_array_equal(pair[0].transitions, single[0].transitions)
    np.testing.assert_array_equal(pair[0].rewards, single[0].rewards)


@pytest.mark.parametrize("branching", [1, 2, 4])
def test_chains_branch_as_asked(branching: int) -> None:
    for chain in tabular.chain_game(0, branching=branching).chains:
        np.testing.assert_allclose(chain.transitions.sum(-1), 1.0)
        assert ((chain.transitions > 0).sum(-1) == branching).all()


def test_generator_refuses_sizes_out_of_range() -> None:
    with pytest.raises(ConfigError, match="branching from 1 to the 4 states, got 5"):
        tabular.chain_game(0, branching=5)
    with pytest.raises(ConfigError, match=r"expected 2 sizes .* got \[4\]"):
        tabular.chain_game(0, states=(4,))
    with pytest.raises(ConfigError, match="gamma"):
        tabular.chain_game(0, gamma=1.0)


def test_one_step_enumeration_has_the_behaviours_probabilities() -> None:
    game = tabular.one_step_game(2)
    batch = tabular.transitions(game)
    assert len(batch) == 5**3
    expected = np.prod([game.behavior[i, batch.actions[:, i]] for i in range(3)], axis=0)
    np.testing.assert_allclose(batch.weights, expected, rtol=1e-12)
    assert batch.weights.sum() == pytest.approx(1.0)
    assert batch.terminals.all()
    mean = float((game.behavior * game.rewards).sum())
    assert float(batch.weights @ batch.rewards) == pytest.approx(mean, rel=1e-5)


def test_hidden_states_scale_the_reward_behind_one_observation() -> None:
    game = tabular.one_step_game(2, state_scales=(0.5, 1.5))
    batch = tabular.transitions(game)
    assert len(batch) == 2 * 5**3
    assert np.unique(batch.observations.reshape(len(batch), -1), axis=0).shape[0] == 1
    hidden = batch.states[:, -2:]
    for state, scale in enumerate((0.5, 1.5)):
        rows = hidden[:, state] == 1
        assert batch.weights[rows].sum() == pytest.approx(0.5)
        reward = sum(game.rewards[i, batch.actions[rows, i]] for i in range(3))
        np.testing.assert_allclose(batch.rewards[rows], scale * reward, rtol=1e-5, atol=1e-6)


def test_chain_enumeration_gives_exact_backups() -> None:
    game = tabular.chain_game(9, agents=2, states=(2, 3), actions=(3, 2))
    batch = tabular.transitions(game)
    assert batch.weights.sum() == pytest.approx(1.0)
    assert batch.weights[batch.terminals].sum() == pytest.approx(game.stop)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(2), rng.standard_normal(3)]
    following = sum(
        (batch.next_observations[:, i, : len(v)] @ v for i, v in enumerate(values)), np.zeros(len(batch))
    )
    target = batch.rewards + game.gamma * ~batch.terminals * following
    state = batch.observations.argmax(-1)
    for x in np.ndindex(2, 3):
        for a in np.ndindex(3, 2):
            rows = (state == x).all(-1) & (batch.actions == a).all(-1)
            assert batch.weights[rows].sum() == pytest.approx(
                np.prod([c.behavior[x[i], a[i]] / len(c.start) for i, c in enumerate(game.chains)])
            )
            expected = sum(
                c.rewards[x[i], a[i]] + game.gamma * (1 - game.stop) * c.transitions[x[i], a[i]] @ values[i]
                for i, c in enumerate(game.chains)
            )
            mean = np.average(target[rows], weights=batch.weights[rows])
            assert mean == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_padding_of_agents_of_different_sizes() -> None:
    game = tabular.game("toy/chain-mixed")
    batch = tabular.transitions(game)
    assert batch.observations.shape[1:] == (3, 4)
    assert batch.states.shape[1] == 2 + 4 + 3
    assert batch.action_masks[0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert (batch.observations[:, 0, 2:] == 0).all()
    assert (batch.observations.sum(-1) == 1).all()


def test_masked_oracle_never_leaves_the_available_actions() -> None:
    game = tabular.game("toy/masked")
    assert isinstance(game, tabular.ChainGame)
    discount = game.gamma * (1 - game.stop)
    for chain, alpha, best in zip(game.chains, ALPHA, _solve(game, ALPHA), strict=True):
        assert not chain.available.all()
        assert (best.policy[~chain.available] == 0).all()
        np.testing.assert_allclose(best.policy.sum(-1), 1.0)
        # The same chain with an enormous penalty in place of the mask.
        rewards = np.where(chain.available, chain.rewards, -1e4)
        behavior = np.where(chain.available, chain.behavior, 1e-12)
        fined = oracles.solve_chain(rewards, chain.transitions, behavior, alpha, discount)
        np.testing.assert_allclose(best.policy, fined.policy, atol=1e-9)
        np.testing.assert_allclose(best.v_r, fined.v_r, atol=1e-6)
        np.testing.assert_allclose(best.kl, fined.kl, atol=1e-6)
    assert oracles.largest_kl(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])).tolist() == [0.0]


def test_masks_of_a_row_and_the_next_follow_the_states() -> None:
    game = tabular.game("toy/masked")
    batch = tabular.transitions(game)
    assert batch.weights.sum() == pytest.approx(1.0)
    for i, chain in enumerate(game.chains):
        state = batch.observations[:, i].argmax(-1)
        successor = batch.next_observations[:, i].argmax(-1)
        np.testing.assert_array_equal(batch.action_masks[:, i], chain.available[state])
        np.testing.assert_array_equal(batch.next_action_masks[:, i], chain.available[successor])
    assert np.take_along_axis(batch.action_masks, batch.actions[..., None], -1).all()
    assert (batch.action_masks != batch.next_action_masks).any()


def test_masks_are_drawn_as_asked() -> None:
    assert all(chain.available.all() for chain in tabular.chain_game(0).chains)
    none = tabular.chain_game(0, masked=1.0).chains
    assert all((chain.available.sum(-1) == 1).all() for chain in none)  # one action stays available
    many = [c.available for seed in range(60) for c in tabular.chain_game(seed, actions=6, masked=0.3).chains]
    kept = np.concatenate(many).mean()
    assert kept == pytest.approx(1 - 0.3 * 5 / 6, abs=5 * np.sqrt(0.25 / (len(many) * 24)))
    with pytest.raises(ConfigError, match="masked"):
        tabular.chain_game(0, masked=1.1)


def test_samples_follow_the_weights() -> None:
    batch = tabular.transitions(tabular.one_step_game(0))
    dataset = batch.sample(20_000, seed=1)
    assert len(dataset) == 20_000
    exact = np.array([batch.weights[batch.actions[:, 0] == a].sum() for a in range(5)])
    counts = np.bincount(dataset.actions[:, 0], minlength=5) / 20_000
    assert np.abs(counts - exact).max() < 5 * np.sqrt(0.25 / 20_000)
    np.testing.assert_array_equal(dataset.actions, batch.sample(20_000, seed=1).actions)
    assert (dataset.actions != batch.sample(20_000, seed=2).actions).any()


# --- the environment -------------------------------------------------------------------------------------------


def test_environment_plays_its_game() -> None:
    """Every reward is the table's, and successors have the table's probabilities."""
    environment = toy.make("toy/chain")
    game = environment.game
    rng = np.random.default_rng(0)
    counts = [np.zeros_like(chain.transitions) for chain in game.chains]
    observations, _ = environment.reset(seed=0)
    ends = limits = steps = 0
    age = 0
    while steps < 6000:
        x = [int(observations[name].argmax()) for name in environment.possible_agents]
        a = [int(rng.integers(3)) for _ in x]
        observations, rewards, terminations, truncations, _ = environment.step(
            dict(zip(environment.possible_agents, a, strict=True))
        )
        steps, age = steps + 1, age + 1
        expected = sum(float(c.rewards[x[i], a[i]]) for i, c in enumerate(game.chains))
        assert rewards["agent_0"] == rewards["agent_1"] == pytest.approx(expected)
        for i, name in enumerate(environment.possible_agents):
            counts[i][x[i], a[i], int(observations[name].argmax())] += 1
        np.testing.assert_array_equal(environment.state(), np.concatenate(list(observations.values())))
        assert truncations["agent_0"] == (age == 25 and not terminations["agent_0"])
        if terminations["agent_0"] or truncations["agent_0"]:
            ends, limits, age = ends + terminations["agent_0"], limits + truncations["agent_0"], 0
            observations, _ = environment.reset()
    assert limits > 0
    assert ends / steps == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / steps))
    for i, chain in enumerate(game.chains):
        visits = counts[i].sum(-1, keepdims=True)
        error = np.abs(counts[i] / visits - chain.transitions)
        assert (error <= 5 * np.sqrt(0.25 / visits)).all()
        assert (counts[i][chain.transitions == 0] == 0).all()


def test_hidden_state_is_in_the_centralised_state_alone() -> None:
    environment = toy.make("toy/one-step-hidden")
    assert environment.spec.state_size == 3 + 2
    scales = set()
    for seed in range(20):
        observations, _ = environment.reset(seed)
        assert all(values.tolist() == [1.0] for values in observations.values())
        hidden = int(environment.state()[-2:].argmax())
        _, rewards, terminations, truncations, _ = environment.step(dict.fromkeys(observations, 2))
        assert isinstance(environment.game, tabular.OneStepGame)
        base = float(environment.game.rewards[:, 2].sum())
        assert rewards["agent_0"] == pytest.approx((0.5, 1.5)[hidden] * base)
        assert terminations["agent_0"]
        assert not truncations["agent_0"]
        scales.add(hidden)
    assert scales == {0, 1}


def test_tabular_policies_sample_their_tables() -> None:
    team = toy.TabularPolicies("toy/chain-mixed")
    game = tabular.game("toy/chain-mixed")
    noise = NoiseSource(team.spec, seed=0).draw(20_000)
    observations = {
        agent.name: np.tile(np.eye(agent.observation_size, dtype=np.float32)[1], (20_000, 1))
        for agent in team.spec.agents
    }
    decisions = team.act(observations, noise=noise)
    for chain, agent in zip(game.chains, team.spec.agents, strict=True):
        decision = decisions[agent.name]
        share = np.bincount(decision.action, minlength=agent.action.size) / 20_000
        assert np.abs(share - chain.behavior[1]).max() < 5 * np.sqrt(0.25 / 20_000)
        assert (decision.divergence == 0).all()
    greedy = team.act({name: values[0] for name, values in observations.items()})
    assert int(greedy["agent_2"].action) == int(game.chains[2].behavior[1].argmax())


def test_tabular_policies_report_their_divergence() -> None:
    game = tabular.game("toy/chain")
    assert isinstance(game, tabular.ChainGame)
    solutions = _solve(game, ALPHA[:2])
    team = toy.TabularPolicies("toy/chain", [s.policy for s in solutions])
    states = {name: np.eye(4, dtype=np.float32) for name in team.spec.names}
    for solution, decision in zip(solutions, team.act(states).values(), strict=True):
        np.testing.assert_allclose(decision.divergence, solution.kl, rtol=1e-5)
        np.testing.assert_array_equal(decision.action, solution.policy.argmax(-1))
    with pytest.raises(ContractError, match="expected tables of shapes"):
        toy.TabularPolicies("toy/chain", [np.ones((4, 2)) / 2] * 2)


def test_returns_of_an_optimum_match_its_values() -> None:
    """Rolling pi* out earns what policy evaluation says: tables, policies and environment agree."""
    environment = toy.make("toy/chain")
    game = environment.game
    assert isinstance(game, tabular.ChainGame)
    solutions = _solve(game, ALPHA[:2])
    exact = 0.0
    for chain, solution in zip(game.chains, solutions, strict=True):
        occupancy, reward = chain.start, (solution.policy * chain.rewards).sum(-1)
        step = np.einsum("xk,xky->xy", solution.policy, chain.transitions)
        for t in range(environment.spec.episode_limit):
            exact += (1 - game.stop) ** t * float(occupancy @ reward)
            occupancy = occupancy @ step
    team = toy.TabularPolicies("toy/chain", [s.policy for s in solutions])
    noise = NoiseSource(team.spec, seed=3)
    returns = []
    for seed in range(400):
        observations, _ = environment.reset(seed)
        total, over = 0.0, False
        while not over:
            draw = {name: values[0] for name, values in noise.draw(1).items()}
            decisions = team.act(observations, noise=draw)
            observations, rewards, terminations, truncations, _ = environment.step(
                {name: int(decision.action) for name, decision in decisions.items()}
            )
            total += rewards["agent_0"]
            over = terminations["agent_0"] or truncations["agent_0"]
        returns.append(total)
    assert np.mean(returns) == pytest.approx(exact, abs=4 * np.std(returns) / np.sqrt(len(returns)))


def test_masked_environment_says_what_is_available_and_refuses_the_rest() -> None:
    environment = toy.make("toy/masked")
    chains = environment.game.chains
    rng = np.random.default_rng(0)
    refused, lengths, age = 0, [], 0
    observations, infos = environment.reset(seed=0)
    for _ in range(600):
        actions = {}
        for chain, (name, values) in zip(chains, observations.items(), strict=True):
            mask = infos[name]["action_mask"]
            assert mask.dtype == np.uint8
            np.testing.assert_array_equal(mask, chain.available[values.argmax()])
            actions[name] = int(rng.choice(np.flatnonzero(mask)))
        for name in actions:
            for choice in np.flatnonzero(infos[name]["action_mask"] == 0).tolist():
                earlier = environment.state()
                allowed = np.flatnonzero(infos[name]["action_mask"]).tolist()
                with pytest.raises(ContractError) as error:
                    environment.step({**actions, name: choice})
                message = f"action of {name}: expected one of the available {allowed}, got {choice}"
                assert str(error.value) == message
                np.testing.assert_array_equal(environment.state(), earlier)
                refused += 1
        observations, _, terminations, truncations, infos = environment.step(actions)
        age += 1
        if terminations["agent_0"] or truncations["agent_0"]:
            lengths.append(age)
            observations, infos = environment.reset()
            age = 0
    assert refused > 100
    assert 4 < np.mean(lengths) < 20


def test_masked_behaviour_plays_only_what_is_available() -> None:
    team = toy.behavior_team("toy/masked")
    noise = NoiseSource(team.spec, seed=0).draw(3000)
    states = {name: np.tile(np.eye(3, dtype=np.float32), (1000, 1)) for name in team.spec.names}
    for chain, decision in zip(
        tabular.game("toy/masked").chains, team.act(states, noise=noise).values(), strict=True
    ):
        assert chain.available[np.arange(3000) % 3, decision.action].all()
        np.testing.assert_allclose(decision.divergence, 0.0, atol=1e-6)
    greedy = [np.eye(4)[chain.behavior.argmax(-1)] for chain in tabular.game("toy/masked").chains]
    for table, chain, decision in zip(
        greedy,
        tabular.game("toy/masked").chains,
        toy.TabularPolicies("toy/masked", greedy).act(states).values(),
        strict=True,
    ):
        expected = -np.log((table * chain.behavior).sum(-1))
        np.testing.assert_allclose(decision.divergence[:3], expected, rtol=1e-5)
    forbidden = [np.where(chain.available, 0.0, 1.0) for chain in tabular.game("toy/masked").chains]
    with pytest.raises(
        ContractError, match=r"policy of agent 0 in state .: expected probabilities of the avail"
    ):
        toy.TabularPolicies("toy/masked", forbidden)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"agent_0": 0}, "expected one action for each of agent_0, agent_1"),
        ({"agent_0": 0, "agent_1": 0, "agent_2": 0}, "expected one action for each"),
        ({"agent_0": 0, "agent_1": 3}, "action of agent_1: expected an integer from 0 to 2, got 3"),
        ({"agent_0": -1, "agent_1": 0}, "action of agent_0"),
        ({"agent_0": 0.0, "agent_1": 0}, "action of agent_0"),
        ({"agent_0": [0], "agent_1": 0}, "action of agent_0"),
    ],
)
def test_wrong_actions_are_refused(actions: dict[str, object], message: str) -> None:
    environment = toy.make("toy/chain")
    environment.reset(seed=0)
    earlier = environment.state()
    with pytest.raises(ContractError, match=message):
        environment.step(actions)
    np.testing.assert_array_equal(environment.state(), earlier)


def test_misuse_is_explained() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'toy/chain'"):
        toy.make("toy/chian")
    with pytest.raises(ContractError, match="call reset"):
        toy.make("toy/chain").step({"agent_0": 0, "agent_1": 0})


def test_frame_lights_the_present_states() -> None:
    environment = toy.make("toy/chain-mixed", render_mode="rgb_array")
    observations, _ = environment.reset(seed=1)
    frame = environment.render()
    assert frame.shape == (3 * 24, 4 * 24, 3)
    lit = frame[12::24, 12::24, 0]
    for i, values in enumerate(observations.values()):
        assert lit[i].argmax() == values.argmax()
        assert (lit[i, len(values) :] == 0).all()
