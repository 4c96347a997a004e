"""Estimates against exact returns of tabular games, from episodes of behaviour alone; seeds are fixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.writer import write_dataset
from omcda_deploy.envs import tabular
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.estimation import (
    Bounds,
    Comparison,
    Estimator,
    Gaussian,
    TeamDistributions,
    effective_sample_size,
)
from omcda_deploy.estimation.returns import LEAST_EFFECTIVE, MEAN_WEIGHTS
from omcda_deploy.experiments.promotions import GAMES, at_rows, record, reweighted
from omcda_deploy.registry import read_dataset
from tests.support.bundles import continuous_spec
from tests.support.episodes import random_episode

Table = NDArray[np.float64]


def recorded(task: str, episodes: int, seed: int) -> Dataset:
    game = tabular.game(task)
    return record(
        game, task, [chain.behavior for chain in game.chains], episodes, np.random.default_rng(seed)
    )


def candidate(task: str, size: float, seed: int) -> list[Table]:
    generator = np.random.default_rng([seed, 17])
    return [reweighted(chain.behavior, size, generator) for chain in tabular.game(task).chains]


def true_gain(task: str, policies: Sequence[Table]) -> float:
    game = tabular.game(task)
    present = [chain.behavior for chain in game.chains]
    return tabular.exact_return(game, policies) - tabular.exact_return(game, present)


def estimator(dataset: Dataset, confidence: float = 0.95) -> Estimator:
    return Estimator(dataset, TeamDistributions.of_recording(dataset), confidence)


@pytest.mark.parametrize("task", GAMES)
def test_estimates_come_near_the_exact_return(task: str) -> None:
    dataset, policies = recorded(task, 2000, 1), candidate(task, 0.3, 1)
    found = estimator(dataset).compare(at_rows(policies, dataset))
    exact = tabular.exact_return(tabular.game(task), policies)
    assert abs(found.improvement.estimate - true_gain(task, policies)) < 3.5 * found.standard_error
    assert found.value.low - 0.4 < exact < found.value.high + 0.4
    assert found.standard_error < 0.4, "so large that anything would be near"


def test_estimates_have_no_bias() -> None:
    """The mean over many small recordings of one candidate is its exact improvement."""
    policies = candidate("toy/chain", 0.4, 3)
    errors = []
    for seed in range(120):
        dataset = recorded("toy/chain", 40, seed)
        found = estimator(dataset).compare(at_rows(policies, dataset))
        errors.append(found.improvement.estimate - true_gain("toy/chain", policies))
    assert abs(np.mean(errors)) < 3.0 * np.std(errors) / np.sqrt(len(errors))
    assert np.std(errors) < 2.0


def test_bounds_hold_as_often_as_they_say() -> None:
    held: dict[float, list[bool]] = {0.7: [], 0.95: []}
    for seed in range(100):
        dataset, policies = recorded("toy/chain", 150, seed), candidate("toy/chain", 0.4, seed)
        for confidence, outcomes in held.items():
            found = estimator(dataset, confidence).compare(at_rows(policies, dataset)).improvement
            truth = true_gain("toy/chain", policies)
            outcomes += [found.low <= truth, truth <= found.high]
    for confidence, outcomes in held.items():
        deviation = np.sqrt(confidence * (1.0 - confidence) / len(outcomes))
        assert abs(np.mean(outcomes) - confidence) < 3.0 * deviation, (confidence, np.mean(outcomes))


def test_weighted_rewards_are_those_of_a_plain_loop() -> None:
    """Per-decision importance sampling as it is written down, each weight capped at the root of the episodes."""
    dataset, policies = recorded("toy/masked", 40, 5), candidate("toy/masked", 0.5, 5)
    chains = tabular.game("toy/masked").chains
    expected = []
    for number in range(40):
        episode, weight, total = dataset.episode(number), 1.0, 0.0
        for t in range(len(episode)):
            for i, (policy, chain) in enumerate(zip(policies, chains, strict=True)):
                x, a = episode.observations[t, i].argmax(), episode.actions[t, i]
                weight *= policy[x, a] / chain.behavior[x, a]
            total += min(weight, math.sqrt(40)) * float(episode.rewards[t])
        expected.append(total)
    terms = estimator(dataset)._terms(at_rows(policies, dataset))
    np.testing.assert_allclose(terms.weighted, expected, rtol=1e-4, atol=1e-4)


def test_an_unlikely_step_takes_nothing_from_other_episodes() -> None:
    """Weights are products within an episode: a step of a very small one leaves all others as they were."""
    dataset, policies = recorded("toy/chain", 60, 5), candidate("toy/chain", 0.5, 5)
    found, team = estimator(dataset), at_rows(policies, dataset)
    expected = found._terms(team).log_weight
    density = team.log_density(found._actions)
    density[found._rows[found._episode == 7]] -= 1e20

    class Unlikely(TeamDistributions):
        def log_density(self, actions: NDArray[Any]) -> NDArray[np.float64]:
            return density

    others = np.arange(60) != 7
    logs = found._terms(Unlikely(team.agents)).log_weight
    assert np.array_equal(logs[others], expected[others])
    assert logs[7] < -1e19


def test_values_that_mislead_cost_no_correctness(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, policies = recorded("toy/chain", 600, 7), candidate("toy/chain", 0.3, 7)
    helped = estimator(dataset).compare(at_rows(policies, dataset))
    values = Estimator._values
    monkeypatch.setattr(
        Estimator, "_values", lambda self, team: tuple(-50.0 * part for part in values(self, team))
    )
    misled = estimator(dataset).compare(at_rows(policies, dataset))
    monkeypatch.setattr(Estimator, "_values", lambda self, team: np.zeros((3, len(self._rows))))
    alone = estimator(dataset).compare(at_rows(policies, dataset))
    assert helped.standard_error < misled.standard_error <= 1.001 * alone.standard_error
    assert abs(misled.improvement.estimate - true_gain("toy/chain", policies)) < 3.5 * misled.standard_error


def test_a_team_that_is_behavior_earns_what_was_recorded() -> None:
    dataset = recorded("toy/chain", 200, 2)
    found = estimator(dataset)
    compared = found.compare(found.behavior)
    assert compared.improvement == Bounds(0.0, 0.0, 0.0)
    assert compared.effective_episodes == 200
    assert (compared.divergence, compared.unsupported, compared.silence) == (0.0, 0.0, "")
    assert found.recorded.estimate == pytest.approx(dataset.episode_returns.mean(), rel=1e-5)
    assert compared.value == pytest.approx(found.recorded)


def test_what_acted_is_paid_what_was_recorded_though_it_is_taken_for_another() -> None:
    """As a clone takes it: the control variate of either has another mean than 0, and a team's near it as well."""
    dataset, policies = recorded("toy/chain", 400, 2), candidate("toy/chain", 0.5, 2)
    taken = at_rows(policies, dataset)
    found = Estimator(dataset, taken)
    control = found._terms(taken).control
    assert abs(control.mean()) > 5.0 * control.std() / np.sqrt(len(control))
    assert found.compare(taken).value == pytest.approx(found.recorded)


