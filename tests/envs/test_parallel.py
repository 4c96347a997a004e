"""PettingZoo's parallel API in both directions, and tasks named ``module:callable``."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test, parallel_seed_test

from omcda_deploy import registry
from omcda_deploy.envs.adapters.parallel import EPISODE_LIMIT, from_parallel
from omcda_deploy.envs.adapters.pettingzoo import _classes, to_parallel
from omcda_deploy.envs.adapters.spaces import flatten
from omcda_deploy.envs.vector import vectorize
from omcda_deploy.errors import (
    ConfigError,
    ContractError,
    MissingExtraError,
    PluginError,
    SimulatorError,
    TerminatedError,
)
from omcda_deploy.references import user_code
from omcda_deploy.registry import make_environment
from omcda_deploy.spec import ActionSpec
from tests.support.own_simulators import (
    CHOICES,
    LENGTH,
    SPEC,
    Choose,
    MaskedChoose,
    ParallelReach,
    Reach,
    unequal_rewards,
)

OWN = "tests.support.own_simulators"
# One compile of SMAX, and no StarCraft II: their contract is checked in test_environment_contract.py.
TASKS = [task for task in registry.tasks() if not task.startswith("sma")]


# -- ours as theirs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*TASKS, f"{OWN}:Choose", f"{OWN}:MaskedChoose", f"{OWN}:ParallelReach"])
def test_pettingzoos_own_tests_pass(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings of theirs are errors here."""
    parallel_api_test(to_parallel(make_environment(task)), num_cycles=40)
    parallel_seed_test(lambda: to_parallel(make_environment(task)), num_cycles=20)
    assert "Passed Parallel API test" in capsys.readouterr().out


def test_spaces_describe_the_spec_and_actions_can_be_drawn_without_masks() -> None:
    view = to_parallel(make_environment("toy/masked"))
    assert isinstance(view, ParallelEnv)
    assert view.metadata["name"] == "toy/masked"
    assert view.state_space.shape == (9,)
    _, infos = view.reset(seed=1)
    masks = {name: info["action_mask"] for name, info in infos.items()}
    assert any(not mask.all() for mask in masks.values())
    for name, space in view.action_spaces.items():
        assert isinstance(space, Discrete)
        assert space is view.action_space(name)
        assert {int(space.sample()) for _ in range(200)} == set(np.flatnonzero(masks[name]))
        only = np.zeros(space.n, np.int8)
        only[2] = 1
        assert space.sample(mask=only) == 2
        assert space.sample(probability=only.astype(np.float64)) == 2
    for seed in range(20):  # an unavailable choice would be refused
        view.reset(seed=seed)
        while view.agents:
            view.step({name: view.action_space(name).sample() for name in view.agents})
    own = to_parallel(make_environment(f"{OWN}:Reach"))
    assert own.action_space("arm") == Box(-2.0, 2.0, (2,), np.float32)
    assert own.observation_space("base") == Box(-np.inf, np.inf, (3,), np.float32)


def test_an_episode_through_the_view_is_the_environments_own() -> None:
    view, plain = to_parallel(make_environment("toy/chain")), make_environment("toy/chain")
    observations, infos = view.reset(seed=5)
    expected, _ = plain.reset(seed=5)
    while view.agents:
        np.testing.assert_array_equal(observations["agent_1"], expected["agent_1"])
        np.testing.assert_array_equal(view.state(), plain.state())
        actions = {name: int(np.flatnonzero(infos[name]["action_mask"])[0]) for name in view.agents}
        observations, rewards, terminations, truncations, infos = view.step(actions)
        expected, *others, _ = plain.step(actions)
        assert [rewards, terminations, truncations] == others
    assert any(terminations.values()) or any(truncations.values())
    view.close()


def test_without_pettingzoo_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _classes.cache_clear()
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'omcda-deploy\[pettingzoo\]'"):
        to_parallel(make_environment("toy/chain"))


# -- theirs as ours -------------------------------------------------------------------------------------------


