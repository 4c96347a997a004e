"""MuJoCo environments in step: equal, to the bit, to single ones over Gymnasium's classes."""

from __future__ import annotations

import ctypes.util
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs import Float, mamujoco, mamujoco_khop
from omcda_deploy.envs.programs.mujoco_bodies import (
    MujocoVector,
    ant_is_healthy,
    hopper_is_healthy,
    humanoid_is_healthy,
)
from omcda_deploy.envs.vector import VectorEnvironment, VectorStep, vectorize
from omcda_deploy.errors import ConfigError, ContractError, MissingExtraError, UnknownNameError
from omcda_deploy.local import JointTeam
from omcda_deploy.play import collect as collect_module
from omcda_deploy.play.collect import collect
from omcda_deploy.play.scripted import RandomTeam
from omcda_deploy.play.shipped import POLICIES
from omcda_deploy.spec import TeamSpec

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

HOPPER, ANT, CHEETAH, HUMANOID = mamujoco.TASKS


def random_actions(spec: TeamSpec, count: int, generator: np.random.Generator) -> dict[str, Float]:
    """Actions in [-1, 1], and one in five rows up to five times as large."""
    scale = np.where(generator.random((count, 1)) < 0.2, 5.0, 1.0)
    return {
        agent.name: (scale * generator.uniform(-1, 1, (count, agent.action.size))).astype(np.float32)
        for agent in spec.agents
    }


def require_equal(ours: VectorStep, expected: VectorStep) -> None:
    """Compare all that two steps hold, bit by bit."""
    assert list(ours.observations) == list(expected.observations)
    assert ours.action_masks is None
    assert ours.info.keys() == expected.info.keys() <= {"stalled", "fell"}
    pairs = [(ours.observations[name], values) for name, values in expected.observations.items()]
    pairs += [(ours.info[name], values) for name, values in expected.info.items()]
    pairs += [
        (getattr(ours, field.name), getattr(expected, field.name))
        for field in fields(VectorStep)
        if field.name not in ("observations", "action_masks", "info")
    ]
    for one, other in pairs:
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.tobytes() != other.tobytes():  # files tell 0 from -0
            np.testing.assert_array_equal(one, other)
            raise AssertionError(f"zeros of different signs in {one} and {other}")


def _single_bodies(vector: VectorEnvironment) -> list[Any]:
    environments: dict[int, Any] = vector._groups[0]._environments
    return [
        environment._joint._env
        if isinstance(environment, mamujoco.MultiAgentMujoco)
        else environment._parallel.single_agent_env.unwrapped
        for environment in environments.values()
    ]


def make_vector(task: str, count: int) -> MujocoVector:
    make = mamujoco.make_vector if task in mamujoco.TASKS else mamujoco_khop.make_vector
    return make(task, count)