def test_an_improvement_is_over_the_baseline() -> None:
    dataset = recorded("toy/chain", 300, 4)
    one, other = (at_rows(candidate("toy/chain", 0.2, seed), dataset) for seed in (1, 2))
    found = estimator(dataset)
    forward, backward = found.compare(one, other).improvement, found.compare(other, one).improvement
    assert forward.estimate == pytest.approx(-backward.estimate)
    assert forward.low == pytest.approx(-backward.high)
    assert found.compare(one, one).improvement == Bounds(0.0, 0.0, 0.0)


def test_data_that_cannot_tell_are_silent() -> None:
    dataset = recorded("toy/chain", 100, 6)
    found = estimator(dataset)
    far = found.compare(at_rows(candidate("toy/chain", 2.0, 6), dataset))
    assert far.effective_episodes < 10
    assert f"{far.effective_episodes:.1f} of 100 episodes speak for the team" in far.silence
    assert "record about" in far.silence
    farther = dataclasses.replace(far, episode_divergence=50.0)
    assert "no number of episodes that one records would do" in farther.silence
    chains = tabular.game("toy/chain").chains
    rare = [np.eye(chain.behavior.shape[1])[chain.behavior.argmin(-1)] for chain in chains]
    beyond = found.compare(at_rows(rare, dataset))
    assert beyond.unsupported > 0.05
    assert "of the recorded states" in beyond.silence
    assert beyond.to_json()["divergence"] == pytest.approx(beyond.divergence)


def test_weights_tell_a_behavior_that_is_not_the_one_that_acted() -> None:
    """A team that is taken for what acted, and another one close to it: many episodes count, all for nothing."""
    dataset, policies = recorded("toy/chain", 400, 11), candidate("toy/chain", 0.1, 11)
    right = estimator(dataset).compare(at_rows(policies, dataset))
    assert right.mean_weight == pytest.approx(1.0, abs=0.2)
    assert right.silence == ""
    taken = [reweighted(table, 2.5, np.random.default_rng(6)) for table in policies]
    wrong = Estimator(dataset, at_rows(taken, dataset)).compare(
        at_rows([reweighted(table, 0.3, np.random.default_rng(15)) for table in taken], dataset)
    )
    assert wrong.effective_episodes > LEAST_EFFECTIVE
    assert not MEAN_WEIGHTS[0] <= wrong.mean_weight <= MEAN_WEIGHTS[1]
    assert "where 1 is expected" in wrong.silence


