"""Plug-in modules by name: those of the tree, those of entry points, and those that break their protocol."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import omcda_deploy.training.algorithms
from omcda_deploy import registry
from omcda_deploy.datasets.formats import (
    madt_episodes,
    minari_folder,
    npz_episodes,
    og_vault,
    omiga_hdf5,
    pymarl_hdf5,
)
from omcda_deploy.envs import mamujoco, mamujoco_khop, own, smac, smax, toy
from omcda_deploy.errors import DatasetError, PluginError, UnknownNameError
from omcda_deploy.plugins import DatasetFormat, ForeignFormat, Simulator, WithBehavior, WithVector

# mypy holds the modules of the tree against the types of their protocols; the tests see names alone.
SIMULATORS: tuple[Simulator, ...] = (mamujoco, mamujoco_khop, own, smac, smax, toy)
FORMATS: tuple[DatasetFormat, ...] = (omiga_hdf5,)
FOREIGN_FORMATS: tuple[ForeignFormat, ...] = (
    madt_episodes,
    minari_folder,
    npz_episodes,
    og_vault,
    pymarl_hdf5,
)
BATCHED: tuple[WithVector, ...] = (mamujoco, mamujoco_khop, smax)
RECORDABLE: WithBehavior = toy

GROUPS = ("omcda_deploy.algorithms", "omcda_deploy.envs", "omcda_deploy.datasets")
ALGORITHM = """
PAPER, SUMMARY, ACTIONS, DIVERGENCE = "a paper", "a summary", frozenset(), {}
Config = Algorithm = make_policy = object
"""
SIMULATOR = """
TASKS = ("outside/task",)
PACKAGES = ("numpy",)
def make(task, **options): return (task, options)
"""
FORMAT = """
SUFFIXES = (".out",)
def read(path, task): return task
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(group, name, source)`` adds a module with an entry point, as installing its package would."""
    entries = {group: list[metadata.EntryPoint]() for group in GROUPS}
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints(entries.get(group, ())))
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def add(group: str, name: str, source: str) -> None:
        module = f"outside_{name}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source)
        entries[f"omcda_deploy.{group}"].append(metadata.EntryPoint(name, module, f"omcda_deploy.{group}"))
        registry.rescan()

    yield add
    monkeypatch.undo()
    for module in modules:
        sys.modules.pop(module, None)
    registry.rescan()


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return process.stdout


def test_tasks_are_listed_and_made_by_name() -> None:
    assert {"mamujoco/hopper-3x1", "mamujoco/ant-2x4", "mamujoco/halfcheetah-6x1"} <= set(registry.tasks())
    assert list(registry.tasks()) == sorted(registry.tasks())
    assert registry.team_spec("mamujoco/hopper-3x1").task == "mamujoco/hopper-3x1"
    with pytest.raises(UnknownNameError, match="did you mean 'mamujoco/halfcheetah-6x1'"):
        registry.make_environment("mamujoco/halfcheeta-6x1")


def test_algorithms_are_the_files_of_their_folder() -> None:
    folder = Path(next(iter(omcda_deploy.training.algorithms.__path__)))
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert files <= set(registry.algorithms())
    with pytest.raises(UnknownNameError, match="unknown algorithm 'nonesuch'"):
        registry.load_algorithm("nonesuch")


def test_listing_needs_neither_torch_nor_a_simulator() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'gymnasium', 'mujoco', 'h5py', 'jax']))\n"
        "from omcda_deploy import registry\n"
        "registry.algorithms()\n"
        "print('mamujoco/ant-2x4' in registry.tasks(), registry.dataset_formats())\n"
        "try: registry.make_environment('mamujoco/ant-2x4')\n"
        "except Exception as error: print(error)\n"
    )
    lines = run(code).splitlines()
    assert lines[0].startswith("True (")
    assert "omiga_hdf5" in lines[0]
    assert "pip install 'omcda-deploy[mujoco]'" in lines[1]


def test_modules_of_the_tree_are_all_registered() -> None:
    assert {task for module in SIMULATORS for task in module.TASKS} == set(registry.tasks())
    formats = {registry.load_dataset_format(name) for name in registry.dataset_formats()}
    assert formats == {*FORMATS, *FOREIGN_FORMATS}
    assert set(registry.foreign_formats().values()) == set(FOREIGN_FORMATS)
    batched = {task for task in registry.tasks() if registry.vector_factory(task) is not None}
    assert batched == {*smax.TASKS, *mamujoco.TASKS, *mamujoco_khop.TASKS}


def test_entry_points_add_to_each_kind(install: Install) -> None:
    install("algorithms", "mine", ALGORITHM)
    install("envs", "sim", SIMULATOR)
    install("datasets", "out", FORMAT)
    assert "mine" in registry.algorithms()
    assert registry.load_algorithm("mine").PAPER == "a paper"
    assert "outside/task" in registry.tasks()
    environment: Any = registry.make_environment("outside/task", size=3)
    assert environment == ("outside/task", {"size": 3})
    assert registry.simulator_versions("outside/task") == {"numpy": metadata.version("numpy")}
    assert registry.behavior_team("outside/task") is None
    read: Any = registry.read_dataset("episodes.out", "a-task")
    assert read == "a-task"


def test_each_missing_name_of_an_algorithm_is_named(install: Install) -> None:
    install("algorithms", "typo", ALGORITHM.replace("make_policy", "make_polices").replace("PAPER", "TITLE"))
    with pytest.raises(PluginError) as refused:
        registry.load_algorithm("typo")
    message = str(refused.value)
    assert message.startswith(
        "outside_typo (entry point 'typo' of omcda_deploy.algorithms): expected PAPER, "
    )
    assert "missing is PAPER, make_policy (is make_polices a misspelling of it?): define it" in message


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("SUFIXES = ('.out',)\ndef read(path, task): ...", r"SUFFIXES \(is SUFIXES a misspelling"),
        ("suffixes = ('.out',)\ndef read(path, task): ...", r"SUFFIXES \(is suffixes a misspelling"),
        ("SUFFIXES = ('.out',)", "missing is read: define it"),
        (
            "SOURCE = 'a folder'\ndef recognize(path): ...\ndef open_recording(path, task): ...",
            r"recognizes \(is recognize a misspelling",
        ),
        ("", "missing is SUFFIXES, read: define it"),
    ],
)
def test_an_incomplete_format_is_an_error_and_no_missing_format(
    install: Install, source: str, missing: str, tmp_path: Path
) -> None:
    install("datasets", "broken", source)
    with pytest.raises(PluginError, match=missing):
        registry.load_dataset_format("broken")
    with pytest.raises(
        DatasetError, match=rf"ending in one of \.h5 .*'broken' of omcda_deploy\.datasets.*{missing}"
    ):
        registry.read_dataset(tmp_path / "episodes.out")


def test_an_incomplete_file_of_the_tree_is_always_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(omiga_hdf5, "SUFFIXES")
    registry.rescan()
    try:
        with pytest.raises(
            PluginError, match=r"omcda_deploy\.datasets\.formats\.omiga_hdf5: expected SUFFIXES, read"
        ):
            registry.read_dataset("episodes.out")
    finally:
        monkeypatch.undo()
        registry.rescan()


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        (SIMULATOR.replace("make", "makes"), r"make \(is makes a misspelling of it\?\)"),
    ],
)
def test_a_broken_simulator_names_itself_and_spares_the_others(
    install: Install, source: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    install("envs", "broken", source)
    install("envs", "sim", SIMULATOR)
    with caplog.at_level(logging.WARNING, logger="omcda_deploy.registry"):
        assert {"outside/task", *toy.TASKS} <= set(registry.tasks())
        assert registry.team_spec("toy/chain").task == "toy/chain"
        assert registry.make_environment("outside/task")
    # Once, not at each look-up. The thread of a server that an earlier test stopped may log beside it.
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "omcda_deploy.registry")
    assert "outside_broken (entry point 'broken' of omcda_deploy.envs)" in warning
    with pytest.raises(UnknownNameError, match=rf"unknown task 'broken/task': .*'broken' of .*{cause}"):
        registry.make_environment("broken/task")


def test_modules_are_listed_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("envs", "sim", SIMULATOR)
    assert "outside/task" in registry.tasks()
    monkeypatch.setattr(metadata, "entry_points", lambda group: pytest.fail("listed again"))
    for _ in range(2):
        assert "outside/task" in registry.tasks()
        assert registry.team_spec("toy/chain").task == "toy/chain"


def test_dataset_formats_are_told_by_file_name(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"ending in one of .*\.hdf5 \(omiga_hdf5\)"):
        registry.read_dataset(tmp_path / "data.csv")
    with pytest.raises(DatasetError, match="no such file"):
        registry.read_dataset(tmp_path / "data.hdf5")


def test_a_broken_algorithm_is_left_out_of_the_list_with_a_warning(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("algorithms", "mine", ALGORITHM)
    install("algorithms", "broken", "import no_such_package")
    loaded = registry.load_algorithms()
    assert {"bc", "mine", "omcda"} <= loaded.keys()
    assert "broken" not in loaded
    assert (
        "outside_broken (entry point 'broken' of omcda_deploy.algorithms) cannot be imported" in caplog.text
    )
    with pytest.raises(PluginError, match="no_such_package"):
        registry.load_algorithm("broken")
