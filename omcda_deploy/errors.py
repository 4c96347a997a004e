"""Errors that a user can act on.

    OmcdaError
    ├── DatasetError
    ├── BundleError
    ├── ContractError
    ├── ConfigError
    ├── EndpointError
    │   └── MissedAnswerError
    ├── SimulatorError
    │   └── NoSimulatorError
    ├── ExportError
    ├── UnknownNameError
    ├── MissingExtraError
    ├── PluginError
    ├── RequestError, RangeError, ExhaustedError, StateError, OtherBundleError, StoppingError, EndedError
    │                                                                           omcda_deploy.serve.status
    └── DivergedError                                                           omcda_deploy.training.metrics

Every message says what was expected, what came, and what to do next. The command line prints the message as one
line and exits with status 2; any exception that is not an :class:`OmcdaError` is a defect of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OmcdaError(Exception):
    """Base of all errors caused by input, such as a file, a name, a setting or an endpoint."""


class DatasetError(OmcdaError):
    """A dataset file is missing, truncated, of the wrong shape or holds values that cannot be trained on."""


class BundleError(OmcdaError):
    """A bundle is missing a file, was changed after export, or does not fit its use."""


class ContractError(OmcdaError):
    """Two sides (bundle, simulator, dataset, endpoint, client) disagree about observations or actions."""


class ConfigError(OmcdaError):
    """A setting is outside its range, or a run folder cannot be used as requested."""


class EndpointError(OmcdaError):
    """A policy server cannot be reached, or answered with an error."""


class MissedAnswerError(EndpointError):
    """A policy server is gone or did not answer before the deadline; a fallback can act in its place."""


class SimulatorError(OmcdaError):
    """A simulator failed, or the process that ran it died."""


class NoSimulatorError(SimulatorError):
    """A task cannot be played here. Everything else needs no more than its spec."""

    def __init__(self, task: str) -> None:
        super().__init__(
            f"{task} has no simulator here: it can be trained, exported, served and replayed, but not played. "
            "Install the package that has its simulator, if there is one"
        )


class ExportError(OmcdaError):
    """The exported graph does not reproduce the trained policy."""


class UnknownNameError(OmcdaError):
    """A task, algorithm, tier or agent has no such name; the message names the most similar one."""

    def __init__(self, kind: str, name: str, names: Iterable[str], note: str = "") -> None:
        """``names`` are those that exist; ``note`` ends the message."""
        choices = sorted(names)
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}known are {', '.join(choices) or 'none'}{note}")


class MissingExtraError(OmcdaError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run  pip install 'omcda-deploy[{extra}]'")


class PluginError(OmcdaError):
    """A module that adds a simulator, dataset format or algorithm cannot be imported or lacks a required name."""


class TerminatedError(SystemExit):
    """SIGTERM came: no error of anyone's, and no :class:`SystemExit` of user code either."""
