"""The table from errors to gRPC status codes, and the details that a caller receives."""

from __future__ import annotations

import logging

import grpc
from google.protobuf.message import DecodeError

from omcda_deploy.errors import BundleError, ConfigError, ContractError, OmcdaError, UnknownNameError

log = logging.getLogger(__name__)

DETAILS_LIMIT = 400  # characters; gRPC sends details in a header and refuses headers of several kilobytes


class RequestError(OmcdaError):
    """A request that does not fit the model it is addressed to."""


class RangeError(OmcdaError):
    """A well-formed request for which the policy has no finite action, or one beyond the distance limit."""


class ExhaustedError(OmcdaError):
    """A limit of the server is reached."""


class StateError(OmcdaError):
    """A change that the server's present state does not allow."""


class OtherBundleError(OmcdaError):
    """A version that is another bundle here than the one that the caller began with."""


class StoppingError(OmcdaError):
    """A control step that came after the server began to stop."""


class EndedError(OmcdaError):
    """A control stream that an operator has ended."""


STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (DecodeError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownNameError, grpc.StatusCode.NOT_FOUND),
    (OtherBundleError, grpc.StatusCode.NOT_FOUND),
    (RangeError, grpc.StatusCode.OUT_OF_RANGE),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION),  # the version to load has a defect
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (StateError, grpc.StatusCode.FAILED_PRECONDITION),
    (ContractError, grpc.StatusCode.FAILED_PRECONDITION),
    (ExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StoppingError, grpc.StatusCode.UNAVAILABLE),
    (EndedError, grpc.StatusCode.UNAVAILABLE),
)


def code_of(error: Exception) -> grpc.StatusCode:
    """Return the status code for ``error``: INTERNAL for a defect."""
    return next((code for kind, code in STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status code and details for ``error``; the particulars of a defect go to the log only."""
    if (code := code_of(error)) is not grpc.StatusCode.INTERNAL:
        return code, str(error)[:DETAILS_LIMIT]
    log.error("request failed", exc_info=error)
    return code, "the server failed to answer; its log says why"
