"""SMAC in an interpreter of its own: real hosts, over a stand-in for the simulator."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.cli import app
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.envs import smac
from omcda_deploy.envs.programs import smac_host
from omcda_deploy.envs.smac import Smac
from omcda_deploy.envs.vector import VectorEnvironment
from omcda_deploy.errors import ConfigError, ContractError, SimulatorError, UnknownNameError
from omcda_deploy.play import rollout
from omcda_deploy.play.collect import Source, collect, collect_mixture
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.play.rollout import episode_seed
from omcda_deploy.policy import Decision, Float
from omcda_deploy.report.evaluation import evaluation_table
from omcda_deploy.spec import TeamSpec
from tests.support import fake_smac
from tests.support.bundles import write_test_bundle

TASK = "smac/5m_vs_6m"
SPEC = smac.SPECS[TASK]
SUPPORT = Path(fake_smac.__file__).parent


def options(variant: str = "StarCraft2Env") -> dict[str, Any]:
    return {"python": sys.executable, "factory": f"fake_smac:{variant}", "path": str(SUPPORT)}


def make_smac(variant: str = "StarCraft2Env", task: str = TASK) -> Smac:
    return smac.make(task, **options(variant))


def choice(observation: NDArray[Any], mask: NDArray[Any]) -> int:
    """Choose an available action as a function of the agent's whole observation."""
    available = np.flatnonzero(mask)
    return int(available[int(1e4 * np.abs(observation).astype(np.float64).sum()) % available.size])


class Team:
    """Team policy that acts by :func:`choice`."""

    def __init__(self, spec: TeamSpec = SPEC) -> None:
        self.spec = spec

    def reset(self) -> None: ...

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        assert action_masks is not None
        return {
            name: Decision(
                np.array([choice(*pair) for pair in zip(rows, action_masks[name], strict=True)], np.int64),
                np.ones(len(rows), np.float32),
            )
            for name, rows in observations.items()
        }


def actions_of(
    environment: Smac, observations: Mapping[str, Float], infos: Mapping[str, Any]
) -> dict[str, int]:
    return {name: choice(observations[name], infos[name]["action_mask"]) for name in environment.spec.names}


def play(environment: Smac, seed: int | None) -> list[Any]:
    """The steps of one episode."""
    observations, infos = environment.reset(seed)
    steps: list[Any] = []
    while not steps or not (steps[-1][2]["agent_0"] or steps[-1][3]["agent_0"]):
        steps.append(environment.step(actions_of(environment, observations, infos)))
        observations, infos = steps[-1][0], steps[-1][4]
    return steps


def play_directly(game: Any) -> tuple[float, int, bool] | None:
    """Play an episode of the stand-in in this process: (return, length, won), or None where it crashes."""
    game.reset()
    total, steps, terminated = 0.0, 0, False
    info: dict[str, bool] = {}
    while not terminated:
        actions = [
            choice(*inputs) for inputs in zip(game.get_obs(), np.array(game.get_avail_actions()), strict=True)
        ]
        reward, terminated, info = game.step(actions)
        if not info:
            return None
        total, steps = total + reward, steps + 1
    return total, steps, info["battle_won"]


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def pid_of(environment: Any) -> int:
    pid: int = environment._host._process.pid
    return pid


@pytest.fixture
def environment(request: pytest.FixtureRequest) -> Iterator[Smac]:
    environment = make_smac(getattr(request, "param", "StarCraft2Env"))
    yield environment
    environment.close()


