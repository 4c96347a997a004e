"""Requirements: every third-party import is declared where it is needed, nothing else is, and all is pinned."""

from __future__ import annotations

import ast
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FOLDERS = ("omcda_deploy", "training", "export", "serve", "protos")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

BEHAVIOR = ("training/behavior/*.py", "omcda_deploy/commands/behavior.py")  # outside the extra "train"
NEEDED_FOR = {  # extra -> files that must find all they import with this extra alone
    "data": ("omcda_deploy/datasets/hdf5.py",),
    "vault": ("omcda_deploy/datasets/formats/og_vault.py", "omcda_deploy/datasets/hdf5.py"),
    "minari": ("omcda_deploy/datasets/minari*.py", "omcda_deploy/datasets/hdf5.py"),
    "train": (
        "training/**/*.py",
        "omcda_deploy/commands/benchmark.py",
        "omcda_deploy/datasets/hdf5.py",
    ),
    "export": ("export/*.py", "omcda_deploy/local.py"),
    "serve": (
        "serve/**/*.py",
        "omcda_deploy/watch/*.py",
        "omcda_deploy/client/admin.py",
        "omcda_deploy/client/remote.py",
        "omcda_deploy/client/connection.py",
        "omcda_deploy/local.py",
    ),
    "tracing": ("serve/tracing.py",),
    "mujoco": (
        "omcda_deploy/envs/mamujoco*.py",
        "omcda_deploy/envs/programs/mujoco*.py",
        "omcda_deploy/play/video.py",
        "omcda_deploy/local.py",
    ),
    "pettingzoo": ("omcda_deploy/envs/adapters/*.py",),
    "smax": ("omcda_deploy/envs/*smax*.py", "omcda_deploy/envs/vector/*.py"),
    "behavior": (
        *BEHAVIOR,
        "training/networks.py",
        "export/*.py",
        "omcda_deploy/experiments/tiers.py",
        "omcda_deploy/envs/mamujoco*.py",
        "omcda_deploy/local.py",
    ),
    "dev": ("protos/generate.py",),
}
TORCH_IMPORTERS = {  # outside training and export
    "omcda_deploy/commands/behavior.py",
    "omcda_deploy/commands/benchmark.py",
    "omcda_deploy/datasets/torch_episodes.py",  # a program, which is started only where torch is installed
}
DISTRIBUTIONS = {  # of packages that several distributions share, longest names first
    "google.protobuf": "protobuf",
    "torch.utils.tensorboard": "tensorboard",
    "opentelemetry.exporter.otlp.proto.grpc": "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry": "opentelemetry-api",
}
LOADED_BY_GYMNASIUM = {"mujoco"}
TOOLS = {
    *(
        "flashbax",
        "import-linter",
        "kubernetes-validate",
        "mypy",
        "packaging",
        "pytest",
        "pytest-xdist",
        "pyyaml",
        "ruff",
        "setuptools",
    ),
    *("tritonclient", "trustme", "types-grpcio", "types-protobuf", "types-pyyaml"),
}
SITE = {"ipykernel", "mkdocs-material", "mkdocstrings", "nbconvert"}  # programs that make docs runs
TORCH_PLATFORM = ("cuda-", "nvidia-", "triton==")  # pinned by torch itself, absent from its CPU build


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    extra: str | None  # the extra that MissingExtraError tells a user to install when the import fails

    @property
    def distribution(self) -> str:
        for package, distribution in DISTRIBUTIONS.items():
            if self.module.startswith(package):
                return distribution
        package = self.module.partition(".")[0]
        (distribution,) = set(distributions().get(package, [package]))
        return canonicalize_name(distribution)


@cache
def distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


class Scan(ast.NodeVisitor):
    """Third-party imports of one file, those inside functions and by a literal name included."""

    def __init__(self, file: Path) -> None:
        self.imports: list[Import] = []
        self._file = str(file.relative_to(ROOT))
        self._extra: str | None = None
        self.visit(ast.parse(file.read_text()))

    def _add(self, node: ast.expr | ast.stmt, *modules: str) -> None:
        internal = {"omcda_deploy", *sys.stdlib_module_names}
        self.imports += [
            Import(self._file, node.lineno, module, self._extra)
            for module in modules
            if module.partition(".")[0] not in internal
        ]

    def visit_Import(self, node: ast.Import) -> None:
        self._add(node, *(alias.name for alias in node.names))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0:
            self._add(node, *(f"{node.module}.{alias.name}" for alias in node.names))

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(
                ast.Name("import_module") | ast.Attribute(attr="import_module"), [ast.Constant(str(name))]
            ):
                self._add(node, name)
        self.generic_visit(node)

    def visit_Try(self, node: ast.Try) -> None:
        outer = self._extra
        for part in (part for handler in node.handlers for part in ast.walk(handler)):
            match part:
                case ast.Call(ast.Name("MissingExtraError"), [_, ast.Constant(str(extra))]):
                    self._extra = extra
        for child in node.body:
            self.visit(child)
        self._extra = outer
        for other in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(other)


