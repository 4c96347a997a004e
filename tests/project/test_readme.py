"""The README's blocks, run as they stand but for the sizes of the run and the ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server_process import free_ports

README = Path(__file__).parents[2] / "README.md"
SMALLER = {
    "--transitions 200000": "--transitions 2000",
    "--steps 20000": "--steps 100 --behavior-steps 100",
    "--report report.html": "--episodes 2 --report report.html",
    "--bundle bundle": "--bundle bundle --episodes 1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_pipeline_and_python_blocks_run(tmp_path: Path) -> None:
    """One test, because the Python block talks to the servers that the pipeline starts; real physics, ~30 s."""
    [pipeline] = [block for block in blocks("bash") if "train data.hdf5" in block]
    [python] = blocks("python")
    base = free_ports(7)
    ports = {str(8500 + index): str(base + index) for index in range(7)}
    for old, new in SMALLER.items():
        assert old in pipeline
        pipeline = pipeline.replace(old, new)
    for old, new in ports.items():
        pipeline, python = pipeline.replace(old, new), python.replace(old, new)
    wait = f"""until {sys.executable} -c 'from omcda_deploy.client.remote import RemoteTeam as R; \
R(["127.0.0.1:{base + 5}"])' 2>&1 | grep -q "agent_0"; do sleep 0.3; done"""
    lines = pipeline.splitlines()
    served = next(index for index, line in enumerate(lines) if line.endswith("&"))
    lines[served + 1 : served + 1] = ["server=$!", wait]
    (tmp_path / "loop.py").write_text(python)
    script = "\n".join(["set -e", *lines, f"{sys.executable} loop.py", "kill -TERM $server", "wait $server"])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMCDA_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert re.search(r"return -?\d+\.\d, divergence now \d+\.\d+ nats", output), output
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("target", ["test", "demo"])
def test_make_targets_of_the_readme_exist(target: str) -> None:
    assert any(f"make {target}" in block for block in blocks("bash"))
    dry = subprocess.run(["make", "-n", target], cwd=README.parent, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
