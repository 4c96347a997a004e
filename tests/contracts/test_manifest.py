"""Manifests that somebody has changed: refused in one line when they are read, whatever would trust them later."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from omcda_deploy.bundle import MANIFEST, Bundle, read_bundle
from omcda_deploy.errors import BundleError
from tests.support.bundles import continuous_spec, with_references, write_test_bundle

MISSING = object()
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_references(write_test_bundle(tmp_path_factory.mktemp("b") / "bundle", continuous_spec()))


@pytest.fixture
def change(bundle: Bundle) -> Any:
    """A function that writes another text as the manifest; at the end the first one is restored."""
    file = bundle.path / MANIFEST
    before = file.read_text()
    yield file.write_text
    file.write_text(before)


def changed(bundle: Bundle, path: str, value: Any) -> str:
    """Return the manifest with another value at a path of keys."""
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    *parents, last = path.split("/", 3) if path.startswith("agents") else path.split("/", 1)
    target = reduce(lambda entry, key: entry[key], parents, manifest)
    if value is MISSING:
        del target[last]
    else:
        target[last] = value
    return json.dumps(manifest)


P99 = "agents/agent_0/reference/divergence_p99"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("agents/agent_0/budget", "x", "(budget of agent_0: expected a number from 0 on, or null, got 'x')"),
        ("agents/agent_0/budget", NAN, "budget of agent_0: expected a number from 0 on, or null, got nan"),
        ("agents/agent_0/budget", INF, "budget of agent_0"),
        ("agents/agent_0/budget", -0.1, "budget of agent_0"),
        ("agents/agent_0/budget", True, "budget of agent_0"),
        ("agents/agent_0/budget", 10**400, "damaged (int too large"),
        ("agents/agent_0/budget", MISSING, "damaged ('budget')"),
        ("agents/agent_0/alpha", "x", "alpha of agent_0"),
        ("agents/agent_0", None, "is damaged"),
        ("agents", ["agent_0"], "is damaged"),
        (P99, -5.0, "divergence_p99 of agent_0: expected a KL from 0 on, got -5.0"),
        (P99, NAN, "divergence_p99: expected a finite number, got nan"),
        ("agents/agent_0/reference/distance_p99", -1.0, "distance_p99: expected a number from 0 on, got -1.0"),
        ("agents/agent_0/reference", [1], "is damaged"),
        ("schema_version", True, "has schema version True, expected 1"),
        ("divergence_kind", ["kl"], "expected divergence_kind kl or neg_log_behavior, got ['kl']"),
        ("files/" + "a" * 300, "0", "lists 'aaa"),
        ("files/a\0b", "0", "which cannot be read (embedded null byte): export the run again"),
        ("files/\ud800", "0", "is damaged ('utf-8' codec can't encode"),
        ("files", ["a"], "is damaged"),
        ("team/task", "\ud800", "is damaged ('utf-8' codec can't encode"),
        ("team/normalizer", {"kind": "minmax"}, "Normalizer.kind: expected 'none' or 'per-vector-standardize'"),
        ("team/control_rate", "fast", "is damaged (not a team spec"),
        ("team/state_size", INF, "is damaged (not a team spec"),
        ("training", "omcda", "damaged (training: expected an object, got 'omcda')"),
        ("parity", {"rows": 3, "against_torch": {}}, "parity: expected numbers of rows and of max_abs"),
        ("parity", {"rows": 3, "against_torch": {"action": {"max_abs": "0"}}}, "parity: expected numbers"),
        ("parity", [], "is damaged"),
    ],
)  # fmt: skip
def test_what_no_export_writes_is_refused(
    bundle: Bundle, change: Callable[[str], Any], path: str, value: Any, message: str
) -> None:
    change(changed(bundle, path, value))
    with pytest.raises(BundleError) as refused:
        read_bundle(bundle.path)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    str(refused.value).encode()  # can be printed, and sent


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\0", '"x"'])
def test_what_is_no_manifest_is_refused(bundle: Bundle, change: Callable[[str], Any], text: str) -> None:
    change(text)
    with pytest.raises(BundleError, match=r"is damaged .*: export the run again"):
        read_bundle(bundle.path)


def test_a_density_may_make_a_divergence_negative(bundle: Bundle, change: Callable[[str], Any]) -> None:
    """A policy without a density has -log pi_b(a|o), and float32 may miss a KL of 0."""
    change(changed(bundle, P99, -1e-7))
    read_bundle(bundle.path)
    text = json.loads(changed(bundle, P99, -5.0)) | {"divergence_kind": "neg_log_behavior"}
    change(json.dumps(text))
    assert read_bundle(bundle.path).references["agent_0"].divergence_p99 == -5.0


def test_files_that_lie_behind_links_in_a_circle_are_named(tmp_path: Path) -> None:
    bundle = write_test_bundle(tmp_path / "bundle", continuous_spec(agents=1))
    (bundle.path / "loop").symlink_to("loop")
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    manifest["files"]["loop/model"] = "0"
    (bundle.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="loop"):
        read_bundle(bundle.path)
