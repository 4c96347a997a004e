"""The border between simulators and this package: checked in one place, whatever the simulator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.envs.adapters.border import Border, require_sound
from omcda_deploy.envs.vector import VectorEnvironment, VectorStep, vectorize
from omcda_deploy.errors import ConfigError, ContractError, OmcdaError, SimulatorError
from omcda_deploy.play.collect import collect
from omcda_deploy.play.scripted import RandomTeam
from omcda_deploy.registry import make_environment
from tests.support.own_simulators import (
    CHOICES,
    HOSTILE,
    LENGTH,
    MASKS,
    SPEC,
    Clinging,
    Reach,
    leaves,
    toward,
)

OWN = "tests.support.own_simulators"


def record(task: str, out: Path, workers: int = 0, **options: Any) -> dict[str, Any]:
    spec = make_environment(task, **options).spec
    return collect(
        task,
        RandomTeam(spec),
        out,
        transitions=20,
        seed=0,
        behavior="random",
        num_envs=2,
        workers=workers,
        options=options,
    )


@pytest.mark.parametrize("case", [*HOSTILE, *MASKS])
def test_an_answer_that_breaks_the_rules_is_named_with_agent_and_step(case: str, tmp_path: Path) -> None:
    _, message = {**HOSTILE, **MASKS}[case]
    with pytest.raises(ContractError, match=rf"^{OWN}:hostile, step 5: {message}") as refused:
        record(f"{OWN}:hostile", tmp_path / "data.hdf5", case=case)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["one dies", "observation nan"])
def test_a_worker_tells_the_same(case: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=rf"^{OWN}:hostile, step 5: {HOSTILE[case][1]}"):
        record(f"{OWN}:hostile", tmp_path / "data.hdf5", workers=1, case=case)
    with pytest.raises(
        SimulatorError, match=r"^\S+:raises: step\(\) 5 raised KeyError: 'torque' \(.*own_sim\S+, line"
    ):
        record(f"{OWN}:raises", tmp_path / "data.hdf5", workers=1)
    with pytest.raises(SimulatorError, match=r"^\S+:leaves: step\(\) 5 raised SystemExit \("):
        record(f"{OWN}:leaves", tmp_path / "data.hdf5", workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_close_costs_neither_the_result_nor_the_first_error(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """``record`` makes one environment of its own and plays two; each look at a spec makes and closes one more."""
    Clinging.closed.clear()
    summary = record(f"{OWN}:Clinging", tmp_path / "data.hdf5", workers)
    assert summary["transitions"] >= 20
    assert (tmp_path / "data.hdf5").exists()
    told = rf"{OWN}:Clinging: close\(\) raised OSError: the port is gone \(\S+, line \d+\); what it holds"
    warnings = [*caplog.messages, *capfd.readouterr().err.splitlines()]
    assert [line for line in warnings if not re.search(told, line)] == []
    assert len(warnings) == 3  # the spec's and the two that were played
    assert len(Clinging.closed) == (3 if workers == 0 else 1)

    Clinging.closed.clear()
    with pytest.raises(ContractError, match="step 5: arm is not among the observations"):
        record(f"{OWN}:clinging_and_hostile", tmp_path / "other.hdf5", workers)
    assert len(Clinging.closed) == (3 if workers == 0 else 1)
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.hdf5"]


def test_environments_that_were_made_are_closed_where_a_later_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Reach] = []

    def make(task: str) -> Reach:
        if len(made) == 3:
            raise SimulatorError("no fourth")
        made.append(Clinging())
        return made[-1]

    Clinging.closed.clear()
    monkeypatch.setattr(registry, "make_environment", make)
    with pytest.raises(SimulatorError, match="no fourth"):
        VectorEnvironment("toy/reach", 3)  # one more is made for the spec
    assert Clinging.closed == made


def test_simulators_that_are_installed_are_checked_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the vector environment, without the adapter of the user's own."""

    def make(task: str, **options: Any) -> Any:
        return Reach(lambda step, answer: HOSTILE["one dies"][0](step, answer) if step == 5 else answer)

    monkeypatch.setattr(registry, "make_environment", lambda task: leaves())
    with VectorEnvironment("toy/reach", 1) as vector:
        vector.reset({0: 0})
        actions = {a.name: np.zeros((1, a.action.size), np.float32) for a in SPEC.agents}
        for _ in range(4):
            vector.step(actions)
        with pytest.raises(SimulatorError, match=r"^toy/reach: step\(\) raised SystemExit \("):
            vector.step(actions)
    monkeypatch.setattr(registry, "make_environment", make)
    with VectorEnvironment("toy/reach", 2) as vector:
        vector.reset({0: 0, 1: 1})
        actions = {a.name: np.zeros((2, a.action.size), np.float32) for a in SPEC.agents}
        for _ in range(4):
            vector.step(actions)
        with pytest.raises(ContractError, match="reach, step 5: arm is not among the observations"):
            vector.step(actions)


