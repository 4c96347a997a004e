"""The digest covers what decides training; files of version 1 keep theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.datasets import Episode
from omcda_deploy.datasets.merging import concatenate
from omcda_deploy.datasets.writer import write_dataset
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.experiments.sweep import check_jobs, jobs_of, sweep_of
from omcda_deploy.experiments.train import resume, train
from omcda_deploy.registry import read_dataset
from omcda_deploy.training.algorithms.omcda import Config
from omcda_deploy.training.behavior_model import BehaviorConfig
from omcda_deploy.training.budget import BudgetSearch
from omcda_deploy.training.run_folder import read_config, snapshot_steps, write_config
from tests.support.digests import as_version_1, digest_of
from tests.support.episodes import SPECS, random_episode

SMALL = {"hidden": 8, "batch_size": 8}
Change = Callable[[Episode], Episode]


def states(episode: Episode) -> Episode:
    return replace(episode, states=episode.states + 1)


def end(episode: Episode) -> Episode:
    return replace(episode, timeout=not episode.timeout)


def reward(episode: Episode) -> Episode:
    return replace(episode, rewards=episode.rewards + 1)


def mask(episode: Episode) -> Episode:
    masks = np.array(episode.action_masks)
    masks[-1, 0, 0] = 0
    return replace(episode, action_masks=masks)


def write(path: Path, change: Change | None = None, kind: str = "discrete") -> Path:
    """Four episodes, the second of them changed."""
    episodes = [random_episode(SPECS[kind], steps, steps, timeout=steps == 2) for steps in (3, 2, 5, 4)]
    if change is not None:
        episodes[1] = change(episodes[1])
    write_dataset(path, SPECS[kind], episodes)
    return path


@pytest.mark.parametrize("change", [states, end, reward, mask])
def test_whatever_decides_training_changes_the_digest(tmp_path: Path, change: Change) -> None:
    plain = read_dataset(write(tmp_path / "plain.hdf5"))
    changed = read_dataset(write(tmp_path / "changed.hdf5", change))
    for dataset, name in ((plain, "plain"), (changed, "changed")):
        assert dataset.digests == {
            version: digest_of(tmp_path / f"{name}.hdf5", version) for version in (1, 2)
        }
        assert (dataset.digest, dataset.digest_version) == (dataset.digests[2], 2)
    assert plain.digest != changed.digest
    assert (plain.digests[1] == changed.digests[1]) == (change in (states, end))


def test_neither_compression_nor_metadata_change_it(tmp_path: Path) -> None:
    path = write(tmp_path / "d.hdf5", kind="continuous")
    with h5py.File(path) as file, h5py.File(tmp_path / "packed.hdf5", "w") as packed:
        for name in "osard":
            packed.create_dataset(name, data=file[name][:].astype(np.float64), compression="lzf")
        file.copy("omcda", packed)
        packed["omcda"].attrs["rig"] = "A"
    assert read_dataset(tmp_path / "packed.hdf5").digest == read_dataset(path).digest


@pytest.mark.parametrize(("array", "value"), [("s", 0.5), ("omcda/episode_timeouts", 1)])
def test_states_and_ends_that_were_changed_in_place_are_noticed(
    tmp_path: Path, array: str, value: float
) -> None:
    path = write(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file[array][:] = value
    with pytest.raises(DatasetError, match="was changed after it was written: expected digest"):
        read_dataset(path)


def test_files_of_version_1_are_read_and_keep_their_digest(tmp_path: Path) -> None:
    new = read_dataset(write(tmp_path / "d.hdf5"))
    old = read_dataset(as_version_1(write(tmp_path / "old.hdf5")))
    assert (old.digest, old.digest_version) == (new.digests[1], 1)
    assert old.digests == new.digests
    np.testing.assert_array_equal(old.states, new.states)
    runner = CliRunner()
    summary = json.loads(
        runner.invoke(app, ["inspect", "dataset", str(tmp_path / "old.hdf5"), "--json"]).stdout
    )
    assert (summary["digest"], summary["digest_version"]) == (old.digest, 1)
    table = runner.invoke(app, ["inspect", "dataset", str(tmp_path / "old.hdf5")]).stdout
    assert "version 1" in table
    assert concatenate([tmp_path / "old.hdf5"], tmp_path / "again.hdf5") == new.digest  # in version 2
    with h5py.File(tmp_path / "old.hdf5", "a") as file:
        file["r"][1] += 1
    with pytest.raises(DatasetError, match="was changed after it was written"):
        read_dataset(tmp_path / "old.hdf5")


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file["omcda"].attrs["format_version"] = 3
    with pytest.raises(DatasetError, match="has format version 3, expected 1 or 2: update omcda-deploy"):
        read_dataset(path)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Trains a short run on a file."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))

    def begin(data: Path) -> Path:
        return train(
            data,
            "bc",
            tmp_path / f"run-{data.stem}",
            steps=100,
            settings=SMALL,
            behavior={"steps": 2},
            checkpoint_every=100,
            snapshot_every=100,
        )

    return begin


@pytest.mark.parametrize("change", [states, end])
@pytest.mark.parametrize("version", [1, 2])
def test_a_run_is_not_resumed_with_other_states_or_ends(
    tmp_path: Path, begun: Callable[[Path], Path], change: Change, version: int
) -> None:
    convert = as_version_1 if version == 1 else Path
    data = convert(write(tmp_path / "d.hdf5"))
    run = begun(data)
    other = convert(write(tmp_path / "other.hdf5", change))
    with pytest.raises(ConfigError, match=r"was trained on a dataset of digest (\w{12})…, got (?!\1)\w{12}…"):
        resume(run, other)
    resume(run, data)
    moved = data.rename(tmp_path / "moved.hdf5")
    resume(run, moved)
    jobs = jobs_of(
        sweep_of({"datasets": [str(moved)], "algorithms": ["bc"], "seeds": [0], "steps": 100}, "here"),
        tmp_path / "sweep",
    )
    job = replace(jobs[0], run=run, settings=tuple(SMALL.items()), snapshot_every=100)
    check_jobs([job])
    with pytest.raises(ConfigError, match=r"a run of dataset digest (\w{12})…, expected (?!\1)\w{12}…"):
        check_jobs([replace(job, dataset=other)])


@pytest.mark.parametrize("change", [states, end])
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_cached_of_a_dataset_is_not_taken_for_one_of_other_states_or_ends(
    tmp_path: Path, change: Change, version: int
) -> None:
    convert = as_version_1 if version == 1 else Path
    plain = read_dataset(convert(write(tmp_path / "plain.hdf5")))
    changed = read_dataset(convert(write(tmp_path / "changed.hdf5", change)))
    assert (plain.digest == changed.digest) == (version == 1)
    cloning = BehaviorConfig()
    search = BudgetSearch(asdict(Config()), steps=10, behavior=cloning)
    assert cloning.key(plain) != cloning.key(changed)
    assert search.key(plain) != search.key(changed)
    same = read_dataset(write(tmp_path / "same.hdf5"))  # of version 2, with the contents of the first
    assert (cloning.key(plain), search.key(plain)) == (cloning.key(same), search.key(same))


def test_runs_of_the_version_before_resume(tmp_path: Path, begun: Callable[[Path], Path]) -> None:
    """Their configuration holds a digest of version 1 alone."""
    data = write(tmp_path / "d.hdf5")
    run = begun(data)
    config = read_config(run)
    assert config.dataset_content == config.dataset_digest == read_dataset(data).digest
    write_config(run, replace(config, dataset_digest=digest_of(data, 1), dataset_content=""))
    (run / "policies" / "step-00000100.pt").unlink()
    (run / "resume.pt").unlink()
    resume(run)
    assert snapshot_steps(run)[-1] == 100
    assert read_config(run).dataset_digest == digest_of(data, 1)
    with pytest.raises(ConfigError, match="resume with the dataset it began with"):
        resume(run, write(tmp_path / "other.hdf5", reward))
