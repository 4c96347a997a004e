"""Bundles of small random policies for tests of serving, written without torch.

Every agent has its own linear maps, so mixing up agents, rows or inputs changes the answer. The team graph has the
same nodes for all agents at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper, save

from omcda_deploy.bundle import (
    CONFIG_FILE,
    MANIFEST,
    MODEL_FILE,
    SCHEMA_VERSION,
    TEAM,
    Bundle,
    read_bundle,
)
from omcda_deploy.files import sha256
from omcda_deploy.guard import DataReference
from omcda_deploy.local import LocalTeam
from omcda_deploy.protos.model_config import triton_config
from omcda_deploy.protos.tensors import Tensor, input_tensors, output_tensors
from omcda_deploy.spec import ActionSpec, AgentSpec, Normalizer, TeamSpec

ONNX_TYPES = {"FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64, "UINT8": TensorProto.UINT8}
OPSET, IR_VERSION = 17, 10


def continuous_spec(*, agents: int = 3) -> TeamSpec:
    """Return a team of agents of unequal sizes, so that a vector of the wrong agent does not fit."""
    return TeamSpec(
        task="toy/continuous",
        agents=tuple(AgentSpec(f"agent_{i}", 4 + i, ActionSpec("continuous", 1 + i)) for i in range(agents)),
        state_size=5,
        control_rate=20.0,
        normalizer=Normalizer("none"),
        episode_limit=50,
    )


def discrete_spec(*, agents: int = 2) -> TeamSpec:
    """Return a team of agents of unequal sizes with discrete actions."""
    return TeamSpec(
        task="toy/discrete",
        agents=tuple(
            AgentSpec(f"agent_{i}", 5 - i, ActionSpec("discrete", 3 + i, 0.0, 1.0)) for i in range(agents)
        ),
        state_size=4,
        control_rate=8.0,
    )


def write_test_bundle(path: Path, spec: TeamSpec, seed: int = 0, *, divergence_kind: str = "kl") -> Bundle:
    """Write a bundle of random policies for ``spec`` into the new folder ``path`` and read it back.

    Budgets are 0.1, 0.2, … nats, except for the last agent of the team, which has none.
    """
    generator = np.random.default_rng(seed)
    weights = {agent.name: _weights(agent, generator) for agent in spec.agents}
    last = spec.names[-1]
    budgets = {name: None if name == last else round(0.1 * (i + 1), 3) for i, name in enumerate(spec.names)}
    files: dict[str, str] = {}
    for model in (*spec.names, TEAM):
        onnx_file, config = path / model / MODEL_FILE, path / model / CONFIG_FILE
        onnx_file.parent.mkdir(parents=True)
        save(_graph(spec, model, weights), str(onnx_file))
        config.write_text(triton_config(spec, model, divergence_kind, budgets))
        files |= {str(file.relative_to(path)): sha256(file) for file in (onnx_file, config)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "contract_hash": spec.contract_hash,
        "team": spec.to_json(),
        "agents": {name: {"budget": budget} for name, budget in budgets.items()},
        "divergence_kind": divergence_kind,
        "files": files,
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return read_bundle(path)


def with_references(bundle: Bundle) -> Bundle:
    """Add the references that an export from a dataset would write, and read the bundle again."""
    generator = np.random.default_rng(5)
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    observations = {a.name: generator.normal(size=(400, a.observation_size)) for a in bundle.spec.agents}
    decisions = LocalTeam(bundle).act({name: rows.astype(np.float32) for name, rows in observations.items()})
    for agent in bundle.spec.agents:
        reference = DataReference.of(
            bundle.spec, agent, observations[agent.name], decisions[agent.name].divergence
        )
        manifest["agents"][agent.name]["reference"] = asdict(reference)
    (bundle.path / MANIFEST).write_text(json.dumps(manifest))
    return read_bundle(bundle.path)


def _weights(agent: AgentSpec, generator: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    heads = (
        ("mean", "log_std", "behavior_mean", "behavior_log_std")
        if agent.action.kind == "continuous"
        else ("logits", "behavior_logits")
    )
    shape = (agent.observation_size, agent.action.size)
    return {head: (0.5 * generator.standard_normal(shape)).astype(np.float32) for head in heads}


def _graph(spec: TeamSpec, model: str, weights: dict[str, dict[str, NDArray[np.float32]]]) -> ModelProto:
    agents = spec.agents if model == TEAM else (spec.agent(model),)
    nodes: list[Any] = []
    constants: list[Any] = []
    inputs, outputs = input_tensors(spec, model), output_tensors(spec, model)
    prefixes = {agent.name: f"{agent.name}/" if model == TEAM else "" for agent in agents}

    def node(operator: str, sources: list[str], result: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, sources, [result], **attributes))
        return result

    def constant(name: str, values: Any, dtype: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    if model == TEAM:
        for tensor in inputs:
            sizes = [a.observation_size if tensor.name == "observation" else a.action.size for a in agents]
            split = constant(f"{tensor.name}/sizes", sizes, np.int64)
            parts = [prefixes[agent.name] + tensor.name for agent in agents]
            nodes.append(helper.make_node("Split", [tensor.name, split], parts, axis=1))
    constant("last", [-1], np.int64)
    if spec.action_kind == "continuous":
        for name, value in (("half", 0.5), ("least", -1.0), ("most", 1.0)):
            constant(name, value)
    else:
        constant("forbidden", -1e9)
    for agent in agents:
        at = prefixes[agent.name]
        for head, matrix in weights[agent.name].items():
            linear = node(
                "MatMul", [at + "observation", constant(f"{at}W_{head}", matrix)], f"{at}linear_{head}"
            )
            if head.endswith("mean"):
                node("Identity", [linear], at + head)
            elif head.endswith("log_std"):
                node("Tanh", [linear], at + head)
            else:
                mask = node("Cast", [at + "action_mask"], f"{at}mask_{head}", to=TensorProto.BOOL)
                masked = node("Where", [mask, linear, "forbidden"], f"{at}masked_{head}")
                node("LogSoftmax", [masked], at + head, axis=-1)
        (_continuous_outputs if agent.action.kind == "continuous" else _discrete_outputs)(
            node, at, model == TEAM
        )
    if model == TEAM:
        for tensor in outputs:
            parts = [prefixes[agent.name] + tensor.name for agent in agents]
            node("Concat", parts, tensor.name, axis=1)
    graph = helper.make_graph(
        nodes, model, [_value(t) for t in inputs], [_value(t) for t in outputs], constants
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    checker.check_model(proto, full_check=True)
    return proto


def _continuous_outputs(node: Any, at: str, keep: bool) -> None:
    """Add a tanh-Gaussian action, and KL(N(mean, std) || N(behavior_mean, behavior_std)), summed over A."""
    std = node("Exp", [at + "log_std"], at + "std")
    behavior_std = node("Exp", [at + "behavior_log_std"], at + "behavior_std")
    scaled = node("Mul", [std, at + "noise"], at + "scaled")
    for u, action in (
        (node("Add", [at + "mean", scaled], at + "u"), "action"),
        (at + "behavior_mean", "behavior_action"),
    ):
        squashed = node("Tanh", [u], f"{u}_squashed")
        node("Clip", [squashed, "least", "most"], at + action)  # onnxruntime's tanh exceeds 1 by a little
    log_ratio = node("Sub", [at + "behavior_log_std", at + "log_std"], at + "log_ratio")
    gap = node("Sub", [at + "mean", at + "behavior_mean"], at + "gap")
    squares = node(
        "Add",
        [node("Mul", [std, std], at + "variance"), node("Mul", [gap, gap], at + "gap2")],
        at + "squares",
    )
    variance = node("Mul", [behavior_std, behavior_std], at + "behavior_variance")
    quadratic = node("Mul", ["half", node("Div", [squares, variance], at + "relative")], at + "quadratic")
    terms = node("Sub", [node("Add", [log_ratio, quadratic], at + "sum"), "half"], at + "terms")
    node("ReduceSum", [terms, "last"], at + "divergence", keepdims=int(keep))


def _discrete_outputs(node: Any, at: str, keep: bool) -> None:
    """Add a Gumbel-max action, and KL(softmax(logits) || softmax(behavior_logits))."""
    noisy = node("Add", [at + "logits", at + "noise"], at + "noisy")
    node("ArgMax", [noisy], at + "action", axis=-1, keepdims=int(keep))
    node("ArgMax", [at + "behavior_logits"], at + "behavior_action", axis=-1, keepdims=int(keep))
    log_ratio = node("Sub", [at + "logits", at + "behavior_logits"], at + "log_ratio")
    terms = node("Mul", [node("Exp", [at + "logits"], at + "probabilities"), log_ratio], at + "terms")
    node("ReduceSum", [terms, "last"], at + "divergence", keepdims=int(keep))


def _value(tensor: Tensor) -> Any:
    shape: list[str | int | None] = ["B"] if tensor.width is None else ["B", tensor.width]
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.datatype], shape)
