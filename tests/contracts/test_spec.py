"""Team specifications: positions of agents in joined vectors, and numbers that no team has."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

SPEC = TeamSpec(
    task="test/slices",
    agents=(
        AgentSpec("a", 4, ActionSpec("continuous", 2)),
        AgentSpec("b", 1, ActionSpec("continuous", 3)),
        AgentSpec("c", 2, ActionSpec("continuous", 1)),
    ),
    state_size=7,
    control_rate=10.0,
)


def test_slices_divide_a_joined_vector_among_the_agents() -> None:
    assert SPEC.observation_slices == (slice(0, 4), slice(4, 5), slice(5, 7))
    assert SPEC.action_slices == (slice(0, 2), slice(2, 5), slice(5, 6))
    joined = np.arange(7)
    parts = [joined[columns] for columns in SPEC.observation_slices]
    np.testing.assert_array_equal(np.concatenate(parts), joined)


def test_cached_slices_belong_to_one_spec_and_leave_it_equal() -> None:
    fresh = replace(SPEC)
    assert SPEC.action_slices is SPEC.action_slices
    assert fresh == SPEC
    assert hash(fresh) == hash(SPEC)
    assert asdict(fresh) == asdict(SPEC)
    single = replace(SPEC, agents=SPEC.agents[1:2])
    assert single.action_slices == (slice(0, 3),)
    assert pickle.loads(pickle.dumps(SPEC)).observation_slices == SPEC.observation_slices


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_size": 0}, "expected a state_size and an episode_limit of at least 1, got 0 and"),
        ({"episode_limit": 0}, "expected a state_size and an episode_limit of at least 1"),
        ({"control_rate": 0.0}, r"control_rate: expected a number of Hz above 0, got 0\.0"),
        ({"control_rate": float("nan")}, "control_rate: expected a number of Hz above 0, got nan"),
        ({"control_rate": float("inf")}, "control_rate: expected a number of Hz above 0, got inf"),
    ],
)
def test_numbers_that_no_team_has_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SPEC, **changes)
    with pytest.raises(ConfigError, match=message):
        TeamSpec.from_json({**SPEC.to_json(), **changes})


@pytest.mark.parametrize("name", ["state_size", "episode_limit", "control_rate"])
def test_true_is_no_number_of_a_team(name: str) -> None:
    changes: dict[str, Any] = {name: True}
    with pytest.raises(ConfigError, match=f"{name}.*, got .*True"):
        replace(SPEC, **changes)
    with pytest.raises(ContractError, match=r"expected a (whole )?number, got True"):
        TeamSpec.from_json({**SPEC.to_json(), **changes})


def test_true_is_no_number_of_an_agent() -> None:
    with pytest.raises(ConfigError, match="observation_size of a: expected at least 1, got True"):
        AgentSpec("a", True, ActionSpec("continuous", 2))
    with pytest.raises(ConfigError, match=r"ActionSpec\.size: expected at least 1, got True"):
        ActionSpec("discrete", True)
    with pytest.raises(ConfigError, match=r"finite bounds .* got low 0 and high True"):
        ActionSpec("continuous", 2, 0, True)
    agent = {**SPEC.to_json()["agents"][0], "action_high": True}
    with pytest.raises(ContractError, match="expected a number, got True"):
        TeamSpec.from_json({**SPEC.to_json(), "agents": [agent]})


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, -1.0), (-np.inf, 1.0), (0.0, np.nan)])
def test_bounds_without_a_range_are_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="expected finite bounds with low < high"):
        ActionSpec("continuous", 1, low, high)
    with pytest.raises(ContractError, match=r"expected a whole number, got 2\.5"):
        TeamSpec.from_json({**SPEC.to_json(), "state_size": 2.5})


def test_normalisers_that_do_nothing_known_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'none' or 'per-vector-standardize', got 'identity'"):
        TeamSpec.from_json({**SPEC.to_json(), "normalizer": {"kind": "identity"}})


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "team", "agent\n", "größe"])
def test_names_that_no_folder_or_model_can_have_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected names of letters, digits"):
        replace(SPEC, agents=(replace(SPEC.agents[0], name=name),))
    replace(SPEC, agents=(replace(SPEC.agents[0], name="Arm_1.left-2"),))


@pytest.mark.parametrize(
    ("actions", "admitted"),
    [
        ([[-0.4, 2.0]], True),
        ([[-0.4, 2.0 + 1e-6]], True),  # rounding
        ([[-0.4, 2.001]], False),
        ([[-0.401, 0.0]], False),
        ([[np.nan, 0.0]], False),
        ([[0.0, np.inf]], False),
    ],
)
def test_actions_within_the_bounds_are_admitted(actions: list[list[float]], admitted: bool) -> None:
    assert ActionSpec("continuous", 2, -0.4, 2.0).admits(np.array(actions)) is admitted


@pytest.mark.parametrize(
    ("choices", "admitted"),
    [([0, 2], True), ([3], False), ([-1], False), ([1.0], False), ([True], False), ([1.5], False)],
)
def test_choices_that_exist_are_admitted(choices: list[float], admitted: bool) -> None:
    assert ActionSpec("discrete", 3).admits(np.array(choices)) is admitted
