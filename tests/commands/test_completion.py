"""Completion in shells: names of tasks, tiers, algorithms and engines, without a simulator or torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "jax", "mujoco", "grpc", "h5py", "onnxruntime", "gymnasium")
PROBE = f"""
import sys
from omcda_deploy import cli
try:
    cli.main()
finally:
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, heavy
"""


def call(*words: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("collect toy/one", "toy/one-step toy/one-step-hidden"),
        ("collect smax/corridor --tier ", "medium poor random"),
        ("train data.hdf5 --algo om", "omar omcda omiga"),
        ("settings omcda smax/6", "smax/6h_vs_8z"),
        ("replay data.hdf5 --task mamujoco/hu", "mamujoco/humanoid-9-8"),
        ("sweep s.toml --engine s", "slurm"),
        ("inspect nothing-here ", "dataset bundle run"),
        ("algori", "algorithms"),
    ],
)
def test_names_are_completed(line: str, expected: str) -> None:
    words = line.split(" ")
    output = call(
        _OMCDA_DEPLOY_COMPLETE="complete_bash",
        COMP_WORDS=f"omcda-deploy {line}",
        COMP_CWORD=str(len(words)),
    )
    assert output.split() == expected.split()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_of_a_shell_is_shown(shell: str) -> None:
    script = call("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_OMCDA_DEPLOY_COMPLETE=complete_{shell}" in script


def test_help_imports_nothing_heavy() -> None:
    assert "omcda-deploy" in call("--help")
