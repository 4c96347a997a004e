from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import omcda_deploy.training.algorithms
from omcda_deploy import registry
from omcda_deploy.errors import DatasetError, UnknownNameError


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


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


def test_entry_points_add_to_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_algorithm.py").write_text("LOADED = True\n")
    (tmp_path / "outside_env.py").write_text(
        "TASKS = ('outside/task',)\nPACKAGES = ('numpy',)\ndef make(task, **options): return (task, options)\n"
    )
    (tmp_path / "outside_format.py").write_text("SUFFIXES = ('.out',)\ndef read(path, task): return task\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = {
        "omcda_deploy.algorithms": ("mine", "outside_algorithm"),
        "omcda_deploy.envs": ("sim", "outside_env"),
        "omcda_deploy.datasets": ("out", "outside_format"),
    }
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda group: metadata.EntryPoints([metadata.EntryPoint(*entries[group], group)]),
    )
    assert "mine" in registry.algorithms()
    assert registry.load_algorithm("mine").LOADED
    assert "outside/task" in registry.tasks()
    made: Any = registry.make_environment("outside/task", size=3)
    assert made == ("outside/task", {"size": 3})
    assert registry.simulator_versions("outside/task") == {"numpy": metadata.version("numpy")}
    read: Any = registry.read_dataset("episodes.out", "a-task")
    assert read == "a-task"


def test_dataset_formats_are_told_by_file_name(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"ending in one of .*\.hdf5 \(omiga_hdf5\)"):
        registry.read_dataset(tmp_path / "data.csv")
    with pytest.raises(DatasetError, match="no such file"):
        registry.read_dataset(tmp_path / "data.hdf5")
