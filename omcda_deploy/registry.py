"""What is there by name: tasks, algorithms and dataset formats.

A file in ``omcda_deploy/envs``, ``omcda_deploy/training/algorithms`` or ``omcda_deploy/datasets`` is found by
listing its folder; code outside the tree is found through the entry-point groups ``omcda_deploy.envs``,
``omcda_deploy.algorithms`` and ``omcda_deploy.datasets``, whose entries name modules. Algorithms are listed by
file name and imported only when asked for, so that listing them never imports torch.

A simulator's module defines ``TASKS`` and ``make(task, **options)``, and may define ``PACKAGES``, the distributions
whose versions a recorded dataset should name, and ``behavior_team(task)``, the behaviour policies that its tasks
are defined with. A format's module defines ``SUFFIXES`` and ``read(path, task)``.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

from omcda_deploy.datasets import Dataset
from omcda_deploy.envs import Environment
from omcda_deploy.errors import DatasetError, UnknownNameError
from omcda_deploy.policy import TeamPolicy
from omcda_deploy.spec import TeamSpec

_ENVIRONMENTS = "omcda_deploy.envs"
_ALGORITHMS = "omcda_deploy.training.algorithms"
_DATASETS = "omcda_deploy.datasets"


def tasks() -> tuple[str, ...]:
    """Names of all tasks, whether or not their simulator is installed."""
    return tuple(sorted(_environments()))


def make_environment(task: str, **options: Any) -> Environment:
    """Create one environment. Raises :class:`UnknownNameError`, or MissingExtraError without its simulator."""
    environment: Environment = _environment(task).make(task, **options)
    return environment


def team_spec(task: str, **options: Any) -> TeamSpec:
    """The task's spec, as its environment states it."""
    environment = make_environment(task, **options)
    try:
        return environment.spec
    finally:
        environment.close()


def simulator_versions(task: str) -> dict[str, str]:
    """Installed versions of the packages that the task's physics depends on."""
    packages = getattr(_environment(task), "PACKAGES", ())
    return {package: metadata.version(package) for package in packages}


def behavior_team(task: str) -> TeamPolicy | None:
    """The behaviour policies that the task itself comes with, where its simulator defines any."""
    make = getattr(_environment(task), "behavior_team", None)
    team: TeamPolicy | None = make(task) if make else None
    return team


def algorithms() -> tuple[str, ...]:
    """Names of all algorithms. Imports none of them."""
    return tuple(sorted({*_files(_ALGORITHMS), *_entry_points("omcda_deploy.algorithms")}))


def load_algorithm(name: str) -> ModuleType:
    """Import an algorithm's module. Raises :class:`UnknownNameError`."""
    return _load("algorithm", name, _ALGORITHMS, "omcda_deploy.algorithms")


def dataset_formats() -> tuple[str, ...]:
    """Names of all dataset formats."""
    return tuple(sorted({*_files(_DATASETS), *_entry_points("omcda_deploy.datasets")}))


def load_dataset_format(name: str) -> ModuleType:
    """Import a dataset format's module. Raises :class:`UnknownNameError`."""
    return _load("dataset format", name, _DATASETS, "omcda_deploy.datasets")


def read_dataset(path: str | Path, task: str | None = None) -> Dataset:
    """Read a dataset of any format, told by the end of its name. Raises :class:`DatasetError`."""
    path = Path(path)
    suffixes = {}
    for name in dataset_formats():
        module = load_dataset_format(name)
        for suffix in module.SUFFIXES:
            if path.name.endswith(suffix):
                dataset: Dataset = module.read(path, task)
                return dataset
            suffixes[suffix] = name
    known = ", ".join(f"{suffix} ({name})" for suffix, name in sorted(suffixes.items()))
    raise DatasetError(f"{path}: expected a file name ending in one of {known}")


def _environments() -> dict[str, ModuleType]:
    modules = [importlib.import_module(f"{_ENVIRONMENTS}.{name}") for name in _files(_ENVIRONMENTS)]
    modules += [entry.load() for entry in _entry_points("omcda_deploy.envs").values()]
    return {task: module for module in modules for task in getattr(module, "TASKS", ())}


def _environment(task: str) -> ModuleType:
    environments = _environments()
    if task not in environments:
        raise UnknownNameError("task", task, environments)
    return environments[task]


def _load(kind: str, name: str, package: str, group: str) -> ModuleType:
    files, entries = _files(package), _entry_points(group)
    if name in files:
        return importlib.import_module(f"{package}.{name}")
    if name in entries:
        module: ModuleType = entries[name].load()
        return module
    raise UnknownNameError(kind, name, {*files, *entries})


def _files(package: str) -> list[str]:
    spec = util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return [module.name for module in pkgutil.iter_modules(folders) if not module.name.startswith("_")]


def _entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=group)}
