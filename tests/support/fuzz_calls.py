"""Calls that a hostile or careless client might make: valid, mutated, and bytes that are no message.

Call ``i`` of seed ``s`` depends on nothing else. There are three kinds:

* ``valid``: ordinary requests in every form that the protocols allow,
* ``message``: the same with changed fields, found through the descriptors, so that new fields are fuzzed too,
* ``bytes``: valid and mutated requests with bits flipped, cut or spliced, and random bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal, TypeAlias

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from omcda_deploy.bundle import TEAM
from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.protos.tensors import input_tensors
from omcda_deploy.spec import TeamSpec

Kind: TypeAlias = Literal["valid", "message", "bytes"]
KINDS: dict[Kind, int] = {"valid": 25, "message": 50, "bytes": 25}  # how often, of 100

OIP, POLICY = "/inference.GRPCInferenceService/", "/omcda.v1.PolicyService/"
INFER, ACT, STREAM, CONTRACT = (
    OIP + "ModelInfer",
    POLICY + "Act",
    POLICY + "ActStream",
    POLICY + "GetContract",
)
WEIGHTS = {  # method -> how often, of 100
    **{INFER: 50, ACT: 20, STREAM: 14, CONTRACT: 4},
    **{OIP + "ModelReady": 3, OIP + "ModelMetadata": 3},
    **{OIP + "ServerLive": 2, OIP + "ServerReady": 2, OIP + "ServerMetadata": 2},
}
MESSAGE_LIMIT = 1 << 20  # bytes, the server's default

NAMES = (
    *("agent_0", "agent_1", "agent_9", TEAM, "observation", "noise", "action_mask", "action", "divergence"),
    *("FP32", "FP64", "INT64", "UINT8", "BOOL", "BYTES", "1", "2", "-1", "", " ", "\0", "%s%n", "a\r\nb: c"),
    *("../../etc/passwd", "x" * 5000, "ä€🤖" * 300, "\u202e", "agent_0\0"),
)
INTEGERS = tuple(
    sign * (2**power) + offset
    for power in (0, 1, 7, 31, 32, 63, 64)
    for sign in (-1, 1)
    for offset in (-1, 0, 1)
)
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -1e-39, 3.4e38, -3.4e38, 1.0, -2.5)


@dataclass(frozen=True)
class Call:
    """``messages`` are sent in order; only a stream has more than one."""

    index: int
    kind: Kind
    method: str
    messages: tuple[bytes, ...]


class Fuzzer:
    """Calls for a server of all models of ``spec``."""

    def __init__(self, spec: TeamSpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed
        self._models = (*spec.names, TEAM)
        self._inputs = {name: input_tensors(spec, name) for name in self._models}

    def call(self, index: int) -> Call:
        draw = Random(f"{self._seed}/{index}")  # a string is hashed alike by every Python
        (method,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        count = draw.randint(1, 5) if method == STREAM else 1
        return Call(index, kind, method, tuple(self._message(draw, kind, method) for _ in range(count)))

    def _message(self, draw: Random, kind: Kind, method: str) -> bytes:
        message = self._valid(draw, method)
        if kind == "valid" or (method == STREAM and draw.random() < 0.4):
            return message.SerializeToString()
        if kind == "message" or draw.random() < 0.3:
            for _ in range(draw.choice((1, 1, 2, 4))):
                mutate(message, draw)
        data = message.SerializeToString()
        return spoiled(data, self._valid(draw, method).SerializeToString(), draw) if kind == "bytes" else data

    def _valid(self, draw: Random, method: str) -> Message:
        model, version = draw.choice(self._models), draw.choice(("", "1"))
        match method.removeprefix(OIP).removeprefix(POLICY):
            case "ModelInfer":
                return self._infer(draw, model, version)
            case "Act" | "ActStream":
                step = self._act(draw, model, version)
                others = [name for name in self._models if name != model]
                if others and draw.random() < 0.2:
                    step.others.append(self._act(draw, draw.choice(others), version))
                return step
            case "GetContract":
                return policy_pb2.GetContractRequest(model_version=version)
            case "ModelReady" | "ModelMetadata" as name:
                return getattr(oip, f"{name}Request")(name=model, version=version)  # type: ignore[no-any-return]
            case name:
                return getattr(oip, f"{name}Request")()  # type: ignore[no-any-return]

    def _infer(self, draw: Random, model: str, version: str) -> Message:
        request = oip.ModelInferRequest(
            model_name=model, model_version=version, id=draw.choice(("", "7", "ä"))
        )
        tensors = self._tensors(draw, model)
        raw = draw.random() < 0.7
        for name in draw.sample(list(tensors), len(tensors)):
            values = tensors[name]
            kind = "UINT8" if values.dtype == np.uint8 else "FP32"
            entry = request.inputs.add(name=name, datatype=kind, shape=values.shape)
            if raw:
                request.raw_input_contents.append(values.tobytes())
            else:
                typed = entry.contents.uint_contents if kind == "UINT8" else entry.contents.fp32_contents
                typed.extend(values.ravel().tolist())
        if draw.random() < 0.3:
            for name in draw.sample(("action", "divergence", "behavior_action"), draw.randint(1, 3)):
                request.outputs.add(name=name)
        if draw.random() < 0.2:
            request.parameters["priority"].int64_param = 3
        return request

    def _act(self, draw: Random, model: str, version: str) -> policy_pb2.ActRequest:
        tensors = self._tensors(draw, model)
        return policy_pb2.ActRequest(
            model=model,
            model_version=version,
            contract_hash=draw.choice(("", self._spec.contract_hash)),
            step_id=draw.getrandbits(64),  # a stream takes one id for one step
            reset=draw.random() < 0.1,
            batch=len(tensors["observation"]),
            **{name: values.tobytes() for name, values in tensors.items()},
        )

    def _tensors(self, draw: Random, model: str) -> dict[str, Any]:
        numbers = np.random.default_rng(draw.getrandbits(64))
        rows = draw.choices((1, 2, 3, 64, 2000), (60, 20, 14, 5, 1))[0]
        scale = draw.choice((1.0, 1.0, 10.0, 1e-42, 0.0))
        tensors: dict[str, Any] = {}
        for tensor in self._inputs[model]:
            if tensor.name == "action_mask":
                mask = numbers.integers(0, 2, tensor.shape(rows), np.uint8)
                agents = self._spec.agents if model == TEAM else (self._spec.agent(model),)
                mask[:, np.cumsum([agent.action.size for agent in agents]) - 1] = (
                    1  # one action of each at least
                )
                tensors[tensor.name] = mask
            elif tensor.name == "observation" or draw.random() < 0.5:
                tensors[tensor.name] = (scale * numbers.standard_normal(tensor.shape(rows))).astype("<f4")
        return tensors


def mutate(message: Any, draw: Random) -> None:
    """Change one field of ``message``, or of a message inside it."""
    if not (fields := message.DESCRIPTOR.fields):
        return
    (chosen,) = draw.choices(fields, [1 if field.message_type is None else 3 for field in fields])
    values = getattr(message, chosen.name)
    if chosen.message_type is not None and chosen.message_type.GetOptions().map_entry:
        mutate(values[draw.choice(NAMES)], draw)
    elif not chosen.is_repeated:
        if chosen.message_type is not None:
            mutate(values, draw)
        elif draw.random() < 0.15:
            message.ClearField(chosen.name)
        else:
            setattr(message, chosen.name, _scalar(chosen, draw, values))
    elif values and draw.random() < 0.15:
        del values[draw.randrange(len(values))]
    elif chosen.message_type is not None:
        if values and draw.random() < 0.8:
            mutate(draw.choice(values), draw)
        else:
            (values.add().CopyFrom(draw.choice(values)) if values and draw.random() < 0.5 else values.add())
    elif values and draw.random() < 0.6:
        at = draw.randrange(len(values))
        values[at] = _scalar(chosen, draw, values[at])
    else:
        # bytes may be large already
        many = 2 if chosen.type == FieldDescriptor.TYPE_BYTES else 1000
        values.extend([_scalar(chosen, draw, None)] * draw.choice((1, 1, many)))


def _scalar(chosen: FieldDescriptor, draw: Random, present: Any) -> Any:
    match chosen.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return draw.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_STRING:
            if chosen.type == FieldDescriptor.TYPE_STRING:
                return draw.choice(NAMES)
            return _spoiled_tensor(present or b"", draw)
        case kind:
            unsigned = kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
            wide = kind in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64)
            bits = (64 if wide else 32) - (not unsigned)
            low = 0 if unsigned else -(2**bits)
            return draw.choice([*range(max(low, -3), 8), *(n for n in INTEGERS if low <= n < 2**bits)])


def _spoiled_tensor(data: bytes, draw: Random) -> bytes:
    match draw.randrange(6):
        case 0:
            return b""
        case 1:
            return data[: draw.randint(0, len(data))]
        case 2:
            return data + draw.randbytes(draw.choice((1, 4, 400)))
        case 3:
            return (
                bytes(draw.choice((MESSAGE_LIMIT, MESSAGE_LIMIT + 1))) if draw.random() < 0.02 else data * 2
            )
        case _:  # one entry of float32, or a few of a mask
            at = 4 * draw.randrange(max(1, len(data) // 4))
            return data[:at] + np.float32(draw.choice(FLOATS)).tobytes() + data[at + 4 :]


def spoiled(data: bytes, other: bytes, draw: Random) -> bytes:
    """Flip bits of a message, cut it, or splice it with an ``other``, or return random bytes."""
    spoiled = bytearray(data)
    at = draw.randint(0, len(data))
    match draw.randrange(7):
        case 0 | 1 if data:
            for _ in range(draw.choice((1, 1, 3, 20))):
                spoiled[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 2:
            del spoiled[at:]
        case 3:
            spoiled[at:] = other[draw.randint(0, len(other)) :]
        case 4:
            spoiled[at:at] = draw.randbytes(draw.choice((1, 2, 8, 100)))
        case 5:
            spoiled[at:at] = draw.choice(
                (b"\x0b", b"\x2a\xff\xff\xff\x7f", b"\xff" * 11, b"\x0a\x00")
            ) * draw.choice((1, 5000))
        case _:
            return draw.randbytes(draw.choice((0, 1, 5, 50, 5000)))
    return bytes(spoiled)