def test_the_mean_weight_is_that_of_a_plain_loop() -> None:
    dataset, policies = recorded("toy/masked", 50, 8), candidate("toy/masked", 0.4, 8)
    chains = tabular.game("toy/masked").chains
    weights = []
    for number in range(50):
        episode, weight = dataset.episode(number), 1.0
        for t in range(len(episode)):
            for i, (policy, chain) in enumerate(zip(policies, chains, strict=True)):
                x, a = episode.observations[t, i].argmax(), episode.actions[t, i]
                weight *= policy[x, a] / chain.behavior[x, a]
        weights.append(min(weight, math.sqrt(50)))
    found = estimator(dataset).compare(at_rows(policies, dataset))
    assert found.mean_weight == pytest.approx(np.mean(weights), rel=1e-5)


def test_the_episodes_that_would_tell_do() -> None:
    """The lower bound of as many episodes as are asked for lies above the threshold in about 80 %."""
    policies = candidate("toy/one-step-hidden", 0.15, 0)
    gain = true_gain("toy/one-step-hidden", policies)
    first = recorded("toy/one-step-hidden", 400, 0)
    threshold = gain - 0.02
    found = estimator(first).compare(at_rows(policies, first))
    exact = dataclasses.replace(found, improvement=found.improvement._replace(estimate=gain))
    needed = exact.episodes_for(threshold)
    assert needed is not None
    cleared = []
    for seed in range(60):
        dataset = recorded("toy/one-step-hidden", needed, seed)
        cleared.append(estimator(dataset).compare(at_rows(policies, dataset)).improvement.low > threshold)
    assert 0.6 < np.mean(cleared) < 0.97
    assert exact.episodes_for(gain) is None


def test_effective_samples_are_those_of_the_weights() -> None:
    """Two equally likely weights 0.5 and 1.5: 1 / (1 + 0.5^2); a factor on all changes nothing."""
    weights = np.log(np.tile([0.5, 1.5], 500))
    assert effective_sample_size(weights + 700.0) == pytest.approx(1.0 / 1.25)


def test_continuous_teams_are_estimated_too(tmp_path: Path) -> None:
    """A reward that is the first agent's action: the expected return is E[tanh(u)] times the steps."""
    spec, generator, steps = continuous_spec(agents=2), np.random.default_rng(0), 3
    shape = (steps, 2, spec.action_size)
    padding = np.arange(spec.action_size) >= np.array([[agent.action.size] for agent in spec.agents])
    episodes = []
    for seed in range(600):
        u = np.where(padding, 0.0, np.exp(-0.5) * generator.normal(size=shape)).astype(np.float32)
        behavior = {
            "mean": np.zeros(shape, np.float32),
            "log_std": np.full(shape, -0.5, np.float32),
            "log_prob": np.zeros(shape[:2]),
        }
        action = np.tanh(u)
        episodes.append(
            dataclasses.replace(
                random_episode(spec, steps, seed), actions=action, rewards=action[:, 0, 0], behavior=behavior
            )
        )
    write_dataset(tmp_path / "data.hdf5", spec, episodes)
    dataset = read_dataset(tmp_path / "data.hdf5", spec)
    acted = TeamDistributions.of_recording(dataset)
    first, second = acted.agents
    assert isinstance(first, Gaussian)
    found = Estimator(dataset, acted).compare(
        TeamDistributions([Gaussian(first.mean + 0.3, first.log_std), second])
    )
    exact = steps * float(np.tanh(0.3 + np.exp(-0.5) * generator.normal(size=400_000)).mean())
    assert abs(found.value.estimate - exact) < 3.5 * found.standard_error + 0.005
    assert found.standard_error < 0.03
    assert found.divergence == pytest.approx(0.5 * (0.3 / np.exp(-0.5)) ** 2, rel=1e-4)


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_confidences_out_of_range_are_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match="confidence: expected"):
        estimator(recorded("toy/one-step", 40, 0), confidence)


def test_too_few_episodes_are_refused() -> None:
    with pytest.raises(DatasetError, match="at least 30 closed episodes"):
        estimator(recorded("toy/one-step", 29, 0))


def test_returns_to_go_are_no_rewards() -> None:
    dataset = recorded("toy/one-step", 40, 0)
    sums = dataclasses.replace(dataset, metadata={**dataset.metadata, "reward_mode": "return_to_go"})
    with pytest.raises(
        DatasetError, match=r"expected the rewards of steps, got .* mode return_to_go: import"
    ):
        estimator(sums)


def test_comparisons_are_plain_json() -> None:
    found = estimator(recorded("toy/one-step", 40, 0))
    values = found.compare(found.behavior).to_json()
    assert values.keys() == {field.name for field in dataclasses.fields(Comparison)}
    assert values["improvement"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
