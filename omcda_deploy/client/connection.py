"""Connections to policy servers: their contracts, and the errors of calls that fail.

A step is missed if its answer does not come before the deadline or the server is gone (:class:`MissedAnswerError`).
An answer that arrives later is dropped: a call is cancelled, a stream is replaced by a new one, and an answer with
another step id than the request's is refused. A server that keeps missing is asked in the background
(:mod:`omcda_deploy.client.circuit`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import grpc

from omcda_deploy.client.channel import Credentials, Metadata, open_channel
from omcda_deploy.client.circuit import LONG_MISS_S, Circuit
from omcda_deploy.client.transport import SERVICE
from omcda_deploy.errors import (
    ConfigError,
    ContractError,
    EndpointError,
    MissedAnswerError,
    OmcdaError,
)
from omcda_deploy.protos.policy_pb2 import GetContractRequest, GetContractResponse
from omcda_deploy.spec import TeamSpec, require_same_contract

CONNECT_LIMIT_S = 5.0  # for a contract
RETRY_S = 0.1  # between two questions to a server that is waited for


@dataclass(frozen=True)
class Contract:
    """A server's description of one version that it holds."""

    version: str
    models: tuple[str, ...]  # agents, or ``team``
    team: TeamSpec
    contract_hash: str
    divergence_kind: str
    bundle_digest: str
    budgets: dict[str, float | None]  # d_i in nats by agent


class ServerConnection:
    """A connection to one endpoint. ``contract``: of one version, at first of ``version``; empty: the current one.

    ``wait_s``: seconds in which it is asked again if it does not answer, or does not hold the version.

    Raises :class:`EndpointError` if the endpoint is no policy server, :class:`MissedAnswerError` if it does not
    answer.
    """

    def __init__(
        self, endpoint: str, credentials: Credentials | None = None, version: str = "", wait_s: float = 0.0
    ) -> None:
        self.endpoint = endpoint
        self.circuit = Circuit(breaks=False)  # replaced by that of its models in use
        self.channel = open_channel(endpoint, credentials)
        self._pending: Any = None  # the future of the contract that was asked for last
        self._allow(CONNECT_LIMIT_S)
        self.metadata: Metadata = () if credentials is None else credentials.metadata
        self._get_contract = self.channel.unary_unary(
            SERVICE + "GetContract",
            request_serializer=GetContractRequest.SerializeToString,
            response_deserializer=GetContractResponse.FromString,
        )
        try:
            self.contract = self._first_answer(version, time.monotonic() + wait_s)
        except BaseException:
            self.close()
            raise

    def _first_answer(self, version: str, end: float) -> Contract:
        """Return the contract of a version, as soon as the server tells it."""
        while True:
            self._allow(CONNECT_LIMIT_S)
            try:
                return self._ask(version)
            except MissedAnswerError:
                if time.monotonic() + RETRY_S >= end:
                    raise
            time.sleep(RETRY_S)

    @property
    def silent(self) -> bool:
        """True while it is not waited for."""
        return self.circuit.open

    def begin(self, version: str, limit_s: float) -> None:
        """Ask for the contract of a version, for up to ``limit_s``; empty: the one that answers new episodes."""
        self._allow(limit_s)
        request = GetContractRequest(model_version=version)
        self._pending = self._get_contract.future(request, timeout=limit_s, metadata=self.metadata)

    def describe(self) -> None:
        """Wait for the contract that was asked for. Raises :class:`EndpointError` if the server tells none."""
        try:
            response: GetContractResponse = self._pending.result()
        except grpc.RpcError as error:
            raise self._failure(error, "GetContract") from error
        known = self.contract.version, self.contract.bundle_digest
        if (response.model_version, response.bundle_digest) != known:
            self.contract = self._read(response)

    def require_contract(self, spec: TeamSpec | None) -> None:
        """Raise :class:`ContractError` if the server's contract is another one than ``spec``'s.

        Raises :class:`ConfigError` for a ``spec`` that is none.
        """
        if spec is not None and not isinstance(spec, TeamSpec):
            raise ConfigError(
                f"spec: expected a TeamSpec, as environment.spec is, or None for any, got {type(spec).__name__}"
            )
        if spec is not None:
            team = self.contract.team
            require_same_contract(spec, team, "the client's team", f"the team served at {self.endpoint}")

    def close(self) -> None:
        self.channel.close()

    def _allow(self, limit_s: float) -> None:
        """Let the calls for one contract take ``limit_s`` from now on, all together."""
        self.limit_s, self._due = limit_s, time.monotonic() + limit_s

    @property
    def remaining_s(self) -> float:
        """Seconds that are left for them."""
        return max(0.0, self._due - time.monotonic())

    def _ask(self, version: str) -> Contract:
        request = GetContractRequest(model_version=version)
        try:
            return self._read(self._get_contract(request, timeout=self.remaining_s, metadata=self.metadata))
        except grpc.RpcError as error:
            raise self._failure(error, "GetContract") from error

    def _read(self, response: GetContractResponse) -> Contract:
        try:
            team = TeamSpec.from_json(json.loads(response.team))
        except (ValueError, OmcdaError) as error:
            raise EndpointError(
                f"{self.endpoint} states a contract that cannot be read ({error}): update it"
            ) from error
        return Contract(
            version=response.model_version,
            models=tuple(response.models),
            team=team,
            contract_hash=response.contract_hash,
            divergence_kind=response.divergence_kind,
            bundle_digest=response.bundle_digest,
            budgets={name: response.budgets.get(name) for name in team.names},
        )

    def _failure(self, error: grpc.RpcError, method: str) -> OmcdaError:
        """Note a call beside the steps that failed, and return its error."""
        if status_of(error) is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.circuit.miss(self.limit_s)
        return error_of(error, f"{self.endpoint}: {method}", self.limit_s)


