"""Teams described in JSON files and by spaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from omcda_deploy.datasets.teams import agents_of_spaces, read_team
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.spec import ActionSpec, AgentSpec
from tests.support.episodes import SPECS

AGENT = {"name": "left", "observation_size": 5, "action_kind": "continuous", "action_size": 2}
SHORT = {"task": "cell/reach", "control_rate": 10, "state_size": 5, "agents": [AGENT]}


def save(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("kind", SPECS)
def test_a_spec_is_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    assert read_team(save(tmp_path / "team.json", SPECS[kind].to_json())) == SPECS[kind]


def test_bounds_limit_and_normalisation_may_be_left_out(tmp_path: Path) -> None:
    team = read_team(save(tmp_path / "team.json", SHORT))
    assert team.agents == (AgentSpec("left", 5, ActionSpec("continuous", 2, -1.0, 1.0)),)
    assert (team.normalizer.kind, team.episode_limit) == ("none", 1000)


def of_agent(**changed: Any) -> dict[str, Any]:
    return {**SHORT, "agents": [{**AGENT, **changed}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a team with task, control_rate, state_size and agents"),
        ({"task": "a"}, "'agents' is missing"),
        ({**SHORT, "agents": ["left"]}, "expected a team with task"),
        ({**SHORT, "agents": []}, "expected at least one agent"),
        ({key: value for key, value in SHORT.items() if key != "control_rate"}, "control_rate"),
        ({**SHORT, "control_rate": -1}, "control_rate: expected a number of Hz above 0, got -1"),
        ({**SHORT, "state_size": 0}, "expected a state_size and an episode_limit of at least 1, got 0"),
        ({**SHORT, "state_size": "five"}, "expected a team"),
        (of_agent(observation_size=2.5), "expected a whole number, got 2.5"),
        (of_agent(observation_size=0), "observation_size of left: expected at least 1, got 0"),
        (of_agent(action_kind="both"), "expected 'continuous' or 'discrete', got 'both'"),
        (
            of_agent(action_low=1, action_high=-1),
            "expected finite bounds with low < high, got low 1.0 and high -1.0",
        ),
        ({**SHORT, "agents": [AGENT, AGENT]}, "names must be distinct"),
        ({**SHORT, "normalizer": "none"}, "expected a team"),
        (
            {**SHORT, "normalizer": {"kind": "identity"}},
            "expected 'none' or 'per-vector-standardize', got 'id",
        ),
        ({**SHORT, "normalizer": {"kind": "none", "mean": 1}}, "unknown field of a normalizer 'mean'"),
        ({**SHORT, "episode_limits": 5}, "field of a team 'episode_limits': did you mean 'episode_limit'"),
        (of_agent(low=-2), "unknown field of agent left 'low': did you mean 'action_low'"),
        ({**SHORT, "episode_limit": float("inf")}, "expected a team .* infinity"),
        (
            json.dumps(SHORT).replace('"observation_size": 5', '"observation_size": 1e400'),
            "a team .* infinity",
        ),
    ],
)
def test_what_is_no_team_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        read_team(save(tmp_path / "team.json", content))
    assert str(tmp_path / "team.json") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.json cannot be read .* expected a team"):
        read_team(tmp_path / "no.json")
    (tmp_path / "team.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_team(tmp_path / "team.json")


BOX = spaces.Box(-1, 1, (2,))


def test_spaces_tell_the_agents(tmp_path: Path) -> None:
    masked = spaces.Dict({"observation": spaces.Box(0, 1, (3,)), "action_mask": spaces.MultiBinary(4)})
    agents = agents_of_spaces(
        ["b", "a"],
        {"a": masked, "b": spaces.Box(0, 1, (2,))},
        {"a": spaces.Discrete(4), "b": spaces.Discrete(2)},
        "x",
    )
    assert agents == (
        AgentSpec("b", 2, ActionSpec("discrete", 2)),
        AgentSpec("a", 3, ActionSpec("discrete", 4)),
    )
    (agent,) = agents_of_spaces(["a"], {"a": BOX}, {"a": spaces.Box(-2, 2, (3,))}, "x")
    assert agent == AgentSpec("a", 2, ActionSpec("continuous", 3, -2.0, 2.0))


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (spaces.Box(0, 1, (8, 8)), BOX, "observation space of a: expected a Box of one axis"),
        (spaces.Discrete(5), BOX, "observation space of a: expected a Box of one axis"),
        (spaces.Dict({"image": BOX}), BOX, "observation space of a: expected a Box of one axis"),
        (BOX, spaces.Box(-np.inf, np.inf, (2,)), "action space of a: expected one pair of finite bounds"),
        (
            BOX,
            spaces.Box(np.array([-1, -2], np.float32), np.array([1, 2], np.float32)),
            "action space of a: expected one pair of",
        ),
        (BOX, spaces.Box(-1, 1, (2, 2)), "action space of a: expected a Box of one axis or a Discrete"),
        (
            BOX,
            spaces.Discrete(3, start=1),
            "action space of a: expected a Box of one axis or a Discrete from 0 on",
        ),
        (BOX, spaces.MultiBinary(3), "action space of a: expected a Box of one axis or a Discrete"),
    ],
)
def test_spaces_that_no_spec_states_are_named(observation: Any, action: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=f"x: {message}"):
        agents_of_spaces(["a"], {"a": observation}, {"a": action}, "x")
    with pytest.raises(DatasetError, match="an observation space and an action space for each agent"):
        agents_of_spaces(["a", "b"], {"a": observation}, {"a": action}, "x")
