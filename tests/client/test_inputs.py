"""Teams in this process and served ones take the same inputs, and refuse the same in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.fallback import BehaviorTeam
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import ContractError
from omcda_deploy.local import JointTeam, LocalPolicy, LocalTeam
from omcda_deploy.policy import NoiseSource
from tests.client.test_client import assert_same, masks, observations
from tests.support.server_process import ServerProcess

NAN = float("nan")
WRONG: dict[
    str, list[tuple[dict[str, Any], str]]
] = {  # by kind: what agent_0 gives in place of its own, message
    "continuous": [
        ({"observations": [[NAN] * 4] * 2}, "observation of agent_0: expected finite numbers, got nan"),
        (
            {"observations": np.full((2, 4), 1e300)},
            "observation of agent_0: expected finite numbers, got inf",
        ),
        ({"observations": np.zeros((3, 4))}, "as many observations of every agent, got {'agent_0': 3"),
        ({"observations": np.zeros((0, 4))}, "observation of agent_0: expected at least one row"),
        (
            {"observations": np.zeros((1, 2, 4))},
            r"observation of agent_0: expected shape \[B, 4\] or \[4\]",
        ),
        ({"observations": [[1.0], [1.0, 2.0]]}, "observation of agent_0: expected numbers of shape"),
        ({"observations": 1j * np.ones((2, 4))}, "observation of agent_0: expected numbers of shape"),
        (
            {"noise": [[NAN], [0.0]]},
            "noise of agent_0: expected finite numbers, got nan in row 0, column 0",
        ),
        ({"noise": [[0.0], [np.inf]]}, "noise of agent_0: expected finite numbers, got inf in row 1"),
        (
            {"noise": np.zeros((1, 2))},
            r"noise of agent_0: expected shape \[B, 1\] or \[1\], got \[1, 2\]",
        ),
        ({"noise": np.zeros(2)}, r"noise of agent_0: expected shape \[B, 1\] or \[1\], got \[2\]"),
        ({"noise": np.zeros((3, 1))}, "noise of agent_0: expected 2 rows as in the observation, got 3"),
        ({"noise": "loud"}, "noise of agent_0: expected numbers of shape"),
        ({"action_masks": [[1], [1]]}, "action_mask of agent_0: expected none for continuous actions"),
    ],
    "discrete": [
        ({"action_masks": mask}, f"action_mask of agent_0: expected {message}")
        for mask, message in (
            (np.zeros((2, 3)), "at least one available action, got none in row 0"),
            (np.array([[1, 1, 1], [0, 0, 0]], np.uint8), "at least one available action, got none in row 1"),
            ([[2, 0, 0]] * 2, "0 or 1, got 2"),
            (np.full((2, 3), 2, np.uint8), "0 or 1, got 2"),
            ([[-1, 0, 0]] * 2, "0 or 1, got -1"),
            ([[256, 0, 1]] * 2, "0 or 1, got 256"),
            ([[0.5, 0, 1]] * 2, "0 or 1, got 0.5"),
            ([[NAN, 0, 1]] * 2, "0 or 1, got nan"),
            ([1, 1], r"shape \[B, 3\] or \[3\], got \[2\]"),
            ([1, 1, 1], "2 rows as in the observation, got 1"),
            ([[1], [1, 1]], r"numbers of shape \[B, 3\] or \[3\]"),
            ([["1", "1", "1"]] * 2, r"numbers of shape \[B, 3\] or \[3\]"),
        )
    ],
}
NO_MAPPING: list[Any] = [[1, 2], np.ones((2, 3)), 1.0, "all"]


class Teams:
    """Teams of every kind for one bundle, and its policies for its first agent."""

    def __init__(self, bundle: Bundle, endpoint: str, **options: Any) -> None:
        self.spec = bundle.spec
        self.remote = RemoteTeam([endpoint], deadline_s=5, **options)
        self.policy = RemotePolicy(endpoint, "agent_0", deadline_s=5, **options)
        self.teams: list[Any] = [  # Any, as they are given what no type checker lets pass
            self.remote,
            LocalTeam(bundle, **options),
            JointTeam(bundle, **options),
            BehaviorTeam(bundle, **options),
        ]
        self.policies: list[Any] = [self.policy, LocalPolicy(bundle, "agent_0", **options)]

    def ordinary(self) -> dict[str, dict[str, Any]]:
        """Inputs that are in order."""
        noise: dict[str, Any] = {"noise": dict(NoiseSource(self.spec, 1).draw(2))}
        if self.spec.action_kind == "discrete":
            noise["action_masks"] = masks(self.spec, 2)
        return {"observations": observations(self.spec, 2), **noise}


@pytest.fixture(params=["continuous", "discrete"])
def teams(request: pytest.FixtureRequest) -> Iterator[Teams]:
    bundle: Bundle = request.getfixturevalue(f"{request.param}_bundle")
    server: ServerProcess = request.getfixturevalue(f"{request.param}_server")
    made = Teams(bundle, server.endpoint, temperature=1.0)
    yield made
    made.remote.close()
    made.policy.close()


def test_every_team_refuses_the_same_inputs_in_the_same_words(teams: Teams) -> None:
    for wrong, message in WRONG[teams.spec.action_kind]:
        inputs = teams.ordinary()
        if "observations" in wrong:
            del inputs["noise"]
        for name, values in wrong.items():
            inputs[name] = {**inputs.get(name, observations(teams.spec, 2)), "agent_0": values}
        said = set()
        for team in teams.teams:
            with pytest.raises(ContractError, match=message) as raised:
                team.act(**inputs)
            said.add(str(raised.value))
        assert len(said) == 1
        single = {name.removesuffix("s"): values["agent_0"] for name, values in inputs.items()}
        if "every agent" in message:
            continue
        for policy in teams.policies:
            with pytest.raises(ContractError, match=message):
                policy.act(**single)


@pytest.mark.parametrize("what", ["observations", "noise", "action_masks"])
def test_agents_that_are_left_out_or_unknown_are_named(teams: Teams, what: str) -> None:
    inputs = teams.ordinary()
    if what not in inputs:
        return
    others = {name: values for name, values in inputs[what].items() if name != "agent_1"}
    for team in teams.teams:
        incomplete: list[Any] = [others, others | {"agent_9": others["agent_0"]}, {}]
        for wrong in incomplete:
            with pytest.raises(ContractError, match=r"no .* for agent_[01]: expected one per agent, got \["):
                team.act(**{**inputs, what: wrong})
        for wrong in NO_MAPPING:
            with pytest.raises(
                ContractError, match=r"no .* for agent_0: expected one per agent, got [a-z]+$"
            ):
                team.act(**{**inputs, what: wrong})
        with pytest.raises(ContractError, match=f"{what}: expected those of agent_0, .*, got 9, agent_9 too"):
            team.act(**{**inputs, what: inputs[what] | {9: [1.0], "agent_9": [1.0]}})


def test_what_is_refused_leaves_no_trace(teams: Teams) -> None:
    """Neither in the noise of the next call, nor in the number of the step."""
    inputs = teams.ordinary()
    del inputs["noise"]
    before = []
    for team in teams.teams:
        with pytest.raises(ContractError):
            team.act(**{**inputs, "observations": {}})
        with pytest.raises(ContractError):
            team.act({"agent_0": [[0.0]]})
        before.append(team.act(**inputs))
    remote, local, joint, _ = before
    assert teams.remote.episode[1] == 1
    assert_same(remote, local)
    for name, decision in joint.items():
        np.testing.assert_allclose(decision.action, local[name].action, rtol=1e-5)


def test_every_team_takes_what_is_in_order_and_answers_in_kind(teams: Teams) -> None:
    """Vectors beside batches of one row, lists, truth values, and an agent's absent noise or mask."""
    spec, seen = teams.spec, observations(teams.spec, None)
    inputs: dict[str, Any] = {
        "observations": {**seen, "agent_0": seen["agent_0"][None].tolist()},
        "noise": {**dict.fromkeys(spec.names), "agent_0": [0.5] * spec.agents[0].action.size},
        "action_masks": None,
    }
    if spec.action_kind == "discrete":
        inputs["action_masks"] = {"agent_0": [True, False, False], "agent_1": None}
    else:
        inputs["action_masks"] = {}  # no agent has any
    remote, local, joint, behavior = (team.act(**inputs) for team in teams.teams)
    assert_same(remote, local)
    for decisions in (remote, local, joint, behavior):
        assert [decision.divergence.shape for decision in decisions.values()] == [
            (1,),
            *[()] * (len(spec.agents) - 1),
        ]
    for name, decision in joint.items():
        np.testing.assert_allclose(decision.action, local[name].action, rtol=1e-5)
