"""Judgement of answered requests, from the bytes of request and response.

It follows the definitions of the protocols and imports nothing of the server.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM
from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.spec import AgentSpec, TeamSpec

Arrays = dict[str, NDArray[Any]]


def complaint(spec: TeamSpec, method: str, request: bytes, answer: bytes) -> str | None:
    """Return the fault of answering ``request`` OK with ``answer``; None without a fault."""
    try:
        match method.rpartition("/")[2]:
            case "ModelInfer":
                _infer(
                    spec, oip.ModelInferRequest.FromString(request), oip.ModelInferResponse.FromString(answer)
                )
            case "Act" | "ActStream":
                step, response = (
                    policy_pb2.ActRequest.FromString(request),
                    policy_pb2.ActResponse.FromString(answer),
                )
                steps, responses = [step, *step.others], [response, *response.others]
                _must(len(steps) == len(responses), f"{len(responses)} answers to {len(steps)} steps")
                _must(len({each.model for each in steps}) == len(steps), "two steps of one model")
                for each, each_answer in zip(steps, responses, strict=True):
                    _act(spec, each, each_answer)
            case "GetContract":
                contract = policy_pb2.GetContractRequest.FromString(request)
                _must(contract.model_version in ("", "1"), f"version {contract.model_version!r}")
            case "ModelReady" | "ModelMetadata" as name:
                model = getattr(oip, f"{name}Request").FromString(request)
                _model(spec, model.name, model.version)
            case name:
                getattr(oip, f"{name}Request").FromString(request)
    except DecodeError:
        return "bytes that do not decode were accepted"
    except _UndeservedError as wrong:
        return f"accepted: {wrong}"
    return None


class _UndeservedError(Exception):
    """A request that should have been refused, or an answer that does not fit its request."""


def _must(condition: Any, fault: str) -> None:
    if not condition:
        raise _UndeservedError(fault)


def _model(spec: TeamSpec, name: str, version: str) -> tuple[AgentSpec, ...]:
    _must(version in ("", "1"), f"version {version!r}")
    _must(name in (*spec.names, TEAM), f"model {name!r}")
    return spec.agents if name == TEAM else (spec.agent(name),)


def _infer(spec: TeamSpec, request: oip.ModelInferRequest, answer: oip.ModelInferResponse) -> None:
    agents = _model(spec, request.model_name, request.model_version)
    inputs: Arrays = {}
    for index, entry in enumerate(request.inputs):
        _must(entry.name not in inputs, f"{entry.name} twice")
        dtype, typed = (
            (np.dtype("u1"), "uint_contents")
            if entry.datatype == "UINT8"
            else (np.dtype("<f4"), "fp32_contents")
        )
        _must(entry.datatype == ("UINT8" if entry.name == "action_mask" else "FP32"), entry.datatype)
        _must(len(entry.shape) == 2 and min(entry.shape) > 0, f"shape {list(entry.shape)}")
        fields = [field.name for field, _ in entry.contents.ListFields()]
        if request.raw_input_contents:
            _must(len(request.raw_input_contents) == len(request.inputs), "raw contents of another number")
            _must(not fields, "raw and typed contents")
            values = np.frombuffer(request.raw_input_contents[index], dtype)
        else:
            _must(fields == [typed], f"contents {fields}")
            values = np.array(getattr(entry.contents, typed))
        _must(values.size == entry.shape[0] * entry.shape[1], "values of another number")
        inputs[entry.name] = values.reshape(tuple(entry.shape))
    _judge_inputs(agents, inputs)
    names = [entry.name for entry in request.outputs]
    _must(not any(entry.parameters for entry in request.outputs), "a parameter of an output")
    outputs = {
        entry.name: np.frombuffer(data, "<i8" if entry.datatype == "INT64" else "<f4").reshape(
            tuple(entry.shape)
        )
        for entry, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
    _must(not names or names == list(outputs), f"asked for {names}, answered {list(outputs)}")
    _must(answer.id == request.id, "another id")
    _judge_outputs(agents, inputs, outputs)


def _act(spec: TeamSpec, request: policy_pb2.ActRequest, answer: policy_pb2.ActResponse) -> None:
    agents = _model(spec, request.model, request.model_version)
    _must(request.contract_hash in ("", spec.contract_hash), "another contract")
    _must(request.batch > 0, "an empty batch")
    _must(0 <= request.temperature <= 10 or np.isnan(request.temperature), f"T {request.temperature}")
    inputs = {
        name: np.frombuffer(data, "u1" if name == "action_mask" else "<f4").reshape(request.batch, -1)
        for name in ("observation", "noise", "action_mask")
        if (data := getattr(request, name))
    }
    _judge_inputs(agents, inputs)
    _must((answer.step_id, answer.batch) == (request.step_id, request.batch), "another step or batch")
    integers = spec.action_kind == "discrete"
    outputs = {
        name: np.frombuffer(data, "<i8" if integers and name.endswith("action") else "<f4").reshape(
            request.batch, -1
        )
        for field, data in answer.ListFields()
        if isinstance(data, bytes) and (name := field.name)
    }
    _judge_outputs(agents, inputs, outputs)


def _judge_inputs(agents: tuple[AgentSpec, ...], inputs: Arrays) -> None:
    actions = sum(agent.action.size for agent in agents)
    widths = {"observation": sum(agent.observation_size for agent in agents), "noise": actions}
    if agents[0].action.kind == "discrete":
        widths["action_mask"] = actions
    _must(inputs.keys() <= widths.keys(), f"inputs {list(inputs)}")
    _must(inputs.keys() >= widths.keys() - {"noise"}, f"inputs {list(inputs)}")
    for name, values in inputs.items():
        _must(values.shape == (len(inputs["observation"]), widths[name]), f"{name} of shape {values.shape}")
        _must(np.isfinite(values).all(), f"{name} that is not finite")
    if "action_mask" in inputs:
        _must(inputs["action_mask"].max() <= 1, "a mask of other values than 0 and 1")
        for mask in _by_agent(agents, inputs["action_mask"]):
            _must(mask.any(axis=1).all(), "a mask without an available action")


def _judge_outputs(agents: tuple[AgentSpec, ...], inputs: Arrays, outputs: Arrays) -> None:
    rows = len(inputs["observation"])
    for name, values in outputs.items():
        _must(len(values) == rows, f"{name}: {len(values)} rows for {rows}")
        _must(np.isfinite(values).all(), f"answered {name} that is not finite")
    if "action" not in outputs:
        return
    action = outputs["action"].reshape(rows, -1)
    if "action_mask" not in inputs:
        low, high = agents[0].action.low, agents[0].action.high
        _must(((low <= action) & (action <= high)).all(), "answered an action beyond its bounds")
        return
    for index, mask in enumerate(_by_agent(agents, inputs["action_mask"])):
        chosen = action[:, index]
        _must(((chosen >= 0) & (chosen < mask.shape[1])).all(), "answered an action that does not exist")
        _must(mask[np.arange(rows), chosen].all(), "answered an action that is not available")


def _by_agent(agents: tuple[AgentSpec, ...], values: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum([agent.action.size for agent in agents])[:-1].tolist(), axis=1)
