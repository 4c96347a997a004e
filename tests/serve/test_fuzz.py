"""2,400 hostile calls, and tests of the fuzzer and of its judge (``make fuzz`` sends 100,000 calls)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.bundle import TEAM
from omcda_deploy.protos import oip, policy_pb2
from tests.support.bundles import continuous_spec, discrete_spec, write_test_bundle
from tests.support.fuzz import CONTROL_EVERY, TEAMS, fuzz
from tests.support.fuzz_admin import fuzz_admin
from tests.support.fuzz_calls import ACT, INFER, STREAM, WEIGHTS, Fuzzer
from tests.support.judge import complaint

CALLS = 1000  # for each of two servers
ADMIN_CALLS = 400


@pytest.mark.parametrize("team", TEAMS)
def test_no_call_breaks_a_server(team: str, tmp_path: Path) -> None:
    bundle = write_test_bundle(tmp_path / "bundle", TEAMS[team](), seed=1)
    report = fuzz(bundle, seed=0, first=0, calls=CALLS)
    assert report.failures == [], "\n".join(report.failures)[:10_000]
    assert report.statuses.total() == CALLS
    assert report.controls == 2 + CALLS // CONTROL_EVERY  # before, after and between the calls
    assert set(report.methods) == set(WEIGHTS)
    # Neither are all refused before they are decoded, nor are all harmless.
    for status in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"):
        assert report.statuses["message", status] > 0, report.statuses
    assert CALLS / 10 < report.statuses["message", "OK"] < CALLS / 4
    assert report.statuses["bytes", "INVALID_ARGUMENT"] > CALLS / 10


def test_no_operator_breaks_a_server() -> None:
    report = fuzz_admin(seed=0, calls=ADMIN_CALLS)
    assert report.failures == [], "\n".join(report.failures)[:10_000]
    assert report.statuses.total() == ADMIN_CALLS
    for status in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"):
        assert sum(n for (_, told), n in report.statuses.items() if told == status) > 0, report.statuses
    assert len(report.steps) > 1, "no switch came about: the test shows little"


def test_a_call_depends_on_its_seed_and_number_alone() -> None:
    calls = [Fuzzer(discrete_spec(), 3).call(i) for i in range(50)]
    assert [Fuzzer(discrete_spec(), 3).call(i) for i in reversed(range(50))] == calls[::-1]
    assert Fuzzer(discrete_spec(), 4).call(0) != calls[0]


def test_every_field_of_an_infer_request_is_fuzzed() -> None:
    fuzzer = Fuzzer(continuous_spec(), 0)
    seen: Counter[str] = Counter()
    shapes: set[int] = set()
    for call in (fuzzer.call(i) for i in range(1200)):
        if call.method == INFER and call.kind == "message":
            request = oip.ModelInferRequest.FromString(call.messages[0])
            seen.update(field.name for field, _ in request.ListFields())
            for entry in request.inputs:
                seen.update(f"inputs.{field.name}" for field, _ in entry.ListFields())
                seen.update(field.name for field, _ in entry.contents.ListFields())
                shapes.update(entry.shape)
    fields = [field.name for field in oip.ModelInferRequest.DESCRIPTOR.fields]
    fields += [f"inputs.{field.name}" for field in oip.ModelInferRequest.InferInputTensor.DESCRIPTOR.fields]
    fields += [field.name for field in oip.InferTensorContents.DESCRIPTOR.fields]
    assert [name for name in fields if not seen[name]] == []
    assert min(shapes) == -(2**63)
    assert max(shapes) >= 2**31 - 1


SPEC = discrete_spec()
GOOD = policy_pb2.ActRequest(
    model="agent_0", batch=1, observation=bytes(20), action_mask=bytes([0, 1, 1]), step_id=7
)
ANSWER = policy_pb2.ActResponse(step_id=7, batch=1, action=np.array([2]).tobytes(), divergence=bytes(4))


def changed(message: policy_pb2.ActRequest | policy_pb2.ActResponse, **fields: object) -> bytes:
    other = type(message).FromString(message.SerializeToString())
    for name, value in fields.items():
        setattr(other, name, value)
    return other.SerializeToString()


@pytest.mark.parametrize(
    ("request_data", "answer_data", "words"),
    [
        (changed(GOOD, observation=bytes([0, 0, 0xC0, 0x7F] * 5)), changed(ANSWER), "not finite"),
        (changed(GOOD, observation=bytes(16)), changed(ANSWER), "observation of shape (1, 4)"),
        (changed(GOOD, model="agent_7"), changed(ANSWER), "model 'agent_7'"),
        (changed(GOOD, batch=0), changed(ANSWER), "empty batch"),
        (changed(GOOD, contract_hash="0"), changed(ANSWER), "another contract"),
        (changed(GOOD, action_mask=bytes(3)), changed(ANSWER), "without an available action"),
        (changed(GOOD, action_mask=bytes([2, 1, 1])), changed(ANSWER), "other values than 0 and 1"),
        (changed(GOOD), changed(ANSWER, step_id=8), "another step"),
        (changed(GOOD), changed(ANSWER, action=np.array([0]).tobytes()), "not available"),
        (changed(GOOD), changed(ANSWER, action=np.array([3]).tobytes()), "does not exist"),
        (changed(GOOD), changed(ANSWER, divergence=np.float32("nan").tobytes()), "divergence that is not"),
        (b"\x0a\xff", changed(ANSWER), "do not decode"),
    ],
)
def test_the_judge_sees_what_should_have_been_refused(
    request_data: bytes, answer_data: bytes, words: str
) -> None:
    assert complaint(SPEC, ACT, changed(GOOD), changed(ANSWER)) is None
    for method in (ACT, STREAM):
        assert words in (complaint(SPEC, method, request_data, answer_data) or "no complaint")


@pytest.mark.parametrize(
    "spoil",
    [
        {"shape": [2, 8]},
        {"shape": [-1, -9]},
        {"shape": [9]},
        {"datatype": "FP64"},
        {"name": "noise"},
    ],
)
def test_the_judge_sees_accepted_infer_requests_that_are_wrong(spoil: dict[str, object]) -> None:
    request = oip.ModelInferRequest(model_name=TEAM)
    for name, kind, width in (("observation", "FP32", 9), ("action_mask", "UINT8", 7)):
        request.inputs.add(name=name, datatype=kind, shape=[1, width])
        request.raw_input_contents.append(bytes([1]) * 7 if kind == "UINT8" else bytes(36))
    answer = oip.ModelInferResponse().SerializeToString()
    assert complaint(SPEC, INFER, request.SerializeToString(), answer) is None
    for name, value in spoil.items():
        if isinstance(value, list):
            request.inputs[0].shape[:] = value
        else:
            setattr(request.inputs[0], name, value)
    assert complaint(SPEC, INFER, request.SerializeToString(), answer)