@pytest.mark.parametrize("task", [*mamujoco.TASKS, *mamujoco_khop.TASKS])
def test_steps_equal_those_of_single_environments(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many environment steps, with inactive rows, resets in mid-episode and ends at different times."""
    count, generator = 8, np.random.default_rng(0)
    # A humanoid takes long, and falls soon; Gymnasium-Robotics' environments take long.
    enough = 10_000 if task in (HOPPER, ANT, CHEETAH) else 2_000
    monkeypatch.setattr(mamujoco_khop, "EPISODE_LIMIT", 150)
    steps = terminations = truncations = 0
    contacts = 0
    with make_vector(task, count) as ours, VectorEnvironment(task, count) as reference:
        assert ours.spec == reference.spec
        bodies = _single_bodies(reference)
        require_equal(ours.reset({}), reference.reset({}))  # zeros before the first reset
        seeds = {3: 100, 0: 101}  # in no order, and not all of them
        require_equal(ours.reset(seeds), reference.reset(seeds))
        waiting = {row: 102 + row for row in range(count) if row not in seeds}
        running = np.zeros(count, np.bool_)
        running[list(seeds)] = True
        while steps < enough:
            if waiting and generator.random() < 0.5:
                require_equal(ours.reset(waiting), reference.reset(waiting))
                running[list(waiting)] = True
                waiting = {}
            if (
                generator.random() < 0.01
            ):  # in mid-episode; only some rows, so that others reach the time limit
                early = {int(generator.integers(count // 2)): int(generator.integers(2**32))}
                require_equal(ours.reset(early), reference.reset(early))
                running[list(early)] = True
                waiting = {row: seed for row, seed in waiting.items() if row not in early}
            actions = random_actions(ours.spec, count, generator)
            active = running & (
                generator.random(count) < generator.choice([0.0, 0.2, 0.95, 1.0], p=[0.01, 0.04, 0.35, 0.6])
            )
            one, other = ours.step(actions, active), reference.step(actions, active)
            require_equal(one, other)
            ended = one.terminated | one.truncated
            running &= ~ended
            waiting |= {int(row): int(generator.integers(2**32)) for row in np.flatnonzero(ended)}
            steps += int(active.sum())
            terminations += int(one.terminated.sum())
            truncations += int(one.truncated.sum())
            contacts += sum(body.data.ncon for body in bodies)
    assert contacts > enough // 10
    if "halfcheetah" in task:
        assert (terminations, truncations >= 4) == (0, True)
    else:
        assert terminations > enough // 200


@pytest.mark.parametrize("task", [*mamujoco.TASKS, *mamujoco_khop.TASKS])
def test_steps_from_extreme_states_are_equal(task: str) -> None:
    """Velocities beyond the limit at which Hopper's are clipped, bodies high up, upside down or in the ground."""
    count, generator = 8, np.random.default_rng(2)
    with make_vector(task, count) as ours, VectorEnvironment(task, count) as reference:
        assert ours._bodies is not None
        for seed in range(25):
            seeds = dict.fromkeys(range(count), seed)
            ours.reset(seeds)
            reference.reset(seeds)
            for data, body in zip(ours._bodies._data, _single_bodies(reference), strict=True):
                position, velocity = (
                    generator.normal(0, 0.5, data.qpos.size),
                    generator.normal(0, 15, data.qvel.size),
                )
                for each in (data, body.data):
                    each.qpos[:] += position
                    each.qvel[:] = velocity
            actions: dict[str, NDArray[Any]] = {  # float64, which single environments round to float32
                agent.name: generator.uniform(-1, 1, (count, agent.action.size)) for agent in ours.spec.agents
            }
            require_equal(ours.step(actions), reference.step(actions))


@pytest.mark.parametrize("task", [HOPPER, ANT, HUMANOID])
def test_health_is_gymnasiums(task: str) -> None:
    """The rule at and beside every threshold, and for numbers that are not finite."""
    body: Any = mamujoco.JointBody(task.split("/")[1])._env
    healthy = {HOPPER: hopper_is_healthy, ANT: ant_is_healthy, HUMANOID: humanoid_is_healthy}[task]
    generator = np.random.default_rng(0)
    states = np.tile(np.concatenate([body.init_qpos, body.init_qvel]), (600, 1))
    assert body.model.nq > 2
    special = [0.2, 0.7, 1.0, -0.2, 100.0, -100.0, np.inf, -np.inf, np.nan]
    special += [np.nextafter(value, side) for value in special[:6] for side in (-np.inf, np.inf)]
    for state in states[100:]:  # some states keep the healthy start
        entry = generator.integers(1, 4) if generator.random() < 0.7 else generator.integers(states.shape[1])
        state[entry] = generator.choice(special)
    expected = []
    for state in states:
        body.data.qpos[:], body.data.qvel[:] = state[: body.model.nq], state[body.model.nq :]
        expected.append(bool(body.is_healthy))
    ours = healthy(states[:, : body.model.nq], states[:, body.model.nq :])
    assert ours.tolist() == expected
    assert 100 < sum(expected) < 500


def test_a_fall_on_the_last_step_is_a_termination(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero actions let this Hopper fall: with the time limit on that very step, it still has fallen."""

    def last_step() -> tuple[int, bool, bool]:
        with mamujoco.make_vector(HOPPER, 1) as vector:
            actions = {name: np.zeros((1, 1), np.float32) for name in vector.spec.names}
            vector.reset({0: 0})
            for step in range(1, 1000):
                step_result = vector.step(actions)
                if step_result.terminated[0] or step_result.truncated[0]:
                    with pytest.raises(ContractError, match="environment 0 is between episodes"):
                        vector.step(actions)
                    return step, bool(step_result.terminated[0]), bool(step_result.truncated[0])
        raise AssertionError("it never fell")

    step, terminated, truncated = last_step()
    assert (terminated, truncated) == (True, False)
    monkeypatch.setattr(mamujoco, "EPISODE_LIMIT", step)
    assert last_step() == (step, True, False)
    monkeypatch.setattr(mamujoco, "EPISODE_LIMIT", step - 1)
    assert last_step() == (step - 1, False, True)


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = np.random.default_rng(1)
    with mamujoco.make_vector(CHEETAH, 5) as five, mamujoco.make_vector(CHEETAH, 1) as one:
        five.reset({row: 7 * row for row in range(5)})
        one.reset({0: 21})
        for _ in range(20):
            actions = random_actions(five.spec, 5, generator)
            of_five = five.step(actions)
            alone = one.step({name: values[3:4] for name, values in actions.items()})
            np.testing.assert_array_equal(of_five.state[3:4], alone.state)
            np.testing.assert_array_equal(of_five.reward[3:4], alone.reward)
            assert len(np.unique(of_five.reward)) == 5


def test_results_are_the_callers_own() -> None:
    with mamujoco.make_vector(HOPPER, 2) as vector:
        first = vector.reset({0: 1, 1: 2})
        state = first.state.copy()
        mine: list[NDArray[Any]] = [
            *first.observations.values(),
            first.reward,
            first.terminated,
            first.truncated,
        ]
        for values in mine:
            values[:] = 1
        np.testing.assert_array_equal(first.state, state)
        first.state[:] = 1
        np.testing.assert_array_equal(vector.reset({}).state, state)
        actions = {name: np.full((2, 1), 0.5, np.float32) for name in vector.spec.names}
        second = vector.step(actions, np.array([True, False]))
        third = vector.step(actions, np.array([False, False]))
        np.testing.assert_array_equal(second.state, third.state)
        np.testing.assert_array_equal(second.state[1], state[1])
        assert second.reward[0] != 0
        assert not third.reward.any()
        assert all((values == np.float32(0.5)).all() for values in actions.values())


def test_misuse_is_named_and_nothing_is_stepped() -> None:
    with mamujoco.make_vector(HOPPER, 2) as vector:
        actions = {name: np.zeros((2, 1), np.float32) for name in vector.spec.names}
        with pytest.raises(ContractError, match="environment 0 is between episodes"):
            vector.step(actions)
        vector.reset({0: 0})
        with pytest.raises(ContractError, match="environment 1 is between episodes"):
            vector.step(actions)
        before = vector.reset({0: 0, 1: 0})
        wrong: list[tuple[dict[str, NDArray[Any]], NDArray[np.bool_] | None, str]] = [
            (
                {**actions, "agent_1": np.zeros((2, 3))},
                None,
                r"agent_1: expected shape \[2, 1\], got \[2, 3\]",
            ),
            ({"agent_0": actions["agent_0"]}, None, "no action for agent_1"),
            (actions, np.ones(3, np.bool_), r"active: expected shape \[2\], got \[3\]"),
            (
                {**actions, "agent_2": np.array([[0.0], [np.nan]])},
                None,
                r"finite numbers, got \[0.0, 0.0, nan\]",
            ),
            ({**actions, "agent_0": np.array([[0.0], [np.inf]])}, None, "expected finite numbers"),
        ]
        for columns, active, message in wrong:
            with pytest.raises(ContractError, match=message):
                vector.step(columns, active)
        with pytest.raises(ContractError, match="0 to 1, got 2"):
            vector.reset({0: 5, 2: 0})
        with pytest.raises(ContractError, match="seeds of at least 0, got -1"):
            vector.reset({0: 5, 1: -1})
        with pytest.raises(ContractError, match="0 to 1, got -1"):
            vector.render(-1)
        require_equal(vector.reset({}), before)
        unused = {**actions, "agent_2": np.array([[0.0], [np.nan]])}  # of a row that is not stepped
        assert vector.step(unused, np.array([True, False])).reward[0] != 0
    for call in (lambda: vector.reset({}), lambda: vector.step(actions), lambda: vector.render(0)):
        with pytest.raises(ContractError, match="MujocoVector is closed"):
            call()
    vector.close()
    with pytest.raises(ConfigError, match="num_envs"):
        mamujoco.make_vector(HOPPER, 0)


def test_vectorize_takes_this_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for workers in (0, 2):
        with vectorize(CHEETAH, 3, workers=workers) as vector:
            assert isinstance(vector, MujocoVector)
            assert vector.spec == registry.team_spec(CHEETAH)
            assert vector.num_envs == 3
    with pytest.raises(ConfigError, match="has no option color: expected render_mode"):
        vectorize(CHEETAH, 2, color="red")
    with pytest.raises(UnknownNameError, match="did you mean 'mamujoco/hopper-3x1'"):
        mamujoco.make_vector("mamujoco/hoper-3x1", 2)
    for package in ("gymnasium", "mujoco"):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=r"pip install 'omcda-deploy\[mujoco\]'"):
                mamujoco.make_vector(HOPPER, 2)


def test_frames_are_those_of_single_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        mamujoco.make_vector(CHEETAH, 1) as silent,
        pytest.raises(ConfigError, match="render_mode='rgb_array'"),
    ):
        silent.render(0)
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("no EGL on this machine")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    body = mamujoco._BODIES["halfcheetah-6x1"]
    small = replace(body, options={**body.options, "width": 96, "height": 96})  # drawn in software
    monkeypatch.setitem(mamujoco._BODIES, "halfcheetah-6x1", small)
    options: dict[str, Any] = {"render_mode": "rgb_array"}
    with (
        mamujoco.make_vector(CHEETAH, 2, **options) as ours,
        VectorEnvironment(CHEETAH, 2, **options) as reference,
    ):
        generator = np.random.default_rng(0)
        for vector in (ours, reference):
            vector.reset({0: 4, 1: 5})
        for _ in range(10):
            actions = random_actions(ours.spec, 2, generator)
            ours.step(actions)
            reference.step(actions)
            frames = [ours.render(row) for row in (1, 0, 1)]
            np.testing.assert_array_equal(frames, [reference.render(row) for row in (1, 0, 1)])
        assert frames[0].shape == (96, 96, 3)
        assert frames[0].std() > 10
        assert not np.array_equal(frames[0], frames[1])


@pytest.mark.parametrize("task", mamujoco.TASKS)
def test_datasets_keep_their_digest(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    team = RandomTeam(registry.team_spec(task)) if task == HUMANOID else JointTeam(POLICIES / task / "medium")

    def record(name: str) -> tuple[str, bytes]:
        summary = collect(
            task, team, tmp_path / name, transitions=1200, seed=3, behavior="medium", num_envs=3, workers=0
        )
        return summary["digest"], (tmp_path / name).read_bytes()

    ours = record("ours.hdf5")
    monkeypatch.setattr(collect_module, "vectorize", VectorEnvironment)
    assert record("reference.hdf5") == ours