def test_the_spec_follows_from_spaces() -> None:
    spec = from_parallel(ParallelReach()).spec
    assert [(a.name, a.observation_size, a.action) for a in spec.agents] == [
        ("base", 3, ActionSpec("continuous", 1, -1.0, 3.0)),
        ("arm", 5, ActionSpec("continuous", 2)),
        ("eye", 3, ActionSpec("continuous", 1)),
    ]
    assert (spec.state_size, spec.control_rate, spec.episode_limit) == (11, 50.0, LENGTH)
    named = from_parallel(ParallelReach(), task="mine", control_rate=5.0, episode_limit=3).spec
    assert (named.task, named.control_rate, named.episode_limit) == ("mine", 5.0, 3)
    masked = from_parallel(MaskedChoose()).spec
    assert [agent.action for agent in masked.agents] == [agent.action for agent in CHOICES.agents]
    assert [agent.observation_size for agent in masked.agents] == [6, 8, 6]  # a Discrete(3) as one-hot
    assert (masked.state_size, masked.control_rate, masked.episode_limit) == (3, 1.0, EPISODE_LIMIT)
    odd: Any = ParallelReach()
    odd.metadata = {"render_fps": "fast"}
    with pytest.raises(ConfigError, match="expected a control_rate above 0, got 'fast'"):
        from_parallel(odd)
    odd.metadata, odd.possible_agents = None, 3
    with pytest.raises(
        PluginError, match="reading its agents and spaces raised TypeError: 'int' object is not iter"
    ):
        from_parallel(odd)
    odd.possible_agents = [1, 2]
    with pytest.raises(PluginError, match="expected agents named by strings, got 1"):
        from_parallel(odd)
    rates: list[Any] = [0.0, float("inf"), float("nan"), True, np.array(20)]
    for rate in rates:
        with pytest.raises(ConfigError, match=r"^own/parallel: expected a control_rate above 0, got "):
            from_parallel(ParallelReach(), control_rate=rate)


@pytest.mark.parametrize("limit", [10, np.int64(10), np.uint8(10), np.array(10), 10.0, np.float32(10)])
def test_a_limit_is_a_whole_number_of_any_type(limit: Any) -> None:
    source: Any = ParallelReach()
    source.max_cycles, source.max_steps = limit, 20
    for spec in (from_parallel(source).spec, from_parallel(ParallelReach(), episode_limit=limit).spec):
        assert spec.episode_limit == 10
        assert type(spec.episode_limit) is int
    source.max_cycles = None
    assert from_parallel(source).spec.episode_limit == 20
    source.metadata = {"render_fps": np.int64(20)}
    assert from_parallel(source).spec.control_rate == 20.0
    rate: Any = np.float32(0.5)
    assert from_parallel(source, control_rate=rate).spec.control_rate == 0.5


@pytest.mark.parametrize("limit", [0, -1, 10.5, np.inf, np.nan, "10", True, np.True_, [10], np.ones(2)])
def test_a_limit_that_is_no_number_of_steps_is_refused(limit: Any) -> None:
    source: Any = ParallelReach()
    source.max_cycles = limit
    expected = "expected a whole number of steps, at least 1, got .*: correct it, or give from_parallel an"
    with pytest.raises(ConfigError, match=f"^own/parallel: max_cycles: {expected}"):
        from_parallel(source)
    with pytest.raises(ConfigError, match=f"^own/parallel: episode_limit: {expected}"):
        from_parallel(ParallelReach(), episode_limit=limit)


def test_actions_are_the_boxes_own_or_scaled_to_them_and_observations_pass_as_they_are() -> None:
    source = ParallelReach()
    team = from_parallel(source)
    raw, _ = Reach().reset(2)
    observations, infos = team.reset(seed=2)
    np.testing.assert_array_equal(observations["arm"], raw["arm"].astype(np.float32))
    np.testing.assert_array_equal(team.state(), np.concatenate(list(observations.values())))
    assert infos == {"base": {}, "arm": {}, "eye": {}}
    for ours, theirs in (
        ({"base": [-1.0], "arm": [-1.0, -1.0], "eye": [0.25]}, ([-1.0], [-1.0, 0.0], [0.25])),
        ({"base": [3.0], "arm": [1.0, 1.0], "eye": [0.0]}, ([3.0], [1.0, 10.0], [0.0])),
        ({"base": [1.0], "arm": [0.5, -0.5], "eye": [0.0]}, ([1.0], [0.5, 2.5], [0.0])),
    ):
        team.step(ours)
        for received, expected in zip(source.received[-1].values(), theirs, strict=True):
            np.testing.assert_allclose(received, expected, atol=1e-7)
            assert received.dtype == np.float32


