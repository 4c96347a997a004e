"""SIGTERM ends commands as an exception would: half-written files are removed, children end first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from omcda_deploy.registry import team_spec
from tests.support.processes import wait_for
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


def test_a_termination_that_is_swallowed_is_repeated() -> None:
    """As some modules do while they are imported. The clean-up is not disturbed by it."""
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (TERMINATED, "cleaned\n")


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


@pytest.mark.parametrize("name", ["collect", "train"])
def test_a_command_that_is_terminated_leaves_nothing(tmp_path: Path, name: str) -> None:
    file = write_dataset(tmp_path / "d.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)
    folder = tmp_path / "new"
    words = endless(file, folder / "out.hdf5")[name]
    with subprocess.Popen(
        [sys.executable, "-m", "omcda_deploy.cli", *map(str, words)], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: folder.is_dir() and os.listdir(folder), 60, "not begun")  # noqa: PTH208
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == TERMINATED
    assert "Traceback" not in errors
    assert not folder.exists()
