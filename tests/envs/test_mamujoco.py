"""Both MuJoCo simulators: the rules of v2, OMIGA's observations, and equal rewards under both views."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.envs import Environment, mamujoco, mamujoco_khop
from omcda_deploy.errors import ConfigError, ContractError, MissingExtraError, UnknownNameError
from omcda_deploy.spec import TeamSpec

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("gymnasium_robotics")

BODIES = ("hopper-3x1", "ant-2x4", "halfcheetah-6x1")
TASKS = [*mamujoco.TASKS, *mamujoco_khop.TASKS]
HUMANOID = "humanoid-9-8"
LEG = ("hip_x", "hip_y", "hip_z", "knee")
V4 = {
    "hopper-3x1": "Hopper-v4",
    "ant-2x4": "Ant-v4",
    "halfcheetah-6x1": "HalfCheetah-v4",
    HUMANOID: "Humanoid-v4",
}


def _module(task: str) -> ModuleType:
    return mamujoco_khop if task.startswith("mamujoco-khop1/") else mamujoco


def _make(task: str, **options: Any) -> Environment:
    environment: Environment = _module(task).make(task, **options)
    return environment


def _shared_out(spec: TeamSpec, joint: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    actions = joint.astype(np.float32)
    return {name: actions[part] for name, part in zip(spec.names, spec.action_slices, strict=True)}


@pytest.mark.parametrize(
    ("task", "agents", "width", "actions", "rate"),
    [
        ("mamujoco/hopper-3x1", 3, 14, 1, 125.0),
        ("mamujoco/ant-2x4", 2, 113, 4, 20.0),
        ("mamujoco/halfcheetah-6x1", 6, 23, 1, 20.0),
    ],
)
def test_dimensions_are_omigas(task: str, agents: int, width: int, actions: int, rate: float) -> None:
    environment = mamujoco.make(task)
    spec = environment.spec
    assert [agent.observation_size for agent in spec.agents] == [width] * agents
    assert [agent.action.size for agent in spec.agents] == [actions] * agents
    assert spec.state_size == agents * width
    assert spec.control_rate == rate
    assert spec.normalizer.kind == "per-vector-standardize"
    observations, _ = environment.reset(seed=0)
    np.testing.assert_array_equal(environment.state(), np.concatenate(list(observations.values())))


@pytest.mark.parametrize("body", BODIES)
def test_control_rate_is_that_of_the_physics(body: str) -> None:
    unwrapped = gymnasium.make(V4[body].replace("v4", "v5")).unwrapped
    for prefix in ("mamujoco", "mamujoco-khop1"):
        assert _make(f"{prefix}/{body}").spec.control_rate == pytest.approx(1.0 / unwrapped.dt)


@pytest.mark.parametrize("body", BODIES)
def test_observations_hold_the_full_vector_and_the_identity(body: str) -> None:
    """Mean and deviation follow from the one-hot, so the standardisation can be undone."""
    environment = mamujoco.make(f"mamujoco/{body}")
    joint = mamujoco.JointBody(body)
    observations, _ = environment.reset(seed=3)
    raw = joint.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(5):
        for i, vector in enumerate(observations.values()):
            assert vector.dtype == np.float32
            one_hot = vector[-len(observations) :].astype(np.float64)
            assert one_hot.argmax() == i
            rest = np.delete(one_hot, i)
            assert np.ptp(rest) < 1e-6
            scale = 1.0 / (one_hot[i] - rest[0])
            undone = (vector[: -len(observations)] - rest[0]) * scale
            np.testing.assert_allclose(undone[: raw.size], raw, atol=2e-6 * scale)
            np.testing.assert_allclose(undone[raw.size :], 0.0, atol=2e-6 * scale)  # Ant's 84 zeros
            assert undone.size == raw.size + (84 if body == "ant-2x4" else 0)
            np.testing.assert_allclose(mamujoco.standardize(vector), vector, atol=1e-6)
            assert vector.mean() == pytest.approx(0.0, abs=1e-6)
            assert vector.std() == pytest.approx(1.0, abs=1e-6)
        action = rng.uniform(-1, 1, joint.action_size).astype(np.float32)
        observations, *_ = environment.step(_shared_out(environment.spec, action))
        raw, _, _ = joint.step(action.astype(np.float64))


def test_the_humanoids_agents_drive_and_see_what_they_should() -> None:
    """Gymnasium-Robotics' factorisation by the names of its joints; actions within its controls' range."""
    environment = mamujoco.make("mamujoco/humanoid-9-8")
    upper, lower = environment.spec.agents
    assert (upper.action.size, lower.action.size) == (9, 8)
    assert [(agent.action.low, agent.action.high) for agent in (upper, lower)] == [(-0.4, 0.4)] * 2
    assert upper.observation_size == lower.observation_size == 272
    simulation = environment._joint._env
    assert (simulation.action_space.low == np.float32(-0.4)).all()
    assert environment.spec.control_rate == pytest.approx(1.0 / simulation.dt)
    from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges

    parts, _, _ = get_parts_and_edges("Humanoid", "9|8")
    names = [[node.label for node in part] for part in parts]
    assert {name for name in names[1]} == {f"{s}_{j}" for s in ("left", "right") for j in LEG}
    for agent, labels in zip((upper, lower), names, strict=True):
        for k, label in enumerate(labels):
            environment.reset(seed=0)
            actions = {a.name: np.zeros(a.action.size, np.float32) for a in environment.spec.agents}
            actions[agent.name][k] = 0.25
            environment.step(actions)
            (moved,) = np.flatnonzero(simulation.data.ctrl)
            assert simulation.model.joint(simulation.model.actuator(moved).trnid[0]).name == label


@pytest.mark.parametrize("body", [*BODIES, HUMANOID])
@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
def test_rewards_and_ends_are_those_of_the_v2_rule(body: str) -> None:
    """Gymnasium's v4 kept v2's rule: equal rewards step by step, the terminating one included."""
    reference = gymnasium.make(V4[body])
    environment = mamujoco.make(f"mamujoco/{body}")
    rng = np.random.default_rng(1)
    ends = 0
    for seed in range(3):
        reference.reset(seed=seed)
        environment.reset(seed=seed)
        for _ in range(300):
            action = rng.uniform(-1, 1, reference.action_space.shape[0]).astype(np.float32)
            action *= environment.spec.agents[0].action.high
            _, reward, terminated, _, _ = reference.step(action.astype(np.float64))
            by_agent = action[list(environment._joint.body.joints)]
            _, rewards, terminations, truncations, _ = environment.step(
                _shared_out(environment.spec, by_agent)
            )
            assert rewards["agent_0"] == pytest.approx(reward, abs=1e-9)
            assert terminations["agent_0"] == terminated
            assert not truncations["agent_0"]
            if terminated:
                ends += 1
                break
    assert ends == {"hopper-3x1": 3, "ant-2x4": 3, "halfcheetah-6x1": 0, HUMANOID: 3}[body]


@pytest.mark.parametrize("body", BODIES)
def test_v5_withholds_one_on_the_terminating_step(body: str) -> None:
    options = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0} if "ant" in body else {}
    reference = gymnasium.make(V4[body].replace("v4", "v5"), **options)
    joint = mamujoco.JointBody(body)
    reference.reset(seed=0)
    joint.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = rng.uniform(-1, 1, joint.action_size)
        observation, reward, terminated, _, _ = reference.step(action)
        ours, our_reward, our_end = joint.step(action)
        np.testing.assert_array_equal(ours, observation)
        assert our_reward - reward == pytest.approx(float(terminated), abs=1e-12)
        assert our_end == terminated
        if terminated:
            break
    assert terminated == (body != "halfcheetah-6x1")


@pytest.mark.parametrize("body", BODIES)
def test_both_views_are_one_body(body: str) -> None:
    """The same joint motion earns the same reward and ends alike, once actuators are matched."""
    order = [2, 3, 4, 5, 6, 7, 0, 1] if body == "ant-2x4" else slice(None)
    full, khop = _make(f"mamujoco/{body}"), _make(f"mamujoco-khop1/{body}")
    rng = np.random.default_rng(0)
    full.reset(seed=0)
    khop.reset(seed=0)
    over = False
    for _ in range(200):
        action = rng.uniform(-1, 1, sum(agent.action.size for agent in full.spec.agents))
        _, rewards, ends, limits, _ = full.step(_shared_out(full.spec, action))
        _, khop_rewards, khop_ends, khop_limits, _ = khop.step(_shared_out(khop.spec, action[order]))
        assert khop_rewards["agent_0"] == pytest.approx(rewards["agent_0"], abs=1e-9)
        assert khop_ends == ends
        assert khop_limits == limits
        if over := ends["agent_0"]:
            break
    assert over == (body != "halfcheetah-6x1")


def test_ants_two_views_order_their_actuators_differently() -> None:
    full, khop = _make("mamujoco/ant-2x4"), _make("mamujoco-khop1/ant-2x4")
    action = np.linspace(-1, 1, 8)
    full.reset(seed=7)
    khop.reset(seed=7)
    reward = full.step(_shared_out(full.spec, action))[1]["agent_0"]
    assert khop.step(_shared_out(khop.spec, action))[1]["agent_0"] != pytest.approx(reward, abs=1e-6)


@pytest.mark.parametrize("task", [task for task in TASKS if "halfcheetah" in task])
def test_time_limit_is_a_truncation(task: str) -> None:
    environment = _make(task)
    actions = _shared_out(environment.spec, np.zeros(6))
    for episode in range(2):  # the count starts anew with each episode
        environment.reset(seed=episode)
        for step in range(1, 1001):
            _, _, terminations, truncations, _ = environment.step(actions)
            assert not any(terminations.values())
            assert set(truncations.values()) == {step == 1000}


@pytest.mark.parametrize("task", [task for task in TASKS if "hopper" in task])
def test_an_end_on_the_last_step_is_a_termination(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero actions let this Hopper fall; a time limit in the same step does not make it a truncation."""

    def fall(environment: Environment) -> tuple[int, bool, bool]:
        environment.reset(seed=0)
        for step in range(1, 1000):
            _, _, terminations, truncations, _ = environment.step(_shared_out(environment.spec, np.zeros(3)))
            if terminations["agent_0"] or truncations["agent_0"]:
                return step, terminations["agent_0"], truncations["agent_0"]
        raise AssertionError("it never fell")

    step, terminated, _ = fall(_make(task))
    assert terminated
    monkeypatch.setattr(_module(task), "EPISODE_LIMIT", step)
    assert fall(_make(task)) == (step, True, False)
    monkeypatch.setattr(_module(task), "EPISODE_LIMIT", step - 1)
    assert fall(_make(task)) == (step - 1, False, True)