def episode_limit_s(deadline_s: float, *, lenient: bool) -> float:
    """Return the seconds for which a new episode waits for contracts, given those of a step.

    ``lenient``: where a fallback acts without them, no longer than a hung server can cost a step.
    """
    return min(CONNECT_LIMIT_S, max(deadline_s, LONG_MISS_S)) if lenient else CONNECT_LIMIT_S


def status_of(error: BaseException) -> grpc.StatusCode:
    """Return the status of a failed call; an answer that did not come on a stream has none of its own."""
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.DEADLINE_EXCEEDED


def error_of(error: BaseException, call: str, deadline_s: float) -> OmcdaError:
    """Return the error for a failed call, with what the user can do about it.

    What may well be answered at another moment is a miss, in which a fallback acts. What is wrong with the request
    is none, as a fallback would hide it for ever.
    """
    code = status_of(error)
    details = (error.details() if isinstance(error, grpc.Call) else None) or "no details"
    match code:
        # The server was killed, or it aborted the call because it stops.
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return MissedAnswerError(
                f"{call} failed, the server cannot be reached ({details}). "
                "Start it with  omcda-deploy serve BUNDLE  or correct the endpoint; both sides need TLS, or neither"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return MissedAnswerError(
                f"{call} failed, no answer within {1000 * deadline_s:g} ms. "
                "Raise the deadline, send smaller batches, or look at the server's load"
            )
        case grpc.StatusCode.FAILED_PRECONDITION:
            return ContractError(f"{call} was refused: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return EndpointError(f"{call} failed, this is no policy server ({details}): correct the endpoint")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            # This package's servers say what to do; gRPC's own messages do not.
            hint = "" if "expected" in details else ". Send smaller batches, or fewer calls at once"
            return MissedAnswerError(f"{call} was refused: {details}{hint}")
        # The version of this episode is not held any more, or not by the server that has taken this one's place.
        case grpc.StatusCode.NOT_FOUND if details.startswith("unknown version"):
            return MissedAnswerError(f"{call} was refused with {code.name}: {details}")
        case _:
            return EndpointError(f"{call} was refused with {code.name}: {details}")
