"""Tasks, algorithms and dataset formats by name.

A module in ``omcda_deploy/envs``, ``omcda_deploy/training/algorithms`` or ``omcda_deploy/datasets/formats`` is
found by listing its folder; the folders inside these hold code that several modules share. Modules outside the tree
are found through the entry-point groups ``omcda_deploy.envs``, ``omcda_deploy.algorithms`` and
``omcda_deploy.datasets``. :mod:`omcda_deploy.plugins` says which names each kind of module defines.

Algorithms are listed by file name and imported when they are asked for, so that listing them never imports torch.
An entry point that cannot be used is reported once, as a warning, and named wherever a name stays unknown; it does
not affect the others.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakValueDictionary

from omcda_deploy.errors import (
    ConfigError,
    DatasetError,
    NoSimulatorError,
    OmcdaError,
    PluginError,
    SimulatorError,
    TerminatedError,
    UnknownNameError,
)
from omcda_deploy.plugins import (
    AlgorithmModule,
    DatasetFormat,
    ForeignFormat,
    Simulator,
    WithBehavior,
    WithEntries,
    WithPackages,
    WithSpecs,
    WithVector,
    WithVersions,
    format_protocol,
    require_protocol,
)
from omcda_deploy.references import is_reference, load_callable, user_code

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset
    from omcda_deploy.entries import AgentEntries
    from omcda_deploy.envs import Environment
    from omcda_deploy.envs.vector import BatchedEnvironment
    from omcda_deploy.policy import TeamPolicy
    from omcda_deploy.spec import TeamSpec

log = logging.getLogger(__name__)

_made: WeakValueDictionary[int, Any] = WeakValueDictionary()  # environments by id, as long as they live


class _Group(NamedTuple):
    """Modules of one kind: those of a package, and those of an entry-point group."""

    kind: str
    package: str
    entry_points: str


_SIMULATORS = _Group("simulator", "omcda_deploy.envs", "omcda_deploy.envs")
_ALGORITHMS = _Group("algorithm", "omcda_deploy.training.algorithms", "omcda_deploy.algorithms")
_OWN = "own"  # the simulator of tasks that are references to the user's own code
_FORMATS = _Group("dataset format", "omcda_deploy.datasets.formats", "omcda_deploy.datasets")


class _Modules(NamedTuple):
    """The usable modules of a group by name, and the errors of those entry points that are not."""

    by_name: dict[str, Any]
    errors: list[PluginError]

    def note(self) -> str:
        """The errors as the end of a message about a name that is not among the usable ones."""
        return "".join(f". It may belong to a plug-in that cannot be used: {error}" for error in self.errors)


def rescan() -> None:
    """Forget which modules there are, after a package was installed in a running process."""
    for cached in (_listed, _module, _simulators, _tasks, _formats):
        cached.cache_clear()


def tasks() -> tuple[str, ...]:
    """Names of all tasks, whether or not their simulators are installed."""
    return tuple(sorted(_tasks()))


def make_environment(task: str, **options: Any) -> Environment:
    """Create one environment of a task, or of ``module:callable``, which makes one of the user's own.

    Raises :class:`UnknownNameError`, MissingExtraError where its simulator is not installed, :class:`PluginError`
    where ``module:callable`` makes no environment or gives one a second time, and :class:`ConfigError` for an
    option that its simulator does not have.
    """
    make = _simulator(task).make
    require_options(task, make, options)
    environment = make(task, **options)
    _require_new(task, environment)
    return environment


def close_environment(task: str, environment: Environment) -> None:
    """Close an environment; an error in that is a warning, since what was to be done with it is done."""
    try:
        with user_code(f"{task}: close()", SimulatorError):
            environment.close()
    except OmcdaError as error:
        log.warning("%s; what it holds may not be free", error)


def _require_new(task: str, environment: Environment) -> None:
    """Raise :class:`PluginError` for an environment that was made before: side by side, its episodes would mix."""
    base = _beneath(environment)
    before = _made.get(id(base))
    if before is not None and (before is base or _beneath(before) is base):
        raise PluginError(f"{task}: returned the same environment twice: make a new one in each call")
    # A class without weak references is known by what holds it, if by anything.
    for known in (environment, base):
        with suppress(TypeError):
            _made[id(base)] = known


def _beneath(environment: Any) -> Any:
    """Return the environment beneath its wrappers, which is their ``unwrapped``, as in Gymnasium."""
    for _ in range(2):  # our adapter, and what it adapts
        base = getattr(environment, "unwrapped", None)
        environment = base if hasattr(base, "step") else environment
    return environment


def require_options(task: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for ``options`` that are no parameters of ``make`` with a default."""
    names, open_ended = _options(make)
    if not open_ended and (unknown := sorted(options.keys() - set(names))):
        raise ConfigError(
            f"{task} has no option {', '.join(unknown)}: expected {' or '.join(names) or 'none'}; leave it out"
        )


