"""Errors that a user can act on.

Every message says what was expected, what came, and what to do next. The command line prints the message as
one line and exits with status 2; anything that is not an :class:`OmcdaError` is a defect of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OmcdaError(Exception):
    """Base of all errors caused by input: a file, a name, a setting, an endpoint."""


class DatasetError(OmcdaError):
    """A dataset file is missing, truncated, of the wrong shape or holds values that cannot be trained on."""


class BundleError(OmcdaError):
    """A bundle is missing a file, was changed after export, or does not fit what it is used for."""


class ContractError(OmcdaError):
    """Two sides (bundle, simulator, dataset, endpoint, client) disagree about what agents see or do."""


class ConfigError(OmcdaError):
    """A setting is outside its range, or a run folder cannot be used as asked."""


class EndpointError(OmcdaError):
    """A policy server cannot be reached, or answered with an error."""


class MissedAnswerError(EndpointError):
    """A policy server is gone, or its answer did not come before the deadline: what a fallback stands in for."""


class SimulatorError(OmcdaError):
    """A simulator failed, or the process that ran it died."""


class ExportError(OmcdaError):
    """The exported graph does not reproduce the trained policy."""


class UnknownNameError(OmcdaError):
    """A task, algorithm, tier or agent name that nothing is registered under."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}known are {', '.join(known) or 'none'}")


class MissingExtraError(OmcdaError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run  pip install 'omcda-deploy[{extra}]'")
