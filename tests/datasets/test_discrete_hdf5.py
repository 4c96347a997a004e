"""Datasets of discrete actions with availability: in OMIGA's layout, recorded, checked, trained on and reresult."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.cli import app
from omcda_deploy.datasets import BLOCK, Dataset, Episode, blocks, require_available
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.datasets.merging import concatenate
from omcda_deploy.datasets.summary import render_table, summarize
from omcda_deploy.datasets.writer import DatasetWriter, write_dataset
from omcda_deploy.envs import tabular, toy
from omcda_deploy.errors import ConfigError, DatasetError, UnknownNameError
from omcda_deploy.play.collect import collect
from omcda_deploy.play.replay import replay
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from omcda_deploy.training.batches import TransitionSampler
from tests.support.digests import digest_of

# Agents of unlike sizes: choices that only the second has are never available to the first.
SPEC = TeamSpec(
    task="test/discrete",
    agents=(AgentSpec("a", 2, ActionSpec("discrete", 2)), AgentSpec("b", 3, ActionSpec("discrete", 4))),
    state_size=5,
    control_rate=10.0,
)


def episode(length: int, seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    masks = (rng.random((length + 1, 2, 4)) < 0.5).astype(np.uint8)
    masks[:, 0, 2:] = 0
    actions = np.stack([rng.integers(0, agent.action.size, length) for agent in SPEC.agents], axis=1)
    np.put_along_axis(masks[:-1], actions[..., None], 1, axis=-1)
    masks[-1] = 0  # after the end nothing need be available
    observations = rng.normal(size=(length + 1, 2, 3)).astype(np.float32)
    observations[:, 0, 2] = 0
    return Episode(
        observations,
        rng.normal(size=(length + 1, 5)).astype(np.float32),
        actions,
        rng.normal(size=length).astype(np.float32),
        timeout=length % 2 == 0,
        action_masks=masks,
        seed=length,
    )


def save(path: Path, lengths: tuple[int, ...] = (4, 7, 3)) -> list[Episode]:
    data = [episode(length, seed=length) for length in lengths]
    with DatasetWriter(path, SPEC, {"behavior": "random", "seed": 3}) as writer:
        for one in data:
            writer.append(one, "random")
    return data


def masks_of(data: list[Episode]) -> NDArray[np.uint8]:
    return np.concatenate([one.action_masks for one in data if one.action_masks is not None])


def require_equal(ours: Dataset, theirs: Dataset) -> None:
    assert ours.digest == theirs.digest
    for name in ("observations", "states", "actions", "rewards", "action_masks", "terminal", "timeout"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_what_we_wrote_comes_back(tmp_path: Path) -> None:
    data = save(tmp_path / "d.hdf5")
    dataset = read(tmp_path / "d.hdf5")
    assert dataset.spec == SPEC
    assert dataset.actions.dtype == np.int64
    assert dataset.actions.shape == (17, 2)
    assert dataset.action_masks is not None
    assert dataset.action_masks.dtype == np.uint8
    np.testing.assert_array_equal(dataset.action_masks, masks_of(data))
    for name in ("actions", "rewards"):
        values = getattr(dataset, name)[dataset.transitions]
        np.testing.assert_array_equal(values, np.concatenate([getattr(one, name) for one in data]))
    np.testing.assert_array_equal(dataset.states, np.concatenate([one.states for one in data]))
    assert np.flatnonzero(dataset.timeout).tolist() == [3]
    assert np.flatnonzero(dataset.terminal).tolist() == [10, 13]
    with h5py.File(tmp_path / "d.hdf5") as file:
        assert (file["a"].shape, file["a"].dtype) == ((17, 2, 1), np.dtype("<i8"))
        assert (file["avail"].shape, file["avail"].dtype) == ((17, 2, 4), np.dtype("u1"))
    assert dataset.digest == digest_of(tmp_path / "d.hdf5", 2)
    copies = [dataset.episode(number) for number in range(3)]
    assert write_dataset(tmp_path / "again.hdf5", SPEC, copies)["digest"] == dataset.digest
    require_equal(read(tmp_path / "again.hdf5"), dataset)


def test_files_longer_than_a_block_are_whole(tmp_path: Path) -> None:
    lengths = (BLOCK // 2, BLOCK // 2 + 5, 3)
    data = save(tmp_path / "d.hdf5", lengths)
    dataset = read(tmp_path / "d.hdf5")
    assert dataset.episode_length.tolist() == list(lengths)
    for name in ("observations", "states", "action_masks"):
        values = np.concatenate([getattr(one, name) for one in data])
        np.testing.assert_array_equal(getattr(dataset, name), values)
    assert len(list(blocks(len(dataset.rewards)))) == 2


def test_the_writer_keeps_nothing_of_the_callers_buffers(tmp_path: Path) -> None:
    data = episode(4, seed=0)
    names = ("observations", "states", "action_masks")
    expected = {name: getattr(data, name).copy() for name in names}
    with DatasetWriter(tmp_path / "d.hdf5", SPEC, {}) as writer:
        writer.append(data)
        for name in (*names, "actions", "rewards"):
            getattr(data, name)[:] = 0
    dataset = read(tmp_path / "d.hdf5")
    for name in names:
        np.testing.assert_array_equal(getattr(dataset, name), expected[name])


def test_concatenate_joins_masks_and_behaviours(tmp_path: Path) -> None:
    first, second = save(tmp_path / "one.hdf5", (4, 2)), save(tmp_path / "two.hdf5", (5,))
    concatenate([tmp_path / "one.hdf5", tmp_path / "two.hdf5"], tmp_path / "both.hdf5")
    both = read(tmp_path / "both.hdf5")
    assert both.action_masks is not None
    np.testing.assert_array_equal(both.action_masks, masks_of([*first, *second]))
    assert both.episode_length.tolist() == [4, 2, 5]
    one_step = Episode(
        np.zeros((2, 3, 1), np.float32),
        np.zeros((2, 3), np.float32),
        np.zeros((1, 3), np.int64),
        np.zeros(1),
        timeout=False,
        action_masks=np.ones((2, 3, 5), np.uint8),
    )
    write_dataset(tmp_path / "other.hdf5", registry.team_spec("toy/one-step"), [one_step])
    with pytest.raises(DatasetError, match="do not fit together"):
        concatenate([tmp_path / "one.hdf5", tmp_path / "other.hdf5"], tmp_path / "no.hdf5")


def replace(name: str, values: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file[name]
            if values is not None:
                file[name] = values

    return apply


def change(name: str, where: Any, value: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            file[name][where] = value

    return apply


def forbid(row: int, agent: int) -> Callable[[Path], None]:
    """Make what an agent did in a row unavailable."""

    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            file["avail"][row, agent, file["a"][row, agent, 0]] = 0

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            forbid(6, 1),
            r"row 6: expected one of the actions \[.*\] that are available to agent number 1, got",
        ),
        (change("a", (2, 0, 0), 5), "row 2: expected one of the actions .* agent number 0, got 5"),
        (change("a", (2, 0, 0), -1), "row 2: expected one of the actions .* agent number 0, got -1"),
        (change("avail", (3, 1, 2), 7), "array avail: expected 0 or 1 .* got 7 for choice 2 in row 3"),
        (
            change("avail", (3, 0, 2), 1),
            "for the 2 choices of a and 0 behind them, got 1 for choice 2 in row 3",
        ),
        (
            replace("avail", np.full((17, 2, 4), -1)),
            "array avail: expected 0 or 1 .* got -1 for choice 0 in row 0",
        ),
        (replace("avail", np.zeros((17, 2, 4), np.float32)), "array avail: expected integers .* got float32"),
        (
            replace("avail", np.zeros((16, 2, 4), np.uint8)),
            r"array avail: expected integers of shape \[17, 2, …\], got uint8 of shape \[16, 2, 4\]",
        ),
        (replace("avail", np.zeros((17, 2, 5), np.uint8)), "test/discrete has 2 .* 4 choices .* 5 choices"),
        (replace("avail", None), r"4 choices \(arrays a and avail\), the file .* actions of 1 numbers"),
        (
            replace("a", np.zeros((17, 2, 1), np.float32)),
            r"array a: expected integers of shape \[17, 2, 1\] beside an array avail, got float32",
        ),
        (replace("a", np.zeros((17, 2, 4), np.int64)), r"array a: expected integers .* got .* \[17, 2, 4\]"),
        (change("avail", (4, 1, 0), 1), "was changed after it was written"),
        (change("a", (4, 0, 0), 1), "was changed after it was written"),  # final rows count too
    ],
)
def test_bad_files_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "d.hdf5"
    save(path)
    damage(path)
    with pytest.raises(DatasetError, match=message):
        read(path)


def test_a_late_row_is_named_by_its_number() -> None:
    masks = np.ones((BLOCK + 9, 1, 2), np.uint8)
    masks[BLOCK + 7, 0, 1] = 0
    actions = np.ones((BLOCK + 9, 1), np.int64)
    rows = np.arange(BLOCK + 9)
    with pytest.raises(DatasetError, match=f"x: row {BLOCK + 107}: expected one of the actions \\[0\\]"):
        require_available(actions, masks, rows, "x", first_row=100)
    require_available(actions, masks, np.delete(rows, BLOCK + 7), "x")


def test_the_writer_refuses_what_was_not_available(tmp_path: Path) -> None:
    def attempt(name: str, where: Any, value: float) -> None:
        data = episode(4, seed=0)
        getattr(data, name)[where] = value
        write_dataset(tmp_path / "d.hdf5", SPEC, [episode(2, seed=1), data])

    with pytest.raises(DatasetError, match=r"row 5: expected one of the actions .* agent number 1, got 4"):
        attempt("actions", (2, 1), 4)
    with pytest.raises(DatasetError, match=r"row 4: .* available to agent number 0"):
        attempt("action_masks", (1, 0), 0)
    with pytest.raises(DatasetError, match="2 choices of a and 0 behind them, got 1 for choice 3 in row 7"):
        attempt("action_masks", (4, 0, 3), 1)

    with pytest.raises(DatasetError, match="expected action masks with discrete ones"):
        write_dataset(tmp_path / "d.hdf5", SPEC, [dataclasses.replace(episode(2, seed=0), action_masks=None)])
    assert not list(tmp_path.iterdir())


# --- recorded from a game --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "masked.hdf5"
    arguments = ["collect", "toy/masked", "--tier", "behavior", "--transitions", "3000", "--workers", "0"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    return path


def test_a_recorded_game_is_its_behaviour(recorded: Path) -> None:
    dataset = read(recorded, "toy/masked")
    game = tabular.game("toy/masked")
    masks = dataset.action_masks
    assert masks is not None
    assert dataset.transitions.size >= 3000
    assert dataset.metadata["behavior"] == "behavior"
    state = dataset.observations.argmax(-1)
    for i, chain in enumerate(game.chains):
        np.testing.assert_array_equal(masks[:, i], chain.available[state[:, i]])  # final rows too
        for x in range(3):
            rows = dataset.transitions[state[dataset.transitions, i] == x]
            share = np.bincount(dataset.actions[rows, i], minlength=4) / len(rows)
            assert (np.abs(share - chain.behavior[x]) <= 5 * np.sqrt(0.25 / len(rows))).all()
    t = dataset.transitions
    rewards = sum(c.rewards[state[t, i], dataset.actions[t, i]] for i, c in enumerate(game.chains))
    np.testing.assert_allclose(dataset.rewards[t], rewards, rtol=1e-5, atol=1e-5)
    exact = tabular.exact_return(game, [chain.behavior for chain in game.chains])
    error = dataset.episode_returns.std() / np.sqrt(dataset.episode_returns.size)
    assert dataset.episode_returns.mean() == pytest.approx(exact, abs=4 * error)


def test_batches_carry_the_masks_of_both_rows(recorded: Path) -> None:
    dataset = read(recorded)
    sampler = TransitionSampler(dataset, 64, seeds=[0])
    batch = sampler.gather(torch.arange(len(sampler)).unsqueeze(0))  # of one run
    masks, t = dataset.action_masks, dataset.transitions
    assert masks is not None
    assert batch.mask is not None
    assert batch.next_mask is not None
    np.testing.assert_array_equal(batch.mask[0].numpy(), masks[t])
    np.testing.assert_array_equal(batch.next_mask[0].numpy(), masks[t + 1])
    np.testing.assert_array_equal(batch.action[0].numpy(), dataset.actions[t])
    assert (batch.next_mask.sum(-1) > 0).all()  # behind the last transition of an episode too


def test_the_summary_counts_choices(recorded: Path) -> None:
    dataset = read(recorded)
    summary = summarize(dataset)
    choices = dataset.actions[dataset.transitions]
    assert summary["action_shares"]["agent_1"][2] == pytest.approx((choices[:, 1] == 2).mean())
    assert all(sum(shares) == pytest.approx(1.0) for shares in summary["action_shares"].values())
    assert summary["shapes"]["action_masks"] == [len(dataset.rewards), 3, 4]
    assert "share_saturated" not in summary
    labels = list(render_table(summary).columns[0].cells)
    assert "actions of agent_2" in labels
    assert 1.0 < summary["coverage"]["action_spread"]["agent_1"] <= 4.0
    assert "actions that agent_2 uses" in labels
    assert not any("|a|" in str(label) for label in labels)


def test_the_behaviour_agrees_with_its_own_recording(recorded: Path) -> None:
    """Replayed greedily it agrees as often as its likeliest choice was taken."""
    dataset = read(recorded)
    result = replay(toy.behavior_team("toy/masked"), dataset, episodes=10**6, batch=64)
    likeliest = [chain.behavior.argmax(-1) for chain in tabular.game("toy/masked").chains]
    state = dataset.observations.argmax(-1)
    rows = np.concatenate(
        [
            np.arange(start, start + length)
            for start, length in zip(dataset.episode_start, dataset.episode_length, strict=True)
        ]
    )
    assert result.steps == rows.size
    for i, name in enumerate(dataset.spec.names):
        expected = (likeliest[i][state[rows, i]] == dataset.actions[rows, i]).mean()
        assert result.agreement[name] == pytest.approx(expected)


def test_recording_is_repeatable_and_independent_of_workers(tmp_path: Path) -> None:
    digests = [
        collect(
            "toy/masked",
            toy.behavior_team("toy/masked"),
            tmp_path / f"{workers}.hdf5",
            transitions=200,
            seed=seed,
            behavior="behavior",
            num_envs=4,
            workers=workers,
        )["digest"]
        for workers, seed in ((0, 1), (1, 1), (0, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("task", "tier", "message"),
    [
        ("toy/masked", "behaviour", "unknown tier of toy/masked 'behaviour': did you mean 'behavior'"),
        ("toy/chain", "medium", "unknown tier of toy/chain 'medium': .*known are behavior"),
        (
            "mamujoco/hopper-3x1",
            "medum",
            "unknown tier of mamujoco/hopper-3x1 'medum': did you mean 'medium'",
        ),
        ("mamujoco/hopper-3x1", "behavior", "known are expert, medium, medium-expert, medium-replay"),
    ],
)
def test_unknown_tiers_are_answered_with_the_tasks_own(
    tmp_path: Path, task: str, tier: str, message: str
) -> None:
    arguments = ["collect", task, "--tier", tier, "--out", str(tmp_path / "d.hdf5")]
    with pytest.raises(UnknownNameError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mamujoco-khop1/hopper-3x1"], "comes without behaviour policies: .* with --bundle"),
        (["toy/chain", "--tier", "behavior", "--bundle", "b"], "got --tier and --bundle: leave one out"),
        (["toy/chain", "--tier", "behavior", "--seed", str(2**63)], r"below 2\^63"),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(
            app, ["collect", *words, "--out", str(tmp_path / "d.hdf5")], catch_exceptions=False
        )
    assert not list(tmp_path.iterdir())
