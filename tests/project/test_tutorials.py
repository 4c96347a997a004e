"""The tutorials' blocks are run as they stand, but for the sizes of data and networks and the servers' ports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy import registry
from omcda_deploy.bundle import read_bundle
from omcda_deploy.envs import smac
from omcda_deploy.local import JointTeam
from omcda_deploy.registry import read_dataset
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.pages import DOCS, NOT_RUN, blocks, run_blocks
from tests.support.server_process import ROOT, server_process
from tests.support.smac_episodes import batch_of, save_pymarl

TUTORIALS = DOCS / "tutorials"
SMALLER = [
    (r"--transitions \d+", "--transitions 1200 --workers 0"),
    (r"--steps \d+ --set hidden=64", "--steps 20 --behavior-steps 20 --set hidden=16 --set batch_size=16"),
    (r"(evaluate|compare) (.*--env \S+)", r"\1 \2 --episodes 2"),
    (r"--episodes \d\d ", ""),
]
SMALLER_LOGS = [*SMALLER, (r"replay held-out.hdf5", "replay held-out.hdf5 --episodes 2")]


def text(name: str) -> str:
    return (TUTORIALS / f"{name}.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for name in ("lift", "rules"):
        sys.modules.pop(name, None)
    registry.rescan()


def test_own_logs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = text("own-logs")
    page = page.replace("range(200)", "range(30)").replace("for step in range(40)", "for step in range(3)")
    commands = run_blocks(page, SMALLER_LOGS, monkeypatch)
    assert [words[0] for words in commands if not words[0].endswith(".py")] == [
        *("import", "inspect", "split", "train", "export", "serve", "replay")
    ]
    cell = read_dataset(folder / "cell.hdf5")
    assert cell.spec.names == ("left", "right")
    assert cell.spec.agents[0].action.high == 0.5
    # A recorded transition is the cell's: what was commanded moved the carts.
    episode = cell.episode(3)
    moved = episode.observations[1:, :, 0] - episode.observations[:-1, :, 0]
    assert moved == pytest.approx(0.1 * episode.actions[:, :, 0], abs=1e-6)
    assert len(read_dataset(folder / "held-out.hdf5").episode_length) == 6
    assert re.search(r"middle of the beam at -?\d\.\d\d m of 0\.4 m, length", capsys.readouterr().out)
    assert (folder / "replay.html").stat().st_size > 10_000


def test_own_simulator_and_its_reports(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pettingzoo")
    page = text("own-simulator")
    [simulator] = [block for language, file, block in blocks(page) if file == "lift.py"]
    assert len(simulator.splitlines()) <= 45
    run_blocks(page, SMALLER, monkeypatch)
    printed = capsys.readouterr().out
    assert "lift:Lift: 2 agents, 10 Hz, at most 40 steps, state of 6" in printed
    assert read_dataset(folder / "lift.hdf5").behaviors == ("rules:clumsy",)
    assert read_bundle(folder / "bundle").manifest["training"]["algorithm"] == "omcda"
    shutil.rmtree(folder / "comparison")
    run_blocks(text("reading-a-report"), SMALLER, monkeypatch)
    report = (folder / "report.html").read_text()
    for words in ("Temperatures", "budget d", "|a| &gt; 0.999", "Provenance", "over the episode"):
        assert words in report, words
    for file in ("report.html", "returns.csv", "temperatures.csv", "summary.csv"):
        assert (folder / "comparison" / file).is_file()


def test_judging_without_playing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "3m" / "medium").mkdir(parents=True)
    save_pymarl(folder / "3m" / "medium" / "part_0.h5", batch_of(smac.SPECS["smac/3m"], [4, 5, 6, 7] * 20))
    page = (
        text("judging-without-playing")
        .replace("steps = 2000", "steps = 20\nbehavior_steps = 20")
        .replace("[0, 1, 2]", "[0]")
    )
    page = page.replace("{ hidden = 64 }", "{ hidden = 8, batch_size = 16 }")
    run_blocks(page, [], monkeypatch)
    judged = capsys.readouterr().out
    assert len(re.findall(r"^omcda-\S+ seed0: [+-]\d+\.\d\d \(.*\), \d+ episodes count", judged, re.M)) == 3
    assert re.search(r"^cql-\S+ seed0 .*expected a policy with a density", judged, re.M)


def client(folder: Path, name: str) -> str:
    """Write a client of the page, which observes 0.5 everywhere, and the protocol's file; return the page."""
    page = text("robot-client")
    [program] = [block for _, file, block in blocks(page) if file == name]
    sensors = {"client.py": ("[0.0] * width", "[0.5] * width"), "client.mjs": ("fill(0)", "fill(0.5)")}
    assert program.count(sensors[name][0]) == 1
    (folder / name).write_text(program.replace(*sensors[name]))
    shutil.copy(ROOT / "protos" / "policy.proto", folder)
    return page


def check_answers(folder: Path, command: list[str]) -> None:
    """Run a client against a server of three unequal agents, and compare its first action with the bundle's."""
    bundle = write_test_bundle(folder / "bundle", continuous_spec())
    observations = {
        agent.name: np.full(agent.observation_size, 0.5, np.float32) for agent in bundle.spec.agents
    }
    decisions = JointTeam(bundle).act(observations)
    with server_process(bundle, "team") as server:
        done = subprocess.run(
            [*command, server.endpoint], cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    first, action, last = done.stdout.splitlines()
    assert all(word in first for word in ("toy/continuous", "agent_0", "agent_2", "20"))
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", action)]
    expected = [float(value) for decision in decisions.values() for value in decision.action]
    assert numbers == pytest.approx(expected, abs=1e-5)
    assert re.fullmatch(r"20 steps, \d+ without an answer in time", last)


def test_the_robots_client_in_python(tmp_path: Path) -> None:
    """The page's generated code and ours cannot be imported into one process: both register the protocol."""
    page = client(tmp_path, "client.py")
    [generate] = [line for line in page.splitlines() if line.startswith("python -m grpc_tools.protoc")]
    command = [sys.executable, *generate.split()[1:]]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    check_answers(tmp_path, [sys.executable, "client.py"])


@pytest.mark.slow  # npm fetches two packages
@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_the_robots_client_in_node(tmp_path: Path) -> None:
    page = client(tmp_path, "client.mjs")
    [install] = [line for line in page.splitlines() if line.startswith("npm install")]
    subprocess.run([*install.split(), "--silent"], cwd=tmp_path, check=True, capture_output=True)
    check_answers(tmp_path, ["node", "client.mjs"])


@pytest.mark.parametrize("name", sorted(page.stem for page in TUTORIALS.glob("*.md") if page.stem != "index"))
def test_no_block_is_left_out(name: str) -> None:
    page = text(name)
    assert len(blocks(page)) == page.count("\n```") // 2
    for language, file, _ in blocks(page):
        assert language in (NOT_RUN, "bash") or file, language
