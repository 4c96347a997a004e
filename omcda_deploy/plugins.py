"""Interfaces of plug-in modules: simulators, dataset formats and algorithms.

One module adds one simulator, format or algorithm, and the module itself is the plug-in: it defines the names of a
protocol of this file. :mod:`omcda_deploy.registry` finds such modules and checks them when it loads them
(:func:`require_protocol`). Optional names have protocols of their own (``With…``), which the registry looks for.
"""

# ruff: noqa: N802 (constants of modules are read-only properties here, so that more specific types fit)

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from omcda_deploy.errors import PluginError

if TYPE_CHECKING:
    from omcda_deploy.bundle import DivergenceKind
    from omcda_deploy.datasets import Claim, Dataset, Recording
    from omcda_deploy.entries import AgentEntries
    from omcda_deploy.envs import Environment
    from omcda_deploy.envs.vector import BatchedEnvironment
    from omcda_deploy.policy import TeamPolicy
    from omcda_deploy.spec import ActionKind, TeamSpec


class Simulator(Protocol):
    """Module of a simulator, such as ``omcda_deploy/envs/toy.py``.

    It must import without the simulator's own packages; ``make`` raises MissingExtraError where they are missing.
    It may define :class:`WithPackages`, :class:`WithVersions`, :class:`WithSpecs`, :class:`WithVector`,
    :class:`WithBehavior` and :class:`WithEntries`.
    """

    @property
    def TASKS(self) -> tuple[str, ...]:
        """Names of its tasks, such as ``toy/chain``."""
        ...

    @property
    def make(self) -> Callable[..., Environment]:
        """``make(task, **options)``, in which every option has a default."""
        ...


@runtime_checkable
class WithPackages(Protocol):
    """Simulator whose physics depends on installed distributions; recorded datasets name their versions."""

    @property
    def PACKAGES(self) -> tuple[str, ...]:
        """Names of the distributions."""
        ...


@runtime_checkable
class WithVersions(Protocol):
    """Simulator that depends on software which is installed elsewhere."""

    @property
    def versions(self) -> Callable[..., dict[str, str]]:
        """``versions(**options)``, with the options of ``make``."""
        ...


@runtime_checkable
class WithSpecs(Protocol):
    """Simulator that states the specs of its tasks, so that they are known where it is not installed."""

    @property
    def SPECS(self) -> Mapping[str, TeamSpec]:
        """Specs by task; a task that it leaves out is made to learn its spec."""
        ...


@runtime_checkable
class WithVector(Protocol):
    """Simulator that steps many environments in one call."""

    @property
    def make_vector(self) -> Callable[..., BatchedEnvironment]:
        """``make_vector(task, num_envs, **options)``, with the options of ``make``."""
        ...


@runtime_checkable
class WithBehavior(Protocol):
    """Simulator whose tasks are defined together with behaviour policies."""

    @property
    def behavior_team(self) -> Callable[[str], TeamPolicy]:
        """``behavior_team(task)``."""
        ...


@runtime_checkable
class WithEntries(Protocol):
    """Simulator that names the numbers of its vectors."""

    @property
    def entries(self) -> Callable[[str], Mapping[str, AgentEntries]]:
        """``entries(task)``, by agent in team order. May need the simulator's own packages, as ``make`` does."""
        ...


class DatasetFormat(Protocol):
    """Module of a dataset format that is read as it is, such as ``datasets/formats/omiga_hdf5.py``."""

    @property
    def SUFFIXES(self) -> tuple[str, ...]:
        """Ends of its files' names, such as ``.hdf5``."""
        ...

    @property
    def read(self) -> Callable[[Path, TeamSpec | str | None], Dataset]:
        """``read(path, task)``: a task's name, its whole spec, or None for the one that the file holds."""
        ...


class ForeignFormat(Protocol):
    """Module of a foreign dataset format, which is converted once into HDF5, such as ``og_vault.py``."""

    SOURCE: str  # a source of the format in words, such as "folder of torch-pickled episodes"

    @property
    def recognizes(self) -> Callable[[Path], bool]:
        """``recognizes(path)``, which looks quickly at an existing path."""
        ...

    @property
    def open_recording(self) -> Callable[[Path, Claim | None], AbstractContextManager[Recording]]:
        """``open_recording(path, claim)``, a context manager; ``claim``: what the user says of the team."""
        ...


@dataclass(frozen=True)
class Column:
    """One metric of an algorithm as a progress table shows it; :class:`WithColumns` lists them.

    A metric per agent becomes a column of the table, one of the whole team a number below it. With a ``unit``,
    lines in a log name the metric's sum over agents in that unit. With ``flag`` the metric is a condition rather
    than a number: ``title`` alone is shown, while the metric is above 1/2 (``flag=True``) or below
    (``flag=False``).
    """

    metric: str  # its name in metrics.jsonl, without the agent's
    title: str
    digits: int = 3  # decimals of a number per agent
    per_agent: bool = True
    unit: str = ""
    flag: bool | None = None


@dataclass(frozen=True)
class Estimate:
    """A stand-in for a metric that runs of older versions did not log: the product of others."""

    factors: tuple[str, ...]  # metrics
    title: str
    note: str


