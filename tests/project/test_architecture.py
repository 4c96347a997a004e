"""The import rules of pyproject.toml hold, and would notice where they did not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE_FOLDERS = ("omcda_deploy", "training", "export", "serve", "protos")

LAYERS = "Each layer imports layers below it"
TORCH = "torch stays in training and export"
GRPC = "gRPC stays in serve"
SERVING = "Serving needs no torch, simulator or dataset"
PLAYING = "Playing knows no gRPC"
REPLAY = "Replay needs no simulator"

WRONG_IMPORTS = (  # rule, importing file, imported module
    (LAYERS, "training/loop.py", "omcda_deploy.serve.session"),
    (LAYERS, "training/algorithms/bc.py", "omcda_deploy.export.graph"),
    (LAYERS, "export/graph.py", "omcda_deploy.training.losses"),
    (LAYERS, "serve/status.py", "omcda_deploy.training.settings"),
    (LAYERS, "omcda_deploy/registry.py", "omcda_deploy.training.algorithms"),
    (LAYERS, "omcda_deploy/envs/toy.py", "omcda_deploy.export.graph"),
    (LAYERS, "omcda_deploy/play/collect.py", "omcda_deploy.commands.data"),
    (LAYERS, "omcda_deploy/spec.py", "omcda_deploy.bundle"),
    (LAYERS, "omcda_deploy/policy.py", "omcda_deploy.protos.tensors"),
    (LAYERS, "protos/tensors.py", "omcda_deploy.client.remote"),
    (TORCH, "omcda_deploy/play/measurements.py", "torch"),
    (TORCH, "serve/handlers.py", "torch"),
    (GRPC, "omcda_deploy/play/measurements.py", "grpc"),
    (SERVING, "serve/session.py", "omcda_deploy.registry"),
    (SERVING, "omcda_deploy/local.py", "h5py"),
    (PLAYING, "omcda_deploy/play/measurements.py", "grpc"),
    (REPLAY, "omcda_deploy/play/replay.py", "omcda_deploy.envs.toy"),
)
UNPLACED = "omcda_deploy/nowhere.py"


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    wide = {**os.environ, "COLUMNS": "500"}
    return subprocess.run(command, cwd=tree, env=wide, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Rule -> what is said about a copy of the tree that breaks every rule, inside functions and through links."""
    tree = tmp_path_factory.mktemp("wrong") / "tree"
    tree.mkdir()
    shutil.copy(ROOT / "pyproject.toml", tree)
    for folder in PACKAGE_FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "policies")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignored)
    for _, importer, imported in WRONG_IMPORTS:
        with (tree / importer).open("a") as file:
            file.write(f"\n\ndef _wrong():\n    import {imported}\n")
    (tree / UNPLACED).touch()
    linted = lint(tree)
    assert linted.returncode == 1, linted.stdout + linted.stderr
    sections: dict[str, str] = {}
    rule = ""
    lines = linted.stdout.partition("Broken contracts")[2].splitlines()
    for line, below in pairwise(lines):
        rule = line if below.startswith("---") else rule
        sections[rule] = sections.get(rule, "") + line + "\n"
    return sections


def test_import_rules() -> None:
    linted = lint(ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert "0 broken" in linted.stdout


@pytest.mark.parametrize(("rule", "importer", "imported"), WRONG_IMPORTS)
def test_wrong_imports_are_reported(
    findings: Mapping[str, str], rule: str, importer: str, imported: str
) -> None:
    module = importer.removesuffix(".py").replace("/", ".")
    module = module if module.startswith("omcda_deploy.") else f"omcda_deploy.{module}"
    (said,) = (text for name, text in findings.items() if name.startswith(rule))
    assert f"{module} -> {imported} (l." in said


def test_indirect_imports_are_reported(findings: Mapping[str, str]) -> None:
    (said,) = (text for name, text in findings.items() if name.startswith(PLAYING))
    assert "omcda_deploy.play is not allowed to import grpc" in said
    assert "omcda_deploy.play.measurements -> grpc (l." in said


def test_a_module_without_a_place_is_reported(findings: Mapping[str, str]) -> None:
    (said,) = (text for name, text in findings.items() if name.startswith(LAYERS))
    assert "not listed as layers:\n\n- omcda_deploy.nowhere" in said


def test_all_but_training_export_and_serve_import_without_any_extra() -> None:
    """Imports by name, and packages that import others, which the linter cannot see."""
    code = """if True:
        import importlib, pkgutil, sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in sys.argv[1:]:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        import omcda_deploy
        names = ["omcda_deploy"]
        for name in names:
            module = importlib.import_module(name)
            for found in pkgutil.iter_modules(getattr(module, "__path__", ()), name + "."):
                if found.name.split(".")[1] not in {"training", "export", "serve"}:
                    names.append(found.name)
        print(*names)
    """
    extras = (
        "torch onnx onnxruntime h5py tensorboard gymnasium gymnasium_robotics mujoco imageio imageio_ffmpeg"
    )
    absent = [*extras.split(), "stable_baselines3", "grpc_health", "grpc_reflection", "grpc_tools"]
    command = [sys.executable, "-c", code, *absent]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert {"omcda_deploy.cli", "omcda_deploy.commands.train", "omcda_deploy.envs.mamujoco"} <= imported
    assert {
        "omcda_deploy.local",
        "omcda_deploy.client.remote",
        "omcda_deploy.datasets.formats.omiga_hdf5",
    } <= imported