def takes_option(task: str, name: str) -> bool:
    """Test if the task's simulator, or the callable that the task refers to, has an option ``name``."""
    make = load_callable(task) if is_reference(task) else vector_factory(task) or _simulator(task).make
    names, open_ended = _options(make)
    return open_ended or name in names


def _options(make: Callable[..., Any]) -> tuple[list[str], bool]:
    """List the parameters with a default, and tell if any other name is taken too."""
    parameters = inspect.signature(make).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    return names, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def vector_factory(task: str) -> Callable[..., BatchedEnvironment] | None:
    """Return ``make_vector(task, num_envs, **options)`` of the task's simulator, None where it has none."""
    module = _find(task)
    return module.make_vector if isinstance(module, WithVector) else None


def team_spec(task: str, **options: Any) -> TeamSpec:
    """Return the spec that the task's simulator states, or that of an environment made with ``options``."""
    module = _find(task)
    if isinstance(module, WithSpecs) and task in module.SPECS:
        return module.SPECS[task]
    environment = make_environment(task, **options)
    try:
        return environment.spec
    finally:
        close_environment(task, environment)


def require_simulator(task: str) -> None:
    """Raise :class:`NoSimulatorError` where no simulator plays ``task``, as for data recorded elsewhere."""
    try:
        _simulator(task)
    except UnknownNameError as error:
        raise NoSimulatorError(task) from error


def simulator_versions(task: str, **options: Any) -> dict[str, str]:
    """Versions of the software on which the task's physics depends, for a simulator made with ``options``."""
    module = _simulator(task)
    packages = module.PACKAGES if isinstance(module, WithPackages) else ()
    elsewhere = module.versions(**options) if isinstance(module, WithVersions) else {}
    return {package: metadata.version(package) for package in packages} | elsewhere


def behavior_team(task: str) -> TeamPolicy | None:
    """Behaviour policies with which the task is defined; None where its simulator defines none."""
    module = _simulator(task)
    return module.behavior_team(task) if isinstance(module, WithBehavior) else None


def entries(task: str) -> Mapping[str, AgentEntries]:
    """Names of the numbers in the vectors of each agent; empty where the task's simulator does not name them.

    Raises MissingExtraError where the simulator needs its packages to tell, and :class:`PluginError` for other
    numbers of names than the team's spec has.
    """
    module = _simulator(task)
    if not isinstance(module, WithEntries):
        return {}
    described, spec = module.entries(task), team_spec(task)
    told = {name: (len(agent.observation), len(agent.action)) for name, agent in described.items()}
    sizes = {agent.name: (agent.observation_size, agent.action.size) for agent in spec.agents}
    if told != sizes:
        raise PluginError(f"entries of {task}: expected names for {sizes}, got {told}: correct its module")
    return described


def algorithms() -> tuple[str, ...]:
    """Names of all algorithms. Imports none of them."""
    return tuple(sorted(_listed(_ALGORITHMS)))


def load_algorithm(name: str) -> AlgorithmModule:
    """Import an algorithm's module. Raises :class:`UnknownNameError` and :class:`PluginError`."""
    return cast(AlgorithmModule, _module(_ALGORITHMS, name))


def load_algorithms() -> dict[str, AlgorithmModule]:
    """Import all algorithms, by name; those of entry points that cannot be used are left out with a warning."""
    return dict(sorted(_modules(_ALGORITHMS).by_name.items()))


def dataset_formats() -> tuple[str, ...]:
    """Names of all dataset formats."""
    return tuple(sorted(_listed(_FORMATS)))


def load_dataset_format(name: str) -> DatasetFormat | ForeignFormat:
    """Import a dataset format's module. Raises :class:`UnknownNameError` and :class:`PluginError`."""
    return cast("DatasetFormat | ForeignFormat", _module(_FORMATS, name))


