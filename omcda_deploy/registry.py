"""What is there by name: tasks, algorithms and dataset formats.

A file in ``omcda_deploy/envs``, ``omcda_deploy/training/algorithms`` or ``omcda_deploy/datasets/formats`` is found
by listing its folder (folders below it hold what several files share); code outside the tree is found through the
entry-point groups ``omcda_deploy.envs``, ``omcda_deploy.algorithms`` and ``omcda_deploy.datasets``, whose entries
name modules. Algorithms are listed by file name and imported only when asked for, so that listing them never
imports torch.

A simulator's module defines ``TASKS`` and ``make(task, **options)``, and may define ``PACKAGES``, the distributions
whose versions a recorded dataset should name, ``versions(**options)``, those of what is installed elsewhere,
``SPECS``, each task's spec where it is known without it, ``make_vector(task, num_envs, **options)``, many
environments in one call, and ``behavior_team(task)``, the behaviour policies that its tasks are defined with. A
format's module defines ``SUFFIXES`` and ``read(path, task)``.

A foreign format's module is not read but converted, once, into one that is. Instead it defines ``SOURCE``, what a
source of it is, in words; ``recognizes(path) -> bool``, which tells by what lies at an existing path and is quick;
and ``open_recording(path, task)``, a context manager that yields a :class:`~omcda_deploy.datasets.Recording`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import shlex
from collections.abc import Callable, Mapping
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

from omcda_deploy.datasets import Dataset
from omcda_deploy.envs import Environment
from omcda_deploy.errors import ConfigError, DatasetError, UnknownNameError
from omcda_deploy.policy import TeamPolicy
from omcda_deploy.spec import TeamSpec

_ENVIRONMENTS = "omcda_deploy.envs"
_ALGORITHMS = "omcda_deploy.training.algorithms"
_DATASETS = "omcda_deploy.datasets.formats"


def tasks() -> tuple[str, ...]:
    """Names of all tasks, whether or not their simulator is installed."""
    return tuple(sorted(_environments()))


def make_environment(task: str, **options: Any) -> Environment:
    """Create one environment.

    Raises :class:`UnknownNameError`, MissingExtraError without its simulator, and :class:`ConfigError` for an
    option that its simulator does not have.
    """
    make = _environment(task).make
    require_options(task, make, options)
    environment: Environment = make(task, **options)
    return environment


def require_options(task: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for ``options`` that ``make`` does not take; options are what has a default."""
    parameters = inspect.signature(make).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not open_ended and (unknown := sorted(options.keys() - set(known))):
        raise ConfigError(
            f"{task} has no option {', '.join(unknown)}: expected {' or '.join(known) or 'none'}; leave it out"
        )


def vector_factory(task: str) -> Callable[..., Any] | None:
    """``make_vector(task, num_envs, **options)`` of the task's simulator, where it batches by itself."""
    make: Callable[..., Any] | None = getattr(_environments().get(task), "make_vector", None)
    return make


def team_spec(task: str, **options: Any) -> TeamSpec:
    """The task's spec: what its simulator's module states, else what an environment made with ``options`` has."""
    stated: Mapping[str, TeamSpec] = getattr(_environments().get(task), "SPECS", {})
    if task in stated:
        return stated[task]
    environment = make_environment(task, **options)
    try:
        return environment.spec
    finally:
        environment.close()


def simulator_versions(task: str, **options: Any) -> dict[str, str]:
    """Versions of what the task's physics depends on, for a simulator made with ``options``."""
    module = _environment(task)
    packages = getattr(module, "PACKAGES", ())
    elsewhere: Callable[..., dict[str, str]] = getattr(module, "versions", lambda **options: {})
    return {package: metadata.version(package) for package in packages} | elsewhere(**options)


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
    """Read a dataset of any format, told by the end of its name.

    Raises :class:`DatasetError`; for a source of a foreign format it names the command that converts it.
    """
    path = Path(path)
    if (foreign := foreign_format_of(path)) is not None:
        quoted, out = shlex.quote(str(path)), shlex.quote(f"{path.absolute().stem}-converted.hdf5")
        raise DatasetError(
            f"{path} is a {load_dataset_format(foreign).SOURCE}: convert it first, with  "
            f"omcda-deploy convert {quoted} --out {out}"
        )
    suffixes = {}
    for name in dataset_formats():
        module = load_dataset_format(name)
        for suffix in getattr(module, "SUFFIXES", ()):
            if path.name.endswith(suffix):
                dataset: Dataset = module.read(path, task)
                return dataset
            suffixes[suffix] = name
    known = ", ".join(f"{suffix} ({name})" for suffix, name in sorted(suffixes.items()))
    raise DatasetError(f"{path}: expected a file name ending in one of {known}")


def foreign_formats() -> dict[str, ModuleType]:
    """The formats that are converted instead of read, by name."""
    modules = {name: load_dataset_format(name) for name in dataset_formats()}
    return {name: module for name, module in modules.items() if hasattr(module, "open_recording")}


def foreign_format_of(path: Path) -> str | None:
    """The foreign format in which ``path`` is, if any."""
    if not path.exists():
        return None
    return next((name for name, module in foreign_formats().items() if module.recognizes(path)), None)


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
    return [module.name for module in pkgutil.iter_modules(folders) if not module.ispkg]


def _entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=group)}