def variant(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("environment", [name], indirect=True)


@pytest.mark.parametrize(
    ("name", "agents", "observation", "state", "actions", "limit"),
    [
        # As papers and recordings of these maps print them.
        ("3m", 3, 30, 48, 9, 60),
        ("8m", 8, 80, 168, 14, 120),
        ("25m", 25, 250, 950, 31, 150),
        ("5m_vs_6m", 5, 55, 98, 12, 70),
        ("8m_vs_9m", 8, 85, 179, 15, 120),
        ("10m_vs_11m", 10, 105, 243, 17, 150),
        ("27m_vs_30m", 27, 285, 1170, 36, 180),
        ("MMM", 10, 160, 290, 16, 150),
        ("MMM2", 10, 176, 322, 18, 180),
        ("2s3z", 5, 80, 120, 11, 120),
        ("3s5z", 8, 128, 216, 14, 150),
        ("3s5z_vs_3s6z", 8, 136, 230, 15, 170),
        ("1c3s5z", 9, 162, 270, 15, 180),
        ("3s_vs_5z", 3, 48, 68, 11, 250),
        ("6h_vs_8z", 6, 78, 140, 14, 150),
        ("corridor", 6, 156, 282, 30, 400),
        ("2c_vs_64zg", 2, 332, 342, 70, 400),
    ],
)
def test_specs_are_oxwhirls_and_need_no_simulator(
    name: str, agents: int, observation: int, state: int, actions: int, limit: int
) -> None:
    spec = registry.team_spec(f"smac/{name}")
    assert spec.names == tuple(f"agent_{i}" for i in range(agents))
    assert {agent.observation_size for agent in spec.agents} == {observation}
    assert {(agent.action.kind, agent.action.size) for agent in spec.agents} == {("discrete", actions)}
    assert (spec.state_size, spec.episode_limit) == (state, limit)
    assert spec.control_rate == pytest.approx(2.8)
    assert spec.normalizer.kind == "none"


@pytest.mark.parametrize("name", fake_smac.MAPS)
def test_sizes_and_limits_are_what_the_simulator_states(name: str) -> None:
    """The stand-in adds features up one by one, as SMAC's source does."""
    game = fake_smac.StarCraft2Env(name)
    info, spec = game.get_env_info(), smac.SPECS[f"smac/{name}"]
    stated = [info[key] for key in ("n_agents", "obs_shape", "state_shape", "n_actions", "episode_limit")]
    assert stated == [
        len(spec.agents),
        spec.observation_size,
        spec.state_size,
        spec.action_size,
        spec.episode_limit,
    ]
    game.reset()
    assert (len(game.get_obs()[0]), len(game.get_state())) == (spec.observation_size, spec.state_size)
    assert set(smac.SPECS) == {f"smac/{other}" for other in fake_smac.MAPS}


@pytest.mark.parametrize("task", ["smac/3m", "smac/5m_vs_6m", "smac/6h_vs_8z", "smac/corridor", "smac/MMM2"])
def test_a_host_shows_what_the_simulator_shows(task: str) -> None:
    game = fake_smac.StarCraft2Env(task.split("/")[1], seed=2**32 - 1)
    environment = make_smac(task=task)
    for episode in range(2):
        game.reset()
        observations, infos = environment.reset(
            seed=2**32 - 1 if episode == 0 else 7
        )  # one game has one seed
        terminated = False
        while not terminated:
            np.testing.assert_array_equal(np.array(list(observations.values())), game.get_obs())
            np.testing.assert_array_equal(
                [info["action_mask"] for info in infos.values()], game.get_avail_actions()
            )
            np.testing.assert_array_equal(environment.state(), game.get_state())
            actions = actions_of(environment, observations, infos)
            reward, terminated, info = game.step(list(actions.values()))
            observations, rewards, terminations, truncations, infos = environment.step(actions)
            assert set(rewards.values()) == {reward}
            assert set(terminations.values()) == {terminated}
            assert not any(truncations.values())
        assert infos["agent_0"]["won"] == info["battle_won"]
    environment.close()


@variant("Peaceful")
def test_the_time_limit_truncates(environment: Smac) -> None:
    steps = play(environment, 0)
    assert len(steps) == SPEC.episode_limit
    _, rewards, terminations, truncations, infos = steps[-1]
    assert set(rewards.values()) == {0.0}
    assert not any(terminations.values())
    assert all(truncations.values())
    assert infos["agent_0"]["won"] is False


@variant("Winnable")
def test_won_battles_pay_twenty_also_after_a_reset_in_the_first_episode(environment: Smac) -> None:
    environment.reset(3)
    for seed in (3, 4):
        steps = play(environment, seed)
        assert sum(step[1]["agent_0"] for step in steps) == pytest.approx(20.0)
        assert steps[-1][2]["agent_0"]
        assert steps[-1][4]["agent_0"]["won"] is True
        assert [step[4]["agent_0"]["won"] for step in steps[:-1]] == [False] * (len(steps) - 1)


@variant("Crashing")
def test_a_crash_ends_and_discards_the_episode(environment: Smac, caplog: pytest.LogCaptureFixture) -> None:
    steps = play(environment, 9)
    _, rewards, terminations, truncations, infos = steps[-1]
    assert len(steps) == 3
    assert set(rewards.values()) == {0.0}
    assert not any(terminations.values())
    assert all(truncations.values())
    assert infos["agent_0"]["discarded"] is True
    assert "won" not in infos["agent_0"]
    assert "StarCraft II crashed" in caplog.text
    with pytest.raises(ContractError, match="between episodes"):
        environment.step(dict.fromkeys(SPEC.names, 1))
    again = play(environment, 10)  # in a new game; the old one would scale rewards down
    assert sum(step[1]["agent_0"] for step in again) == pytest.approx(20.0)
    assert "discarded" not in again[-1][4]["agent_0"]


@variant("Dying")
def test_a_host_that_dies_discards_the_episode_and_takes_its_game_with_it(
    environment: Smac, caplog: pytest.LogCaptureFixture
) -> None:
    steps = play(environment, 9)
    assert steps[-1][4]["agent_0"]["discarded"] is True
    assert "exit code -9, having printed" in caplog.text
    game = int(caplog.text.partition("game ")[2].split()[0])
    assert is_gone(game)
    assert play(environment, 10)[-1][4]["agent_0"]["won"]


def test_killing_one_host_disturbs_no_other_environment() -> None:
    def run(kill: bool) -> list[Any]:
        trace = []
        with VectorEnvironment(TASK, 3, **options()) as vector:
            step = vector.reset({0: 1, 1: 2, 2: 3})
            active = np.ones(3, np.bool_)
            team = Team()
            for t in range(6):
                if kill and t == 4:
                    os.kill(pid_of(vector._groups[0]._environments[1]), signal.SIGKILL)
                decisions = team.act(step.observations, action_masks=step.action_masks)
                step = vector.step({name: d.action for name, d in decisions.items()}, active)
                lost = np.asarray(step.info.get("discarded", np.zeros(3)), np.bool_)
                assert lost.tolist() == [False, kill and t == 4, False]
                assert step.truncated.tolist() == lost.tolist()
                active &= ~lost
                trace.append((step.state[[0, 2]], step.reward[[0, 2]]))
            step = vector.reset({1: 5})
            assert step.action_masks is not None
            assert step.action_masks["agent_0"][1].any()
        return trace

    for quiet, killed in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(quiet[0], killed[0])
        np.testing.assert_array_equal(quiet[1], killed[1])


def test_a_host_killed_between_episodes_costs_none(environment: Smac) -> None:
    first = play(environment, 5)
    os.kill(pid_of(environment), signal.SIGKILL)
    again = play(environment, 5)
    assert len(again) == len(first)
    np.testing.assert_array_equal(again[-1][0]["agent_0"], first[-1][0]["agent_0"])


@variant("Chatty")
def test_what_is_printed_neither_blocks_nor_piles_up(environment: Smac) -> None:
    steps = play(environment, 1)
    assert steps[-1][4]["agent_0"]["won"]
    host = environment._host
    assert host is not None
    environment.close()
    assert 0 < len(host._printed) <= smac.PRINTED_BYTES
    assert host._printed.endswith(b"closed\n")


def test_unavailable_actions_are_refused_here_and_there(environment: Smac) -> None:
    _, infos = environment.reset(0)
    available = np.flatnonzero(infos["agent_2"]["action_mask"]).tolist()
    with pytest.raises(
        ContractError, match=rf"agent_2: expected one of the available \[{available[0]}, .*got 0"
    ):
        environment.step({**dict.fromkeys(SPEC.names, 1), "agent_2": 0})
    environment.step(dict.fromkeys(SPEC.names, 1))
    picky = make_smac("Picky")
    picky.reset(0)
    with pytest.raises(
        ContractError, match=r"refused the actions \[1, 1, 1, 1, 1\].*Agent 0 cannot perform action 1"
    ):
        picky.step(dict.fromkeys(SPEC.names, 1))
    picky.close()


@variant("Mappo")
def test_another_variant_is_refused_with_both_sizes(environment: Smac) -> None:
    with pytest.raises(ContractError, match="obs_shape 124 against 55, state_shape 156 against 98"):
        environment.reset(0)
    assert environment._host is None


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for python in (None, str(tmp_path / "none"), str(plain), str(tmp_path)):
        with pytest.raises(
            ConfigError, match=r"--simulator-python .*expected the bin/python .*docs/smac\.md"
        ):
            smac.make(TASK, python=python)
    for factory in ("fake_smac", ":x", "fake_smac:"):
        with pytest.raises(ConfigError, match="expected MODULE:CALLABLE"):
            smac.make(TASK, python=sys.executable, factory=factory)
    with pytest.raises(UnknownNameError, match="did you mean 'smac/corridor'"):
        smac.make("smac/coridor", python=sys.executable)
    with pytest.raises(ConfigError, match="SMAC saves replays"):
        smac.make(TASK, **options(), render_mode="rgb_array")
    with pytest.raises(ConfigError, match="SMAC saves replays"):
        make_smac().render()
    with pytest.raises(ConfigError, match=r"has no option python: expected render_mode"):
        evaluate(Team(), "toy/one-step", options={"python": sys.executable})
    with pytest.raises(ConfigError, match="--simulator-python"):
        evaluate(Team(), TASK, workers=2, episodes=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**options("NotSmac")}, "a NotSmac, which lacks SMAC's get_env_info, get_obs, get_state"),
        ({**options("Absent")}, "AttributeError: .*Absent"),
        ({"python": sys.executable}, "ModuleNotFoundError: No module named 'smac'"),
        ({"python": shutil.which("true")}, r"ended with exit code 0\. See docs/smac\.md"),
        ({"python": shutil.which("ls")}, r"ended with exit code 2, having printed .*ls"),
    ],
)
def test_what_does_not_start_says_why(settings: dict[str, Any], message: str) -> None:
    environment = smac.make(TASK, **settings)
    with pytest.raises(SimulatorError, match=message):
        environment.reset(0)
    environment.close()


