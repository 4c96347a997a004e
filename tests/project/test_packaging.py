"""The wheel holds each package and data file once and nothing else; the source archive the documents, too."""

from __future__ import annotations

import email
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

import omcda_deploy

ROOT = Path(__file__).parents[2]
MAPPED = (
    "training",
    "export",
    "serve",
    "protos",
)  # folders at the top of the tree that are packages of omcda_deploy
FOLDERS = ("omcda_deploy", *MAPPED)
DOCUMENTS = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md")
BUILT_WITH = ("pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "mkdocs.yml")
BESIDE = (*BUILT_WITH, "LICENSE", "README.md", *DOCUMENTS)
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS: dict[str, Any] = PYPROJECT["tool"]["setuptools"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def files_of(tree: Path) -> Iterator[tuple[Path, str]]:
    """Each file of the package, with the path it is installed at."""
    for folder in FOLDERS:
        prefix = PurePosixPath("omcda_deploy", "" if folder == "omcda_deploy" else folder)
        for file in (tree / folder).rglob("*"):  # does not follow links
            if file.is_file() and "__pycache__" not in file.parts:
                yield file, str(prefix / file.relative_to(tree / folder))


def package_folder(package: str) -> Path:
    _, *rest = package.split(".")
    return ROOT.joinpath(*rest) if rest and rest[0] in MAPPED else ROOT.joinpath("omcda_deploy", *rest)


def relative_links(markdown: str) -> list[str]:
    """Targets of links and images that are neither absolute nor within the page."""
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", markdown) + re.findall(
        r"^\[[^]]+\]:\s*(\S+)", markdown, re.M
    )
    return [target for target in targets if not re.match(r"https?://|mailto:|#", target)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that no build folder of the tree can get into a later wheel."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    copy.mkdir()
    for name in BESIDE:
        shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS, "docs", "examples", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    return copy


def build(kind: str, tree: Path, target: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(target)]
    process = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    (archive,) = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    return target


def contents(archive: Path) -> dict[str, str]:
    """sha256 of the package's files in a wheel, by path."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" not in name]
        assert len(names) == len(set(names))
        return {name: hashlib.sha256(opened.read(name)).hexdigest() for name in names}


def test_packages_are_the_folders_that_hold_them() -> None:
    folders = {
        PurePosixPath(installed).parent.as_posix().replace("/", ".")
        for file, installed in files_of(ROOT)
        if file.name == "__init__.py"
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)


def test_every_python_file_lies_in_a_package() -> None:
    folders = {package_folder(package) for package in SETUPTOOLS["packages"]}
    assert [
        str(file) for file, _ in files_of(ROOT) if file.suffix == ".py" and file.parent not in folders
    ] == []


def test_mapped_packages_are_relative_links_to_their_folders() -> None:
    assert SETUPTOOLS["package-dir"] == {f"omcda_deploy.{name}": name for name in MAPPED}
    links = {path.name: path.readlink() for path in (ROOT / "omcda_deploy").iterdir() if path.is_symlink()}
    assert links == {name: Path("..", name) for name in MAPPED}
    assert all((ROOT / "omcda_deploy" / name / "__init__.py").is_file() for name in MAPPED)


@pytest.mark.parametrize(
    ("package", "pattern"),
    [(package, pattern) for package, patterns in SETUPTOOLS["package-data"].items() for pattern in patterns],
)
def test_package_data_patterns_match(package: str, pattern: str) -> None:
    assert any(path.is_file() for path in package_folder(package).glob(pattern))


def test_version_is_stated_alike() -> None:
    assert PYPROJECT["project"]["version"] == omcda_deploy.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == omcda_deploy.__version__
    assert re.search(
        rf"^## \[{omcda_deploy.__version__}\]|^This will be {omcda_deploy.__version__},", CHANGELOG, re.M
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    links = relative_links((ROOT / document).read_text())
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_the_readme_has_no_relative_link() -> None:
    """PyPI shows the README without the tree around it, where such links lead nowhere."""
    assert relative_links("see [a](docs/a.md), [b](#below), [c](https://example.org)") == ["docs/a.md"]
    text = (ROOT / "README.md").read_text()
    # Pictures of the tree show their description there.
    assert relative_links(re.sub(r"!\[[^]]{20,}\]\(docs/[\w.-]+\.svg\)", "", text)) == []


def test_pictures_of_the_readme_are_small_and_in_the_tree() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures == ["docs/team.svg"]
    assert all((ROOT / picture).stat().st_size < 60_000 for picture in pictures)


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    paths = re.findall(
        r"`((?:docs|training|serve|tests|examples|omcda_deploy)/[\w/.-]*|[A-Z]+\.(?:md|cff))`", text
    )
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_wheel_holds_every_file_of_the_package_and_no_other(tree: Path, wheel: Path) -> None:
    expected = {at: hashlib.sha256(file.read_bytes()).hexdigest() for file, at in files_of(tree)}
    assert contents(wheel) == expected
    ends = ("py.typed", ".proto", ".pyi", ".binpb", "/bundle.json", "/model.onnx", "/config.pbtxt")
    assert [end for end in ends if not any(at.endswith(end) for at in expected)] == []


def test_wheel_names_version_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        info = f"omcda_deploy-{omcda_deploy.__version__}.dist-info"
        metadata = email.message_from_bytes(opened.read(f"{info}/METADATA"))
        assert metadata["Version"] == omcda_deploy.__version__
        assert metadata["License-Expression"] == "Apache-2.0"
        assert opened.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert opened.read(f"{info}/top_level.txt").split() == [b"omcda_deploy"]
        assert b"omcda-deploy = omcda_deploy.cli:main" in opened.read(f"{info}/entry_points.txt")


def test_a_wheel_from_the_source_archive_is_the_same(tree: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))
    assert [name for name in (*BESIDE, "docs/serving.md") if not (unpacked / name).is_file()] == []
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == contents(wheel)


def test_data_files_open_from_the_installed_wheel(tree: Path, installed: Path, tmp_path: Path) -> None:
    code = """if True:
        import hashlib, importlib.resources, json, sys
        sys.path.insert(0, sys.argv[1])
        from omcda_deploy import serve, training
        from omcda_deploy.play import shipped
        for module in (serve, shipped, training):
            assert module.__file__.startswith(sys.argv[1]), module.__file__
        digests = {}
        for package, name in json.load(sys.stdin):
            data = importlib.resources.files(package).joinpath(name).read_bytes()
            digests[f"{package}:{name}"] = hashlib.sha256(data).hexdigest()
        print(json.dumps([digests, shipped.shipped_tasks()]))
    """
    expected: dict[str, str] = {}
    for file, at in files_of(tree):
        if file.suffix == ".py":
            continue
        folder = PurePosixPath(at).parts[1]
        package = f"omcda_deploy.{folder}" if folder in MAPPED else "omcda_deploy"
        name = PurePosixPath(at).relative_to(package.replace(".", "/"))
        expected[f"{package}:{name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    process = subprocess.run(
        [sys.executable, "-I", "-c", code, str(installed)],
        cwd=tmp_path,
        input=json.dumps([key.split(":") for key in expected]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    digests, tasks = json.loads(process.stdout)
    assert digests == expected
    assert "mamujoco/halfcheetah-6x1" in tasks
