"""Export of torch actors to a bundle (:mod:`omcda_deploy.bundle`), verified before it gets its name.

torch's TorchScript exporter traces the graphs: it needs no package beyond onnx and always writes the same bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from omcda_deploy.bundle import (
    CONFIG_FILE,
    MANIFEST,
    MODEL_FILE,
    SCHEMA_VERSION,
    TEAM,
    Bundle,
    DivergenceKind,
    input_names,
    output_names,
    read_bundle,
)
from omcda_deploy.claims import claimed
from omcda_deploy.errors import BundleError, ConfigError
from omcda_deploy.export.graph import PolicyGraph
from omcda_deploy.export.parity import check_parity, parity_samples
from omcda_deploy.export.readme import README, readme
from omcda_deploy.files import atomic_folder, folder_of, probe, refusal, sha256
from omcda_deploy.guard import DataReference
from omcda_deploy.protos.model_config import triton_config
from omcda_deploy.spec import TeamSpec

# The newest opset that the TorchScript exporter of every supported torch writes and any onnxruntime reads.
OPSET = 17


def export_bundle(
    out: Path,
    spec: TeamSpec,
    policy: nn.Module,
    behavior: nn.Module,
    *,
    observations: NDArray[Any],
    divergence_kind: DivergenceKind,
    budgets: Mapping[str, float | None],
    alphas: Mapping[str, float | None],
    provenance: Mapping[str, Any],
    action_masks: NDArray[Any] | None = None,
) -> Bundle:
    """Export a team to the new folder ``out``, check it, and return it as read back.

    Nothing is left behind when the export fails.

    ``policy`` and ``behavior``: modules that fit ``export.graph.ContinuousActor`` or ``DiscreteActor``, on any
    device; they are not changed. Give the same module twice to export a behaviour policy itself.
    ``observations`` [M >= 1000, N, O]: real observations for the parity check, raw or normalised, each agent's
    entries first and padding behind them. ``action_masks`` [M, N, A]: their masks, for discrete actions.
    ``budgets`` and ``alphas``: d_i (nats) and alpha_i per agent, or None. ``provenance``: JSON values, passed on.

    Raises :class:`BundleError` when ``out`` exists or cannot be written, :class:`ConfigError` for arguments that do
    not fit the spec and while another process writes ``out``,
    :class:`ExportError` when the exported graphs do not reproduce the actors.
    """
    out = Path(out).absolute()
    _require_new(out)
    if divergence_kind not in get_args(DivergenceKind):
        raise ConfigError(
            f"divergence_kind: expected one of {', '.join(get_args(DivergenceKind))}, got {divergence_kind!r}"
        )
    for name, values in (("budgets", budgets), ("alphas", alphas)):
        if set(values) != set(spec.names):
            raise ConfigError(
                f"{name}: expected one for each of {', '.join(spec.names)}, got {sorted(values)}"
            )
    samples = parity_samples(spec, observations, action_masks)
    graphs = _build_graphs(spec, policy, behavior, divergence_kind)

    with _new_bundle(out) as folder:
        for name, graph in graphs.items():
            _write_model(graph, spec, name, folder)
            config = triton_config(spec, name, divergence_kind, budgets)
            (folder / name / CONFIG_FILE).write_text(config)
        parity = check_parity(spec, graphs, folder, samples)
        agents = {
            agent.name: {
                "budget": budgets[agent.name],
                "alpha": alphas[agent.name],
                "reference": dataclasses.asdict(
                    DataReference.of(
                        spec, agent, samples[agent.name]["observation"], parity.divergence[agent.name]
                    )
                ),
            }
            for agent in spec.agents
        }
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "contract_hash": spec.contract_hash,
            "team": spec.to_json(),
            "divergence_kind": divergence_kind,
            "agents": agents,
            "training": dict(provenance),
            "parity": parity.report,
            "exporter": _exporter_versions(),
            "files": _digests(folder),
        }
        _write_manifest(folder, manifest)
        (folder / README).write_text(readme(read_bundle(folder)))
    return read_bundle(out)


def _require_new(out: Path) -> None:
    """Raise :class:`BundleError` where ``out`` exists or cannot be written."""
    if os.path.lexists(out):
        raise BundleError(f"{out} exists already: choose another --out, or remove it first")
    try:
        probe(out)
    except OSError as error:
        raise BundleError(f"{out} cannot be written {refusal(error)}") from error


@contextmanager
def _new_bundle(out: Path) -> Iterator[Path]:
    """Yield the folder that becomes the bundle ``out``, which no other process exports to meanwhile."""
    try:
        with folder_of(out), claimed(out):
            _require_new(out)  # another process may have exported it since the first look
            with atomic_folder(out) as folder:
                yield folder
    except OSError as error:
        raise BundleError(f"{out} cannot be written {refusal(error)}") from error


def _build_graphs(
    spec: TeamSpec, policy: nn.Module, behavior: nn.Module, divergence_kind: DivergenceKind
) -> dict[str, PolicyGraph]:
    """Return the graphs to export by model name: one per agent, and the team's."""
    # One deepcopy for both: a behaviour policy that is the policy stays one module and is computed once.
    policy, behavior = copy.deepcopy((policy, behavior))
    graphs = {
        name: PolicyGraph(spec, policy, behavior, divergence_kind, index).cpu().eval()
        for index, name in enumerate(spec.names)
    }
    graphs[TEAM] = PolicyGraph(spec, policy, behavior, divergence_kind).cpu().eval()
    return graphs


def _write_model(graph: PolicyGraph, spec: TeamSpec, name: str, folder: Path) -> None:
    """Write the ONNX model ``name`` into ``folder``."""
    file = folder / name / MODEL_FILE
    file.parent.mkdir(parents=True)
    model = _trace(graph, spec, name, file)
    file.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(file), full_check=True)


def _exporter_versions() -> dict[str, str | int]:
    return {
        "omcda-deploy": importlib.metadata.version("omcda-deploy"),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "opset": OPSET,
    }


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file, by its path in ``folder``."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"provenance, budgets and alphas must be finite JSON values: {error}") from error
    (folder / MANIFEST).write_text(text + "\n")


def _trace(graph: PolicyGraph, spec: TeamSpec, name: str, file: Path) -> onnx.ModelProto:
    """Trace the graph to an ONNX model called ``name``; torch writes to ``file`` first."""
    agents = spec.agents if graph.agent is None else (spec.agents[graph.agent],)
    actions = sum(agent.action.size for agent in agents)
    example = [torch.zeros(2, sum(agent.observation_size for agent in agents)), torch.zeros(2, actions)]
    if spec.action_kind == "discrete":
        example.append(torch.ones(2, actions, dtype=torch.uint8))
    names = (*input_names(spec), *output_names(spec))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would prefer its newer exporter
        torch.onnx.export(
            graph,
            tuple(example),
            file,
            input_names=list(input_names(spec)),
            output_names=list(output_names(spec)),
            dynamic_axes={tensor: {0: "batch"} for tensor in names},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(file)
    model.graph.name = name
    for value in model.graph.output:
        # The tracer loses static widths behind a reshape, but servers and Triton read them from the model.
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 2:
            dims[1].dim_value = len(agents) if value.name in _per_agent_outputs(spec) else actions
    for node in model.graph.node:
        node.doc_string = ""  # some torch releases write the exporting machine's paths here
    return model


def _per_agent_outputs(spec: TeamSpec) -> set[str]:
    """Return the outputs with one number per agent, ``[B]`` or ``[B, N]``."""
    discrete = {"action", "behavior_action"} if spec.action_kind == "discrete" else set()
    return {"divergence"} | discrete
