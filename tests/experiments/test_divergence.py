"""Runs whose reward values leave the range of the data's discounted returns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.experiments.compare import MARGIN, REWARD_VALUE, DataReturns
from omcda_deploy.registry import team_spec
from omcda_deploy.training.run_folder import RunConfig
from tests.support.synthetic import write_dataset

GAMMA = 0.9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return read(
        write_dataset(tmp_path_factory.mktemp("data") / "a.hdf5", team_spec("mamujoco/hopper-3x1"), [6, 4, 9])
    )


def config(dataset: Dataset, gamma: float = GAMMA) -> RunConfig:
    return RunConfig(
        *("omcda", {"gamma": gamma}, 10, 0, "cpu", 1, True, 1, 1, 1, "", dataset.digest, {}),
        team=dataset.spec.to_json(),
        versions={},
    )


def data_range(dataset: Dataset, gamma: float) -> tuple[float, float]:
    """Least and largest discounted return, by the definition, with 0 among them."""
    returns = [0.0]
    for number in range(len(dataset.episode_length)):
        rewards = dataset.episode(number).rewards.astype(np.float64)
        returns += [float(sum(gamma**k * r for k, r in enumerate(rewards[t:]))) for t in range(len(rewards))]
    return min(returns), max(returns)


@pytest.mark.parametrize("gamma", [GAMMA, 0.5])
def test_values_within_the_returns_and_a_margin_have_not_diverged(dataset: Dataset, gamma: float) -> None:
    low, high = data_range(dataset, gamma)
    assert low < high
    margin = MARGIN * (high - low)
    returns = DataReturns(dataset)
    for value, left in (
        (low, False),
        (high, False),
        (0.0, False),
        (high + 0.99 * margin, False),
        (high + 1.01 * margin, True),
        (low - 0.99 * margin, False),
        (low - 1.01 * margin, True),
        (float("nan"), True),
    ):
        early = {REWARD_VALUE: 1e9, "step": 5}  # of 10 steps
        lines = [
            early,
            {REWARD_VALUE: 0.0, "step": 6},
            {REWARD_VALUE: value, "step": 7},
            {"loss": 1e9, "step": 10},
        ]
        assert returns.left_by(config(dataset, gamma), lines) is left, value


def test_what_is_not_logged_or_of_other_data_is_not_known(dataset: Dataset) -> None:
    returns = DataReturns(dataset)
    lines = [{REWARD_VALUE: 1e9, "step": 10}]
    assert returns.left_by(config(dataset), lines) is True
    assert returns.left_by(config(dataset), [{"loss": 1.0, "step": 10}]) is None
    assert returns.left_by(replace(config(dataset), settings={}), lines) is None
    assert returns.left_by(replace(config(dataset), dataset_digest="other"), lines) is None