@pytest.mark.parametrize("task", TASKS)
def test_wrong_actions_are_refused(task: str) -> None:
    environment = _make(task)
    environment.reset(seed=0)
    size = environment.spec.agents[1].action.size
    good = {a.name: np.zeros(a.action.size, np.float32) for a in environment.spec.agents}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"agent_0": good["agent_0"]}, "expected one action for each of agent_0, agent_1"),
        ({**good, "agent_9": good["agent_0"]}, "expected one action for each"),
        ({**good, "agent_1": np.zeros(size + 1)}, rf"agent_1: expected shape \[{size}\], got \[{size + 1}\]"),
        ({**good, "agent_0": np.zeros(2 * size), "agent_1": np.zeros(0)}, "agent_0: expected shape"),
        ({**good, "agent_1": np.zeros((1, size))}, "agent_1: expected shape"),
        ({**good, "agent_1": np.full(size, np.nan)}, "expected finite numbers"),
    ]
    earlier = environment.state()
    for actions, message in cases:
        with pytest.raises(ContractError, match=message):
            environment.step(actions)
    np.testing.assert_array_equal(environment.state(), earlier)
    environment.step(good)


@pytest.mark.parametrize("task", ["mamujoco/hoper-3x1", "mamujoco-khop1/hoper-3x1"])
def test_unknown_task_names_the_nearest(task: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{task.replace('hoper', 'hopper')}'"):
        _make(task)


@pytest.mark.parametrize(
    ("task", "package"), [("mamujoco/ant-2x4", "gymnasium"), ("mamujoco-khop1/ant-2x4", "gymnasium_robotics")]
)
def test_missing_simulator_names_the_extra(task: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'omcda-deploy\[mujoco\]'"):
        _make(task)


@pytest.mark.parametrize("task", ["mamujoco/hopper-3x1", "mamujoco-khop1/hopper-3x1"])
def test_frames(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = _make(task)
    silent.reset(seed=0)
    with pytest.raises(ConfigError, match="render_mode='rgb_array'"):
        silent.render()
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("no EGL on this machine")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    environment = _make(task, render_mode="rgb_array")
    environment.reset(seed=0)
    frame = environment.render()
    environment.close()
    assert frame.dtype == np.uint8
    assert frame.ndim == 3
    assert frame.shape[2] == 3
    assert frame.std() > 10


def test_simulators_are_imported_when_made_and_say_nothing() -> None:
    script = (
        "import sys\n"
        "from omcda_deploy.envs import mamujoco, mamujoco_khop, toy\n"
        "loaded = {'gymnasium', 'gymnasium_robotics', 'mujoco', 'torch'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "mamujoco_khop.make('mamujoco-khop1/hopper-3x1').reset(seed=0)\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
