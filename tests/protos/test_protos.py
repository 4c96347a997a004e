from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.bundle import TEAM, Bundle, input_names, output_names
from omcda_deploy.local import OnnxModel
from omcda_deploy.protos import generate, oip, policy_pb2
from omcda_deploy.protos.tensors import Tensor, input_tensors, output_tensors


def test_committed_code_is_what_the_generator_makes(tmp_path: Path) -> None:
    generated = generate.generate(tmp_path)
    assert {path.name for path in generated} == {
        "admin_pb2.py",
        "admin_pb2.pyi",
        "admin_pb2_grpc.py",
        "oip.pyi",
        "open_inference_grpc.binpb",
        "policy_pb2.py",
        "policy_pb2.pyi",
        "policy_pb2_grpc.py",
        "triton_pb2.py",
        "triton_pb2.pyi",
    }
    assert sorted(tmp_path.iterdir()) == sorted(generated), "something was left beside the generated files"
    for path in generated:
        committed = generate.FOLDER / path.name
        assert committed.read_bytes() == path.read_bytes(), (
            f"{path.name} is stale: run  python -m omcda_deploy.protos.generate"
        )


@pytest.mark.parametrize(
    "order",
    [("omcda_deploy.protos.oip", "tritonclient.grpc"), ("tritonclient.grpc", "omcda_deploy.protos.oip")],
)
def test_lives_in_one_process_with_tritonclient(order: tuple[str, str]) -> None:
    code = f"import {order[0]}, {order[1]}, omcda_deploy.protos.policy_pb2_grpc"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_fields_are_the_protocols_own() -> None:
    """Every field has the number, type and label that NVIDIA's independent definition gives it."""
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    theirs = service_pb2.DESCRIPTOR.message_types_by_name
    compared = 0
    pairs = [(ours, theirs[name]) for name, ours in oip.DESCRIPTOR.message_types_by_name.items()]
    while pairs:
        ours, other = pairs.pop()
        for nested in ours.nested_types:
            if nested.name != "PropertiesEntry":
                pairs.append((nested, other.nested_types_by_name[nested.name]))
        for field in ours.fields:
            if field.full_name == "inference.ModelMetadataResponse.properties":
                assert field.number not in other.fields_by_number
                continue
            same = other.fields_by_number[field.number]
            assert (field.name, field.type, field.is_repeated) == (same.name, same.type, same.is_repeated)
            compared += 1
    assert compared > 50
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        assert method.input_type.full_name == methods[method.name].input_type.full_name
        assert method.output_type.full_name == methods[method.name].output_type.full_name


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_tensors_describe_the_graphs(kind: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    for model in (*bundle.spec.names, TEAM):
        inputs, outputs = input_tensors(bundle.spec, model), output_tensors(bundle.spec, model)
        assert tuple(t.name for t in inputs) == input_names(bundle.spec)
        assert tuple(t.name for t in outputs) == output_names(bundle.spec)
        feeds = {t.name: t.decode(bytes(t.size(3)), 3) for t in inputs}
        if "action_mask" in feeds:
            feeds["action_mask"] = np.ones_like(feeds["action_mask"])
        answers = OnnxModel(bundle.model_path(model)).run(feeds)
        for tensor in outputs:
            assert answers[tensor.name].shape == tensor.shape(3)
            assert tensor.encode(answers[tensor.name]) == answers[tensor.name].tobytes()


def test_every_output_has_its_field_in_the_response() -> None:
    fields = policy_pb2.ActResponse.DESCRIPTOR.fields_by_name
    for name in ("action", "divergence", "behavior_action", "mean", "log_std", "behavior_mean"):
        assert fields[name].type == fields[name].TYPE_BYTES
    assert {"behavior_log_std", "logits", "behavior_logits"} <= set(fields)


def test_bytes_are_little_endian_rows() -> None:
    tensor = Tensor("observation", "FP32", 2)
    assert tensor.encode(np.array([[1.0, -2.0]])) == bytes.fromhex("0000803f000000c0")
    assert tensor.decode(bytes.fromhex("0000803f000000c0"), 1).tolist() == [[1.0, -2.0]]
