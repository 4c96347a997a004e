"""Export of bundles: the manifest, Triton's configuration, arguments that do not fit."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from omcda_deploy.bundle import MODEL_FILE, TEAM, read_bundle
from omcda_deploy.claims import claimed
from omcda_deploy.errors import BundleError, ConfigError
from omcda_deploy.guard import DataReference
from omcda_deploy.local import LocalTeam, OnnxModel
from omcda_deploy.spec import TeamSpec
from tests.support.exported import RAGGED, Export, Exported, M, team_spec


def test_manifest_and_reproducible_bytes(tmp_path: Path) -> None:
    spec = team_spec()
    first, second = Exported(tmp_path / "a", spec), Exported(tmp_path / "deep/er/b", spec)
    assert first.bundle.digest == second.bundle.digest
    manifest = first.bundle.manifest
    assert manifest["training"] == {"algorithm": "test", "step": 7}
    entry = manifest["agents"]["agent_1"]
    assert (entry["budget"], entry["alpha"]) == (0.25, 1.5)
    decision = LocalTeam(first.bundle).act(first.rows)["agent_1"]
    reference = first.bundle.references["agent_1"]
    assert reference.divergence_p99 == pytest.approx(np.percentile(decision.divergence, 99), rel=1e-5)
    assert reference == DataReference.of(
        spec, spec.agent("agent_1"), first.rows["agent_1"], decision.divergence
    )
    assert manifest["parity"]["rows"] == M
    assert 0 < manifest["parity"]["against_torch"]["action"]["max_abs"] <= 1e-5
    assert read_bundle(tmp_path / "a").spec == spec
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deep"]
    for file in first.bundle.path.rglob("*"):
        assert file.is_dir() or str(Path.cwd()).encode() not in file.read_bytes()


_ONNX_TYPES = {
    "TYPE_FP32": onnx.TensorProto.FLOAT,
    "TYPE_INT64": onnx.TensorProto.INT64,
    "TYPE_UINT8": onnx.TensorProto.UINT8,
}


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_triton_reads_the_configuration_and_it_fits_the_model(export: Export, kind: Any) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    exported = export(team_spec(kind, **RAGGED))
    for name in (*exported.spec.names, TEAM):
        text = (exported.bundle.path / name / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config.ModelConfig())
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 0)
        assert [(g.count, g.kind) for g in config.instance_group] == [
            (1, model_config.ModelInstanceGroup.KIND_CPU)
        ]
        stated = {key: entry.string_value for key, entry in config.parameters.items()}
        assert (stated["intra_op_thread_count"], stated["inter_op_thread_count"]) == ("1", "1")
        assert TeamSpec.from_json(json.loads(stated["team"])) == exported.spec
        assert stated["contract_hash"] == exported.spec.contract_hash
        assert (stated["divergence_kind"], json.loads(stated["budgets"])) == (
            exported.bundle.divergence_kind,
            exported.bundle.budgets,
        )
        graph = onnx.load(exported.bundle.model_path(name)).graph
        for entries, values in ((config.input, graph.input), (config.output, graph.output)):
            assert [
                (e.name, _ONNX_TYPES[model_config.DataType.Name(e.data_type)], list(e.dims)) for e in entries
            ] == [
                (
                    v.name,
                    v.type.tensor_type.elem_type,
                    [d.dim_value or -1 for d in v.type.tensor_type.shape.dim],
                )
                for v in values
            ]
        outputs = OnnxModel(exported.bundle.model_path(name)).run(
            {
                entry.name: np.ones(
                    [3 if dim == -1 else dim for dim in entry.dims],
                    np.uint8 if entry.data_type == model_config.TYPE_UINT8 else np.float32,
                )
                for entry in config.input
            }
        )
        types = {"float32": model_config.TYPE_FP32, "int64": model_config.TYPE_INT64}
        assert [entry.name for entry in config.output] == list(outputs)
        for entry in config.output:
            assert tuple(3 if dim == -1 else dim for dim in entry.dims) == outputs[entry.name].shape
            assert types[str(outputs[entry.name].dtype)] == entry.data_type


def test_an_existing_folder_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        Exported(tmp_path / "b", team_spec())
    assert not list((tmp_path / "b").iterdir())


def test_one_process_at_a_time_exports_to_a_place(tmp_path: Path) -> None:
    with (
        claimed(tmp_path / "b"),
        pytest.raises(ConfigError, match=r"b is being written by process \d+: wait"),
    ):
        Exported(tmp_path / "b", team_spec())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    message = r"new/b cannot be written \(No space left on device\): free some space, or choose another place"
    with pytest.raises(BundleError, match=message):
        Exported(tmp_path / "new" / "b", team_spec())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence_kind": "js"}, "divergence_kind: expected one of kl, neg_log_behavior, got 'js'"),
        ({"budgets": {"agent_0": 1.0}}, "budgets: expected one for each of agent_0, agent_1"),
        ({"alphas": {}}, "alphas: expected one for each"),
        ({"observations": np.zeros((999, 2, 5))}, "at least 1000 rows, got 999"),
        ({"observations": np.zeros((1000, 2, 4))}, r"expected shape \[M, 2, 5\], got \[1000, 2, 4\]"),
        ({"observations": np.full((1000, 2, 5), np.nan)}, "finite"),
        ({"provenance": {"path": Path()}}, "JSON"),
        ({"alphas": dict.fromkeys(("agent_0", "agent_1"), math.inf)}, "finite JSON"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Exported(tmp_path / "b", team_spec(), **changes)
    assert not list(tmp_path.iterdir())


def test_discrete_actions_need_masks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"action_masks: .* expected shape \[1000, 2, 2\], got None"):
        Exported(tmp_path / "b", team_spec("discrete"), action_masks=None)


def test_the_trained_modules_are_left_alone(export: Export) -> None:
    exported = export(team_spec())
    assert exported.policy.training
    assert (exported.bundle.path / "agent_0" / MODEL_FILE).is_file()
