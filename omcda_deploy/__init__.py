"""omcda-deploy: from a logged dataset to a served multi-agent team.

The names of :data:`__all__` are the package's public API; each is imported when it is first used, so that
``import omcda_deploy`` is quick and needs none of the optional packages. Everything else may move between versions.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from omcda_deploy.version import __version__ as __version__

if TYPE_CHECKING:
    from omcda_deploy.bundle import Bundle as Bundle
    from omcda_deploy.bundle import read_bundle as read_bundle
    from omcda_deploy.client.channel import Credentials as Credentials
    from omcda_deploy.client.channel import read_credentials as read_credentials
    from omcda_deploy.client.fallback import BehaviorTeam as BehaviorTeam
    from omcda_deploy.client.remote import RemotePolicy as RemotePolicy
    from omcda_deploy.client.remote import RemoteTeam as RemoteTeam
    from omcda_deploy.datasets import Dataset as Dataset
    from omcda_deploy.datasets import Episode as Episode
    from omcda_deploy.datasets.record import RecordDataset as RecordDataset
    from omcda_deploy.datasets.writer import write_dataset as write_dataset
    from omcda_deploy.envs import Environment as Environment
    from omcda_deploy.envs.adapters.parallel import from_parallel as from_parallel
    from omcda_deploy.envs.adapters.pettingzoo import to_parallel as to_parallel
    from omcda_deploy.errors import BundleError as BundleError
    from omcda_deploy.errors import ConfigError as ConfigError
    from omcda_deploy.errors import ContractError as ContractError
    from omcda_deploy.errors import DatasetError as DatasetError
    from omcda_deploy.errors import EndpointError as EndpointError
    from omcda_deploy.errors import ExportError as ExportError
    from omcda_deploy.errors import MissedAnswerError as MissedAnswerError
    from omcda_deploy.errors import MissingExtraError as MissingExtraError
    from omcda_deploy.errors import OmcdaError as OmcdaError
    from omcda_deploy.errors import PluginError as PluginError
    from omcda_deploy.errors import SimulatorError as SimulatorError
    from omcda_deploy.errors import UnknownNameError as UnknownNameError
    from omcda_deploy.experiments.estimate import Estimates as Estimates
    from omcda_deploy.experiments.estimate import estimate as estimate
    from omcda_deploy.experiments.export import export as export
    from omcda_deploy.experiments.train import train as train
    from omcda_deploy.local import JointTeam as JointTeam
    from omcda_deploy.local import LocalPolicy as LocalPolicy
    from omcda_deploy.local import LocalTeam as LocalTeam
    from omcda_deploy.play.collect import collect as collect
    from omcda_deploy.play.evaluate import Evaluation as Evaluation
    from omcda_deploy.play.evaluate import evaluate as evaluate
    from omcda_deploy.play.replay import Replay as Replay
    from omcda_deploy.play.replay import replay as replay
    from omcda_deploy.policy import Decision as Decision
    from omcda_deploy.policy import NoiseSource as NoiseSource
    from omcda_deploy.policy import Policy as Policy
    from omcda_deploy.policy import TeamPolicy as TeamPolicy
    from omcda_deploy.registry import algorithms as algorithms
    from omcda_deploy.registry import make_environment as make_environment
    from omcda_deploy.registry import read_dataset as read_dataset
    from omcda_deploy.registry import tasks as tasks
    from omcda_deploy.spec import ActionSpec as ActionSpec
    from omcda_deploy.spec import AgentSpec as AgentSpec
    from omcda_deploy.spec import Normalizer as Normalizer
    from omcda_deploy.spec import TeamSpec as TeamSpec

_NAMES = {  # module -> its public names
    "omcda_deploy.bundle": ("Bundle", "read_bundle"),
    "omcda_deploy.client.channel": ("Credentials", "read_credentials"),
    "omcda_deploy.client.fallback": ("BehaviorTeam",),
    "omcda_deploy.client.remote": ("RemotePolicy", "RemoteTeam"),
    "omcda_deploy.datasets": ("Dataset", "Episode"),
    "omcda_deploy.datasets.record": ("RecordDataset",),
    "omcda_deploy.datasets.writer": ("write_dataset",),
    "omcda_deploy.envs": ("Environment",),
    "omcda_deploy.envs.adapters.parallel": ("from_parallel",),
    "omcda_deploy.envs.adapters.pettingzoo": ("to_parallel",),
    "omcda_deploy.errors": (
        "BundleError",
        "ConfigError",
        "ContractError",
        "DatasetError",
        "EndpointError",
        "ExportError",
        "MissedAnswerError",
        "MissingExtraError",
        "OmcdaError",
        "PluginError",
        "SimulatorError",
        "UnknownNameError",
    ),
    "omcda_deploy.experiments.estimate": ("Estimates", "estimate"),
    "omcda_deploy.experiments.export": ("export",),
    "omcda_deploy.experiments.train": ("train",),
    "omcda_deploy.local": ("JointTeam", "LocalPolicy", "LocalTeam"),
    "omcda_deploy.play.collect": ("collect",),
    "omcda_deploy.play.evaluate": ("Evaluation", "evaluate"),
    "omcda_deploy.play.replay": ("Replay", "replay"),
    "omcda_deploy.policy": ("Decision", "NoiseSource", "Policy", "TeamPolicy"),
    "omcda_deploy.registry": ("algorithms", "make_environment", "read_dataset", "tasks"),
    "omcda_deploy.spec": ("ActionSpec", "AgentSpec", "Normalizer", "TeamSpec"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    value.__module__ = __name__  # as users import it, whatever file it moves to
    if name != "export":  # that name stays the subpackage's, which is callable: see below
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _ExportPackage(ModuleType):
    """The package ``omcda_deploy.export``, which is called as the public function of the same name.

    Python binds a subpackage to its parent's attribute whenever it is imported, so what ``from omcda_deploy import
    export`` gives, the function or the package, depends on what ran before. Both therefore export a run.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return __getattr__("export")(*arguments, **options)


class _Package(ModuleType):
    """This module, which makes its subpackage ``export`` callable as it is bound."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "export" and isinstance(value, ModuleType):
            value.__class__ = _ExportPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
