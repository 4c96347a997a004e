"""Outcomes of MuJoCo's episodes, against bodies that are held where an outcome is certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.envs import mamujoco, mamujoco_khop
from omcda_deploy.envs.programs.mujoco_outcomes import LEAST_UPRIGHT, STALL_SPEED, OutcomeLog
from omcda_deploy.registry import make_environment, team_spec

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

HOPPER, ANT, CHEETAH, HUMANOID = mamujoco.TASKS
LIMIT = 40  # so the last part has four steps


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mamujoco, mamujoco_khop):
        monkeypatch.setattr(module, "EPISODE_LIMIT", LIMIT)


class Body:
    """A body at ``x`` with its torso at an ``upright`` component, where OutcomeLog looks."""

    def __init__(self) -> None:
        self.qpos, self.xmat = np.zeros(3), np.zeros((2, 9))

    def hold(self, x: float, upright: float) -> None:
        self.qpos[0], self.xmat[1, 8] = x, upright


def outcome(speeds: NDArray[np.float64], upright: NDArray[np.float64]) -> tuple[bool, bool]:
    """Stalled and fell, of an episode with these speeds (m/s) and postures by step."""
    spec, body, x = team_spec(CHEETAH), Body(), 0.0
    log = OutcomeLog([Body(), body], spec)
    for step in range(1, LIMIT + 1):
        x += speeds[step - 1] / spec.control_rate
        body.hold(x, upright[step - 1])
        end = log.step([1], np.array([step]), np.array([False]), np.array([step == LIMIT]))
        if step < LIMIT:
            assert not end["stalled"][0]
            assert not end["fell"][0]
    return bool(end["stalled"][0]), bool(end["fell"][0])


STEPS = np.arange(LIMIT)
LAST = STEPS >= LIMIT - LIMIT // 10


@pytest.mark.parametrize(
    ("speeds", "upright", "expected"),
    [
        (np.full(LIMIT, 2.0), np.ones(LIMIT), (False, False)),  # runs
        (np.zeros(LIMIT), np.ones(LIMIT), (True, False)),  # stands
        (np.full(LIMIT, -2.0), np.ones(LIMIT), (True, False)),  # runs backwards
        (np.where(LAST, 0.0, 2.0), np.ones(LIMIT), (True, False)),  # stops before the end
        (np.where(LAST, 2.0, 0.0), np.ones(LIMIT), (False, False)),  # gets going
        (np.full(LIMIT, 1.01 * STALL_SPEED), np.ones(LIMIT), (False, False)),
        (np.full(LIMIT, 0.99 * STALL_SPEED), np.ones(LIMIT), (True, False)),
        (np.zeros(LIMIT), np.full(LIMIT, 0.5), (False, True)),  # lies on its head
        (np.full(LIMIT, 2.0), np.full(LIMIT, -1.0), (False, True)),  # slides on its back
        (np.full(LIMIT, 2.0), np.where(LAST, 1.0, -1.0), (False, False)),  # gets up
        (np.full(LIMIT, 2.0), np.where(STEPS == LIMIT - 1, 0.0, 1.0), (False, False)),  # one step is no fall
        (np.full(LIMIT, 2.0), np.full(LIMIT, LEAST_UPRIGHT - 1e-6), (False, True)),
        (np.full(LIMIT, 2.0), np.full(LIMIT, LEAST_UPRIGHT + 1e-6), (False, False)),
    ],
)
def test_outcomes_follow_from_the_last_tenth(
    speeds: NDArray[np.float64], upright: NDArray[np.float64], expected: tuple[bool, bool]
) -> None:
    assert outcome(speeds, upright) == expected


def test_a_terminated_episode_fell_and_never_stalled() -> None:
    log = OutcomeLog([Body()], team_spec(HOPPER))
    end = log.step([0], np.array([3]), np.array([True]), np.array([False]))
    assert {name: values.tolist() for name, values in end.items()} == {"stalled": [False], "fell": [True]}


def played(task: str, actions: Mapping[str, Any], turned: bool = False) -> dict[str, Any]:
    """The first agent's info at the end of an episode that repeats ``actions``; ``turned``: on its back."""
    environment: Any = make_environment(task)
    try:
        environment.reset(seed=0)
        inner = environment._joint._env if task in mamujoco.TASKS else environment._parallel.single_agent_env
        data = inner.unwrapped.data
        if turned:
            data.qpos[2] += np.pi
        while True:
            _, _, terminated, truncated, infos = environment.step(actions)
            if terminated["agent_0"] or truncated["agent_0"]:
                return dict(infos["agent_0"])
            assert infos["agent_0"] == {"stalled": False, "fell": False}
            assert not any(infos[name] for name in environment.possible_agents[1:])
    finally:
        environment.close()


@pytest.mark.parametrize("family", ["mamujoco", "mamujoco-khop1"])
def test_outcomes_of_the_simulators(family: str) -> None:
    """A cheetah at rest stalls, one on its back fell; a hopper that lets go falls before the limit."""
    if family.endswith("khop1"):
        pytest.importorskip("gymnasium_robotics")
    cheetah, hopper = f"{family}/halfcheetah-6x1", f"{family}/hopper-3x1"
    rest = {name: np.zeros(1, np.float32) for name in team_spec(cheetah).names}
    assert played(cheetah, rest) == {"stalled": True, "fell": False}
    assert played(cheetah, rest, turned=True) == {"stalled": False, "fell": True}
    bent = {name: np.ones(1, np.float32) for name in team_spec(hopper).names}
    assert played(hopper, bent) == {"stalled": False, "fell": True}


def test_rows_and_episodes_of_a_vector_are_apart() -> None:
    """One stands, one lies on its back, one is left out; in the next episode they change places."""
    rest = {name: np.zeros((3, 1), np.float32) for name in team_spec(CHEETAH).names}
    with mamujoco.make_vector(CHEETAH, 3) as vector:
        assert vector._bodies is not None
        for on_back in (2, 0):
            vector.reset({0: 5, 2: 5})
            vector._bodies._data[on_back].qpos[2] += np.pi
            active = np.array([True, False, True])
            for _ in range(LIMIT):
                step = vector.step(rest, active)
            expected = np.arange(3) == on_back
            assert step.info["fell"].tolist() == expected.tolist()
            assert step.info["stalled"].tolist() == (active & ~expected).tolist()
