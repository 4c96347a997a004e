"""Triton's configuration of a bundle's models, which states the team's contract as parameters.

``config.pbtxt`` has ``max_batch_size: 0`` and the batch as an ordinary dynamic dimension, because Triton's batched
form has no ``[B]`` output: it would answer ``[B, 1]`` where our own server answers ``[B]``. One instance on one
thread of the CPU answers as this package does, to the last digit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from omcda_deploy.protos.tensors import Tensor, input_tensors, output_tensors
from omcda_deploy.spec import TeamSpec

# Parameters that other servers hand on; this package's servers have them as properties of a model's metadata.
TEAM_PARAMETER, HASH_PARAMETER, KIND_PARAMETER, BUDGETS_PARAMETER = (
    "team",
    "contract_hash",
    "divergence_kind",
    "budgets",
)
_THREADS = {"intra_op_thread_count": "1", "inter_op_thread_count": "1"}  # of Triton's onnxruntime backend


def contract_parameters(
    spec: TeamSpec, divergence_kind: str, budgets: Mapping[str, float | None]
) -> dict[str, str]:
    """Return what a client must know of a team beside the tensors of its models."""
    return {
        TEAM_PARAMETER: json.dumps(spec.to_json()),
        HASH_PARAMETER: spec.contract_hash,
        KIND_PARAMETER: divergence_kind,
        BUDGETS_PARAMETER: json.dumps(dict(budgets)),
    }


def triton_config(
    spec: TeamSpec, model: str, divergence_kind: str, budgets: Mapping[str, float | None]
) -> str:
    """Return the text of the ``config.pbtxt`` of an agent, or of ``team``."""
    parameters = _THREADS | contract_parameters(spec, divergence_kind, budgets)
    entries = "\n".join(
        # JSON's strings are those of protobuf's text format, if they have ASCII letters alone.
        f'parameters {{ key: "{name}" value {{ string_value: {json.dumps(value)} }} }}'
        for name, value in parameters.items()
    )
    return (
        f'name: "{model}"\nplatform: "onnxruntime_onnx"\nbackend: "onnxruntime"\nmax_batch_size: 0\n'
        f"input [\n{_tensors(input_tensors(spec, model))}\n]\n"
        f"output [\n{_tensors(output_tensors(spec, model))}\n]\n"
        f"instance_group [ {{ count: 1 kind: KIND_CPU }} ]\n{entries}\n"
    )


def _tensors(tensors: Iterable[Tensor]) -> str:
    return ",\n".join(
        f'  {{ name: "{t.name}" data_type: TYPE_{t.datatype} dims: [ {", ".join(map(str, t.shape(-1)))} ] }}'
        for t in tensors
    )
