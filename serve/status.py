"""What a caller is told when a request fails: the one table from errors to gRPC status codes."""

from __future__ import annotations

import logging

import grpc
from google.protobuf.message import DecodeError

from omcda_deploy.errors import BundleError, ConfigError, ContractError, OmcdaError, UnknownNameError

log = logging.getLogger(__name__)

DETAILS_LIMIT = 400  # characters; gRPC sends details as a header, and refuses headers of several kilobytes


class RequestError(OmcdaError):
    """A request that does not fit the model it is addressed to."""


class RangeError(OmcdaError):
    """A request of the right form for which the policy has no finite action."""


class ExhaustedError(OmcdaError):
    """A limit of the server is reached."""


class StateError(OmcdaError):
    """What was asked for cannot be done in the server's present state."""


class StoppingError(OmcdaError):
    """The server is about to stop and takes no further control steps."""


STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (DecodeError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownNameError, grpc.StatusCode.NOT_FOUND),
    (RangeError, grpc.StatusCode.OUT_OF_RANGE),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION),  # of a version to be loaded
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (StateError, grpc.StatusCode.FAILED_PRECONDITION),
    (ContractError, grpc.StatusCode.FAILED_PRECONDITION),
    (ExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StoppingError, grpc.StatusCode.UNAVAILABLE),
)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and details for ``error``; of a defect only the log learns the particulars."""
    for kind, code in STATUS:
        if isinstance(error, kind):
            return code, str(error)[:DETAILS_LIMIT]
    log.error("request failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, "the server failed to answer; its log says why"