@cache
def third_party_imports() -> tuple[Import, ...]:
    files = (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))  # follows no link
    return tuple(found for file in files for found in Scan(file).imports)


def declared(extra: str | None = None) -> set[str]:
    """Return the distributions of the base requirements, and of an extra with the extras that it names."""
    texts = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    names = set()
    for requirement in map(Requirement, texts):
        if requirement.name == PROJECT["name"]:
            names |= set().union(*(declared(named) for named in requirement.extras))
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def test_the_scan_sees_every_kind_of_import() -> None:
    seen = {(found.file, found.distribution, found.extra) for found in third_party_imports()}
    assert {
        ("omcda_deploy/client/connection.py", "grpcio", None),
        ("serve/introspection.py", "protobuf", None),
        ("serve/introspection.py", "grpcio-health-checking", None),
        ("training/metrics.py", "tensorboard", None),  # inside a function
        ("omcda_deploy/local.py", "onnxruntime", "serve"),
        ("omcda_deploy/play/video.py", "imageio-ffmpeg", "mujoco"),  # by name
        ("protos/generate.py", "grpcio-tools", "dev"),
    } <= seen


@pytest.mark.parametrize("extra", NEEDED_FOR)
def test_an_extra_brings_what_its_files_import(extra: str) -> None:
    files = {str(file.relative_to(ROOT)) for glob in NEEDED_FOR[extra] for file in ROOT.glob(glob)}
    assert files, "no such file"
    if extra == "train":
        files -= {str(file.relative_to(ROOT)) for glob in BEHAVIOR for file in ROOT.glob(glob)}
    if extra == "serve":
        files -= {"serve/tracing.py"}
    undeclared = [
        found
        for found in third_party_imports()
        if found.file in files and found.distribution not in declared(extra)
    ]
    assert undeclared == []


def test_all_but_training_export_and_serve_import_the_base_or_name_the_extra() -> None:
    undeclared = [
        found
        for found in third_party_imports()
        if not found.file.startswith(("training/", "export/", "serve/"))
        and found.file not in TORCH_IMPORTERS
        and found.distribution not in declared(found.extra)
    ]
    assert undeclared == []


def test_nothing_is_declared_that_nothing_imports() -> None:
    imported = {found.distribution for found in third_party_imports()}
    for extra in (None, *PROJECT["optional-dependencies"]):
        tools = {"dev": TOOLS | SITE, "docs": SITE}.get(extra or "", set())
        assert declared(extra) - imported - LOADED_BY_GYMNASIUM - tools == set(), extra


def test_all_is_every_extra_and_dev_is_more() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"all", "dev", "docs"}
    assert declared("all") == set().union(*map(declared, extras))
    assert declared("dev") > declared("all")


def test_constraints_pin_what_dev_installs_as_it_is_installed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(pins) == sorted(pins)
    needed = {name for name in closure() if not f"{name}==".startswith(TORCH_PLATFORM)}
    missing = {name: metadata.version(name) for name in needed if name not in pins}
    assert missing == {}, "pin these in constraints.txt"
    assert {name: Version(metadata.version(name)).public for name in pins} == pins
    assert set(pins) <= needed, "nothing asks for these pins"
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    asks = {name: SpecifierSet(metadata.metadata(name)["Requires-Python"] or "") for name in pins}
    assert [name for name, pythons in asks.items() if oldest not in pythons] == [], "too new for this Python"


def closure() -> set[str]:
    """Return the distributions that the extra ``dev`` resolves to on this machine."""
    pairs: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in PROJECT["dependencies"]]
    waiting += [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name == PROJECT["name"]:
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) not in pairs:
                pairs.add((name, extra))
                for needed in map(Requirement, metadata.requires(name) or ()):
                    if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                        waiting.append(needed)
    return {name for name, _ in pairs}


def test_generated_code_that_serving_installs_runs_on_protobuf_6() -> None:
    """On which tritonclient's users stay; ``make extras`` installs both. That of 1.82 and later refuses it."""
    serving = {
        each.name: each.specifier for each in map(Requirement, PROJECT["optional-dependencies"]["serve"])
    }
    for name in ("grpcio-health-checking", "grpcio-reflection"):
        assert "1.75.1" in serving[name]
        assert not any(version in serving[name] for version in ("1.82.0", "1.84.0", "1.85.1"))