def test_masks_choices_and_reports_are_those_of_the_source() -> None:
    team, plain = from_parallel(MaskedChoose()), Choose()
    observations, infos = team.reset(seed=1)
    raw, raw_infos = plain.reset(1)
    for _ in range(LENGTH):
        assert observations["arm"].tolist() == [
            *raw["arm"].astype(np.float32),
            0.0,
            1.0,
            0.0,
        ] or observations["arm"].tolist() == [0.0, 1.0, 0.0, *raw["arm"].astype(np.float32)]
        np.testing.assert_array_equal(infos["arm"]["action_mask"], raw_infos["arm"]["action_mask"])
        actions = {name: int(np.flatnonzero(info["action_mask"])[-1]) for name, info in infos.items()}
        observations, rewards, _, truncations, infos = team.step(actions)
        raw, raw_rewards, *_, raw_infos = plain.step(actions)
        assert rewards == raw_rewards
        assert infos["base"]["won"] is True
    assert all(truncations.values())


def test_an_environment_without_an_end_is_given_one() -> None:
    def endless(step: int, answer: Any) -> Any:
        return answer if step == 0 else (*answer[:3], dict.fromkeys(answer[3], False), answer[4])

    team = from_parallel(ParallelReach(endless), episode_limit=4)
    team.reset(seed=0)
    actions = {agent.name: np.zeros(agent.action.size, np.float32) for agent in team.spec.agents}
    ends = [any(team.step(actions)[3].values()) for _ in range(4)]
    assert ends == [False, False, False, True]

    def falls(step: int, answer: Any) -> Any:
        return answer if step < 4 else (*answer[:2], dict.fromkeys(answer[2], True), *answer[3:])

    team = from_parallel(ParallelReach(falls), episode_limit=4)
    team.reset(seed=0)
    *_, (_, _, terminations, truncations, _) = [team.step(actions) for _ in range(4)]
    assert all(terminations.values())  # an end in the last step is an end of the task
    assert not any(truncations.values())


def test_there_and_back_is_the_same_environment() -> None:
    for name in ("Reach", "Choose"):
        environment = make_environment(f"{OWN}:{name}")
        back = from_parallel(to_parallel(environment))
        assert [a.observation_size for a in back.spec.agents] == [a.observation_size for a in SPEC.agents]
        observations, infos = back.reset(seed=3)
        expected, expected_infos = make_environment(f"{OWN}:{name}").reset(seed=3)
        for agent in SPEC.names:
            np.testing.assert_array_equal(observations[agent], expected[agent])
            assert infos[agent].keys() == expected_infos[agent].keys()


def test_rewards_join_and_a_wrapped_team_keeps_its_choice() -> None:
    source = unequal_rewards()
    source_view: Any = ParallelReach()
    source_view.inner = source
    team = from_parallel(source_view, reward="mean")
    actions = {agent.name: np.zeros(agent.action.size, np.float32) for agent in team.spec.agents}
    team.reset(seed=0)
    assert team.step(actions)[1] == {"base": 1.0, "arm": 1.0, "eye": 1.0}
    again = team.relabeled("mine", None)
    again.reset(seed=0)
    assert again.step(actions)[1]["arm"] == 1.0
    total = team.relabeled("mine", "sum")
    total.reset(seed=0)
    assert total.step(actions)[1]["arm"] == 3.0
    assert total.spec.task == "mine"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(4), r"step 5: observation of arm: expected shape \[5\], got \[4\]"),
        ("abc", r"step 5: observation of arm: expected shape \[5\], got \[\]"),
    ],
)
def test_an_observation_of_another_space_is_named(value: Any, message: str) -> None:
    def spoil(step: int, answer: Any) -> Any:
        return ({**answer[0], "arm": value}, *answer[1:]) if step == 5 else answer

    team = from_parallel(ParallelReach(spoil), task="mine")
    team.reset(seed=0)
    actions = {agent.name: np.zeros(agent.action.size, np.float32) for agent in team.spec.agents}
    for _ in range(4):
        team.step(actions)
    with pytest.raises(ContractError, match=f"^mine, {message}"):
        team.step(actions)


def nested(box: Any = np.float32) -> Any:
    """A space of boxes and choices in dictionaries and tuples."""
    return Dict(
        pos=Box(-1.0, 1.0, (2, 2), box),
        rest=Tuple([Discrete(3, start=1), Dict(grip=Box(0, 9, (1,), np.int32), on=MultiBinary(2))]),
        gear=MultiDiscrete([2, 3]),
    )


