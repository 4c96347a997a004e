"""The wheel holds what the tree holds: every package and data file once, and nothing else."""

from __future__ import annotations

import email
import hashlib
import json
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

import omcda_deploy

ROOT = Path(__file__).parents[2]
ROOMS = ("training", "export", "serve", "protos")  # folders at the top of the tree, packages of omcda_deploy
FOLDERS = ("omcda_deploy", *ROOMS)
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS: dict[str, Any] = PYPROJECT["tool"]["setuptools"]


def files_of(tree: Path) -> Iterator[tuple[Path, str]]:
    """Each file of the package, with the path it is installed at."""
    for folder in FOLDERS:
        prefix = PurePosixPath("omcda_deploy", "" if folder == "omcda_deploy" else folder)
        for file in (tree / folder).rglob("*"):  # does not follow links
            if file.is_file() and "__pycache__" not in file.parts:
                yield file, str(prefix / file.relative_to(tree / folder))


def package_folder(package: str) -> Path:
    _, *rest = package.split(".")
    return ROOT.joinpath(*rest) if rest and rest[0] in ROOMS else ROOT.joinpath("omcda_deploy", *rest)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that no build folder of ours can reach a later wheel."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS, "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    return copy


def build(kind: str, tree: Path, target: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


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
    """Path -> sha256 of the package's files in a wheel."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" not in name]
        assert len(names) == len(set(names))
        return {name: hashlib.sha256(opened.read(name)).hexdigest() for name in names}


def test_packages_are_the_folders_that_hold_them() -> None:
    found = {
        PurePosixPath(installed).parent.as_posix().replace("/", ".")
        for file, installed in files_of(ROOT)
        if file.name == "__init__.py"
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_python_file_lies_in_a_package() -> None:
    folders = {package_folder(package) for package in SETUPTOOLS["packages"]}
    assert [
        str(file) for file, _ in files_of(ROOT) if file.suffix == ".py" and file.parent not in folders
    ] == []


def test_rooms_are_relative_links_to_the_folders_they_are_mapped_to() -> None:
    assert SETUPTOOLS["package-dir"] == {f"omcda_deploy.{room}": room for room in ROOMS}
    links = {path.name: path.readlink() for path in (ROOT / "omcda_deploy").iterdir() if path.is_symlink()}
    assert links == {room: Path("..", room) for room in ROOMS}
    assert all((ROOT / "omcda_deploy" / room / "__init__.py").is_file() for room in ROOMS)


@pytest.mark.parametrize(
    ("package", "pattern"),
    [(package, pattern) for package, patterns in SETUPTOOLS["package-data"].items() for pattern in patterns],
)
def test_package_data_patterns_match(package: str, pattern: str) -> None:
    assert any(path.is_file() for path in package_folder(package).glob(pattern))


def test_version_is_stated_alike() -> None:
    assert PYPROJECT["project"]["version"] == omcda_deploy.__version__


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
    wanted: dict[str, str] = {}
    for file, at in files_of(tree):
        if file.suffix == ".py":
            continue
        room = PurePosixPath(at).parts[1]
        package = f"omcda_deploy.{room}" if room in ROOMS else "omcda_deploy"
        name = PurePosixPath(at).relative_to(package.replace(".", "/"))
        wanted[f"{package}:{name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(installed)],
        cwd=tmp_path,
        input=json.dumps([key.split(":") for key in wanted]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    digests, tasks = json.loads(done.stdout)
    assert digests == wanted
    assert "mamujoco/halfcheetah-6x1" in tasks