def test_an_error_counts_the_steps_of_its_episode(tmp_path: Path) -> None:
    border = Border(SPEC)
    reach = Reach()
    actions = {agent.name: np.zeros(agent.action.size, np.float32) for agent in SPEC.agents}
    for _ in range(2):
        border.reset(reach.reset(0), reach.state())
        for _ in range(3):
            border.step(reach.step(actions), reach.state())
    assert border.steps == 3
    with pytest.raises(ContractError, match="reach, step 4: expected the tuple"):
        border.step(None, reach.state())
    with pytest.raises(
        ContractError, match=r"reach, reset: expected the tuple \(observations, infos\), got 3 values"
    ):
        border.reset((1, 2, 3), None)
    with pytest.raises(ContractError, match=r"reset: state: expected numbers \[3\], got float64 \[4\]"):
        border.reset(reach.reset(0), np.ones(4))
    with pytest.raises(ContractError, match="reset: state: expected finite numbers, got nan in entry 2"):
        border.reset(reach.reset(0), np.array([0, 0, np.nan]))


@pytest.mark.parametrize(("reward", "expected"), [("sum", 3.0), ("mean", 1.0)])
def test_rewards_that_differ_join_as_the_user_says(reward: str, expected: float, tmp_path: Path) -> None:
    task = f"{OWN}:unequal_rewards"
    with pytest.raises(ContractError, match=r"step 1: the reward of arm is 1\.0, that of base 0\.0"):
        record(task, tmp_path / "data.hdf5")
    summary = record(task, tmp_path / "data.hdf5", reward=reward)
    assert summary["return_mean"] == expected * LENGTH
    with pytest.raises(ConfigError, match="reward: expected shared or sum or mean, got 'total'"):
        make_environment(task, reward="total")


def test_what_is_sound_is_read_as_it_is() -> None:
    border, reach = Border(SPEC), Reach()
    actions = {agent.name: np.full(agent.action.size, 0.5, np.float32) for agent in SPEC.agents}
    answer = border.reset(reach.reset(3), reach.state())
    x = np.random.default_rng(3).normal(size=3)
    np.testing.assert_array_equal(answer.state, x.astype(np.float32))
    np.testing.assert_array_equal(
        answer.observation, np.concatenate([x, x, x[:2] ** 2, x]).astype(np.float32)
    )
    assert (answer.reward, answer.terminated, answer.truncated, answer.action_mask) == (
        0.0,
        False,
        False,
        None,
    )
    raw = reach.step(actions)
    both = (
        raw[0],
        raw[1],
        *({n: True for n in raw[0]} for _ in range(2)),
        {"base": {"won": True, "note": "x"}},
    )
    end = border.step(both, reach.state())
    assert (end.terminated, end.truncated) == (True, False)  # an end in the last step is an end of the task
    assert end.info == {"won": True}
    assert end.reward == raw[1]["base"]


