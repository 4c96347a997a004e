"""The README in a bundle: its block runs, its table is that of the graph, and the digest does not depend on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from omcda_deploy.bundle import MODEL_FILE, read_bundle
from omcda_deploy.export.readme import readme
from omcda_deploy.local import LocalTeam
from tests.support.exported import RAGGED, Export, team_spec

ONNX_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "uint8": "tensor(uint8)"}


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_block_runs_and_the_table_is_that_of_the_graph(
    export: Export, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export(team_spec(kind, **RAGGED)).bundle
    text = (bundle.path / "README.md").read_text()
    monkeypatch.chdir(bundle.path)
    [python] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in python.splitlines() if line]) == 5
    ran: dict[str, Any] = {}
    exec(python, ran)
    local = LocalTeam(bundle).act(
        {a.name: np.zeros((1, a.observation_size), np.float32) for a in bundle.spec.agents}
    )
    assert np.array_equal(ran["action"], local["agent_0"].action)
    assert np.array_equal(ran["divergence"], local["agent_0"].divergence)
    session = onnxruntime.InferenceSession(bundle.path / "agent_0" / MODEL_FILE)
    of_graph = [
        (way, node.name, node.type, ["B", *node.shape[1:]])
        for way, nodes in (("in", session.get_inputs()), ("out", session.get_outputs()))
        for node in nodes
    ]
    rows = re.findall(r"^\| (in|out) \| `(\w+)` \| (\w+) \| \[(.*?)\] \| (.+) \|$", text, flags=re.M)
    told = [
        (way, name, ONNX_TYPES[dtype], [int(n) if n.isdigit() else n for n in shape.split(", ")])
        for way, name, dtype, shape, _ in rows
    ]
    assert told == of_graph


def test_it_tells_team_provenance_and_where_the_names_are(export: Export) -> None:
    exported = export(team_spec(**RAGGED))
    text = (exported.bundle.path / "README.md").read_text()
    assert "| `agent_1` | 6 numbers | 3 numbers from -1 to 1 | 0.25 |" in text
    assert "* algorithm: test\n* step: 7\n" in text
    assert exported.spec.contract_hash in text
    assert "describe" not in text  # no simulator here knows test/team
    shipped = Path(__file__).parents[2] / "omcda_deploy/policies/mamujoco/hopper-3x1/medium"
    assert "`omcda-deploy describe mamujoco/hopper-3x1`" in readme(read_bundle(shipped))


def test_the_digest_does_not_depend_on_it(export: Export) -> None:
    exported = export(team_spec())
    bundle, file = exported.bundle, exported.bundle.path / "README.md"
    assert file.name not in bundle.manifest["files"]
    digest, text = bundle.digest, file.read_text()
    file.write_text(text + "notes of an operator\n")
    assert read_bundle(bundle.path).digest == digest
    file.unlink()
    assert read_bundle(bundle.path).digest == digest
    file.write_text(text)
