"""Runs and their cache on disks that are full: told in one line, and the run goes on from its checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments import train as training
from omcda_deploy.files import cache_folder
from omcda_deploy.registry import team_spec
from omcda_deploy.training import behavior_model, loop, member
from omcda_deploy.training.checkpoint import load_state, save_state
from omcda_deploy.training.run_folder import snapshot_steps
from tests.support.behavior_cache import cache_behavior
from tests.support.synthetic import write_dataset

SETTINGS: dict[str, Any] = {"hidden": 8, "batch_size": 8}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    return write_dataset(tmp_path / "hopper.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)


def full(allowed: int) -> Callable[[Path, dict[str, Any]], None]:
    """Saving on a disk that is full after so many files."""
    left = allowed

    def save(path: Path, state: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_state(path, state)

    return save


def test_runs_of_several_seeds_begin_together_or_not_at_all(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_behavior(file)
    monkeypatch.setattr(loop, "save_state", full(1))
    with pytest.raises(ConfigError, match=r"seed1 cannot be written \(No space left on device\)"):
        training.train(
            file, "bc", tmp_path / "runs", steps=10, seed=[0, 1, 2], settings=SETTINGS, log_every=10
        )
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_somebody_else_makes_meanwhile_is_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_behavior(file)
    clones, notes = loop._clones, tmp_path / "runs" / "seed1" / "notes.txt"

    def cloning(*arguments: Any) -> Any:
        notes.parent.mkdir(parents=True)
        notes.write_text("mine")
        return clones(*arguments)

    monkeypatch.setattr(loop, "_clones", cloning)
    with pytest.raises(ConfigError, match="seed1 cannot be written"):
        training.train(file, "bc", tmp_path / "runs", steps=10, seed=[0, 1], settings=SETTINGS, log_every=10)
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["seed1"]
    assert notes.read_text() == "mine"


def test_a_run_that_a_full_disk_stops_goes_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_behavior(file)
    run = tmp_path / "runs" / "bc"
    every: dict[str, Any] = {"log_every": 10, "checkpoint_every": 10, "snapshot_every": 10}
    monkeypatch.setattr(member, "save_state", full(5))
    message = rf"training stopped, as {run} cannot be written \(No space left on device\): .* --resume {run}$"
    with pytest.raises(ConfigError, match=message):
        training.train(file, "bc", run, steps=60, settings=SETTINGS, **every)
    assert snapshot_steps(run)[-1] < 60
    monkeypatch.undo()
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    training.resume(run)
    assert snapshot_steps(run)[-1] == 60
    assert [path.name for path in run.parent.iterdir()] == ["bc"]
    whole = training.train(file, "bc", tmp_path / "whole", steps=60, settings=SETTINGS, **every)
    for name, tensor in load_state(run / "policies/step-00000060.pt")["policy"].items():
        assert torch.equal(tensor, load_state(whole / "policies/step-00000060.pt")["policy"][name])


def test_a_run_that_does_not_fit_is_not_begun(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_behavior(file)
    monkeypatch.setattr(loop, "save_state", full(0))
    with pytest.raises(
        ConfigError, match=r"runs/bc cannot be written \(No space left on device\): free some"
    ):
        training.train(file, "bc", tmp_path / "runs" / "bc", steps=10, settings=SETTINGS)
    assert not (tmp_path / "runs").exists()


def test_a_cache_that_fills_up_costs_no_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After minutes of cloning."""
    monkeypatch.setattr(behavior_model, "save_state", full(0))
    training.train(file, "bc", tmp_path / "bc", steps=10, settings=SETTINGS, behavior={"steps": 10})
    assert snapshot_steps(tmp_path / "bc") == [10]
    assert "is not kept for other runs, as it cannot be written (No space left on device)" in caplog.text
    assert not list(cache_folder().rglob("*.pt"))


def test_a_state_that_does_not_fit_is_told_by_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own writer reports a RuntimeError without one."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_state(tmp_path / "x.pt", {"step": 1})
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path / "x.pt", {"step": 2})
    assert load_state(tmp_path / "x.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
