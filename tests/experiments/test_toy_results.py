"""The toy table: exact returns of learned policies, and expectations of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.envs import tabular, toy
from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments import toy_games as toy_results
from omcda_deploy.experiments.toy_games import GameResult, Outcome, Row, play_game, write_table
from omcda_deploy.training.networks import CategoricalActor, GreedyActor, NetworkFactory
from omcda_deploy.training.policy_tables import policy_tables
from tests.support.tabular import behavior_table


def empirical(dataset: Dataset) -> list[tabular.Table]:
    """Return the policies of a perfect clone of the dataset: the share of each choice in each state."""
    tables = []
    rows = dataset.transitions
    state = dataset.observations[rows].argmax(-1)
    for i, chain in enumerate(tabular.game(dataset.spec.task).chains):
        counts = np.zeros(chain.rewards.shape)
        np.add.at(counts, (state[:, i], dataset.actions[rows, i]), 1)
        tables.append(counts / counts.sum(-1, keepdims=True))
    return tables


def test_value_learners_beat_behaviour_and_a_clone_matches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison's must-hold on one game, for the algorithms that are quickest to train."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    names = ["bc", "omcda", "omiga"]
    result = play_game("toy/masked", names, tmp_path / "game", transitions=5000, steps=500, seed=1)
    assert [row.algorithm for row in result.rows] == names
    assert [
        line for line in result.violations() if " omcda " not in line
    ] == []  # so few steps do not suffice
    outcomes = {row.algorithm: row.outcome for row in result.rows}
    assert all(outcomes.values())
    earned = {name: outcome.sampled for name, outcome in outcomes.items() if outcome}
    clone = tabular.exact_return(tabular.game("toy/masked"), empirical(result.dataset))
    assert result.gain(clone + result.behavior - earned["bc"]) == pytest.approx(0.0, abs=0.01)
    for name in ("omcda", "omiga"):
        assert result.gain(earned[name]) > 0.1
        assert earned[name] < result.best


def test_tables_are_the_actors_own_probabilities() -> None:
    game = tabular.game("toy/masked")
    for table, chain in zip(policy_tables(behavior_table(game), game), game.chains, strict=True):
        np.testing.assert_allclose(table, chain.behavior, atol=1e-6)
    mixed = tabular.game("toy/chain-mixed")
    torch.manual_seed(0)
    actor = CategoricalActor(4, 4, 3, hidden=8)
    for i, (table, chain) in enumerate(zip(policy_tables(actor, mixed), mixed.chains, strict=True)):
        states, actions = chain.rewards.shape
        assert table.shape == (states, actions)
        logits = actor.mlp(torch.eye(4)[:states, None], i)[:, 0, :actions]
        np.testing.assert_allclose(table, torch.softmax(logits, -1).detach().numpy(), atol=1e-6)


def test_greedy_policies_are_one_hot_on_available_actions() -> None:
    game = tabular.game("toy/masked")
    q: Any = NetworkFactory(tabular.team_spec("toy/masked", game), 8).q()
    tables = policy_tables(GreedyActor(q), game)
    values = q.values(torch.eye(3)[:, None].expand(3, 3, 3)).detach().numpy()  # [X, N, K]
    for i, (table, chain) in enumerate(zip(tables, game.chains, strict=True)):
        best = np.where(chain.available, values[:, i], -np.inf).argmax(-1)
        np.testing.assert_array_equal(table, np.eye(4)[best])
    tabular.exact_return(game, tables)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    from omcda_deploy.play.collect import collect

    team = toy.behavior_team("toy/one-step")
    path = tmp_path / "d.hdf5"
    collect("toy/one-step", team, path, transitions=10, seed=0, behavior="b", num_envs=4, workers=0)
    return read(path)


def test_expectations_that_do_not_hold_are_listed(tmp_path: Path, dataset: Dataset) -> None:
    def row(algorithm: str, sampled: float) -> Row:
        return Row(algorithm, Outcome(sampled, sampled + 1.0, 0.5))

    optimum = tabular.budget_optimum(tabular.game("toy/one-step"), 1.0)
    most = tabular.exact_return(tabular.game("toy/one-step"), optimum)
    rows = (
        row("bc", -7.95),
        row("bcq", -8.0),
        Row("cql", None, "ConfigError: no"),
        row("omiga", -5.0),
        row("omcda", most - 0.11),
        row("omcda", most + 0.09),
    )
    result = GameResult("toy/one-step", dataset, behavior=-8.0, best=2.0, rows=rows)
    assert result.gain(-3.0) == pytest.approx(0.5)
    assert result.optimum.sampled == pytest.approx(most, abs=1e-6)
    assert result.optimum.nats == pytest.approx(1.0, abs=1e-6)
    lines = result.violations()
    assert [line.split(":")[1].split()[0] for line in lines] == ["bcq", "cql", "omcda"]
    far = GameResult("toy/one-step", dataset, 2.0, 12.0, (row("bc", 2.2), row("bc", 1.8), row("bc", 1.95)))
    assert len(far.violations()) == 2  # too good is as wrong as too bad
    path = tmp_path / "docs" / "table.md"
    write_table(path, [result], transitions=10, steps=1, seed=3)
    text = path.read_text()
    for part in (
        dataset.digest,
        "| omiga | -5.000 | +30.0% | -4.000 | +40.0% | 0.50 | alpha 1 |",
        "failed: ConfigError: no",
        "seed 3",
    ):
        assert part in text
    assert all(f"* {line}" in text for line in lines)
    assert "Expectations that do not hold:" in text


def test_a_run_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConfigError("no space\nsecond line")

    monkeypatch.setattr(toy_results, "learn", fail)
    result = play_game("toy/one-step", ["bc"], tmp_path / "game", transitions=10, steps=1, seed=0)
    assert result.rows == (Row("bc", None, "ConfigError: no space"),)
    assert result.violations() == ["toy/one-step: bc failed (ConfigError: no space)"]
