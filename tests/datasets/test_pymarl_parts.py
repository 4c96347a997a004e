"""PyMARL's recordings in parts, of any map or task; and real ones, where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.datasets.convert import convert
from omcda_deploy.datasets.formats import pymarl_hdf5
from omcda_deploy.envs import smac
from omcda_deploy.errors import DatasetError, OmcdaError, UnknownNameError
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.replay import replay
from omcda_deploy.registry import foreign_format_of, read_dataset
from omcda_deploy.spec import TeamSpec
from tests.support.smac_episodes import Batch, batch_of, save_pymarl

# Recordings that this project does not hold: https://github.com/LAMDA-RL/ODIS, its folders dataset/odis/sc2 and cn.
ODIS = Path(os.environ.get("OMCDA_ODIS", "no such folder"))

SMAC_3M = smac.SPECS["smac/3m"]


def save_parts(folder: Path, *batches: Batch) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches):
        save_pymarl(folder / f"part_{number}.h5", batch, compression="gzip")
    return folder


@pytest.mark.parametrize("continuing", [False, True])
def test_an_episode_as_long_as_the_limit_was_ended_by_it(tmp_path: Path, continuing: bool) -> None:
    lengths = [[20, 60, 31], [60, 59]]
    folder = tmp_path / "3m" / "medium"
    batches = [batch_of(SMAC_3M, part, seed, continuing=continuing) for seed, part in enumerate(lengths)]
    save_parts(folder, *batches)
    (folder / "README.txt").write_text("whose")
    assert foreign_format_of(folder) == "pymarl_hdf5"
    summary = convert(folder, tmp_path / "d.hdf5")
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert (summary["task"], dataset.spec) == ("smac/3m", SMAC_3M)
    assert dataset.episode_length.tolist() == [20, 60, 31, 60, 59]
    last = np.cumsum(dataset.episode_length) - 1
    assert dataset.timeout[last].tolist() == [False, True, False, True, False]
    assert dataset.terminal[last].tolist() == [True, False, True, False, True]
    number = 0
    for batch, part in zip(batches, lengths, strict=True):
        for index, steps in enumerate(part):
            episode = dataset.episode(number)
            np.testing.assert_array_equal(episode.observations, batch["obs"][index, : steps + 1])
            np.testing.assert_array_equal(episode.states, batch["state"][index, : steps + 1])
            np.testing.assert_array_equal(episode.actions, batch["actions"][index, :steps, :, 0])
            np.testing.assert_array_equal(episode.rewards, batch["reward"][index, :steps, 0])
            number += 1


def test_parts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    lengths = [3 + number for number in range(12)]
    save_parts(tmp_path / "3m", *[batch_of(SMAC_3M, [steps]) for steps in lengths])
    convert(tmp_path / "3m", tmp_path / "d.hdf5")
    assert read_dataset(tmp_path / "d.hdf5").episode_length.tolist() == lengths


@pytest.mark.parametrize("task", ["smac/MMM2", "smac/2s3z", "smac/27m_vs_30m"])
def test_any_map_is_told_from_the_path(tmp_path: Path, task: str) -> None:
    name = task.split("/")[1]
    save_pymarl(tmp_path / f"{name}-poor.h5", batch_of(smac.SPECS[task], [3, 4]))
    assert convert(tmp_path / f"{name}-poor.h5", tmp_path / "d.hdf5")["task"] == task
    assert read_dataset(tmp_path / "d.hdf5").spec == smac.SPECS[task]


def test_other_tasks_of_pymarl_are_named(tmp_path: Path) -> None:
    spec = TeamSpec("cn/2", SMAC_3M.agents[:2], state_size=8, control_rate=10.0, episode_limit=50)
    save_parts(tmp_path / "cn-2", batch_of(spec, [5, 50]))
    with pytest.raises(DatasetError, match=r"in the path: name it .* for other data name a known task"):
        convert(tmp_path / "cn-2", tmp_path / "d.hdf5")
    with pytest.raises(UnknownNameError, match="A new one needs --control-rate"):
        convert(tmp_path / "cn-2", tmp_path / "d.hdf5", task="cn/2")
    convert(tmp_path / "cn-2", tmp_path / "d.hdf5", task="cn/2", control_rate=10)
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert dataset.spec == spec  # the limit is one row less than the padded length
    assert dataset.timeout.sum() == 1
    convert(tmp_path / "cn-2", tmp_path / "t.hdf5", team=spec)
    assert read_dataset(tmp_path / "t.hdf5").digest == dataset.digest


def gap(folder: Path) -> None:
    (folder / "part_1.h5").rename(folder / "part_3.h5")


def other_map(folder: Path) -> None:
    save_pymarl(folder / "part_1.h5", batch_of(smac.SPECS["smac/8m"], [3]))


def cut(folder: Path) -> None:
    (folder / "part_1.h5").write_bytes((folder / "part_1.h5").read_bytes()[:700])


def changed(**arrays: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        save_pymarl(folder / "part_1.h5", {**batch_of(SMAC_3M, [4]), **arrays})

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (gap, r"3m: expected part_1\.h5 between part_0 and part_3, found none"),
        (
            other_map,
            r"part_1\.h5: array obs: expected episodes of shape \[61, 3, 30\], as in part_0\.h5, got \[121",
        ),
        (cut, r"part_1\.h5 is truncated or not HDF5"),
        (changed(state=np.zeros((1, 61))), r"part_1\.h5: array state: expected 3 dimensions"),
        (changed(reward=np.full((1, 61, 1), b"x")), r"part_1\.h5: array reward: expected numbers, got type"),
        (changed(reward=np.full((1, 61, 1), np.nan)), r"part_1\.h5: episode 0: array reward holds NaN"),
        (changed(avail_actions=np.full((1, 61, 3, 9), 2)), r"part_1\.h5: episode 0: availability of actions"),
        (
            changed(actions=np.full((1, 61, 3, 1), 9)),
            r"part_1\.h5: episode 0: row 0: expected one of the actions",
        ),
        (changed(filled=np.zeros((1, 61, 1))), r"part_1\.h5: episode 0: expected 4 filled rows"),
    ],
)
def test_a_part_that_does_not_fit_is_named_and_nothing_is_left(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = save_parts(tmp_path / "3m", *[batch_of(SMAC_3M, [4]) for _ in range(2)])
    damage(folder)
    with pytest.raises(OmcdaError, match=message) as refused:
        convert(folder, tmp_path / "new" / "d.hdf5")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["3m"]


def test_only_folders_of_parts_are_recognized(tmp_path: Path) -> None:
    assert not pymarl_hdf5.recognizes(tmp_path)
    (tmp_path / "part_0.h5").write_text("text")
    assert not pymarl_hdf5.recognizes(tmp_path)
    with pytest.raises(DatasetError, match=r"expected files part_0\.h5, part_1\.h5"):
        convert(tmp_path.parent, tmp_path / "d.hdf5", format="pymarl_hdf5")


def command(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_import_is_the_command_and_convert_its_older_name(tmp_path: Path) -> None:
    save_parts(tmp_path / "3m", batch_of(SMAC_3M, [4, 60]))
    summaries = [
        json.loads(command(name, tmp_path / "3m", "--out", tmp_path / f"{name}.hdf5"))
        for name in ("import", "convert")
    ]
    assert summaries[0]["digest"] == summaries[1]["digest"]
    help_text = command("--help")
    assert " import " in help_text
    assert " convert " not in help_text


@pytest.mark.skipif(not ODIS.is_dir(), reason="set OMCDA_ODIS to a folder with ODIS' recordings")
def test_a_real_recording_converts_trains_and_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    summary = convert(ODIS / "3m" / "medium", tmp_path / "d.hdf5")
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert (summary["episodes"], summary["task"]) == (2000, "smac/3m")
    assert (summary["return_mean"], summary["return_std"]) == (14.004109686642884, 6.549559699759993)
    assert (int(dataset.terminal.sum()), int(dataset.timeout.sum())) == (1953, 47)
    # A living agent can always stop, and a dead one never: in all 47 somebody lives.
    assert dataset.action_masks is not None
    ends = dataset.transitions[dataset.timeout] + 1
    assert dataset.action_masks[ends][..., 1].any(axis=1).all()
    words = ["--algo", "omcda", "--steps", "100", "--set", "hidden=16", "--behavior-steps", "50"]
    command("train", tmp_path / "d.hdf5", "--out", tmp_path / "run", *words)
    command("export", tmp_path / "run", "--out", tmp_path / "bundle")
    assert replay(LocalTeam(tmp_path / "bundle"), dataset, episodes=2).steps > 0
