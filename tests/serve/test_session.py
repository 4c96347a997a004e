"""Sessions: validation of inputs, masks, noise, and errors for what has no finite action."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.errors import ContractError, UnknownNameError
from omcda_deploy.local import JointTeam, LocalPolicy, LocalTeam
from omcda_deploy.serve.session import Models, Session
from omcda_deploy.serve.status import DETAILS_LIMIT, RangeError, RequestError, status_of
from omcda_deploy.serve.wire import WireTensors


def test_every_agent_of_the_team_needs_an_available_action(discrete_bundle: Bundle) -> None:
    session = Session(discrete_bundle, TEAM, {})  # agent_0 has 3 actions, agent_1 has 4
    observation = np.zeros((2, 9), np.float32)
    mask = np.array([[1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]], np.uint8)
    with pytest.raises(RequestError, match=r"action_mask of agent_1: .* none in row 1"):
        session.run({"observation": observation, "action_mask": mask})
    mask[1] = [0, 0, 0, 1, 0, 0, 0]
    with pytest.raises(RequestError, match=r"action_mask of agent_0: .* none in row 1"):
        session.run({"observation": observation, "action_mask": mask})
    mask[1, 2] = 1
    answers = session.run({"observation": observation, "action_mask": mask})
    np.testing.assert_array_equal(answers["action"], [[0, 3], [2, 0]])


def test_absent_noise_is_no_noise(continuous_bundle: Bundle) -> None:
    session = Session(continuous_bundle, "agent_1", {})
    observation = np.ones((3, 5), np.float32)
    ours = session.run({"observation": observation})
    theirs = session.run({"observation": observation, "noise": np.zeros((3, 2), np.float32)})
    np.testing.assert_array_equal(ours["action"], theirs["action"])
    np.testing.assert_allclose(ours["action"], np.tanh(ours["mean"]), rtol=1e-6)


def test_no_names_mean_all_models(continuous_bundle: Bundle) -> None:
    assert list(Models(continuous_bundle, ()).sessions) == ["agent_0", "agent_1", "agent_2", "team"]
    with pytest.raises(UnknownNameError, match="agent_5"):
        Models(continuous_bundle, ["agent_0", "agent_5"])


def test_a_defect_tells_the_caller_nothing(caplog: pytest.LogCaptureFixture) -> None:
    code, details = status_of(ValueError("/home/someone/secret"))
    assert (code.name, "secret" in details) == ("INTERNAL", False)
    assert "/home/someone/secret" in caplog.text
    assert len(status_of(RequestError("x" * 10_000))[1]) == DETAILS_LIMIT


def test_an_overflow_that_the_tanh_hides_is_out_of_range(continuous_bundle: Bundle) -> None:
    session = Session(continuous_bundle, "agent_0", {})
    observation = np.zeros((2, 4), np.float32)
    observation[1, 2] = 3.4e38
    local = LocalPolicy(continuous_bundle, "agent_0").act(observation)
    assert np.isfinite(local.action).all()
    assert not np.isfinite(local.divergence[1])
    tensors = WireTensors(2, observation.tobytes())
    for ask in (session.answer, session.action):  # a shadow's overflow is a failure of the shadow
        with pytest.raises(RangeError, match=r"divergence is not finite.*3\.4e\+38"):
            ask(tensors)


def test_teams_in_process_refuse_numbers_that_servers_refuse(continuous_bundle: Bundle) -> None:
    observations = {
        agent.name: np.zeros((2, agent.observation_size), np.float32)
        for agent in continuous_bundle.spec.agents
    }
    observations["agent_1"][1, 2] = np.nan
    for team in (LocalTeam(continuous_bundle), JointTeam(continuous_bundle)):
        with pytest.raises(ContractError, match=r"observation of agent_1: .* got nan in row 1, column 2"):
            team.act(observations)


def test_numbers_that_outweigh_the_mask_are_out_of_range(discrete_bundle: Bundle) -> None:
    session = Session(discrete_bundle, TEAM, {})
    tensors: dict[str, NDArray[Any]] = {
        "observation": np.zeros((2, 9), np.float32),
        "noise": np.zeros((2, 7), np.float32),
        "action_mask": np.ones((2, 7), np.uint8),
    }
    tensors["noise"][1, 5] = 3.4e38  # agent_1's action 2
    assert session.run(tensors)["action"][1, 1] == 2
    tensors["action_mask"][1, 5] = 0
    with pytest.raises(RangeError, match=r"agent_1: .*outweigh the mask in row 1"):
        session.run(tensors)
