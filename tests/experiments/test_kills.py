"""Killed parents: sweep, results and train leave no training or evaluation behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from omcda_deploy.processes import child_environment
from omcda_deploy.registry import team_spec
from tests.support.behavior_cache import cache_behavior
from tests.support.processes import running, wait_for
from tests.support.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
LIMIT_S = 2.0
KILLS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    for pid in running(tmp_path):  # of a test that failed
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def command(*words: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-m", "omcda_deploy.cli", *map(str, words)]) as process:
        try:
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[bytes], number: signal.Signals, folder: Path) -> None:
    """Kill a process, whose children are then gone within two seconds."""
    process.send_signal(number)
    process.wait(10)
    wait_for(lambda: not running(folder), LIMIT_S, f"left behind: {running(folder)}")


@KILLS
def test_a_killed_sweep_leaves_no_training(tmp_path: Path, number: signal.Signals) -> None:
    """Called again, it trains each run once; killed as soon as trainings start, and when they train."""
    dataset = write_dataset(tmp_path / "a.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)
    cache_behavior(dataset)
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'datasets = ["{dataset}"]\nalgorithms = ["bc"]\nseeds = [0, 1, 2]\nsteps = 1000000000\n'
        "[grid.bc]\nhidden = [8]\nbatch_size = [8]\n"
    )
    words = ("sweep", file, "--out", tmp_path / "out", "--jobs", 2)
    runs = [tmp_path / "out" / "a" / "bc-hidden=8-batch_size=8" / f"seed{seed}" for seed in (0, 1, 2)]

    def trainings() -> int:
        return len(running(tmp_path, " train-jobs "))

    with command(*words) as process:
        wait_for(lambda: trainings() == 2, 60, "no training")
        kill(process, number, tmp_path)
    with command(*words) as process:
        wait_for(lambda: all((run / "metrics.jsonl").is_file() for run in runs), 120, "no steps")
        assert trainings() == 2
        kill(process, number, tmp_path)
    begun = [(run / "config.json").stat().st_mtime_ns for run in runs]
    with command(*words) as process:  # at once: the first trainings may not have noticed yet
        wait_for(lambda: trainings() == 2, 60, "not resumed")
        assert process.poll() is None
        kill(process, number, tmp_path)
    assert [(run / "config.json").stat().st_mtime_ns for run in runs] == begun


@KILLS
def test_a_killed_results_page_leaves_no_training(tmp_path: Path, number: signal.Signals) -> None:
    page = tmp_path / "page.toml"
    page.write_text(
        'title = "Toy"\ntask = "toy/masked"\ntier = "behavior"\ntransitions = 300\n'
        '[[runs]]\nalgorithms = ["bc"]\nseeds = [0, 1]\nsteps = 1000000000\n[runs.grid.bc]\nhidden = [8]\n'
    )
    with command("results", page, "--out", tmp_path / "out", "--jobs", 2) as process:
        wait_for(lambda: len(running(tmp_path, " train-jobs ")) == 2, 120, "no training")
        kill(process, number, tmp_path)


@KILLS
def test_a_killed_training_leaves_no_evaluation(tmp_path: Path, number: signal.Signals) -> None:
    """Ten episodes of a thousand steps would take longer than the time in which the evaluation must end."""
    dataset = write_dataset(tmp_path / "a.hdf5", team_spec("mamujoco/halfcheetah-6x1"), [40, 20] * 2)
    settings = ("--set", "hidden=8", "--set", "batch_size=8", "--behavior-steps", 1)
    words = ("--steps", 100, "--checkpoint-every", 100, "--evaluate-every", 100)
    with command("train", dataset, "--algo", "bc", "--out", tmp_path / "run", *settings, *words) as process:
        wait_for(lambda: running(tmp_path, "evaluation"), 120, "no evaluation")
        kill(process, number, tmp_path)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_only_a_child_that_is_asked_to_ends_with_its_parent(tmp_path: Path) -> None:
    """The request is for one process: its own children do not inherit it."""
    code = (
        "import os, subprocess, sys; from omcda_deploy.processes import end_with_parent; end_with_parent(); "
        "print(subprocess.run([sys.executable, '-c', 'import os; print(sorted(os.environ))'], "
        "capture_output=True, text=True).stdout)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=child_environment(A="b"), capture_output=True, text=True, check=True)
    assert "'A'" in done.stdout
    assert "OMCDA_PARENT" not in done.stdout