def read_dataset(path: str | Path, task: TeamSpec | str | None = None) -> Dataset:
    """Read a dataset; the end of its name tells its format.

    ``task``, a task's name or its spec, is needed only where the file does not hold a spec; else it is compared.
    Raises :class:`DatasetError`. For a source of a foreign format its message names the command that converts it.
    """
    path = Path(path)
    if (foreign := foreign_format_of(path)) is not None:
        source, out = shlex.quote(str(path)), shlex.quote(f"{path.absolute().stem}-imported.hdf5")
        raise DatasetError(
            f"{path} is a {foreign_formats()[foreign].SOURCE}: convert it first, with  "
            f"omcda-deploy import {source} --out {out}"
        )
    suffixes = {}
    for name, module in _formats().by_name.items():
        if format_protocol(module) is ForeignFormat:
            continue
        for suffix in module.SUFFIXES:
            if path.name.endswith(suffix):
                dataset: Dataset = module.read(path, task)
                return dataset
            suffixes[suffix] = name
    endings = ", ".join(f"{suffix} ({name})" for suffix, name in sorted(suffixes.items()))
    raise DatasetError(f"{path}: expected a file name ending in one of {endings}{_formats().note()}")


def foreign_formats() -> dict[str, ForeignFormat]:
    """Formats that are converted rather than read, by name."""
    modules = _formats().by_name
    return {name: module for name, module in modules.items() if format_protocol(module) is ForeignFormat}


def foreign_format_of(path: Path) -> str | None:
    """Name of the foreign format of an existing ``path``, None for any other path."""
    if not path.exists():
        return None
    return next((name for name, module in foreign_formats().items() if module.recognizes(path)), None)


def require_task(task: str) -> None:
    """Raise :class:`UnknownNameError` for a name that is neither a task nor ``module:callable``."""
    _simulator(task)


def _simulator(task: str) -> Simulator:
    module = _find(task)
    if module is None:
        raise UnknownNameError("task", task, _tasks(), _simulators().note())
    return module


def _find(task: str) -> Simulator | None:
    return _module(_SIMULATORS, _OWN) if is_reference(task) else _tasks().get(task)


@cache
def _tasks() -> dict[str, Simulator]:
    return {task: module for module in _simulators().by_name.values() for task in module.TASKS}


@cache
def _simulators() -> _Modules:
    return _modules(_SIMULATORS)


@cache
def _formats() -> _Modules:
    return _modules(_FORMATS)


def _modules(group: _Group) -> _Modules:
    modules = _Modules({}, [])
    for name, entry in _listed(group).items():
        try:
            modules.by_name[name] = _module(group, name)
        except PluginError as error:
            if entry is None:  # a file of this package: a defect that must not go unnoticed
                raise
            log.warning("%s", error)
            modules.errors.append(error)
    return modules


@cache
def _module(group: _Group, name: str) -> Any:
    """Import one module of a group and check it. Raises :class:`UnknownNameError` and :class:`PluginError`."""
    listed = _listed(group)
    if name not in listed:
        raise UnknownNameError(group.kind, name, listed)
    entry = listed[name]
    if entry is None:
        label = f"{group.package}.{name}"
        module = importlib.import_module(label)
    else:
        label = f"{entry.value} (entry point {name!r} of {group.entry_points})"
        try:
            module = entry.load()
        except TerminatedError:
            raise
        except (Exception, SystemExit) as error:  # whatever a module raises that is not ours
            raise PluginError(
                f"{label} cannot be imported: {type(error).__name__}: {error}. Repair or uninstall its package"
            ) from error
    protocols = {_SIMULATORS: Simulator, _ALGORITHMS: AlgorithmModule}
    require_protocol(module, protocols.get(group) or format_protocol(module), label)
    return module


@cache
def _listed(group: _Group) -> dict[str, metadata.EntryPoint | None]:
    """Names of a group's modules, with their entry points; None for a file of the package, which comes first."""
    spec = util.find_spec(group.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    listed: dict[str, metadata.EntryPoint | None] = {
        module.name: None for module in pkgutil.iter_modules(folders) if not module.ispkg
    }
    for entry in metadata.entry_points(group=group.entry_points):
        listed.setdefault(entry.name, entry)
    return listed