@pytest.mark.parametrize("value", [True, 1, 1.0, np.True_, np.int8(1), np.float32(1.0), np.array(1)])
def test_what_an_info_says_of_an_episode_is_a_truth_value(value: Any) -> None:
    border, reach = Border(SPEC), Reach()
    border.reset(reach.reset(0), None)
    observations, rewards, over, *_ = reach.step({a.name: np.zeros(a.action.size) for a in SPEC.agents})
    infos = {"base": {"won": value, "fell": value != 1, "load": -0.5}}
    told = border.step((observations, rewards, over, over, infos), None).info
    assert told == {"won": True, "fell": False, "load": -0.5}
    assert told["won"] is True
    infos = {"base": {"discarded": value}}
    lost = (observations, dict.fromkeys(rewards, 0.0), over, dict.fromkeys(over, True), infos)
    assert border.step(lost, None).info["discarded"] is True


def test_arrays_that_a_simulator_uses_again_are_copied() -> None:
    shared = np.zeros(11, np.float32)

    def reused(step: int, answer: Any) -> Any:
        shared[:] = step
        return ({"base": shared[:3], "arm": shared[3:8], "eye": shared[8:]}, *answer[1:])

    border, reach = Border(SPEC), Reach(reused)
    first = border.reset(reach.reset(0), reach.state())
    border.step(reach.step({a.name: np.zeros(a.action.size, np.float32) for a in SPEC.agents}), reach.state())
    assert not first.observation.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": [0.0, 2.1]}, r"action of arm: expected numbers from -2 to 2, got \[0\.0, 2\.0999"),
        ({"base": [np.nan]}, r"action of base: expected numbers from -1 to 1, got \[nan\]"),
        ({"eye": [0.0, 0.0]}, r"action of eye: expected numbers \[1\], got a list of 2"),
        ({"eye": ["left"]}, r"action of eye: expected numbers \[1\], got a list of 1"),
        ({"leg": [0.0]}, "'leg' is among the actions"),
    ],
)
def test_actions_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    environment = make_environment(f"{OWN}:Reach")
    good = {agent.name: [0.0] * agent.action.size for agent in SPEC.agents}
    with pytest.raises(ContractError, match="no episode has started"):
        environment.step(good)
    environment.reset(seed=0)
    environment.step({**good, "arm": [2.0, -2.0]})
    with pytest.raises(ContractError, match=f"step 2: {message}"):
        environment.step({**good, **changes})
    with pytest.raises(ContractError, match="step 2: eye is not among the actions"):
        environment.step({name: good[name] for name in ("base", "arm")})


@pytest.mark.parametrize("choice", [0, 3, -1, 1.0, True, "1", [1]])
def test_choices_that_are_not_available_are_refused(choice: Any) -> None:
    environment = make_environment(f"{OWN}:Choose")
    seed = next(s for s in range(9) if np.random.default_rng(s).normal(size=3)[1] > 0)
    _, infos = environment.reset(seed=seed)
    assert infos["arm"]["action_mask"].tolist() == [0, 1, 1]
    with pytest.raises(
        ContractError, match=r"step 1: action of arm: expected one of the available \[1, 2\], got"
    ):
        environment.step({"base": 0, "arm": choice, "eye": 0})
    environment.step({"base": 0, "arm": np.int64(1), "eye": 0})


def sound_step(spec: Any = SPEC, count: int = 3) -> dict[str, Any]:
    return {
        "observations": {a.name: np.zeros((count, a.observation_size), np.float32) for a in spec.agents},
        "state": np.zeros((count, 3), np.float32),
        "action_masks": None,
        "reward": np.zeros(count),
        "terminated": np.zeros(count, np.bool_),
        "truncated": np.zeros(count, np.bool_),
        "info": {},
    }


