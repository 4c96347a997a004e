"""A task that nothing here plays: its spec, in a dataset, a run or a bundle, is enough for everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.cli import app
from omcda_deploy.datasets.convert import convert
from omcda_deploy.datasets.writer import write_dataset
from omcda_deploy.errors import ConfigError, DatasetError, NoSimulatorError, OmcdaError, UnknownNameError
from omcda_deploy.experiments.compare import compare_runs
from omcda_deploy.experiments.scores import Conditions
from omcda_deploy.experiments.train import train
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.registry import read_dataset
from omcda_deploy.training.run_folder import snapshot_steps
from tests.support.episodes import SPECS, random_episode
from tests.support.smac_episodes import random_episode as random_smac_episode
from tests.support.smac_episodes import save_madt

SPEC = replace(SPECS["discrete"], task="cell/sort")
SETTINGS = ["--set", "hidden=8", "--set", "batch_size=8", "--behavior-steps", "2"]
STEPS = ["--steps", "200", "--checkpoint-every", "100", "--snapshot-every", "100"]


def command(*words: str | Path) -> str:
    """Standard output. Raises what the command raises."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def stopped(run: Path, copy: Path) -> Path:
    """A copy of a run as a kill left it: without its last policy and state."""
    shutil.copytree(run, copy)
    (copy / "policies" / "step-00000200.pt").unlink()
    (copy / "resume.pt").unlink()
    return copy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dataset of a task of one's own, a run on it and its bundle."""
    root = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(root / "cache"))
        episodes = [random_episode(SPEC, 6, seed, timeout=seed % 2 == 0) for seed in range(8)]
        write_dataset(root / "d.hdf5", SPEC, episodes)
        command("train", root / "d.hdf5", "--algo", "bc", "--out", root / "run", *STEPS, *SETTINGS)
        command("export", root / "run", "--out", root / "bundle")
        yield root


def test_it_is_not_known() -> None:
    assert SPEC.task not in registry.tasks()


