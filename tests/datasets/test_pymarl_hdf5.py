"""CFCQL's and ICQ's files: PyMARL's padded batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy import registry
from omcda_deploy.datasets.convert import convert
from omcda_deploy.datasets.formats import pymarl_hdf5
from omcda_deploy.errors import DatasetError
from tests.support.smac_episodes import (
    LIMIT,
    Batch,
    pymarl_batch,
    random_episode,
    require_episode,
    save_pymarl,
)


def test_ends_are_told_by_length_and_final_rows_are_kept_where_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pymarl_hdf5, "_BYTES_PER_READ", 200_000)  # a few episodes at a time
    # lengths, whether `terminated` stays 0, and whether the final row was recorded
    ends = [
        (5, False, True),
        (LIMIT, True, True),
        (7, False, False),
        (LIMIT, False, True),
        (LIMIT, True, False),
    ]
    ends += [(2 + i, False, True) for i in range(15)]
    episodes = [random_episode(steps, seed, mappo=False) for seed, (steps, _, _) in enumerate(ends)]
    batch = pymarl_batch(episodes, [timeout for _, timeout, _ in ends], [final for _, _, final in ends])
    source = save_pymarl(tmp_path / "5m_vs_6m_medium.h5", batch, compression="gzip")
    convert(source, tmp_path / "out.hdf5")
    dataset = registry.read_dataset(tmp_path / "out.hdf5", "smac/5m_vs_6m")
    assert dataset.episode_length.tolist() == [steps for steps, _, _ in ends]
    for number, (episode, (_, _, final)) in enumerate(zip(episodes, ends, strict=True)):
        require_episode(dataset, number, episode, final_recorded=final)
    last = np.cumsum(dataset.episode_length) - 1
    assert dataset.timeout[last].tolist() == [steps == LIMIT for steps, _, _ in ends]
    assert (dataset.timeout ^ dataset.terminal).sum() == len(ends)
    assert dataset.spec == registry.team_spec("smac/5m_vs_6m")
    assert dataset.metadata["behavior"] == "5m_vs_6m_medium"


def test_a_row_that_is_filled_but_behind_the_end_is_not_taken(tmp_path: Path) -> None:
    episode = random_episode(4, 0, mappo=False)
    batch = pymarl_batch([episode], [False], [True])
    batch["filled"][0, :9] = 1  # PyMARL masks what follows the first terminated
    batch["reward"][0, 4:9] = 100
    convert(save_pymarl(tmp_path / "5m_vs_6m.h5", batch), tmp_path / "out.hdf5")
    require_episode(registry.read_dataset(tmp_path / "out.hdf5"), 0, episode, final_recorded=True)


def unfilled(batch: Batch) -> None:
    batch["terminated"][1] = 0


def hole(batch: Batch) -> None:
    batch["filled"][0, 1] = 0


def forbidden(batch: Batch) -> None:
    batch["avail_actions"][1, 2, 3] = 0


def missing(batch: Batch) -> None:
    del batch["state"]


def flat(batch: Batch) -> None:
    batch["actions"] = batch["actions"][..., 0]


def agentless(batch: Batch) -> None:
    batch["actions"] = batch["actions"][:, :, :4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unfilled, r"episode 1: expected 70 filled rows, up to the time limit, got 7"),
        (hole, r"episode 0: expected 4 filled rows, up to its end, got 1"),
        (forbidden, r"episode 1: row 2: expected one of the actions \[\] .* agent number 3"),
        (missing, r"array state: expected 3 dimensions, .* got no such array"),
        (flat, r"array actions: expected 4 dimensions, .* got \[2, 71, 5\]"),
        (agentless, r"episode 0: expected .* of equally many agents, got 5, 5 and 4"),
    ],
)
def test_bad_files_are_named_and_nothing_is_left(
    tmp_path: Path, damage: Callable[[Batch], None], message: str
) -> None:
    episodes = [random_episode(steps, steps, mappo=False) for steps in (4, 6)]
    batch = pymarl_batch(episodes, [False, False], [True, True])
    damage(batch)
    source = save_pymarl(tmp_path / "5m_vs_6m.h5", batch)
    with pytest.raises(DatasetError, match=rf"5m_vs_6m\.h5: {message}"):
        convert(source, tmp_path / "out.hdf5")
    assert list(tmp_path.iterdir()) == [source]


def test_only_pymarls_files_are_recognized(tmp_path: Path) -> None:
    batch = pymarl_batch([random_episode(2, 0, mappo=False)], [False], [True])
    source = save_pymarl(tmp_path / "5m_vs_6m.h5", batch)
    assert pymarl_hdf5.recognizes(source)
    assert not pymarl_hdf5.recognizes(tmp_path)
    convert(source, tmp_path / "ours.hdf5")
    assert not pymarl_hdf5.recognizes(tmp_path / "ours.hdf5")
    (tmp_path / "cut.h5").write_bytes(source.read_bytes()[:600])
    assert not pymarl_hdf5.recognizes(tmp_path / "cut.h5")
    with pytest.raises(DatasetError, match="truncated or not HDF5"):
        convert(tmp_path / "cut.h5", tmp_path / "out.hdf5", format="pymarl_hdf5")
