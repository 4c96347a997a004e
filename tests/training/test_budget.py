"""The choice of d_tot from the data alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from omcda_deploy.datasets import Dataset, Episode
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.envs.tabular import team_spec
from omcda_deploy.envs.tabular.games import OneStepGame
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.experiments import budget as experiments
from omcda_deploy.registry import read_dataset
from omcda_deploy.training import budget
from omcda_deploy.training.algorithms.omcda import Config
from omcda_deploy.training.behavior_model import BehaviorConfig
from omcda_deploy.training.budget import BudgetChoice, BudgetRow, BudgetSearch, choose_budget, decide
from omcda_deploy.training.estimation import FittedConfig
from omcda_deploy.training.metrics import DivergedError


def row(
    d_tot: float, share: float, gain: float | None = None, deviation: float = 0.1, steps: float = 10.0
) -> BudgetRow:
    """Measurements of one budget in episodes of ``steps``."""
    return BudgetRow(
        d_tot, d_tot * steps, d_tot, share, gain, None if gain is None else deviation, beyond_data=False
    )


def test_the_largest_budget_above_the_floor_is_chosen() -> None:
    rows = [row(0.03, 0.95), row(0.1, 0.8), row(0.3, 0.31), row(0.6, 0.29)]
    assert decide(rows, with_values=False).d_tot == 0.3


def test_a_budget_beyond_one_below_the_floor_is_never_chosen() -> None:
    rows = [row(0.1, 0.9), row(0.3, 0.29), row(1.0, 0.9)]
    assert decide(rows, with_values=False).d_tot == 0.1


@pytest.mark.parametrize(("steps", "chosen"), [(1000.0, 0.03), (300.0, 0.1), (30.0, 0.6), (5000.0, 0.0)])
@pytest.mark.parametrize("with_values", [False, True])
def test_the_longer_an_episode_the_smaller_is_the_budget_of_a_step(
    steps: float, chosen: float, with_values: bool
) -> None:
    budgets = ((0.03, 0.95), (0.1, 0.8), (0.3, 0.5), (0.6, 0.35))
    rows = [row(d, share, gain=d, deviation=0.0, steps=steps) for d, share in budgets]
    choice = decide(rows, with_values)
    assert choice.d_tot == chosen
    assert f"{(chosen or 0.03) * steps:.3g} nats in an episode" in choice.advice


def test_where_no_budget_is_supported_the_answer_is_to_clone() -> None:
    choice = decide([row(0.1, 0.2), row(0.3, 0.1)], with_values=False)
    assert choice.d_tot == 0.0
    assert choice.advice.startswith("Clone the behaviour policy")


def test_what_a_team_spends_beyond_its_budget_counts_in_an_episode() -> None:
    over = dataclasses.replace(row(0.1, 0.9), spent=0.4, per_episode=0.4 * 1000)
    assert decide([row(0.01, 0.9, steps=1000), over], with_values=False).d_tot == 0.01


def test_the_advice_to_clone_names_the_limit() -> None:
    """And the advice of a budget that was hardly spent says so."""
    share = decide([row(0.1, 0.2)], with_values=False).advice
    assert share == (
        "Clone the behaviour policy: at 0.1 nats 20 % of the held-out steps speak for the trained team, 30 % are "
        "the least."
    )
    long = decide([row(0.1, 0.9, steps=1000)], with_values=False).advice
    assert long.endswith("at 0.1 nats a team adds up to 100 nats in an episode, 40 are the most.")
    gains = decide([row(0.1, 0.9, 0.05, 0.1), row(0.3, 0.5, -0.2)], with_values=True).advice
    assert gains.endswith(
        "has a fitted gain above its deviation (0.05 ± 0.1 at 0.1 nats; -0.2 ± 0.1 at 0.3 nats)."
    )
    beyond = dataclasses.replace(row(0.1, 0.9, 9.0), beyond_data=True)
    assert "(9 ± 0.1 at 0.1 nats, beyond the data)" in decide([beyond], with_values=True).advice
    spent = decide([dataclasses.replace(row(0.3, 0.9), spent=0.1)], with_values=False).advice
    assert spent.endswith("3 nats in an episode. It spends 0.1 nats a step so far.")
    assert "so far" not in decide([row(0.3, 0.9)], with_values=False).advice


def test_values_decide_among_supported_budgets_less_their_deviation() -> None:
    rows = [row(0.1, 0.9, 0.5, 0.1), row(0.3, 0.5, 0.9, 0.2), row(1.0, 0.12, 1.0, 0.6), row(2.0, 0.05, 9.0)]
    assert decide(rows, with_values=True).d_tot == 0.3


def test_values_beyond_the_data_are_not_believed() -> None:
    beyond = dataclasses.replace(row(0.3, 0.5, 9.0), beyond_data=True)
    assert decide([row(0.1, 0.9, 0.5), beyond], with_values=True).d_tot == 0.1


def test_without_a_certain_gain_the_answer_is_to_clone() -> None:
    assert decide([row(0.1, 0.9, 0.05, 0.1), row(0.3, 0.5, -0.2)], with_values=True).d_tot == 0.0


def test_measurements_are_cached_and_the_choice_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that was filled under an older rule answers by the present one."""
    from tests.support.synthetic import continuous_spec, write_dataset

    dataset = read_dataset(write_dataset(tmp_path / "data.hdf5", continuous_spec(), [5] * 4))
    measured = BudgetChoice(0.3, (row(0.1, 0.9), row(0.3, 0.2)), floor=0.1)
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    asked: list[object] = []

    def choose(*request: object) -> BudgetChoice:
        asked.append(request)
        return measured

    monkeypatch.setattr(budget, "choose_budget", choose)
    wanted = search((0.1, 0.3))
    budget.cached_choice(dataset, wanted)
    again = budget.cached_choice(dataset, wanted)
    assert len(asked) == 1
    assert (again.d_tot, again.rows, again.floor) == (0.1, measured.rows, budget.FLOOR)


