"""Data of one's own: actions in other bounds than -1 and 1, and hardly any data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omcda_deploy import registry
from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.summary import summarize
from omcda_deploy.datasets.writer import write_dataset
from omcda_deploy.errors import DatasetError
from omcda_deploy.experiments.export import export
from omcda_deploy.experiments.train import train
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.replay import replay
from omcda_deploy.registry import read_dataset
from omcda_deploy.spec import ActionSpec, TeamSpec
from omcda_deploy.training.batches import TransitionSampler
from omcda_deploy.training.run_folder import read_snapshot
from omcda_deploy.training.settings import plain_types
from tests.support.episodes import SPECS, random_episode

UNIT = SPECS["continuous"]
BOUNDS = [(-3.0, 1.0), (0.0, 10.0), (-1.0, 1.0)]
OTHER = replace(
    UNIT,
    agents=tuple(
        replace(agent, action=ActionSpec("continuous", 2, *bounds))
        for agent, bounds in zip(UNIT.agents, BOUNDS, strict=True)
    ),
)
SETTINGS = {"hidden": 8, "batch_size": 8}
WITH_MIXERS = [
    name
    for name in registry.algorithms()
    if "mixer_hidden" in plain_types(registry.load_algorithm(name).Config)
]


def write(path: Path, spec: TeamSpec, episodes: int = 4, steps: int = 5) -> Dataset:
    """Equal data for both teams, each in its own units: the graphs' map from [-1, 1] tells which."""
    data = [random_episode(UNIT, steps, seed, timeout=True) for seed in range(episodes)]
    for episode in data:
        episode.actions[:] = spec.unsquashed(episode.actions.astype(np.float64))
    write_dataset(path, spec, data)
    return read_dataset(path)


def test_actions_are_trained_in_the_units_in_which_graphs_scale_them(tmp_path: Path) -> None:
    unit, other = write(tmp_path / "u.hdf5", UNIT), write(tmp_path / "o.hdf5", OTHER)
    assert np.abs(other.actions).max() > 5
    batches = [TransitionSampler(dataset, 8, [0]).sample(3) for dataset in (unit, other)]
    torch.testing.assert_close(batches[0].action, batches[1].action, atol=1e-6, rtol=0)
    known = batches[0].next_action_known.bool()
    ours, theirs = (batch.next_action[known] for batch in batches)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert UNIT.squashed(unit.actions) is unit.actions
    summaries = [summarize(dataset) for dataset in (unit, other)]
    assert summaries[0]["largest_action"] == pytest.approx(summaries[1]["largest_action"], abs=1e-6)
    assert [summary["share_outside"] for summary in summaries] == [0, 0]


def test_padding_of_a_short_action_stays_zero() -> None:
    short = replace(OTHER.agents[1], action=ActionSpec("continuous", 1, 0.0, 10.0))
    spec = replace(OTHER, agents=(OTHER.agents[0], short))
    actions = np.array([[[-3.0, 1.0], [10.0, 0.0]]], np.float32)
    assert spec.squashed(actions).tolist() == [[[-1.0, 1.0], [1.0, 0.0]]]


def test_a_policy_answers_in_the_units_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    spreads = []
    for name, spec in (("unit", UNIT), ("other", OTHER)):
        dataset = write(tmp_path / f"{name}.hdf5", spec)
        train(dataset, "bc", tmp_path / name, steps=200, settings=SETTINGS, behavior={"steps": 20})
        export(tmp_path / name, tmp_path / f"{name}-bundle")
        agreement = replay(LocalTeam(tmp_path / f"{name}-bundle"), dataset, episodes=2).agreement
        spreads.append(
            [agreement[agent.name] / (agent.action.high - agent.action.low) for agent in spec.agents]
        )
    np.testing.assert_allclose(spreads[0], spreads[1], atol=1e-3)


@pytest.mark.parametrize("algorithm", WITH_MIXERS)
def test_the_units_of_states_do_not_matter_once_states_are_standardised(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    folders = []
    for name, scale, shift in (("ours", 1.0, 0.0), ("scaled", 100.0, 3.0)):
        dataset = write(tmp_path / f"{name}.hdf5", UNIT)
        dataset = replace(dataset, states=(scale * dataset.states + shift).astype(np.float32))
        settings = {**SETTINGS, "standardize_states": True}
        folders.append(tmp_path / f"{name}-run")
        train(dataset, algorithm, folders[-1], steps=20, settings=settings, behavior={"steps": 20})
    ours, scaled = (read_snapshot(folder, 20).policy.state_dict() for folder in folders)
    for name, values in ours.items():
        torch.testing.assert_close(values, scaled[name], atol=1e-4, rtol=1e-3)


def test_one_transition_in_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    dataset = write(tmp_path / "d.hdf5", UNIT, episodes=1, steps=1)
    assert summarize(dataset)["transitions"] == 1
    with pytest.raises(
        DatasetError, match=r"the dataset holds 1 transition in all: expected at least 2, .* record"
    ):
        train(dataset, "bc", tmp_path / "run", steps=100, settings=SETTINGS)
    assert not (tmp_path / "run").exists()
    for episodes, steps in ((2, 1), (1, 2)):
        dataset = write(tmp_path / "d.hdf5", UNIT, episodes, steps)
        train(dataset, "bc", tmp_path / f"run{steps}", steps=100, settings=SETTINGS, behavior={"steps": 2})