def test_it_is_trained_resumed_and_replayed(home: Path, tmp_path: Path) -> None:
    run = stopped(home / "run", tmp_path / "run")
    command("train", "--resume", run)
    assert snapshot_steps(run)[-1] == 200
    data = home / "d.hdf5"
    assert read_dataset(data, SPEC.task).spec == read_dataset(data, SPEC).spec == SPEC
    command("inspect", "dataset", data, "--task", SPEC.task)
    command("replay", data, "--task", SPEC.task, "--bundle", home / "bundle", "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["task"] == SPEC.task
    with pytest.raises(UnknownNameError, match="unknown task 'cell/sorted': did you mean 'cell/sort'"):
        read_dataset(data, "cell/sorted")


def test_a_sweep_on_it_is_called_again(home: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'datasets = ["{home / "d.hdf5"}"]\nalgorithms = ["bc"]\nseeds = [0]\nsteps = 200\nsnapshot_every = 100\n'
        "[grid.bc]\nhidden = [8]\nbatch_size = [8]\n"
    )
    run = tmp_path / "out" / "d" / "bc-hidden=8-batch_size=8" / "seed0"
    stopped(home / "run", run)
    command("sweep", sweep, "--out", tmp_path / "out")
    assert snapshot_steps(run)[-1] == 200


def test_only_playing_needs_a_simulator_and_says_so(home: Path, tmp_path: Path) -> None:
    missing = "cell/sort has no simulator here"
    with pytest.raises(NoSimulatorError, match=missing):
        evaluate(LocalTeam(home / "bundle"), SPEC.task, episodes=1)
    with pytest.raises(NoSimulatorError, match=missing):
        command("evaluate", SPEC.task, "--bundle", home / "bundle")
    with pytest.raises(UnknownNameError, match="unknown task 'cell/other'"):
        command("evaluate", "cell/other", "--bundle", home / "bundle")
    words = ["train", str(home / "d.hdf5"), "--algo", "bc", "--out", str(tmp_path / "run"), *STEPS, *SETTINGS]
    with pytest.raises(NoSimulatorError, match=missing):
        command(*words, "--evaluate-every", "100")
    with pytest.raises(NoSimulatorError, match=missing):
        command("train", "--resume", home / "run", "--evaluate-every", "100")
    assert not list(tmp_path.iterdir())


def test_compare_says_so_row_by_row_and_does_not_die(home: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        shutil.copytree(home / "run", tmp_path / "runs" / f"seed{seed}")
    shutil.copytree(home / "run", tmp_path / "runs" / "unfinished")
    (tmp_path / "runs" / "unfinished" / "policies" / "step-00000200.pt").unlink()
    out = command("compare", tmp_path / "runs", "--out", tmp_path / "report")
    text = (tmp_path / "report" / "results.md").read_text()
    for seed in (0, 1):
        row = f"runs/seed{seed}` (bc, seed 0): cell/sort has no simulator here"
        assert row in text
    assert out.count("cell/sort has no simulator here") == 2
    assert "unfinished: its last policy is of step 100 of 200" in text
    assert "has no simulator here" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "runs" / "seed0-bundle").is_dir()  # exported all the same
    shutil.rmtree(tmp_path / "runs" / "seed0")
    shutil.rmtree(tmp_path / "runs" / "seed1")
    with pytest.raises(ConfigError, match="none of 1 runs can be compared"):
        compare_runs([tmp_path / "runs" / "unfinished"], Conditions(1, 0, 1))


def test_smac_data_of_the_mappo_variant_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "5m_vs_6m"
    save_madt(folder, a=random_smac_episode(3, 0, mappo=True), b=random_smac_episode(2, 1, mappo=True))
    data = tmp_path / "d.hdf5"
    assert convert(folder, data)["task"] == "smac-mappo/5m_vs_6m"
    settings: dict[str, Any] = {"hidden": 8, "batch_size": 8}
    train(
        data,
        "bc",
        tmp_path / "run",
        steps=200,
        settings=settings,
        behavior={"steps": 2},
        checkpoint_every=100,
        snapshot_every=100,
    )
    copy = stopped(tmp_path / "run", tmp_path / "copy")
    command("train", "--resume", copy)
    assert snapshot_steps(copy)[-1] == 200
    with pytest.raises(OmcdaError, match="do not fit together"):
        command("train", data, "--task", "smac/5m_vs_6m", "--out", tmp_path / "other")


def test_a_run_holds_the_team_of_a_file_that_does_not(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    data = Path(shutil.copy(home / "d.hdf5", tmp_path / "bare.hdf5"))
    with h5py.File(data, "a") as file:
        del file["omcda"]
    with pytest.raises(DatasetError, match="does not say of which task it is"):
        read_dataset(data)
    settings: dict[str, Any] = {"hidden": 8, "batch_size": 8}
    train(
        data,
        "bc",
        tmp_path / "run",
        steps=200,
        settings=settings,
        task=SPEC,
        behavior={"steps": 2},
        checkpoint_every=100,
        snapshot_every=100,
    )
    copy = stopped(tmp_path / "run", tmp_path / "copy")
    command("train", "--resume", copy)
    assert snapshot_steps(copy)[-1] == 200


def test_no_registry_is_asked_for_what_a_file_holds(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known task whose simulator cannot be made: resuming reads the run's own team."""

    def refuse(task: str, **_: Any) -> Any:
        raise AssertionError(f"the registry was asked for {task}")

    spec = registry.team_spec("toy/masked")
    write_dataset(tmp_path / "toy.hdf5", spec, [random_episode(spec, 3, seed) for seed in range(4)])
    monkeypatch.setattr(registry, "team_spec", refuse)
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    data, run = tmp_path / "toy.hdf5", tmp_path / "run"
    command("train", data, "--task", "toy/masked", "--algo", "bc", "--out", run, *STEPS, *SETTINGS)
    command("train", "--resume", stopped(run, tmp_path / "copy"))
    command("export", tmp_path / "copy", "--out", tmp_path / "bundle")
    command("replay", tmp_path / "toy.hdf5", "--bundle", tmp_path / "bundle")