@variant("Failing")
def test_an_exception_of_the_simulator_is_no_crash(environment: Smac) -> None:
    environment.reset(0)
    with pytest.raises(SimulatorError, match="RuntimeError: no such unit"):
        environment.step(dict.fromkeys(SPEC.names, 1))


@variant("FailingLater")
def test_an_exception_after_steps_that_were_played_costs_its_episode(
    environment: Smac, caplog: pytest.LogCaptureFixture
) -> None:
    ends = [play(environment, seed)[-1][4] for seed in range(3)]
    assert [bool(infos["agent_0"].get("discarded")) for infos in ends] == [False, True, False]
    assert "RuntimeError: no port left" in caplog.text


@variant("CrashingInReset")
def test_an_episode_that_began_with_a_crash_is_not_played(
    environment: Smac, caplog: pytest.LogCaptureFixture
) -> None:
    """An episode that is played on after such a crash would be one of dead units."""
    ends = [play(environment, seed)[-1][4] for seed in range(3)]
    assert [infos["agent_0"].get("won") for infos in ends] == [True, True, True]
    assert "StarCraft II crashed when an episode was to begin" in caplog.text


@variant("Forbidding")
def test_a_simulator_that_allows_nothing_is_named(environment: Smac) -> None:
    with pytest.raises(
        ContractError, match=r"expected an available action for every agent, .* none for agent_2"
    ):
        environment.reset(0)


