"""One trainer per run folder: two real processes, kills, and the file of the lock."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from omcda_deploy.claims import lock_path
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments import train as training
from omcda_deploy.registry import team_spec
from omcda_deploy.training import loop, run_lock
from omcda_deploy.training.run_lock import require_unlocked
from tests.support.behavior_cache import cache_behavior
from tests.support.processes import wait_for
from tests.support.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
SETTINGS = ["--algo", "bc", "--set", "hidden=8", "--set", "batch_size=8"]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "hopper.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "omcda_deploy.cli", "train", *map(str, words)]


@contextmanager
def trainer(file: Path, run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real training that never ends by itself, once it holds the run's lock."""
    endless = command(file, *SETTINGS, "--out", run, "--steps", 10**9)
    with subprocess.Popen(endless) as process:
        try:
            wait_for(lambda: lock_path(run).exists() and lock_path(run).read_text(), 60, "no lock")
            yield process
        finally:
            process.kill()


def refused(*words: object) -> str:
    """Run ``train``, which ends with status 2 and one line; returns the line."""
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_a_second_trainer_is_refused_and_told_of_the_first(file: Path, tmp_path: Path) -> None:
    """While the run trains: by the command, again and resuming, and by the library. A kill ends the refusals."""
    run = tmp_path / "runs" / "bc"
    cache_behavior(file)
    with trainer(file, run) as first:
        wait_for(run.exists, 60, "no run folder")
        expected = (
            f"{run} is being trained by process {first.pid}: wait for it, or stop it with  kill {first.pid} and "
            f"continue with  train --resume {run}"
        )
        assert refused("--resume", run) == f"error: {expected}"
        assert refused(file, *SETTINGS, "--out", run) == f"error: {expected}"
        for again in (
            lambda: training.resume(run),
            lambda: training.train(file, "bc", run, steps=10),
            lambda: loop.resume_fleet(read(file), [run]),
        ):
            with pytest.raises(ConfigError) as raised:
                again()
            assert str(raised.value) == expected
    require_unlocked(run)
    assert lock_path(run).exists()  # what a kill leaves is no obstacle
    with trainer_of(run) as second:
        wait_for(lambda: lock_path(run).read_text().startswith(f"{second.pid} "), 60, "not resumed")


@contextmanager
def trainer_of(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command("--resume", run)) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_run_that_is_only_being_created_is_locked_too(file: Path, tmp_path: Path) -> None:
    """Cloning the behaviour policy comes before the folder, and may take minutes."""
    run = tmp_path / "runs" / "bc"
    with cache_behavior(file).with_suffix(".lock").open("w") as cloning:
        fcntl.flock(cloning, fcntl.LOCK_EX)  # as if another run cloned it
        with trainer(file, run) as first:
            line = refused(file, *SETTINGS, "--out", run)
            assert line.startswith(f"error: {run} is being trained by process {first.pid}: wait for it, ")
            assert not run.exists()


def test_a_lock_that_is_dropped_soon_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose sweep was killed needs a moment to notice; the next sweep must not fail on it."""
    code = "import sys, time; from pathlib import Path; from omcda_deploy.training.run_lock import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(0.7)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"being trained by process {process.pid}"):
            require_unlocked(tmp_path / "run")
        monkeypatch.setattr(run_lock, "PATIENCE_S", 30.0)
        with run_lock.run_lock(tmp_path / "run"):
            assert lock_path(tmp_path / "run").read_text().split()[0] == str(os.getpid())
    assert not lock_path(tmp_path / "run").exists()


def test_one_folder_has_one_lock_whatever_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    with run_lock.run_lock(Path()):
        for path in (tmp_path / "run", tmp_path / "link", Path("../run"), Path()):
            with pytest.raises(ConfigError, match=f"is being trained by process {os.getpid()}"):
                require_unlocked(path)
            with pytest.raises(ConfigError, match="is being trained"), run_lock.run_lock(path):
                pass
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_many_that_start_together_hold_it_one_after_another(tmp_path: Path) -> None:
    """Files are removed as locks are dropped; nobody may hold a lock on a file that is no longer there."""
    code = """
import sys, time
from pathlib import Path
from omcda_deploy import claims
from omcda_deploy.training import run_lock
run_lock.PATIENCE_S, claims.RETRY_S = 60.0, 0.0005
run, held = Path(sys.argv[1]), Path(sys.argv[1] + ".held")
for _ in range(200):
    with run_lock.run_lock(run):
        held.mkdir()  # fails where another holds the lock
        held.rmdir()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"cannot lock .*file/run with .*\.run\.lock \(Not a directory\)"
    with pytest.raises(ConfigError, match=message), run_lock.run_lock(tmp_path / "file" / "run"):
        pass


def test_a_trainer_on_another_machine_is_named_with_it(tmp_path: Path) -> None:
    with run_lock.run_lock(tmp_path / "run"):
        lock_path(tmp_path / "run").write_text("17 node7")
        with pytest.raises(
            ConfigError, match=r"by process 17 on node7: wait for it, .* kill 17 on node7 and"
        ):
            require_unlocked(tmp_path / "run")
        lock_path(tmp_path / "run").write_text("")
        start = time.monotonic()
        with pytest.raises(ConfigError, match="is being trained by another process"):
            require_unlocked(tmp_path / "run")
        assert time.monotonic() - start < 1