def one_step_dataset(path: Path, rewards: Sequence[Sequence[float]], noise: float = 0.0) -> Dataset:
    """1,500 episodes of one step, of a uniform behaviour policy."""
    table = np.array(rewards)
    agents, actions = table.shape
    game = OneStepGame(table, np.full(table.shape, 1.0 / actions))
    spec = team_spec("toy/one-step", game)
    generator = np.random.default_rng(0)
    ones = np.ones((2, agents, 1), np.float32)
    with DatasetWriter(path, spec, {"behavior": "uniform"}) as writer:
        for _ in range(1500):
            action = generator.integers(actions, size=(1, agents))
            reward = table[np.arange(agents), action[0]].sum() + noise * generator.normal()
            writer.append(
                Episode(
                    ones,
                    ones.reshape(2, -1)[:, : spec.state_size],
                    action.astype(np.int64),
                    np.array([reward], np.float32),
                    timeout=False,
                    action_masks=np.ones((2, agents, actions), np.uint8),
                )
            )
    return read_dataset(path)


def search(budgets: Sequence[float]) -> BudgetSearch:
    config = Config(
        divergence_mixer="identity", price="solved", lr=3e-3, lr_divergence=3e-3, alpha0=1.0,
        tau=0.05, tau_policy=0.05, warmup=0.1, hidden=16, mixer_hidden=8, batch_size=64,
    )  # fmt: skip
    return BudgetSearch(
        dataclasses.asdict(config),
        steps=400,
        behavior=BehaviorConfig(steps=300, hidden=16, check_every=100),
        budgets=budgets,
        fitted=FittedConfig(steps=200, members=4, lr=5e-3, tau=0.1, hidden=16, mixer_hidden=8, batch_size=64),
    )


def test_where_more_divergence_is_better_the_largest_supported_budget_is_chosen(tmp_path: Path) -> None:
    """Uniform behaviour and additive rewards: every nat gains, and each action is recorded hundreds of times."""
    torch.set_num_threads(1)
    dataset = one_step_dataset(tmp_path / "game.hdf5", [[0.0, 0.5, 1.0], [1.0, 0.0, 0.2]])
    budgets = (0.05, 0.2, 0.8)
    choice = choose_budget(dataset, search(budgets))
    assert choice.d_tot == 0.8
    shares = [measured.effective_share for measured in choice.rows]
    assert 1.0 > shares[0] > shares[1] > shares[2] > 0.1
    for measured in choice.rows:
        assert measured.spent == pytest.approx(measured.d_tot, rel=0.3)
        assert measured.gain is not None
        assert measured.gain > 0.0


def test_noise_in_place_of_rewards_gains_nothing(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    dataset = one_step_dataset(tmp_path / "noise.hdf5", [[0.0] * 3, [0.0] * 3], noise=1.0)
    choice = choose_budget(dataset, search((0.1, 0.5)))
    gains = [measured.gain for measured in choice.rows]
    assert all(gain is not None and abs(gain) < 0.3 for gain in gains)


def test_rewards_on_which_training_diverges_are_refused(tmp_path: Path) -> None:
    from tests.support.synthetic import continuous_spec, write_dataset

    path = write_dataset(tmp_path / "huge.hdf5", continuous_spec(), [5] * 8)
    with h5py.File(path, "r+") as file:
        file["r"][:] = 1e30
        del file["omcda"].attrs["digest"]
    with pytest.raises(DivergedError, match=r"diverged before step 100: .* is (inf|nan)"):
        choose_budget(read_dataset(path), search((0.1, 0.5)))


def test_wrong_budgets_and_too_few_episodes_are_refused(tmp_path: Path) -> None:
    for budgets in ((), (0.0, 1.0), (1.0, 0.5), (0.3, 0.3), (0.3, True)):
        with pytest.raises(ConfigError, match="ascending order"):
            search(budgets)
    from tests.support.synthetic import continuous_spec, write_dataset

    small = read_dataset(write_dataset(tmp_path / "small.hdf5", continuous_spec(), [5, 5, 5]))
    with pytest.raises(DatasetError, match="at least 4 episodes"):
        choose_budget(small, search((0.1,)))
    with pytest.raises(
        ConfigError, match=r"tries 0\.4 nats: omcda\.d_eval: .* set price=solved, or d_eval=1000"
    ):
        experiments.choose_budget(small, budgets=(0.3, 0.4), settings={"price": "gradient"})
    with pytest.raises(DatasetError, match="at least 4 episodes"):  # budgets that fit go on to the dataset
        experiments.choose_budget(small, budgets=(0.2, 0.3), settings={"price": "gradient"})
    with pytest.raises(ConfigError, match="seed: expected int, got True"):
        experiments.choose_budget(small, seed=True)