@dataclass(frozen=True)
class TrainingCurve:
    """One metric per agent as comparisons write it and, where it has a title, draw it over training.

    ``share`` divides by the sum over agents. ``against`` names another curve: the two are drawn against each
    other as well, at the last step, one point per agent and seed. ``note`` explains the curve below its figures.
    """

    name: str  # its column in the CSV file
    metric: str
    title: str = ""  # label of its axis; not drawn where it is empty
    share: bool = False
    against: str = ""
    note: str = ""
    estimate: Estimate | None = None


@dataclass(frozen=True)
class CurveSection:
    """The figures of training that a comparison adds for an algorithm; see :class:`WithCurves`."""

    title: str
    file: str  # the CSV file with the numbers, such as ``influence.csv``
    curves: tuple[TrainingCurve, ...]


@dataclass(frozen=True)
class Scan:
    """The setting over which a comparison draws returns; see :class:`WithScan`.

    Runs that differ in ``setting`` alone make a line, named by the setting ``group``. The axis is logarithmic.
    """

    setting: str
    group: str
    title: str
    axis: str  # label of the axis
    caption: str  # the setting in words, after "return against"

    @property
    def file(self) -> str:
        """The CSV file with the numbers."""
        return f"{self.setting}.csv"


class AlgorithmModule(Protocol):
    """Module of an algorithm, such as ``training/algorithms/omcda.py``. It may import torch.

    It may define :class:`WithColumns`, :class:`WithCurves`, :class:`WithScan` and :class:`WithPerRun`.
    """

    PAPER: str  # title and year of its source
    SUMMARY: str  # a few words on its method
    ACTIONS: frozenset[ActionKind]  # kinds of actions that it handles
    DIVERGENCE: Mapping[ActionKind, DivergenceKind]  # divergence_kind of its exported policies
    Config: type[Any]  # frozen dataclass of its settings, with at least `hidden` and `batch_size`
    Algorithm: type[Any]  # class of its learners, an omcda_deploy.training.algorithm.Algorithm

    @property
    def make_policy(self) -> Callable[..., Any]:
        """``make_policy(config, networks)``, the torch module that is trained and exported."""
        ...


@runtime_checkable
class WithColumns(Protocol):
    """Algorithm that has more to show while it trains than losses."""

    COLUMNS: tuple[Column, ...]


@runtime_checkable
class WithCurves(Protocol):
    """Algorithm whose training a comparison draws."""

    CURVES: CurveSection


@runtime_checkable
class WithScan(Protocol):
    """Algorithm over one of whose settings a comparison draws returns."""

    SCAN: Scan


@runtime_checkable
class WithPerRun(Protocol):
    """Algorithm with settings that may differ between runs that are trained side by side."""

    PER_RUN: tuple[str, ...]  # names of settings that change no shape and no call, beside the seed


def columns_of(algorithm: Any) -> tuple[Column, ...]:
    """Columns that an algorithm's module declares; none where it declares none."""
    return algorithm.COLUMNS if isinstance(algorithm, WithColumns) else ()


def curves_of(algorithm: Any) -> CurveSection | None:
    """Curves that an algorithm's module declares, if any."""
    return algorithm.CURVES if isinstance(algorithm, WithCurves) else None


def scan_of(algorithm: Any) -> Scan | None:
    """Scan that an algorithm's module declares, if any."""
    return algorithm.SCAN if isinstance(algorithm, WithScan) else None


def member_names(protocol: type[Any]) -> list[str]:
    """Names that a module must define for one of the protocols above."""
    properties = [name for name, member in vars(protocol).items() if isinstance(member, property)]
    return [*vars(protocol).get("__annotations__", ()), *properties]


def format_protocol(module: Any) -> type[Any]:
    """Return the protocol for a dataset format's module: the foreign one if the module defines any of its names."""
    foreign = any(hasattr(module, name) for name in member_names(ForeignFormat))
    return ForeignFormat if foreign else DatasetFormat


def require_protocol(module: Any, protocol: type[Any], label: str) -> None:
    """Raise :class:`PluginError` unless ``module`` defines every name of ``protocol``.

    The message names the module by ``label``, the missing names, and for each the most similar name that the module
    defines, which may be misspelt.
    """
    required = member_names(protocol)
    missing = [name for name in required if not hasattr(module, name)]
    if not missing:
        return
    public = {
        name.lower(): name for name in vars(module) if not name.startswith("_") and name not in required
    }
    hints = []
    for name in missing:
        near = difflib.get_close_matches(name.lower(), public, n=1, cutoff=0.75)
        hints.append(f"{name} (is {public[near[0]]} a misspelling of it?)" if near else name)
    raise PluginError(
        f"{label}: expected {', '.join(required)}, as omcda_deploy.plugins.{protocol.__name__} says, missing is "
        f"{', '.join(hints)}: define it"
    )


def per_run_settings(algorithm: Any) -> tuple[str, ...]:
    """Settings of an algorithm that may differ between runs side by side; none where it declares none."""
    return algorithm.PER_RUN if isinstance(algorithm, WithPerRun) else ()
