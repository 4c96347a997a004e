"""SIGTERM ends commands as an exception would: half-written files are removed, children end first."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from omcda_deploy.registry import team_spec
from omcda_deploy.training.run_folder import saved_step
from tests.support.bundles import write_test_bundle
from tests.support.processes import running, wait_for
from tests.support.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
TERMINATED = 128 + signal.SIGTERM
PARENT = """
import sys
from omcda_deploy.processes import run_child, unwinding_on_sigterm
with unwinding_on_sigterm():
    try:
        run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]])
    finally:
        print("unwound", flush=True)
"""
CHILD = """
import pathlib, sys, time
from omcda_deploy.processes import unwinding_on_sigterm
partial = pathlib.Path(sys.argv[1])
with unwinding_on_sigterm():
    try:
        partial.touch()
        time.sleep(60)
    finally:
        time.sleep(0.5)
        partial.unlink()
"""

SWALLOWED = """
import os, signal, time
from omcda_deploy.processes import unwinding_on_sigterm
with unwinding_on_sigterm():
    try:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException:
            pass
        time.sleep(10)
    finally:
        time.sleep(0.7)
        print("cleaned")
"""

FINALIZER = """
import os, signal, sys, time
from omcda_deploy.processes import unwinding_on_sigterm
sys.__unraisablehook__ = lambda unraisable: print("Exception ignored in: 'other'", file=sys.stderr)
class Other:
    def __del__(self):
        raise ValueError
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
with unwinding_on_sigterm():
    Other()
    Slow()
    time.sleep(10)
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_parent_asks_its_children_to_clean_up_first(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD, partial], stdout=subprocess.PIPE) as process:
        wait_for(partial.exists, 30, "no child")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # a second one does not disturb
        output, _ = process.communicate(timeout=30)
    assert process.returncode == TERMINATED
    assert output == b"unwound\n"
    assert not partial.exists()


def test_files_are_written_though_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    spec = team_spec("mamujoco/hopper-3x1")
    data = write_dataset(tmp_path / "data.hdf5", spec, [10, 10])
    write_test_bundle(tmp_path / "bundle", spec)
    write_test_bundle(tmp_path / "toy", team_spec("toy/masked"))
    files = [tmp_path / name for name in ("replay.json", "replay.html", "evaluate.json", "evaluate.html")]
    for words in (
        f"replay {data} --bundle {tmp_path / 'bundle'} --episodes 1 --json {files[0]} --report {files[1]}",
        f"evaluate toy/masked --bundle {tmp_path / 'toy'} --episodes 1 --json {files[2]} --report {files[3]}",
        "--version",
    ):
        unread, printed = os.pipe()
        os.close(unread)
        done = subprocess.run(
            [sys.executable, "-m", "omcda_deploy.cli", *words.split()],
            stdout=printed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        os.close(printed)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, ""), words
    assert all(file.stat().st_size for file in files)


def test_a_termination_that_is_swallowed_is_repeated() -> None:
    """As some modules do while they are imported. The clean-up is not disturbed by it."""
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (TERMINATED, "cleaned\n")


def test_a_termination_during_a_finalizer_is_repeated_without_a_word() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FINALIZER], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (TERMINATED, "Exception ignored in: 'other'\n")