def test_nested_spaces_flatten_as_gymnasium_flattens_them_whatever_the_type_of_numbers() -> None:
    space = nested()
    space.seed(3)
    for _ in range(20):
        value = space.sample()
        flat = flatten(space, value, "observation of base")
        np.testing.assert_array_equal(flat, gymnasium.spaces.flatten(space, value))
        wide = {**value, "pos": value["pos"].astype(np.float64)}
        grip = np.asarray(value["rest"][1]["grip"], np.int64)
        wide["rest"] = (value["rest"][0], {**value["rest"][1], "grip": grip})
        np.testing.assert_array_equal(flatten(space, wide, "observation of base"), flat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos": np.zeros(4)}, r"base, pos: expected shape \[2, 2\], got \[4\]"),
        (
            {"rest": (1, {"on": np.zeros(2, np.int8)})},
            r"base, rest, 1: expected a dictionary of grip, on, got \['on'\]",
        ),
        ({"pos": [["a", "b"], ["c", "d"]]}, r"base, pos: expected numbers, got <U1 \[2, 2\]"),
        ({"pos": [[0.0], [0.0, 1.0]]}, r"base, pos: expected shape \[2, 2\], got list"),
        ({"rest": (1,)}, "base, rest: expected a tuple of 2 values, got 1 values"),
        ({"rest": 1}, "base, rest: expected a tuple of 2 values, got a int"),
        ({"gear": np.zeros(2)}, r"base, gear: expected a value of MultiDiscrete\(.*, float64 \[2\]"),
        (
            {"more": 1},
            r"base: expected a dictionary of pos, rest, gear, got \['pos', 'rest', 'gear', 'more'\]",
        ),
    ],
)
def test_a_part_that_is_not_of_its_space_is_named(changes: Any, message: str) -> None:
    value = {**nested().sample(), **changes}
    with pytest.raises(ContractError, match=f"^observation of {message}"):
        flatten(nested(), value, "observation of base")


