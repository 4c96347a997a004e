"""Simulated promotions: what is recorded is the game, and the decisions are those that docs/improve.md promises."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.envs import tabular
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments.promotions import (
    CLEAR,
    GAMES,
    LEAST_CLEAR,
    MOST_HARMFUL,
    Outcome,
    Trial,
    promoted,
    record,
    simulate,
)


@pytest.mark.parametrize("task", GAMES)
def test_recorded_episodes_are_those_of_the_game(task: str) -> None:
    """Mean returns are exact returns, and every transition is one that the game has."""
    game = tabular.game(task)
    present = [chain.behavior for chain in game.chains]
    dataset = record(game, task, present, 3000, np.random.default_rng(0))
    error = dataset.episode_returns.std() / np.sqrt(3000)
    assert abs(dataset.episode_returns.mean() - tabular.exact_return(game, present)) < 3.5 * error
    rows = dataset.transitions
    for i, chain in enumerate(game.chains):
        x, following = (dataset.observations[at, i].argmax(-1) for at in (rows, rows + 1))
        assert (chain.transitions[x, dataset.actions[rows, i], following] > 0).all()
    assert (dataset.terminal ^ dataset.timeout).sum() == 3000
    assert dataset.episode_length.max() <= dataset.spec.episode_limit


def test_few_harmful_candidates_pass_and_most_clearly_better_ones_do() -> None:
    outcome = simulate("toy/chain", 300, 60, seed=1)
    assert promoted(outcome.harmful) <= MOST_HARMFUL
    assert promoted(outcome.clear) >= LEAST_CLEAR
    assert len(outcome.harmful) > 10


def test_a_decision_that_ignored_the_bound_would_be_noticed() -> None:
    """The same candidates, judged by their estimates alone, harm more often than is allowed."""
    outcome = simulate("toy/masked", 100, 60, seed=1)
    careless = [trial.estimate > 0.0 for trial in outcome.harmful]
    assert np.mean(careless) > MOST_HARMFUL
    assert promoted(outcome.harmful) <= MOST_HARMFUL


def test_shares_are_counted_as_they_are_named() -> None:
    trials = [Trial(gain, gain, gain - 1.0, gain + 1.0, False, gain > 1.0) for gain in range(-5, 5)]
    outcome = Outcome("toy/chain", 100, trials)
    assert [trial.improvement for trial in outcome.clear] == [3, 4]
    assert len(outcome.clear) == CLEAR * len(trials)
    values = outcome.to_json()
    assert (values["harmful"], values["harmful_promoted"]) == (5, 0.0)
    assert (values["better_promoted"], values["clear_promoted"]) == (0.75, 1.0)
    assert (values["silent"], values["above_low"]) == (0.0, 1.0)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        simulate("toy/chain", 100, 4)
    with pytest.raises(UnknownNameError):
        simulate("mamujoco/halfcheetah-6x1", 100, 5)


def test_the_command_prints_both_shares() -> None:
    words = ["bench", "promotions", "--game", "toy/one-step", "--episodes", "200", "--count", "10"]
    output = CliRunner().invoke(app, words).output
    assert "200 episodes: of harmful candidates at most" in output
    assert "clearly better ones at least 100.0 %, at least 60 % shall be: holds" in output
