from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs import Float, Observations, StepResult
from omcda_deploy.envs.vector import VectorEnvironment, VectorStep
from omcda_deploy.errors import ConfigError, ContractError, SimulatorError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

HOPPER = "mamujoco/hopper-3x1"


def random_actions(spec: TeamSpec, count: int, seed: int) -> dict[str, Float]:
    generator = np.random.default_rng(seed)
    return {a.name: generator.uniform(-1, 1, (count, a.action.size)).astype(np.float32) for a in spec.agents}


def trace(workers: int, count: int = 5, steps: int = 40) -> list[VectorStep]:
    """Step hoppers with random actions; each that falls is left out for one step, then reset."""
    with VectorEnvironment(HOPPER, count, workers=workers) as vector:
        trace_steps = [vector.reset({i: 10 + i for i in range(count)})]
        down = np.zeros(count, np.bool_)
        for t in range(steps):
            fresh = np.flatnonzero(down).tolist()
            trace_steps.append(vector.step(random_actions(vector.spec, count, t), ~down))
            down = trace_steps[-1].terminated | trace_steps[-1].truncated
            if fresh:
                trace_steps.append(vector.reset({i: 1000 * t + i for i in fresh}))
        return trace_steps


def test_results_do_not_depend_on_workers() -> None:
    alone, shared = trace(0), trace(2)
    assert len(alone) == len(shared) > 41  # some fell and were reset
    for one, other in zip(alone, shared, strict=True):
        for name, values in one.observations.items():
            np.testing.assert_array_equal(values, other.observations[name])
        for field in ("state", "reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("numbers", [{"num_envs": True}, {"num_envs": 2, "workers": True}])
def test_true_is_no_number_of_environments_or_workers(numbers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r": expected [01] to .*, got True"):
        VectorEnvironment(HOPPER, **numbers)


def test_each_row_is_one_environment() -> None:
    single = registry.make_environment(HOPPER)
    with VectorEnvironment(HOPPER, 3) as vector:
        first = vector.reset({0: 5, 1: 6, 2: 7})
        expected, _ = single.reset(6)
        for name in single.possible_agents:
            np.testing.assert_array_equal(first.observations[name][1], expected[name])
        for t in range(10):
            actions = random_actions(vector.spec, 3, t)
            answer = vector.step(actions)
            expected, rewards, terminated, _, _ = single.step({n: a[1] for n, a in actions.items()})
            for name in single.possible_agents:
                np.testing.assert_array_equal(answer.observations[name][1], expected[name])
                assert answer.reward[1] == rewards[name]
                assert answer.terminated[1] == terminated[name]
            np.testing.assert_array_equal(answer.state[1], single.state())
    assert len(np.unique(answer.reward)) == 3


def test_inactive_environments_keep_what_they_show() -> None:
    with VectorEnvironment(HOPPER, 2) as vector:
        initial = vector.reset({0: 1, 1: 1})
        later = vector.step(random_actions(vector.spec, 2, 0), np.array([True, False]))
        assert later.reward[0] != 0
        assert later.reward[1] == 0
        np.testing.assert_array_equal(later.state[1], initial.state[1])
        assert not np.array_equal(later.state[0], initial.state[0])
        np.testing.assert_array_equal(
            initial.state[0], initial.state[1]
        )  # later steps do not overwrite earlier results
        again = vector.reset({0: 1})
        np.testing.assert_array_equal(again.state, initial.state)
        assert not again.reward.any()


def test_misuse_is_named() -> None:
    with VectorEnvironment(HOPPER, 2) as vector:
        actions = random_actions(vector.spec, 2, 0)
        with pytest.raises(ContractError, match="environment 0 is between episodes"):
            vector.step(actions)
        vector.reset({0: 0})
        with pytest.raises(ContractError, match="environment 1 is between episodes"):
            vector.step(actions)
        vector.reset({1: 0})
        with pytest.raises(ContractError, match=r"agent_1: expected shape \[2, 1\], got \[2, 3\]"):
            vector.step({**actions, "agent_1": np.zeros((2, 3), np.float32)})
        with pytest.raises(ContractError, match="no action for agent_2"):
            vector.step({name: actions[name] for name in ("agent_0", "agent_1")})
        with pytest.raises(ContractError, match="0 to 1, got 2"):
            vector.reset({2: 0})
    with pytest.raises(ContractError, match="closed"):
        vector.reset({0: 0})
    with pytest.raises(ConfigError, match="num_envs"):
        VectorEnvironment(HOPPER, 0)
    with pytest.raises(UnknownNameError, match="did you mean 'mamujoco/hopper-3x1'"):
        VectorEnvironment("mamujoco/hoper-3x1", 2, workers=2)


def test_a_dead_worker_and_a_refused_action_are_one_error_each() -> None:
    vector = VectorEnvironment(HOPPER, 2, workers=2)
    vector.reset({0: 0, 1: 1})
    processes = [worker.process for worker in vector._workers]
    victim = processes[1].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    processes[1].join()
    with pytest.raises(
        SimulatorError, match=r"environments 1 to 1 of mamujoco/hopper-3x1 died \(exit code -9"
    ):
        vector.step(random_actions(vector.spec, 2, 0))
    assert not any(process.is_alive() for process in processes)

    with VectorEnvironment(HOPPER, 1, workers=1) as vector:
        vector.reset({0: 0})
        nowhere = {name: np.full((1, 1), np.nan, np.float32) for name in vector.spec.names}
        with pytest.raises(ContractError, match="finite"):
            vector.step(nowhere)


class Corridor:
    """Two discrete agents of different sizes; an episode of seed s has s steps and is won when s is even."""

    spec = TeamSpec(
        task="test/corridor",
        agents=(
            AgentSpec("left", 1, ActionSpec("discrete", 2)),
            AgentSpec("right", 2, ActionSpec("discrete", 3)),
        ),
        state_size=1,
        control_rate=1.0,
    )

    def __init__(self, **options: Any) -> None:
        self._length, self._steps = 0, 0

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        self._length, self._steps = seed or 0, 0
        return self._observe(), self._info()

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        assert all(isinstance(action, int) for action in actions.values())
        self._steps += 1
        names, over = self.spec.names, self._steps >= self._length
        infos = self._info()
        if over:
            infos["left"]["won"] = self._length % 2 == 0
        reward = float(10 * actions["left"] + actions["right"])
        flags = dict.fromkeys(names, False)
        return self._observe(), dict.fromkeys(names, reward), dict.fromkeys(names, over), flags, infos

    def state(self) -> Float:
        return np.array([self._steps], np.float32)

    def render(self) -> NDArray[np.uint8]:
        return np.full((1, 1, 3), self._length, np.uint8)

    def close(self) -> None: ...

    def _observe(self) -> Observations:
        return {
            "left": np.array([self._length], np.float32),
            "right": np.array([self._length, self._steps], np.float32),
        }

    def _info(self) -> dict[str, dict[str, Any]]:
        return {
            "left": {"action_mask": np.array([1, 0], np.uint8), "note": "no number"},
            "right": {"action_mask": np.array([self._steps == 0, 1, 1], np.uint8)},
        }


def test_discrete_actions_masks_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "make_environment", lambda task, **options: Corridor(**options))
    with VectorEnvironment("test/corridor", 3) as vector:
        first = vector.reset({0: 1, 1: 2, 2: 2})
        assert first.action_masks is not None
        assert first.action_masks["right"].tolist() == [[1, 1, 1]] * 3
        assert first.info == {}
        answer = vector.step({"left": np.array([0, 1, 1]), "right": np.array([2, 0, 1])})
        assert answer.reward.tolist() == [2.0, 10.0, 11.0]
        assert answer.terminated.tolist() == [True, False, False]
        assert answer.observations["right"].tolist() == [[1, 1], [2, 1], [2, 1]]
        assert answer.action_masks is not None
        assert answer.action_masks["left"].tolist() == [[1, 0]] * 3
        assert answer.action_masks["right"].tolist() == [[0, 1, 1]] * 3
        assert answer.info["won"].tolist() == [False, False, False]
        zeros = np.zeros(3, np.int64)
        last = vector.step({"left": zeros, "right": zeros}, np.array([False, True, True]))
        assert last.info["won"].tolist() == [False, True, True]
        assert last.info["won"].dtype == np.bool_
        assert vector.render(1)[0, 0, 0] == 2