def test_an_environment_that_does_not_end_is_not_waited_for() -> None:
    with pytest.raises(ContractError, match="did not end within 70 steps"):
        evaluate(Team(), TASK, episodes=1, options=options("Endless"))


@variant("Hanging")
def test_a_host_that_hangs_is_ended(environment: Smac, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.reset(0)
    pid = pid_of(environment)
    monkeypatch.setattr(smac, "ANSWER_SECONDS", 0.3)
    *_, infos = environment.step(dict.fromkeys(SPEC.names, 1))
    assert infos["agent_0"]["discarded"]
    assert is_gone(pid)


def test_a_host_ends_with_whom_it_serves() -> None:
    code = (
        "import sys, time\nfrom omcda_deploy.envs import smac\n"
        f"environment = smac.make({TASK!r}, **{options()!r})\nenvironment.reset(0)\n"
        "print(environment._host._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert (Path("/proc") / str(pid)).exists()
        parent.kill()
    assert is_gone(pid)


def reference(seeds: Iterator[int], episodes: int, num_envs: int) -> tuple[list[int], list[Any], int]:
    """Play ``Crashing`` in rounds, one game per environment until it crashes: (seeds, results, lost)."""
    games: list[Any] = [None] * num_envs
    kept_seeds: list[int] = []
    results: list[Any] = []
    lost = 0
    while len(kept_seeds) < episodes:
        missing = episodes - len(kept_seeds)  # when the round starts
        for index in range(min(num_envs, missing)):
            seed = next(seeds)
            games[index] = games[index] or fake_smac.Crashing("5m_vs_6m", seed=seed)
            if (result := play_directly(games[index])) is None:
                games[index], lost = None, lost + 1
            else:
                kept_seeds.append(seed)
                results.append(result)
    return kept_seeds, results, lost


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_replaces_lost_episodes(workers: int) -> None:
    evaluation = evaluate(
        Team(), TASK, episodes=7, seed=7, num_envs=3, workers=workers, options=options("Crashing")
    )
    seeds, results, lost = reference((episode_seed(7, k) for k in range(100)), 7, 3)
    assert lost > 0
    assert evaluation.discarded == evaluation.to_json()["discarded"] == lost
    assert list(evaluation.episode_seeds) == seeds
    assert evaluation.won is not None
    outcomes = zip(
        evaluation.returns.tolist(), evaluation.lengths.tolist(), evaluation.won.tolist(), strict=True
    )
    assert list(outcomes) == results
    assert evaluation.terminated.all()
    assert evaluation.divergence["agent_0"].by_step.size == evaluation.lengths.max()
    assert f"{lost} episode" in str(evaluation_table(evaluation).title)


def recorded_seeds(seed: int) -> Iterator[int]:
    episode = 0
    while True:
        yield int(np.random.SeedSequence([seed, episode]).generate_state(2)[0])
        episode += 1


def test_collecting_leaves_lost_episodes_out(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"behavior": "b", "temperature": 0.0, "options": options("Crashing")}
    summary = collect(
        TASK, Team(), tmp_path / "a.h5", transitions=70, seed=1, num_envs=1, workers=0, **settings
    )
    seeds, results, lost = reference(recorded_seeds(1), summary["episodes"], 1)
    assert lost > 0
    assert summary["discarded"] == lost
    data = read(tmp_path / "a.h5")
    assert data.episode_seeds is not None
    assert data.episode_seeds.tolist() == seeds
    assert data.episode_length.tolist() == [length for _, length, _ in results]
    np.testing.assert_allclose(data.episode_returns, [total for total, _, _ in results])
    assert sum(data.episode_length[:-1]) < 70 <= sum(data.episode_length)
    assert data.terminal.sum() == summary["episodes"]

    sources = [Source("one", Team(), 1.0), Source("two", Team(), 1.0)]
    summary = collect_mixture(
        TASK, sources, tmp_path / "b.h5", transitions=140, seed=1, num_envs=3, workers=0, **settings
    )
    data = read(tmp_path / "b.h5")
    assert summary["discarded"] > 0
    assert data.episode_seeds is not None
    numbers = {seed: k for k, seed in zip(range(100), recorded_seeds(1), strict=False)}
    order = [numbers[seed] for seed in data.episode_seeds.tolist()]
    assert order == sorted(set(order))
    assert order != list(range(len(order)))  # numbers of lost ones are missing
    np.testing.assert_allclose(
        data.episode_returns, 20.0, rtol=1e-6
    )  # every episode is whole, and no two share a game


def test_losing_every_episode_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "DISCARDED_IN_A_ROW", 4)
    message = "lost 4 episodes in a row"
    with pytest.raises(SimulatorError, match=message):
        evaluate(Team(), TASK, episodes=3, options=options("AlwaysCrashing"))
    with pytest.raises(SimulatorError, match=message):
        collect(
            TASK,
            Team(),
            tmp_path / "none.h5",
            transitions=10,
            seed=0,
            behavior="b",
            num_envs=3,
            workers=0,
            options=options("AlwaysCrashing"),
        )
    assert not list(tmp_path.iterdir())


def test_the_command_line_plays_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    monkeypatch.chdir(SUPPORT)  # the folder in which a factory's module is searched
    write_test_bundle(tmp_path / "bundle", SPEC)
    (tmp_path / "game" / "Versions" / "Base70000").mkdir(parents=True)
    monkeypatch.setenv("SC2PATH", str(tmp_path / "game"))
    simulator = ["--simulator-python", sys.executable, "--simulator-factory", "fake_smac:StarCraft2Env"]
    chosen = ["--bundle", str(tmp_path / "bundle"), "--num-envs", "2"]
    run = CliRunner().invoke
    result = run(
        app, ["evaluate", TASK, *chosen, "--episodes", "2", *simulator, "--json", str(tmp_path / "e.json")]
    )
    assert result.exit_code == 0, result.output
    evaluation = json.loads((tmp_path / "e.json").read_text())
    assert evaluation["won"] == [False, False]
    assert evaluation["discarded"] == 0
    assert evaluation["versions"]["StarCraftII"] == "build 70000"
    out = tmp_path / "d.h5"
    result = run(
        app,
        ["collect", TASK, "--out", str(out), *chosen, "--workers", "0", "--transitions", "40", *simulator],
    )
    assert result.exit_code == 0, result.output
    recorded = read(out, TASK)
    assert recorded.transitions.size >= 40
    assert recorded.metadata["version_StarCraftII"] == "build 70000"


def test_what_was_played_is_named_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter with SMAC's distributions, and a StarCraft II of two builds."""
    for name, version in (("SMAC", "1.0.1"), ("PySC2", "3.0.0")):
        folder = tmp_path / "packages" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for build in ("Base69232", "Base75689", "Shaders"):
        (tmp_path / "game" / "Versions" / build).mkdir(parents=True)
    monkeypatch.setenv("SC2PATH", str(tmp_path / "game"))
    python = tmp_path / "python"
    text = f"#!/bin/sh\nshift\nPYTHONPATH='{tmp_path / 'packages'}' exec '{sys.executable}' \"$@\"\n"
    python.write_text(text)
    python.chmod(0o755)
    packages = registry.simulator_versions(TASK, python=str(python), factory="x:y", render_mode=None)
    assert packages == {"smac": "1.0.1", "pysc2": "3.0.0", "StarCraftII": "build 75689"}
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    assert registry.simulator_versions(TASK, python=sys.executable) == {}
    assert registry.simulator_versions(TASK) == {}


def test_versions_that_an_interpreter_cannot_tell_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    assert smac.versions(str(python)) == {}
    assert "stay unknown" in caplog.text


def test_the_host_runs_in_old_interpreters_without_this_package() -> None:
    source = Path(smac_host.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"numpy"}


def test_frames_are_checked() -> None:
    reading, writing = os.pipe()
    smac_host.write_frame(writing, {"a": 1}, b"xyz")
    assert smac_host.read_frame(reading) == ({"a": 1}, b"xyz")
    os.write(writing, smac_host.HEADER.pack(b"SC2!", 1, 1))
    with pytest.raises(ValueError, match="expected a frame"):
        smac_host.read_frame(reading)
    os.write(writing, smac_host.HEADER.pack(smac_host.MAGIC, 2**31, 2**31))
    with pytest.raises(ValueError, match=f"{2**32} bytes"):
        smac_host.read_frame(reading)
    with pytest.raises(TimeoutError):
        smac_host.read_frame(reading, 0.01)
    os.write(writing, smac_host.HEADER.pack(smac_host.MAGIC, 7, 0))
    os.close(writing)
    with pytest.raises(EOFError):
        smac_host.read_frame(reading)
    os.close(reading)
