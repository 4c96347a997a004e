"""The protocol ``omcda.v1``, used through its generated stub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.local import LocalPolicy
from omcda_deploy.protos import policy_pb2, policy_pb2_grpc
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.policy_service import PolicyService, StreamMemory
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.status import RequestError
from omcda_deploy.spec import TeamSpec
from tests.support.server_process import ServerProcess

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def stub(continuous_server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(continuous_server.endpoint) as channel:
        make: Any = policy_pb2_grpc.PolicyServiceStub
        yield make(channel)


def good(**fields: Any) -> policy_pb2.ActRequest:
    request_fields: dict[str, Any] = {"model": "agent_0", "batch": 2, "observation": ROWS.tobytes()}
    return policy_pb2.ActRequest(**(request_fields | fields))


def test_get_contract_tells_what_a_client_needs(continuous_bundle: Bundle, stub: Any) -> None:
    contract = stub.GetContract(policy_pb2.GetContractRequest())
    assert TeamSpec.from_json(json.loads(contract.team)) == continuous_bundle.spec
    assert contract.contract_hash == continuous_bundle.spec.contract_hash
    assert contract.bundle_digest == continuous_bundle.digest
    assert contract.divergence_kind == "kl"
    assert list(contract.models) == ["agent_0", "agent_1", "agent_2"]
    assert dict(contract.budgets) == {"agent_0": 0.1, "agent_1": 0.2}


def test_act_answers_as_the_local_policy(continuous_bundle: Bundle, stub: Any) -> None:
    noise = np.array([[0.5], [-1.5]], np.float32)
    response = stub.Act(
        good(noise=noise.tobytes(), step_id=41, contract_hash=continuous_bundle.spec.contract_hash)
    )
    expected = LocalPolicy(continuous_bundle, "agent_0").act(ROWS, noise=noise)
    assert (response.step_id, response.batch, response.model_version) == (41, 2, "1")
    assert response.action == expected.action.tobytes()
    assert response.divergence == expected.divergence.tobytes()
    for name, values in expected.parameters.items():
        assert getattr(response, name) == values.tobytes()
    assert response.logits == response.behavior_logits == b""


def test_a_team_acts_by_its_joint_graph(continuous_bundle: Bundle) -> None:
    service = PolicyService(Releases(continuous_bundle.path, (), ServerConfig()))
    width = sum(agent.observation_size for agent in continuous_bundle.spec.agents)
    rows = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32).tobytes()
    request = policy_pb2.ActRequest(batch=3, observation=rows, step_id=5)
    answer = service.team_act(request)
    assert answer == service.act(policy_pb2.ActRequest(model="team", batch=3, observation=rows, step_id=5))
    with pytest.raises(RequestError, match="expected model team or none, got 'agent_1': call Act"):
        service.team_act(good(model="agent_1"))


def test_a_stream_gives_one_response_per_request_in_order(stub: Any) -> None:
    requests = [good(step_id=i, observation=(ROWS + i).tobytes(), reset=i == 0) for i in range(20)]
    assert list(stub.ActStream(iter(requests))) == [stub.Act(request) for request in requests]


def test_a_step_that_is_sent_again_on_a_stream_is_not_run_again() -> None:
    runs: list[policy_pb2.ActRequest] = []

    def act(request: policy_pb2.ActRequest) -> bytes:
        runs.append(request)
        return f"answer {len(runs)}".encode()

    answer = StreamMemory(act)
    one, two, others = good(step_id=1), good(step_id=2), good(model="agent_1", step_id=2)
    again = policy_pb2.ActRequest.FromString(two.SerializeToString())  # equal, not the same object
    answers = [answer(request) for request in (one, two, again, others, two, others)]
    assert answers == [b"answer 1", b"answer 2", b"answer 2", b"answer 3", b"answer 2", b"answer 3"]
    with pytest.raises(RequestError, match="step 2 of agent_0 was another one before"):
        answer(good(step_id=2, observation=(ROWS + 1).tobytes()))
    assert len(runs) == 3
    assert answer(good(step_id=2, observation=(ROWS + 1).tobytes(), reset=True)) == b"answer 4"
    assert answer(good(step_id=2, observation=(ROWS + 1).tobytes(), reset=True)) == b"answer 4"
    assert [answer(good()) for _ in range(2)] == [
        b"answer 5",
        b"answer 6",
    ]  # not numbered: nothing is a repetition
    assert answer(one) == b"answer 7"  # an id of before the last one is a new step
    assert StreamMemory(act)(one) == b"answer 8"  # another stream's steps are its own


def test_a_step_that_failed_may_be_sent_again() -> None:
    def act(request: policy_pb2.ActRequest) -> bytes:
        if request.batch == 0:
            raise RequestError("expected a batch")
        return b"an answer"

    answer = StreamMemory(act)
    with pytest.raises(RequestError, match="expected a batch"):
        answer(good(step_id=1, batch=0))
    assert answer(good(step_id=1)) == b"an answer"


def test_streams_repeat_answers_and_refuse_other_contents_under_one_id(stub: Any) -> None:
    step, other = good(step_id=7), good(step_id=7, observation=(ROWS + 1).tobytes())
    first, second = stub.ActStream(iter([step, step]))
    assert first == second == stub.Act(step)
    answers = stub.ActStream(iter([step, other]))
    assert next(answers) == first
    with pytest.raises(
        grpc.RpcError, match=r"(?s)INVALID_ARGUMENT.*step 7 of agent_0 was another one before"
    ):
        next(answers)
    assert stub.Act(other) != first  # calls know nothing of each other


def test_one_stream_may_speak_of_several_models(stub: Any) -> None:
    requests = [good(), good(model="agent_1", batch=1, observation=bytes(20))]
    assert list(stub.ActStream(iter(requests))) == [stub.Act(request) for request in requests]


def test_steps_of_several_models_share_a_message(stub: Any) -> None:
    """The answers are those that each would have alone, in order; on a stream, a repetition is run no more."""
    noise = np.array([[0.5], [-1.5]], np.float32).tobytes()
    one, two = good(noise=noise, step_id=3), good(model="agent_1", batch=1, observation=bytes(20), step_id=9)
    alone = [stub.Act(two), stub.Act(one)]
    together = policy_pb2.ActRequest.FromString(two.SerializeToString())
    together.others.append(one)
    for answer in (stub.Act(together), *stub.ActStream(iter([together, together]))):
        assert list(answer.others) == [alone[1]]
        answer.ClearField("others")
        assert answer == alone[0]


@pytest.mark.parametrize(
    ("others", "status", "words"),
    [
        ([good()], "INVALID_ARGUMENT", "one step of each model in a request, got 2 of 1"),
        ([good(model="agent_1", others=[good()])], "INVALID_ARGUMENT", "without others of their own"),
        ([good(model="agent_7")], "NOT_FOUND", "agent_7"),
        ([good(model="agent_1")], "INVALID_ARGUMENT", "observation of agent_1: expected"),
    ],
)
def test_one_bad_step_refuses_the_whole_request(
    stub: Any, others: list[policy_pb2.ActRequest], status: str, words: str
) -> None:
    request = good(others=others)
    for ask in (stub.Act, lambda bad: list(stub.ActStream(iter([bad])))):
        with pytest.raises(grpc.RpcError) as refusal:
            ask(request)
        assert refusal.value.code().name == status
        assert words in str(refusal.value)


BAD: dict[str, tuple[policy_pb2.ActRequest, str, tuple[str, ...]]] = {
    "unknown model": (good(model="agent_7"), "NOT_FOUND", ("agent_7", "agent_0")),
    "no model": (good(model=""), "NOT_FOUND", ("agent_0",)),
    "unknown version": (good(model_version="2"), "NOT_FOUND", ("2", "known are 1")),
    "empty batch": (good(batch=0), "INVALID_ARGUMENT", ("at least 1",)),
    "batch too large": (good(batch=2**32 - 1), "INVALID_ARGUMENT", ("got 32",)),
    "too few bytes": (good(observation=ROWS.tobytes()[:-1]), "INVALID_ARGUMENT", ("32 bytes", "got 31")),
    "another agent's observation": (good(observation=bytes(40)), "INVALID_ARGUMENT", ("32 bytes", "got 40")),
    "no observation": (good(observation=b""), "INVALID_ARGUMENT", ("send observation",)),
    "noise of another size": (good(noise=bytes(4)), "INVALID_ARGUMENT", ("noise", "8 bytes", "got 4")),
    "mask for continuous": (good(action_mask=bytes(2)), "INVALID_ARGUMENT", ("action_mask", "leave it out")),
    "NaN": (good(observation=(ROWS * np.nan).tobytes()), "INVALID_ARGUMENT", ("finite", "nan")),
    "infinite noise": (good(noise=np.full(2, np.inf, "<f4").tobytes()), "INVALID_ARGUMENT", ("noise", "inf")),
    "negative temperature": (good(temperature=-1.0), "INVALID_ARGUMENT", ("from 0 to 10", "got -1")),
    "temperature of another scale": (good(temperature=1e30), "INVALID_ARGUMENT", ("temperature", "1e+30")),
    "another contract": (good(contract_hash="0" * 64), "FAILED_PRECONDITION", ("000000", "GetContract")),
    "oversize": (good(observation=bytes(5 << 20)), "RESOURCE_EXHAUSTED", ("1048576",)),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_with_what_was_expected(stub: Any, case: str, stream: bool) -> None:
    request, code, words = BAD[case]
    ask = (
        (lambda: list(stub.ActStream(iter([good(), request, good()]))))
        if stream
        else lambda: stub.Act(request)
    )
    with pytest.raises(grpc.RpcError) as raised:
        ask()
    assert isinstance(raised.value, grpc.Call)
    details = raised.value.details() or ""
    assert raised.value.code().name == code, details
    assert all(word in details for word in words), details
    assert stub.Act(good()).batch == 2


def test_bytes_that_are_no_message_are_an_invalid_argument(continuous_server: ServerProcess) -> None:
    with grpc.insecure_channel(continuous_server.endpoint) as channel:
        service = "/omcda.v1.PolicyService/"
        untyped: Any = channel
        act, contract = (untyped.unary_unary(service + name) for name in ("Act", "GetContract"))
        act_stream = untyped.stream_stream(service + "ActStream")
        for ask in (
            lambda: act(b"\x0a\xff"),
            lambda: contract(b"\xff"),
            lambda: list(act_stream(iter([b"\x0a\xff"]))),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                ask()
            assert isinstance(raised.value, grpc.Call)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "omcda.v1." in (raised.value.details() or "")
