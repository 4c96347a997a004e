"""Connections to policy servers: their contracts, and their models' answers step by step.

A step is missed if its answer does not come before the deadline or the server is gone (:class:`MissedAnswerError`).
An answer that arrives later is dropped: a call is cancelled, a stream is replaced by a new one, and an answer with
another step id than the request's is refused. A model that keeps missing is asked in the background
(:mod:`omcda_deploy.client.circuit`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from numpy.typing import NDArray

from omcda_deploy.client.channel import Credentials, Metadata, open_channel
from omcda_deploy.client.circuit import Circuit, NotAwaitedError
from omcda_deploy.client.transport import SERVICE, Arrivals, Calls, Stream
from omcda_deploy.errors import (
    ConfigError,
    ContractError,
    EndpointError,
    MissedAnswerError,
    OmcdaError,
)
from omcda_deploy.protos.policy_pb2 import ActRequest, ActResponse, GetContractRequest, GetContractResponse
from omcda_deploy.protos.tensors import answer_tensors, input_tensors
from omcda_deploy.spec import TeamSpec, require_same_contract

CONNECT_LIMIT_S = 5.0

Rows: TypeAlias = dict[str, NDArray[Any]]  # a model's inputs by name, one row per sample
Outputs: TypeAlias = dict[str, NDArray[Any]]


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
    """A connection to one endpoint. ``contract``: of one version, at first the current one.

    Raises :class:`EndpointError` if the endpoint is no policy server, :class:`MissedAnswerError` if it does not
    answer.
    """

    def __init__(self, endpoint: str, credentials: Credentials | None = None) -> None:
        self.endpoint = endpoint
        self.circuits: list[Circuit] = []  # of its models that are in use
        self.channel = open_channel(endpoint, credentials)
        self.metadata: Metadata = () if credentials is None else credentials.metadata
        self._get_contract = self.channel.unary_unary(
            SERVICE + "GetContract",
            request_serializer=GetContractRequest.SerializeToString,
            response_deserializer=GetContractResponse.FromString,
        )
        try:
            self.contract = self._ask("")
        except BaseException:
            self.close()
            raise

    @property
    def silent(self) -> bool:
        """True while a model of it is not waited for."""
        return any(circuit.open for circuit in self.circuits)

    def current_version(self) -> str:
        """Ask for the version that answers new episodes."""
        return self._request("").model_version

    def describe(self, version: str) -> None:
        """Ask for the contract of a version. Raises :class:`EndpointError` if the server does not hold it."""
        self.contract = self._ask(version)

    def require_contract(self, spec: TeamSpec | None) -> None:
        """Raise :class:`ContractError` if the server's contract is another one than ``spec``'s."""
        if spec is not None:
            team = self.contract.team
            require_same_contract(spec, team, "the client's team", f"the team served at {self.endpoint}")

    def close(self) -> None:
        self.channel.close()

    def _ask(self, version: str) -> Contract:
        response = self._request(version)
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

    def _request(self, version: str) -> GetContractResponse:
        request = GetContractRequest(model_version=version)
        try:
            return self._get_contract(request, timeout=CONNECT_LIMIT_S, metadata=self.metadata)
        except grpc.RpcError as error:
            if _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED:
                for circuit in self.circuits:
                    circuit.miss(CONNECT_LIMIT_S)
            raise _error_of(error, f"{self.endpoint}: GetContract", CONNECT_LIMIT_S) from error


class ServedModel:
    """One model of one server. :meth:`ask` is a whole step; :meth:`send` and :meth:`receive` are its halves.

    ``version``: requested in every step. ``latency``: seconds from sending the last step to its answer's arrival,
    however late the answer is read; None without an answer. ``breaks``: whether a circuit opens after misses.
    """

    def __init__(
        self, server: ServerConnection, model: str, deadline_s: float, stream: bool, breaks: bool
    ) -> None:
        if not 0.0 < deadline_s < math.inf:
            raise ConfigError(f"deadline_s: expected a number of seconds above 0, got {deadline_s}")
        contract = server.contract
        if model not in contract.models:
            raise EndpointError(
                f"{server.endpoint} serves {', '.join(contract.models)}, not {model}: give the endpoint of {model}"
            )
        self.latency: float | None = None
        self.version = contract.version
        self._model = model
        self._step_name = f"{server.endpoint}: step of {model}"
        self._contract_hash = contract.contract_hash
        self._deadline_s = deadline_s
        self._inputs = {tensor.name: tensor for tensor in input_tensors(contract.team, model)}
        self._outputs = answer_tensors(contract.team, model)
        self._arrivals = Arrivals()
        self._transport: Calls | Stream = (Stream if stream else Calls)(
            server.channel, deadline_s, self._arrivals, server.metadata
        )
        self._step_id = 0
        self._first = True
        self._sent_at = 0.0
        self._under_way = False  # a request that was sent and not answered
        self._circuit = Circuit(breaks)
        server.circuits.append(self._circuit)

    def reset(self) -> None:
        """Mark the next step as the first of an episode."""
        if self._under_way:
            self.abandon()
        self._first = True

    def ask(self, rows: Rows) -> Outputs:
        """Send one step and wait for its answer; raises as :meth:`receive`."""
        if self._circuit.open:
            self.send(rows)
            return self.receive()
        request = self._request(rows)
        return self._answer(lambda: self._transport.ask(request))

    def send(self, rows: Rows) -> None:
        """Send one step without waiting; while the circuit is open, only if no other one is under way."""
        if self._circuit.open and not self._settled():
            self.latency = None
            return
        self._transport.send(self._request(rows))
        self._under_way = True

    def receive(self) -> Outputs:
        """Wait for the answer to the step that was sent.

        Raises :class:`MissedAnswerError`, which is a :class:`NotAwaitedError` while the circuit is open,
        :class:`ContractError`, and :class:`EndpointError` for a refusal.
        """
        if self._circuit.open:
            raise NotAwaitedError(f"{self._step_name} was not waited for, as its last answers were missed")
        return self._answer(self._transport.receive)

    def abandon(self) -> None:
        """Forget a request that was sent, so that the next answer is the next request's."""
        self._under_way = False
        self._transport.abandon()

    def _settled(self) -> bool:
        """Return whether no step is under way; an answer in time to the last one closes the circuit."""
        if self._under_way and self._transport.arrived():
            with suppress(MissedAnswerError):
                self._answer(self._transport.receive)
        return not self._under_way

    def _request(self, rows: Rows) -> ActRequest:
        self._step_id += 1
        self.latency = None
        self._sent_at = time.perf_counter()
        tensors: dict[str, Any] = {name: self._inputs[name].encode(values) for name, values in rows.items()}
        return ActRequest(
            model=self._model,
            model_version=self.version,
            contract_hash=self._contract_hash,
            step_id=self._step_id,
            reset=self._first,
            batch=len(rows["observation"]),
            **tensors,
        )

    def _answer(self, receive: Callable[[], ActResponse]) -> Outputs:
        try:
            response = receive()
            self._under_way = False
        except BaseException as error:
            self.abandon()
            if isinstance(error, (grpc.RpcError, TimeoutError)):
                if _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._circuit.miss(time.perf_counter() - self._sent_at)
                raise _error_of(error, self._step_name, self._deadline_s) from error
            raise
        if (response.step_id, response.model_version) != (self._step_id, self.version):
            self.abandon()
            raise EndpointError(
                f"{self._step_name}: expected the answer to step {self._step_id} of version {self.version}, got "
                f"that to {response.step_id} of {response.model_version}: the server mixes up its answers, update "
                "it"
            )
        self.latency = self._arrivals.last - self._sent_at
        self._circuit.close()
        self._first = False
        # Copies, as bytes are read-only and a caller may change an action in place.
        return {
            tensor.name: tensor.decode(getattr(response, tensor.name), response.batch).copy()
            for tensor in self._outputs
        }


def _code(error: BaseException) -> grpc.StatusCode:
    """Return the status of a failed call; an answer that did not come on a stream has none of its own."""
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.DEADLINE_EXCEEDED


def _error_of(error: BaseException, call: str, deadline_s: float) -> OmcdaError:
    """Return the error for a failed call, with what the user can do about it.

    What may well be answered at another moment is a miss, in which a fallback acts. What is wrong with the request
    is none, as a fallback would hide it for ever.
    """
    code = _code(error)
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