def spoilt(values: NDArray[Any], row: int) -> NDArray[Any]:
    copy = values.copy()
    copy[row] = np.nan
    return copy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "state",
            spoilt(np.zeros((3, 3), np.float32), 1),
            "environment 1, step 7: state: expected finite numbers",
        ),
        ("reward", spoilt(np.zeros(3), 2), "environment 2, step 9: reward: expected finite numbers"),
        ("reward", np.zeros((3, 3)), r"reward: expected numbers \[3\], got float64 \[3, 3\]"),
        ("terminated", np.zeros(3), r"terminated: expected bool \[3\], got float64 \[3\]"),
        ("truncated", np.zeros(2, np.bool_), r"truncated: expected bool \[3\], got bool \[2\]"),
        (
            "observations",
            {"base": np.zeros((3, 3), np.float32)},
            r"arm is not among the observations \(base\)",
        ),
        ("info", {"won": np.array([1, -1, 0])}, r"won: expected bool \[3\], got int64 \[3\]"),
        ("info", {"fell": spoilt(np.ones(3), 0)}, r"fell: expected bool \[3\], got float64 \[3\]"),
        ("info", {"stalled": np.zeros(2, np.bool_)}, r"stalled: expected bool \[3\], got bool \[2\]"),
        (
            "info",
            {"discarded": np.array([False, True, False])},
            "environment 1, step 7: discarded: expected a truncation with reward 0",
        ),
    ],
)
def test_simulators_that_batch_by_themselves_are_checked_as_a_batch(
    field: str, value: Any, message: str
) -> None:
    ages = np.array([5, 7, 9])
    require_sound(SPEC, 3, VectorStep(**sound_step()), ages)
    with pytest.raises(ContractError, match=rf"^reach(: |, ){message}"):
        require_sound(SPEC, 3, VectorStep(**{**sound_step(), field: value}), ages)
    observations = sound_step()["observations"]
    observations["arm"] = spoilt(observations["arm"], 0)
    with pytest.raises(ContractError, match="environment 0, step 5: observation of arm: expected finite"):
        require_sound(SPEC, 3, VectorStep(**{**sound_step(), "observations": observations}), ages)


@pytest.mark.parametrize("step", [0, 3])
def test_a_batched_simulator_that_blows_up_is_stopped(
    step: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MuJoCo gives NaN where a body explodes; the dataset would hold them."""
    from omcda_deploy.envs.programs.mujoco_bodies import Bodies

    task, observe, calls = "mamujoco/hopper-3x1", Bodies._observation, [0]

    def exploding(self: Any, *arguments: Any) -> Any:
        observation = observe(self, *arguments)
        calls[0] += 1
        if calls[0] <= step:
            return observation
        return np.where(np.arange(len(observation))[:, None] == 1, np.nan, observation)

    monkeypatch.setattr(Bodies, "_observation", exploding)
    with pytest.raises(
        ContractError, match=rf"hopper-3x1, environment 1, step {step}: observation of agent_0: expected fin"
    ):
        record(task, tmp_path / "data.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_masks_may_be_left_out_altogether() -> None:
    border = Border(CHOICES)
    observations = {agent.name: np.zeros(agent.observation_size) for agent in CHOICES.agents}
    answer = border.reset((observations, {}), np.zeros(3))
    assert answer.action_mask is not None
    assert answer.action_mask.tolist() == [1] * 9


def test_the_same_numbers_whatever_the_way(tmp_path: Path) -> None:
    """A loop of one's own, environments in this process and in workers play the same episode."""
    task = f"{OWN}:Reach"
    single = make_environment(task)
    observations, _ = single.reset(seed=4)
    total = 0.0
    for _ in range(LENGTH):
        observations, rewards, *_ = single.step(toward(observations))
        total += rewards["eye"]
    for workers in (0, 1):
        with vectorize(task, 2, workers=workers) as vector:
            step = vector.reset({0: 0, 1: 4})
            for _ in range(LENGTH):
                rows = [toward({n: v[i] for n, v in step.observations.items()}) for i in range(2)]
                actions = {n: np.stack([row[n] for row in rows]).astype(np.float32) for n in SPEC.names}
                step = vector.step(actions)
            np.testing.assert_array_equal(step.observations["arm"][1], observations["arm"])
            assert step.truncated.all()
    assert issubclass(ContractError, OmcdaError)
    assert total < 0.0