# -- module:callable ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("arm.py:make", ConfigError, r"'arm\.py:make': expected a module's name: leave out \.py"),
        (":make", ConfigError, "expected module:callable"),
        ("arm:", ConfigError, "expected module:callable"),
        ("a b:make", ConfigError, "expected module:callable"),
        (
            "nowhere:make",
            PluginError,
            r"found no module nowhere, neither installed nor in /.*: run this in the folder",
        ),
        (
            f"{OWN}.deeper:make",
            PluginError,
            rf"{OWN} needs|{OWN}.deeper cannot be imported|found no module {OWN}",
        ),
        (
            f"{OWN}:Reech",
            PluginError,
            r"own_simulators \(.*own_simulators\.py\) has no Reech: did you mean 'Reach'\?",
        ),
        (f"{OWN}:Reach.make", PluginError, "Reach has no make"),
        (f"{OWN}:number", PluginError, "expected a callable, got 3 of type int: name a function or a class"),
        (
            f"{OWN}:needs",
            PluginError,
            r"it is called as needs\(\), but is declared as \(port.*: missing a required",
        ),
        (
            f"{OWN}:broken",
            PluginError,
            r"calling it raised ZeroDivisionError: no power \(.*own_sim\S+, line \d+\)",
        ),
        (
            f"{OWN}:nothing",
            PluginError,
            "got None, which lacks possible_agents, reset, step, observation_space, ",
        ),
        (f"{OWN}:Stateless", PluginError, "which has a spec but lacks state: define it"),
        (
            f"{OWN}:TakesTurns",
            PluginError,
            r"got an AECEnv, whose agents take turns: use its parallel_env\(\)",
        ),
        (
            f"{OWN}:OddSpaces",
            PluginError,
            "action space of arm: expected a Box of floats or a Discrete, got Mul",
        ),
        (f"{OWN}:Unbounded", PluginError, "action space of arm: expected finite bounds with low < high"),
    ],
)
def test_a_reference_to_no_environment_says_what_is_wrong(
    reference: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        make_environment(reference)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import numpyy\n", "needs numpyy, which is not installed"),
        ("def make(:\n", r"cannot be imported: SyntaxError: .*\(arm_\w+\.py, line 1\)"),
        ("\nx = 1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(arm_\w+\.py, line 2\)"),
        ("import sys\nsys.exit('usage: arm')\n", "cannot be imported: SystemExit: usage: arm"),
        ("raise ValueError('two\\nlines')\n", r"ValueError: two \("),
        ("raise ValueError()\n", r"ValueError \(arm_\w+\.py, line 1\)"),
    ],
)
def test_a_module_that_cannot_be_imported_says_where(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"arm_{abs(hash(message))}"
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(PluginError, match=message) as refused:
        make_environment(f"{name}:make")
    assert re.match(rf"{name}:make: {name} ", str(refused.value))
    assert "\n" not in str(refused.value)


def test_a_task_keeps_its_reference_as_its_name_and_its_options() -> None:
    environment = make_environment(f"{OWN}:Reach")
    assert environment.spec.task == f"{OWN}:Reach"
    assert environment.spec.contract_hash == SPEC.contract_hash
    assert registry.team_spec(f"{OWN}:Reach") == environment.spec
    assert registry.simulator_versions(f"{OWN}:Reach") == {}
    assert registry.behavior_team(f"{OWN}:Reach") is None
    assert registry.vector_factory(f"{OWN}:Reach") is None
    make_environment(f"{OWN}:with_render_mode", render_mode="rgb_array")
    with pytest.raises(ConfigError, match="has no option size: expected render_mode; leave it out"):
        make_environment(f"{OWN}:with_render_mode", size=3)
    with pytest.raises(ConfigError, match="has no render"):
        environment.render()


def test_an_error_in_the_call_itself_has_no_place() -> None:
    environment = make_environment(f"{OWN}:takes_no_seed")
    with pytest.raises(
        SimulatorError, match=r"reset\(\) raised TypeError: .*unexpected keyword argument 'seed'$"
    ):
        environment.reset(seed=0)


def test_an_error_inside_the_environment_says_where() -> None:
    environment = make_environment(f"{OWN}:raises")
    environment.reset(seed=0)
    good = {agent.name: [0.0] * agent.action.size for agent in SPEC.agents}
    for _ in range(4):
        environment.step(good)
    with pytest.raises(
        SimulatorError, match=r"raises: step\(\) 5 raised KeyError: 'torque' \(.*\.py, line \d+\)"
    ):
        environment.step(good)


@pytest.mark.parametrize(
    ("name", "workers"),
    [("the_same", 0), ("the_same", 1), ("the_same_adapted", 0), ("the_same_slotted", 0), ("Wrapped", 0)],
)
def test_the_same_environment_twice_is_refused(name: str, workers: int) -> None:
    """Side by side its episodes would mix; one that was closed after a look at its spec is no better."""
    registry._made.clear()
    task = f"{OWN}:{name}"
    with pytest.raises(
        PluginError, match=rf"^{task}: returned the same environment twice: make a new one in"
    ):
        vectorize(task, 2, workers=workers)
    if workers == 0:
        registry._made.clear()
        environment = make_environment(task)
        with pytest.raises(PluginError, match="returned the same environment twice"):
            vectorize(task, 1)
        environment.close()


@pytest.mark.parametrize("name", ["Reach", "ParallelReach", "Slotted"])
def test_new_environments_are_not_taken_for_old_ones_nor_kept(name: str) -> None:
    registry._made.clear()
    ids = set()
    for _ in range(50):
        ids.add(id(vars(make_environment(f"{OWN}:{name}"))["source"]))
        gc.collect(0)
    gc.collect()
    assert len(ids) < 50  # the place of one that is gone is used again
    assert len(registry._made) == 0
    kept = [make_environment(f"{OWN}:{name}") for _ in range(3)]
    assert len(registry._made) == len(kept)


def test_simulators_that_are_installed_make_new_environments_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_environment(f"{OWN}:Reach")
    module = SimpleNamespace(TASKS=("lab/reach",), make=lambda task: plain)
    monkeypatch.setattr(registry, "_find", lambda task: module)
    with pytest.raises(PluginError, match=r"^lab/reach: returned the same environment twice"):
        vectorize("lab/reach", 2)


def test_sigterm_in_user_code_is_no_error_of_it() -> None:
    with pytest.raises(TerminatedError), user_code("mine", SimulatorError):
        raise TerminatedError(143)
