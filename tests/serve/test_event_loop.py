"""The poller and the event loop of a server process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.remote import RemotePolicy
from omcda_deploy.serve import event_loop
from tests.support.server_process import server_process


def loop_with(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> str:
    """Return the module of the event loop that runs under an environment."""
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    event_loop.choose_poller()
    modules: list[str] = []

    async def look() -> None:
        modules.append(type(asyncio.get_running_loop()).__module__)

    event_loop.run(look())
    return modules[0]


def test_uvloop_runs_on_the_poller_that_we_choose_and_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop_with(monkeypatch, {}) == "uvloop"
    assert os.environ["GRPC_EXPERIMENTS"] == "-event_engine_listener"
    assert loop_with(monkeypatch, {"GRPC_EXPERIMENTS": ""}).startswith("asyncio")
    assert os.environ["GRPC_EXPERIMENTS"] == ""


LOOK = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_EXPERIMENTS"))
sys.meta_path.insert(0, Finder())
"""
MODULE = """
import runpy
sys.argv = ["serve", "/nothing/there"]
try:
    runpy.run_module("omcda_deploy.serve", run_name="__main__")
except SystemExit:
    pass
"""
COMMAND = """
from pathlib import Path
from omcda_deploy.commands.serve import serve
try:
    serve(Path("/nothing/there"), agent="a", port=0)
except Exception:
    pass
"""


@pytest.mark.parametrize("start", [MODULE, COMMAND])
def test_the_poller_is_chosen_before_grpc_is_imported(start: str) -> None:
    """gRPC reads the choice when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK + start],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert done.stdout.splitlines() == ["-event_engine_listener"], done.stderr


@pytest.mark.parametrize("chosen", ["", "-event_engine_listener"])
def test_either_poller_answers_and_grpc_knows_its_name(
    continuous_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", chosen)
    log = tmp_path / "log"
    with (
        server_process(continuous_bundle, "agent_0", log=log) as server,
        RemotePolicy(server.endpoint, "agent_0") as policy,
    ):
        observation = np.zeros(continuous_bundle.spec.agent("agent_0").observation_size, np.float32)
        assert policy.act(observation).action.shape == (1,)
    assert log.read_text() == ""  # gRPC complains of experiments that it does not know
