"""Reports of a loop on its steps, and refusals of what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import ConfigError, ContractError, OmcdaError
from omcda_deploy.recordings.reader import find_segments, read_segment
from tests.support.server_process import ServerProcess


@pytest.fixture
def team(continuous_server: ServerProcess, tmp_path: Path) -> Iterator[RemoteTeam]:
    with RemoteTeam([continuous_server.endpoint], record=tmp_path, temperature=1.0) as connected:
        yield connected


def act(team: RemoteTeam, batch: int | None = None) -> None:
    shape = () if batch is None else (batch,)
    team.act({a.name: np.ones((*shape, a.observation_size), np.float32) for a in team.spec.agents})


def reported(team: RemoteTeam, folder: Path) -> dict[str, Any]:
    team.close()
    (path,) = find_segments([folder])
    segment = read_segment(path)
    assert segment is not None
    return dict(segment.columns)


def test_reports_of_one_row_of_a_batch_and_of_agents_are_one(team: RemoteTeam, tmp_path: Path) -> None:
    names = team.spec.names
    team.reset(episode_id="flight 3")
    assert team.episode == ("flight 3", 0)
    act(team)
    team.report(1.5, False, False)
    act(team)
    assert team.episode == ("flight 3", 2)
    team.report(dict.fromkeys(names, 2.5), dict.fromkeys(names, False), dict.fromkeys(names, True))
    team.reset()
    act(team, 3)
    rewards = np.array([1.0, 2.0, 3.0])
    team.report(rewards, [True, False, False], np.zeros(3, bool), active=[True, False, True])
    rewards[:] = 0.0  # a loop may use its arrays again
    columns = reported(team, tmp_path)
    assert columns["reward"].tolist() == [1.5, 2.5, 1.0, 3.0]
    assert columns["row"].tolist() == [0, 0, 0, 2]
    assert columns["episode_step"].tolist() == [1, 2, 1, 1]
    assert columns["terminated"].tolist() == [0, 0, 1, 0]
    assert columns["truncated"].tolist() == [0, 1, 0, 0]
    episodes = columns["episode_id"].tolist()
    assert episodes[:2] == ["flight 3", "flight 3"]
    assert len(set(episodes)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((float("nan"), False, False), "reward: expected finite numbers"),
        (([1.0, 2.0], False, False), r"reward: expected shape \[1\]"),
        ((1.0, [False] * 3, False), "terminated: expected shape"),
        (("x", False, False), "reward: expected numbers, got 'x'"),
        ((1j, False, False), "reward: expected numbers"),
        ((1.0, "False", False), "terminated: expected truth values, got 'False'"),
        ((1.0, float("nan"), False), "terminated: expected truth values, got nan"),
        ((1.0, False, None), "truncated: expected truth values, got None"),
        ((1.0, False, 2), "truncated: expected truth values, got 2"),
        ((1.0, [[True], []], False), "terminated: expected truth values"),
        (({"agent_0": 1.0, "agent_1": 1.0}, False, False), "reward: expected one value for the team"),
        (({"agent_0": 1.0, "agent_1": 1.0, "agent_2": 2.0}, False, False), "join the agents' own first"),
    ],
)
def test_wrong_reports_are_refused_and_can_be_made_again(
    team: RemoteTeam, tmp_path: Path, arguments: tuple[Any, Any, Any], message: str
) -> None:
    act(team)
    with pytest.raises(ContractError, match=message):
        team.report(*arguments)
    team.report(1.0, False, False)
    assert reported(team, tmp_path)["reward"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("unseen", "message"),
    [
        ({"next_observations": {}}, "no next_observations for agent_0"),
        (
            {"next_observations": {f"agent_{i}": [float("nan")] * (4 + i) for i in range(3)}},
            "next_observations of agent_0: expected finite numbers, got nan",
        ),
        ({"state": np.zeros(4)}, r"state: expected shape \[B, 5\]"),
        ({"state": np.full(5, np.nan)}, "^state: expected finite numbers, got nan"),
        ({"next_state": np.full(5, np.inf)}, "next_state: expected finite numbers, got inf"),
        ({"next_state": np.zeros((2, 5))}, "next_state: expected 1 rows"),
        ({"active": [True, False]}, "active: expected shape"),
        ({"observation": 1}, "report: expected active, next_observations"),
    ],
)
def test_wrong_company_of_a_report_is_refused(team: RemoteTeam, unseen: dict[str, Any], message: str) -> None:
    act(team)
    with pytest.raises(OmcdaError, match=message):
        team.report(1.0, False, False, **unseen)


def test_masks_of_anything_but_0_and_1_are_refused(discrete_server: ServerProcess, tmp_path: Path) -> None:
    """A cast would make 0 of 256; none at all is left where an episode has ended."""
    with RemoteTeam([discrete_server.endpoint], record=tmp_path) as team:
        act(team)
        with pytest.raises(ContractError, match="next_action_masks of agent_0: expected 0 or 1, got 256"):
            team.report(1.0, True, False, next_action_masks={"agent_0": [256, 0, 1], "agent_1": [0] * 4})
        team.report(1.0, True, False, next_action_masks={"agent_0": [0, 0, 1], "agent_1": [0] * 4})
        assert [row.tolist() for row in reported(team, tmp_path)["next_action_mask"]] == [
            [0, 0, 1, 0, 0, 0, 0]
        ]


def test_one_report_follows_each_step(team: RemoteTeam) -> None:
    with pytest.raises(ConfigError, match="call act"):
        team.report(1.0, False, False)
    act(team)
    team.report(1.0, False, False)
    with pytest.raises(ConfigError, match="call act"):
        team.report(1.0, False, False)


def test_nothing_is_reported_without_a_folder(continuous_server: ServerProcess) -> None:
    with RemoteTeam([continuous_server.endpoint]) as team:
        assert not team.reporting
        act(team)
        with pytest.raises(ConfigError, match="record=FOLDER"):
            team.report(1.0, False, False)


@pytest.mark.parametrize(
    "connect",
    [
        lambda endpoint: RemoteTeam([endpoint]),
        lambda endpoint: RemotePolicy(endpoint, "agent_0"),
    ],
)
def test_names_of_episodes_are_checked(
    continuous_server: ServerProcess, connect: Callable[[str], RemoteTeam | RemotePolicy]
) -> None:
    with connect(continuous_server.endpoint) as client:
        names: list[Any] = ["", "x" * 101, 5]
        for name in names:
            with pytest.raises(ConfigError, match="episode_id: expected 1 to 100 characters"):
                client.reset(episode_id=name)


def test_a_folder_that_cannot_be_written_is_refused(continuous_server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RemoteTeam([continuous_server.endpoint], record=tmp_path / "file")
