"""The examples run, or what of them can run here."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy import LocalPolicy, LocalTeam, MissedAnswerError, read_bundle, registry
from omcda_deploy.bundle import DEMO_TEAM
from omcda_deploy.envs import mamujoco
from omcda_deploy.registry import read_dataset
from tests.support.pages import run_command
from tests.support.server_process import server_process

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_the_simulator_is_recorded_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(EXAMPLES / "own_simulator.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES / "own_simulator.py").read_text()
    simulator = text.partition("class Convoy")[2]
    assert len([line for line in simulator.splitlines() if line.strip()]) <= 30
    commands = re.findall(r"^    (omcda-deploy .*)$", text, re.M)
    smaller = {
        "--transitions 20000": "--transitions 300 --workers 0",
        "--steps 4000 --set hidden=64": "--steps 20 --behavior-steps 20 --set hidden=16 --set batch_size=16",
    }
    for original, cheaper in smaller.items():
        commands = [command.replace(original, cheaper) for command in commands]
    try:
        for command in commands:
            run_command(shlex.split(command)[1:], monkeypatch)
        recorded = read_dataset(tmp_path / "convoy.hdf5")
        first = recorded.episode(0)
        # Gaps that agents share are the same number, and they follow from what was commanded.
        assert first.observations[:, 0, 1] == pytest.approx(first.observations[:, 1, 0])
        moved = np.diff(first.observations[:, 1, 0])
        difference = 0.1 * (first.actions[:-1, 0, 0] - first.actions[:-1, 1, 0])
        assert moved[: len(difference)] == pytest.approx(difference, abs=1e-5)
    finally:
        sys.modules.pop("own_simulator", None)
        registry.rescan()


def test_the_guarded_loop_counts_what_the_guard_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loop, bundle = example("guarded_loop.py"), read_bundle(DEMO_TEAM)
    actions = 5 * len(bundle.spec.names)
    monkeypatch.setattr(mamujoco, "EPISODE_LIMIT", 30)
    strict = tmp_path / "guard.toml"
    text = (EXAMPLES / "guard.toml").read_text()
    counted = []
    for settings in (text, text.replace("[guard]", "[guard]\nthreshold = 0.0"), text.replace("8.0", "0.001")):
        strict.write_text(settings)
        with server_process(bundle, *bundle.spec.names, options=["--config", str(strict)]) as server:
            loop["main"]([server.endpoint], steps=5, deadline_s=10.0)
        counted.append(capsys.readouterr().out)
    loose, none, unlike = counted
    numbers = {
        name: int(number) for number, name in re.findall(r"(\d+) (policy|limited|held|refused)", loose)
    }
    assert re.match(r"reward -?\d+\.\d; actions: ", loose)
    assert sum(numbers.values()) == actions
    assert set(numbers) <= {"policy", "limited"}
    assert numbers["policy"] > actions / 2
    assert f"{actions} limited" in none
    assert f"{actions} refused" in unlike


class Scripted:
    """A policy that doubles its observation, or raises what it is given."""

    error: Exception | None = None

    def act(self, observation: list[float]) -> Any:
        if self.error:
            raise self.error
        return type("Decision", (), {"action": 2 * np.array(observation)})


def test_the_ros_node_acts_on_the_newest_observation_or_stops() -> None:
    policy = Scripted()
    node = example("ros2_node.py")["AgentLoop"](policy, 0.1, [0.0])
    assert node.command(5.0) == ([0.0], "no observation in the last two periods")
    node.observe([1.0], 5.0)
    node.observe([3.0], 5.1)
    assert node.command(5.2) == ([6.0], None)
    assert node.command(5.31)[0] == [0.0]
    node.observe([3.0], 5.4)
    policy.error = MissedAnswerError("too late")
    assert node.command(5.4) == ([0.0], "too late")
    policy.error = ValueError("a defect is not hidden")
    with pytest.raises(ValueError, match="defect"):
        node.command(5.4)


def test_observations_that_no_policy_takes_stop_the_ros_node() -> None:
    """Topics bring what they bring."""
    bundle = read_bundle(DEMO_TEAM)
    agent = bundle.spec.agents[0]
    node = example("ros2_node.py")["AgentLoop"](LocalPolicy(bundle, agent.name), 0.1, [0.0])
    for values, message in (
        ([1.0], "expected shape"),
        ([float("nan")] * agent.observation_size, "expected finite"),
    ):
        node.observe(values, 5.0)
        command, reason = node.command(5.0)
        assert command == [0.0]
        assert message in reason


def test_the_guarded_loop_stands_still_where_a_sensor_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = example("guarded_loop.py")
    environment = registry.make_environment(read_bundle(DEMO_TEAM).spec.task)
    step = environment.step

    def blind(actions: Any) -> Any:
        observations, *others = step(actions)
        return {name: np.full_like(values, np.nan) for name, values in observations.items()}, *others

    monkeypatch.setattr(environment, "step", blind)
    team = LocalTeam(DEMO_TEAM)
    _, kinds = loop["run"](team, environment, 3, 0.0)
    agents = len(team.spec.names)
    assert kinds == {"policy": agents, "refused": 2 * agents}


def test_without_ros_the_node_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['rclpy'] = None\nimport ros2_node; ros2_node.main()"],
        cwd=EXAMPLES,
        env={"PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rclpy is not installed: ")
    assert done.stderr.count("\n") == 1


@NODE
def test_the_program_for_node_can_be_read() -> None:
    subprocess.run(["node", "--check", str(EXAMPLES / "policy.mjs")], check=True)


@pytest.mark.slow  # npm fetches a package
@NODE
def test_node_acts_as_onnxruntime_does(tmp_path: Path) -> None:
    text = (EXAMPLES / "policy.mjs").read_text()
    (tmp_path / "policy.mjs").write_text(text)
    [install] = re.findall(r"^// +(npm install .*)$", text, re.M)
    subprocess.run([*install.split(), "--silent"], cwd=tmp_path, check=True, capture_output=True)
    bundle = read_bundle(DEMO_TEAM)
    agent = bundle.spec.names[2]
    command = ["node", "policy.mjs", str(bundle.model_path(agent))]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    size = bundle.spec.agent(agent).observation_size
    decision = LocalPolicy(bundle, agent).act(np.sin(np.arange(size)).astype(np.float32))
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", printed)]
    assert numbers == pytest.approx([*decision.action, decision.divergence], abs=1e-5)


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".mjs", ".toml")}
    assert {name for name in re.findall(r"\]\(([\w.]+)\)", page)} >= files
