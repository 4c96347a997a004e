"""Exact returns against enumeration, against rolled-out episodes, and against each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from omcda_deploy.envs import tabular, toy
from omcda_deploy.envs.vector import VectorEnvironment
from omcda_deploy.errors import ContractError
from omcda_deploy.policy import NoiseSource


def random_policies(game: tabular.Game, seed: int) -> list[tabular.Table]:
    """Random distributions over the available actions, independent of the behaviour policies."""
    rng = np.random.default_rng(seed)
    tables = []
    for chain in game.chains:
        weights = np.where(
            chain.available, rng.dirichlet(np.ones(chain.rewards.shape[1]), len(chain.start)), 0.0
        )
        tables.append(weights / weights.sum(-1, keepdims=True))
    return tables


@pytest.mark.parametrize("task", ["toy/one-step", "toy/one-step-hidden"])
def test_one_step_games_by_enumeration(task: str) -> None:
    game = tabular.game(task)
    assert isinstance(game, tabular.OneStepGame)
    policies = random_policies(game, 1)
    expected = 0.0
    for scale in game.state_scales:
        for joint in itertools.product(range(5), repeat=3):
            probability = np.prod([table[0, a] for table, a in zip(policies, joint, strict=True)])
            reward = scale * sum(game.rewards[i, a] for i, a in enumerate(joint))
            expected += float(probability * reward) / len(game.state_scales)
    assert tabular.exact_return(game, policies) == pytest.approx(expected, rel=1e-12)


def played_returns(task: str, policies: list[tabular.Table], episodes: int) -> tabular.Table:
    """Undiscounted returns of stochastic episodes in the environment, [episodes]."""
    team = toy.TabularPolicies(task, policies)
    noise = NoiseSource(team.spec, seed=7)
    totals = np.zeros(episodes)
    with VectorEnvironment(task, episodes) as vector:
        answer = vector.reset({index: 1000 + index for index in range(episodes)})
        active = np.ones(episodes, np.bool_)
        while active.any():
            decisions = team.act(answer.observations, noise=noise.draw(episodes))
            actions = {name: decision.action for name, decision in decisions.items()}
            answer = vector.step(actions, active)
            totals += answer.reward
            active &= ~(answer.terminated | answer.truncated)
    return totals


@pytest.mark.parametrize("task", ["toy/chain", "toy/masked", "toy/one-step-hidden"])
def test_played_episodes_earn_it(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy.make(task).spec
    monkeypatch.setattr("omcda_deploy.registry.team_spec", lambda name, **options: spec)
    monkeypatch.setattr("omcda_deploy.registry.make_environment", toy.make)  # skips 400 look-ups of the task
    game = tabular.game(task)
    for policies in ([chain.behavior for chain in game.chains], random_policies(game, 2)):
        returns = played_returns(task, policies, 400)
        error = returns.std() / np.sqrt(len(returns))
        assert tabular.exact_return(game, policies) == pytest.approx(returns.mean(), abs=4 * error)


def test_start_end_and_limit_each_count() -> None:
    """One agent walks 0 -> 1 -> 2 -> 2 … and earns 1, 10, 100 there."""
    walk = np.zeros((3, 1, 3))
    walk[[0, 1, 2], 0, [1, 2, 2]] = 1.0
    chain = tabular.Chain(
        np.array([[1.0], [10.0], [100.0]]), walk, np.ones((3, 1)), np.array([1.0, 0.0, 0.0])
    )
    game = tabular.ChainGame((chain,), gamma=0.5, stop=0.5)
    limit = tabular.team_spec("", game).episode_limit
    expected = 1 + 0.5 * 10 + sum(0.5**t * 100 for t in range(2, limit))
    policies = [np.ones((3, 1))]
    assert tabular.exact_return(game, policies) == pytest.approx(expected, rel=1e-12)  # gamma has no effect
    forever = replace(game, stop=0.0)
    assert tabular.exact_return(forever, policies) == pytest.approx(11 + 100 * (limit - 2))
    late = replace(forever, chains=(replace(chain, start=np.array([0.0, 0.25, 0.75])),))
    assert tabular.exact_return(late, policies) == pytest.approx(0.25 * 10 + 100 * (limit - 0.25))
    assert tabular.best_return(late) == pytest.approx(tabular.exact_return(late, policies))


def test_best_return_bounds_every_policy_and_is_nearly_reached() -> None:
    game = tabular.game("toy/masked")
    assert isinstance(game, tabular.ChainGame)
    best = 0.0
    for chain in game.chains:
        single = replace(game, chains=(chain,))
        choices = [np.flatnonzero(row) for row in chain.available]
        returns = [
            tabular.exact_return(single, [np.eye(4)[list(picked)]]) for picked in itertools.product(*choices)
        ]
        assert max(returns) <= tabular.best_return(single) + 1e-9
        best += max(returns)
    assert 0.97 * tabular.best_return(game) < best <= tabular.best_return(game) + 1e-9
    # The masks bind: with every action available the best return would be larger.
    free = tuple(replace(chain, behavior=np.full((3, 4), 0.25)) for chain in game.chains)
    assert tabular.best_return(replace(game, chains=free)) > tabular.best_return(game) + 1
    one_step = tabular.game("toy/one-step")
    assert isinstance(one_step, tabular.OneStepGame)
    assert tabular.best_return(one_step) == pytest.approx(one_step.rewards.max(-1).sum())


def test_tables_must_be_policies_of_the_game() -> None:
    game = tabular.game("toy/masked")
    behavior = [chain.behavior for chain in game.chains]
    with pytest.raises(
        ContractError, match=r"expected tables of shapes \[\(3, 4\), \(3, 4\), \(3, 4\)\], got"
    ):
        tabular.exact_return(game, behavior[:2])
    uniform = np.full((3, 4), 0.25)
    with pytest.raises(
        ContractError, match="policy of agent 1 in state 0: expected probabilities of the avail"
    ):
        tabular.exact_return(game, [behavior[0], uniform, behavior[2]])
    with pytest.raises(ContractError, match="that sum to 1"):
        tabular.exact_return(game, [behavior[0], 0.5 * behavior[1], behavior[2]])
    with pytest.raises(ContractError, match="policy of agent 2"):
        tabular.exact_return(game, [*behavior[:2], np.full((3, 4), np.nan)])