def endless(file: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """Commands that would run for hours, by name."""
    small = ("--algo", "bc", "--set", "hidden=8", "--set", "batch_size=8")
    return {
        "collect": (
            "collect",
            "toy/masked",
            "--tier",
            "behavior",
            "--workers",
            0,
            "--transitions",
            10**9,
            "--out",
            out,
        ),
        "train": ("train", file, *small, "--behavior-steps", 10**8, "--out", out.with_suffix("")),
    }


SIGNALS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


@pytest.mark.parametrize(
    ("name", "number"),
    [("collect", signal.SIGTERM), ("train", signal.SIGTERM), ("collect", signal.SIGINT)],
    ids=["collect", "train", "collect-ctrl-c"],
)
def test_a_command_that_is_stopped_leaves_nothing_and_says_so(
    tmp_path: Path, name: str, number: signal.Signals
) -> None:
    file = write_dataset(tmp_path / "d.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)
    folder = tmp_path / "new"
    words = [str(word) for word in endless(file, folder / "out.hdf5")[name]]
    with command(*words) as process:
        wait_for(lambda: folder.is_dir() and os.listdir(folder), 60, "not begun")  # noqa: PTH208
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    again = shlex.join(["omcda-deploy", *words])
    assert errors.splitlines()[-1] == f"{SIGNALS[number]}: nothing was kept, start again with  {again}"
    assert "Traceback" not in errors
    assert not folder.exists()


@contextmanager
def command(*words: object) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a process group of its own, as a shell does."""
    arguments = [sys.executable, "-m", "omcda_deploy.cli", *map(str, words)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_training_that_is_interrupted_goes_on_with_the_command_that_it_names(tmp_path: Path) -> None:
    file = write_dataset(tmp_path / "d.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)
    run = tmp_path / "a run"
    small = ("--set", "hidden=8", "--set", "batch_size=8", "--behavior-steps", 5, "--checkpoint-every", 100)
    with command("train", file, "--algo", "bc", *small, "--steps", 1500, "--out", run) as process:
        wait_for(lambda: (run / "resume.pt").exists() and saved_step(run) >= 100, 60, "no state")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    kept, _, words = errors.splitlines()[-1].partition(" is kept, go on with  ")
    assert kept.startswith("interrupted: the state of step ")
    assert 100 <= int(kept.rpartition(" ")[2]) < 1500
    assert shlex.split(words) == ["omcda-deploy", "train", "--resume", str(run)]
    with command(*shlex.split(words)[1:]) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.startswith(f"trained {run}")


def test_a_sweep_that_is_interrupted_ends_its_trainings_and_counts_what_is_finished(tmp_path: Path) -> None:
    """Also where the signal reaches the sweep alone."""
    file = write_dataset(tmp_path / "d.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)
    sweep = tmp_path / "s.toml"
    sweep.write_text(
        f'datasets = ["{file}"]\nalgorithms = ["bc"]\nseeds = [0, 1]\nsteps = 1000000\n'
        "[grid.bc]\nhidden = [8]\nbatch_size = [8]\n"
    )
    words = ("sweep", str(sweep), "--out", str(tmp_path / "out"), "--jobs", "1")
    with command(*words) as process:
        wait_for(lambda: list(tmp_path.glob("out/*/*/seed1/metrics.jsonl")), 90, "no run")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert output == "2 runs, 0 of them finished\n"
    again = shlex.join(["omcda-deploy", *words])
    assert errors.splitlines()[-1] == (
        f"interrupted: 0 of 2 runs are finished, the others go on from their last states with  {again}"
    )
    assert "failed" not in errors
    assert not running(tmp_path)


def test_a_signal_waits_for_a_short_block(tmp_path: Path) -> None:
    """It comes while the block runs, and ends the process after it."""
    program = """
import os, signal, sys, time
from pathlib import Path
from omcda_deploy.processes import postponing_signals, unwinding_on_sigterm
with unwinding_on_sigterm():
    with postponing_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        Path(sys.argv[1]).touch()
    time.sleep(30)
"""
    done = tmp_path / "done"
    ended = subprocess.run([sys.executable, "-c", program, str(done)], timeout=25, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert done.exists()


def test_a_signal_waits_for_tensorboard(tmp_path: Path) -> None:
    """Its queue, which a thread of its own empties, would stay locked, and the clean-up would wait for ever."""
    program = """
import os, signal, sys, time
from pathlib import Path
from torch.utils import tensorboard
from omcda_deploy.processes import unwinding_on_sigterm
from omcda_deploy.training.metrics import MetricsWriter

class Board(tensorboard.SummaryWriter):
    def add_scalar(self, *point):
        os.kill(os.getpid(), signal.SIGTERM)
        super().add_scalar(*point)
        print("whole")

    def close(self):
        super().close()
        print("closed")

tensorboard.SummaryWriter = Board
writer = MetricsWriter(Path(sys.argv[1]), 0)
with unwinding_on_sigterm():
    try:
        writer.write(1, {"a": 0.0, "b": 0.0})
        time.sleep(30)
    finally:
        writer.close()
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(words, timeout=25, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout.split() == ["whole", "whole", "closed"]
