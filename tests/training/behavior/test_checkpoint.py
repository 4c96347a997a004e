"""Runs of behaviour policies: files that are checkpoints, and files that are not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.errors import ConfigError

pytest.importorskip("stable_baselines3")

from omcda_deploy.training.behavior.checkpoint import (
    checkpoint_path,
    find_checkpoints,
    new_run,
    read_checkpoint,
    read_config,
    write_checkpoint,
)


@dataclass(frozen=True)
class Config:
    steps: int


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 100)
    write_checkpoint(path, {"w1": np.eye(2, dtype=np.float32), "clip": np.asarray(10.0)})
    assert path.name == "checkpoint-00000100.npz"
    arrays = read_checkpoint(path, ("w1",))
    assert list(arrays) == ["w1"]
    assert arrays["w1"].dtype == np.float32
    np.testing.assert_array_equal(arrays["w1"], np.eye(2))
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    names = ("w1", "b1")
    with pytest.raises(ConfigError, match=r"does not exist: expected a checkpoint-<steps>\.npz"):
        read_checkpoint(tmp_path / "nothing.npz", names)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ConfigError, match="is not a behaviour policy's checkpoint"):
        read_checkpoint(tmp_path / "text.npz", names)
    np.savez(tmp_path / "other.npz", w1=np.zeros(3))
    with pytest.raises(ConfigError, match=r"is not a behaviour policy's checkpoint .* a \.npz with w1, b1"):
        read_checkpoint(tmp_path / "other.npz", names)
    np.savez(tmp_path / "pickle.npz", w1=np.zeros(3), b1=np.array([{}], dtype=object))
    with pytest.raises(ConfigError, match=r"is not a behaviour policy's checkpoint .*allow_pickle=False"):
        read_checkpoint(tmp_path / "pickle.npz", names)


def test_a_run_has_its_task_and_its_checkpoints_in_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_run(run, "mamujoco/hopper-3x1", 7, Config(300))
    assert read_config(run) == {"task": "mamujoco/hopper-3x1", "seed": 7, "steps": 300}
    for steps in (123_456_789, 200, 9_000):
        write_checkpoint(checkpoint_path(run, steps), {"w1": np.zeros(1)})
    (run / ".checkpoint-00000300.npz").touch()  # left by a process that was killed while it wrote
    assert list(find_checkpoints(run)) == [200, 9_000, 123_456_789]
    with pytest.raises(ConfigError, match="exists already"):
        new_run(run, "mamujoco/hopper-3x1", 7, Config(300))
    assert json.loads((run / "config.json").read_text())["steps"] == 300


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a folder of  omcda-deploy behavior train, .* config\.json"
    ):
        read_config(tmp_path)
