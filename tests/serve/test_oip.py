"""The Open Inference Protocol, used by a stock client and by a hostile one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from omcda_deploy.bundle import Bundle, output_names
from omcda_deploy.local import JointTeam, LocalPolicy
from omcda_deploy.policy import NoiseSource
from omcda_deploy.protos import oip
from tests.support.server_process import ServerProcess

SERVICE = "/inference.GRPCInferenceService/"
FLOAT = np.float32


def tensor(name: str, values: Any) -> triton.InferInput:
    infer_input = triton.InferInput(name, values.shape, {"f": "FP32", "u": "UINT8"}[values.dtype.kind])
    infer_input.set_data_from_numpy(values)
    return infer_input


def test_a_stock_client_reads_the_server(continuous_bundle: Bundle, continuous_server: ServerProcess) -> None:
    with triton.InferenceServerClient(continuous_server.endpoint) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("agent_1")
        assert client.is_model_ready("agent_1", "1")
        assert client.get_server_metadata().name == "omcda-deploy"
        metadata = client.get_model_metadata("agent_1", as_json=True)
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [
        {"name": "observation", "datatype": "FP32", "shape": ["-1", "5"]},
        {"name": "noise", "datatype": "FP32", "shape": ["-1", "2"]},
    ]
    outputs = {entry["name"]: (entry["datatype"], entry["shape"]) for entry in metadata["outputs"]}
    assert tuple(outputs) == (*output_names(continuous_bundle.spec), "policy_weight")
    assert outputs["action"] == ("FP32", ["-1", "2"])
    assert outputs["divergence"] == ("FP32", ["-1"])


def test_metadata_carries_the_contract(continuous_bundle: Bundle, call: Call) -> None:
    answer = call("ModelMetadata", oip.ModelMetadataRequest(name="agent_0"), oip.ModelMetadataResponse)
    assert answer.properties["contract_hash"] == continuous_bundle.spec.contract_hash
    assert answer.properties["bundle_digest"] == continuous_bundle.digest


@pytest.mark.parametrize("noisy", [False, True])
def test_a_stock_client_gets_the_local_answer(
    continuous_bundle: Bundle, continuous_server: ServerProcess, noisy: bool
) -> None:
    generator = np.random.default_rng(5)
    noise = NoiseSource(continuous_bundle.spec, 1).draw(6) if noisy else {}
    with triton.InferenceServerClient(continuous_server.endpoint) as client:
        for agent in continuous_bundle.spec.agents:
            observation = generator.standard_normal((6, agent.observation_size)).astype(FLOAT)
            inputs = [tensor("observation", observation)]
            if noisy:
                inputs.insert(0, tensor("noise", noise[agent.name]))
            answer = client.infer(agent.name, inputs, request_id="7")
            expected = LocalPolicy(continuous_bundle, agent.name).act(
                observation, noise=noise.get(agent.name)
            )
            assert answer.get_response().id == "7"
            np.testing.assert_array_equal(answer.as_numpy("action"), expected.action)
            np.testing.assert_array_equal(answer.as_numpy("divergence"), expected.divergence)
            for name, values in expected.parameters.items():
                np.testing.assert_array_equal(answer.as_numpy(name), values)


def test_a_stock_client_gets_discrete_actions(
    discrete_bundle: Bundle, discrete_server: ServerProcess
) -> None:
    observation = np.random.default_rng(0).standard_normal((9, 5)).astype(FLOAT)
    mask = np.ones((9, 3), np.uint8)
    free = LocalPolicy(discrete_bundle, "agent_0").act(observation, action_mask=mask)
    mask[np.arange(9), free.action] = 0
    expected = LocalPolicy(discrete_bundle, "agent_0").act(observation, action_mask=mask)
    with triton.InferenceServerClient(discrete_server.endpoint) as client:
        inputs = [tensor("observation", observation), tensor("action_mask", mask)]
        answer = client.infer("agent_0", inputs)
    assert answer.as_numpy("action").dtype == np.int64
    np.testing.assert_array_equal(answer.as_numpy("action"), expected.action)
    assert (answer.as_numpy("action") != free.action).all()


def test_requested_outputs_alone_come_back(continuous_server: ServerProcess) -> None:
    inputs = [tensor("observation", np.zeros((2, 4), FLOAT))]
    with triton.InferenceServerClient(continuous_server.endpoint) as client:
        requested = [triton.InferRequestedOutput(name) for name in ("divergence", "action")]
        answer = client.infer("agent_0", inputs, outputs=requested).get_response()
    assert [output.name for output in answer.outputs] == ["divergence", "action"]
    assert [len(data) for data in answer.raw_output_contents] == [8, 8]


def test_the_joint_graph_is_model_team(continuous_bundle: Bundle, joint_server: ServerProcess) -> None:
    spec = continuous_bundle.spec
    generator = np.random.default_rng(3)
    observations = {
        a.name: generator.standard_normal((2, a.observation_size)).astype(FLOAT) for a in spec.agents
    }
    with triton.InferenceServerClient(joint_server.endpoint) as client:
        answer = client.infer(
            "team", [tensor("observation", np.concatenate(list(observations.values()), axis=1))]
        )
    expected = JointTeam(continuous_bundle).act(observations)
    np.testing.assert_array_equal(
        answer.as_numpy("action"), np.concatenate([d.action for d in expected.values()], axis=1)
    )


# One request, changed in one way at a time -----------------------------------------------------------------

Call = Callable[..., Any]
ROWS = np.arange(8, dtype=FLOAT).reshape(2, 4)


def good() -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="agent_0")
    request.inputs.add(name="observation", datatype="FP32", shape=[2, 4])
    request.raw_input_contents.append(ROWS.tobytes())
    return request


def typed() -> oip.ModelInferRequest:
    request = good()
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend(ROWS.ravel().tolist())
    return request


def send(channel: Any, method: str, data: bytes) -> bytes:
    answer: bytes = channel.unary_unary(SERVICE + method)(data, timeout=5.0)
    return answer


@pytest.fixture
def call(continuous_server: ServerProcess) -> Iterator[Call]:
    with grpc.insecure_channel(continuous_server.endpoint) as channel:

        def ask(method: str, request: Any, response_type: Any = oip.ModelInferResponse) -> Any:
            data = request if isinstance(request, bytes) else request.SerializeToString()
            return response_type.FromString(send(channel, method, data))

        yield ask


def changed(**fields: Any) -> oip.ModelInferRequest:
    request = good()
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def with_input(**fields: Any) -> oip.ModelInferRequest:
    request = good()
    shape = fields.pop("shape", None)
    if shape is not None:
        request.inputs[0].shape[:] = shape
    for name, value in fields.items():
        setattr(request.inputs[0], name, value)
    return request


def with_raw(*raw: bytes) -> oip.ModelInferRequest:
    request = good()
    request.raw_input_contents[:] = raw
    return request


def with_more(name: str, shape: list[int], data: bytes) -> oip.ModelInferRequest:
    request = good()
    request.inputs.add(name=name, datatype="FP32", shape=shape)
    request.raw_input_contents.append(data)
    return request


def with_output(*names: str) -> oip.ModelInferRequest:
    request = good()
    for name in names:
        request.outputs.add(name=name)
    return request


def typed_with(field: str, values: list[Any]) -> oip.ModelInferRequest:
    request = typed()
    request.inputs[0].ClearField("contents")
    getattr(request.inputs[0].contents, field).extend(values)
    return request


def both() -> oip.ModelInferRequest:
    request = typed()
    request.raw_input_contents.append(ROWS.tobytes())
    return request


def with_output_parameter(name: str) -> oip.ModelInferRequest:
    request = with_output("divergence", "action")
    request.outputs[1].parameters[name].int64_param = 2
    return request


def with_temperature(value: float) -> oip.ModelInferRequest:
    request = good()
    request.parameters["temperature"].double_param = value
    return request


def spoiled(value: float) -> bytes:
    rows = ROWS.copy()
    rows[1, 2] = value
    return rows.tobytes()


BAD: dict[str, tuple[oip.ModelInferRequest | bytes, str, tuple[str, ...]]] = {
    "unknown model": (changed(model_name="agent_00"), "NOT_FOUND", ("agent_00", "did you mean 'agent_0'")),
    "model not served": (changed(model_name="team"), "NOT_FOUND", ("team",)),
    "enormous model name": (changed(model_name="x" * 100_000), "NOT_FOUND", ("agent_0",)),
    "unknown version": (changed(model_version="99"), "NOT_FOUND", ("99", "known are 1")),
    "wrong input name": (with_input(name="obs"), "INVALID_ARGUMENT", ("observation, noise", "obs")),
    "no inputs": (oip.ModelInferRequest(model_name="agent_0"), "INVALID_ARGUMENT", ("observation", "none")),
    "wrong datatype": (with_input(datatype="FP64"), "INVALID_ARGUMENT", ("FP32", "FP64")),
    "bogus datatype": (with_input(datatype="FOO"), "INVALID_ARGUMENT", ("FP32", "FOO")),
    "wrong width": (with_input(shape=[2, 5]), "INVALID_ARGUMENT", ("4", "[2, 5]")),
    "rank 1": (with_input(shape=[8]), "INVALID_ARGUMENT", ("[8]",)),
    "rank 3": (with_input(shape=[1, 2, 4]), "INVALID_ARGUMENT", ("[1, 2, 4]",)),
    "many dimensions": (with_input(shape=[1] * 50_000), "INVALID_ARGUMENT", ("…",)),
    "negative shape": (with_input(shape=[-2, -4]), "INVALID_ARGUMENT", ("[-2, -4]",)),
    "overflowing shape": (with_input(shape=[2**62, 4]), "INVALID_ARGUMENT", ("got 32",)),
    "empty batch": (with_input(shape=[0, 4]), "INVALID_ARGUMENT", ("[0, 4]",)),
    "no shape": (with_input(shape=[]), "INVALID_ARGUMENT", ("[]",)),
    "raw too short": (with_raw(ROWS.tobytes()[:-4]), "INVALID_ARGUMENT", ("32 bytes", "got 28")),
    "raw too long": (with_raw(ROWS.tobytes() + b"\0"), "INVALID_ARGUMENT", ("32 bytes", "got 33")),
    "empty raw": (with_raw(b""), "INVALID_ARGUMENT", ("observation of agent_0", "32 bytes", "got 0")),
    "empty raw noise": (with_more("noise", [2, 1], b""), "INVALID_ARGUMENT", ("noise", "8 bytes", "got 0")),
    "raw for no input": (with_raw(ROWS.tobytes(), b""), "INVALID_ARGUMENT", ("1 inputs", "got 2")),
    "neither raw nor typed": (with_raw(), "INVALID_ARGUMENT", ("fp32_contents", "neither")),
    "raw and typed": (both(), "INVALID_ARGUMENT", ("both",)),
    "typed of another type": (typed_with("fp64_contents", [0.0] * 8), "INVALID_ARGUMENT", ("fp64_contents",)),
    "typed too few": (typed_with("fp32_contents", [0.0] * 7), "INVALID_ARGUMENT", ("8 values", "got 7")),
    "typed NaN": (typed_with("fp32_contents", [float("nan")] * 8), "INVALID_ARGUMENT", ("nan",)),
    "NaN": (with_raw(spoiled(np.nan)), "INVALID_ARGUMENT", ("finite", "nan", "row 1, column 2")),
    "infinity": (with_raw(spoiled(-np.inf)), "INVALID_ARGUMENT", ("finite", "-inf")),
    "input twice": (with_more("observation", [2, 4], ROWS.tobytes()), "INVALID_ARGUMENT", ("twice",)),
    "noise of other rows": (with_more("noise", [3, 1], bytes(12)), "INVALID_ARGUMENT", ("2 rows", "got 3")),
    "mask for continuous": (with_more("action_mask", [2, 1], bytes(2)), "INVALID_ARGUMENT", ("action_mask",)),
    "unknown output": (with_output("action", "q"), "INVALID_ARGUMENT", ("action, divergence", "q")),
    "output twice": (with_output("action", "action"), "INVALID_ARGUMENT", ("each once",)),
    "class_count": (
        with_output_parameter("classification"),
        "INVALID_ARGUMENT",
        ("output action of agent_0: expected no parameters, got classification", "no class_count"),
    ),
    "shared memory": (with_output_parameter("shared_memory_region"), "INVALID_ARGUMENT", ("shared_memory",)),
    "negative temperature": (with_temperature(-1.0), "INVALID_ARGUMENT", ("from 0 to 10", "got -1")),
    "temperature of another scale": (with_temperature(1e300), "INVALID_ARGUMENT", ("temperature", "1e+300")),
    "bytes that are no message": (b"\x0a\xff\xff", "INVALID_ARGUMENT", ("inference.ModelInferRequest",)),
    "oversize": (with_raw(bytes(5 << 20)), "RESOURCE_EXHAUSTED", ("1048576",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_with_what_was_expected(call: Call, case: str) -> None:
    request, code, words = BAD[case]
    before = call("ModelInfer", good())
    with pytest.raises(grpc.RpcError) as raised:
        call("ModelInfer", request)
    assert isinstance(raised.value, grpc.Call)
    details = raised.value.details() or ""
    assert raised.value.code().name == code, details
    assert all(word in details for word in words), details
    assert len(details) < 1000
    assert "/" not in details, f"a path leaks: {details}"
    assert call("ModelInfer", good()) == before


@pytest.mark.parametrize(
    "mask", [np.zeros((1, 3)), np.array([[1, 0, 2]])], ids=["nothing available", "neither 0 nor 1"]
)
def test_bad_masks_are_refused(discrete_server: ServerProcess, mask: Any) -> None:
    inputs = [tensor("observation", np.zeros((1, 5), FLOAT)), tensor("action_mask", mask.astype(np.uint8))]
    with (
        triton.InferenceServerClient(discrete_server.endpoint) as client,
        pytest.raises(triton.InferenceServerException, match="action_mask") as raised,
    ):
        client.infer("agent_0", inputs)
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_mask_is_required_for_discrete_actions(discrete_server: ServerProcess) -> None:
    with (
        triton.InferenceServerClient(discrete_server.endpoint) as client,
        pytest.raises(triton.InferenceServerException, match="send action_mask") as raised,
    ):
        client.infer("agent_0", [tensor("observation", np.zeros((1, 5), FLOAT))])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_typed_masks_do_not_wrap_around(discrete_server: ServerProcess) -> None:
    request = oip.ModelInferRequest(model_name="agent_0")
    request.inputs.add(name="observation", datatype="FP32", shape=[1, 5]).contents.fp32_contents.extend(
        [0.0] * 5
    )
    request.inputs.add(name="action_mask", datatype="UINT8", shape=[1, 3]).contents.uint_contents.extend(
        [257, 1, 1]
    )
    with grpc.insecure_channel(discrete_server.endpoint) as channel, pytest.raises(grpc.RpcError) as raised:
        send(channel, "ModelInfer", request.SerializeToString())
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_parameters_that_change_no_answer_are_ignored(call: Call) -> None:
    request = good()
    for name in ("sequence_id", "priority", "timeout"):
        request.parameters[name].int64_param = 3
    for name in ("sequence_start", "sequence_end"):
        request.parameters[name].bool_param = True
    assert call("ModelInfer", request) == call("ModelInfer", good())


def test_a_temperature_may_be_unknown_or_any_of_play(call: Call) -> None:
    for value in (float("nan"), 0.0, 10.0):
        assert call("ModelInfer", with_temperature(value)) == call("ModelInfer", good())


def test_typed_contents_and_denormals_are_valid(call: Call) -> None:
    assert call("ModelInfer", typed()) == call("ModelInfer", good())
    denormal = np.full((2, 4), np.finfo(FLOAT).smallest_subnormal, FLOAT)
    assert len(call("ModelInfer", with_raw(denormal.tobytes())).outputs) == 8


def test_finite_inputs_without_a_finite_action_are_out_of_range(
    continuous_bundle: Bundle, call: Call
) -> None:
    signs = np.array(list(itertools.product([-1, 1], repeat=5)), FLOAT) * FLOAT(3e38)
    local = LocalPolicy(continuous_bundle, "agent_0").act(signs[:, :4], noise=signs[:, 4:])
    row = signs[np.isnan(local.action[:, 0])][:1]  # inf - inf
    assert len(row) == 1
    request = oip.ModelInferRequest(
        model_name="agent_0", raw_input_contents=[row[:, :4].tobytes(), row[:, 4:].tobytes()]
    )
    request.inputs.add(name="observation", datatype="FP32", shape=[1, 4])
    request.inputs.add(name="noise", datatype="FP32", shape=[1, 1])
    with pytest.raises(grpc.RpcError) as raised:
        call("ModelInfer", request)
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert "3e+38" in (raised.value.details() or "")


def test_unknown_models_are_not_found_everywhere(call: Call) -> None:
    for method, request in (
        ("ModelReady", oip.ModelReadyRequest(name="agent_9")),
        ("ModelMetadata", oip.ModelMetadataRequest(name="agent_0", version="2")),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call(method, request)
        assert isinstance(raised.value, grpc.Call)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
