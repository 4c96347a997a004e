"""Connections to policy servers: their contracts, and their models' answers step by step.

A step is missed if its answer does not come before the deadline or the server is gone (:class:`MissedAnswerError`).
An answer that arrives later is dropped: a call is cancelled, a stream is replaced by a new one, and an answer with
another step id than the request's is refused.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc
from numpy.typing import NDArray

from omcda_deploy.client.channel import Credentials, Metadata, open_channel
from omcda_deploy.errors import ContractError, EndpointError, MissedAnswerError, OmcdaError
from omcda_deploy.protos.policy_pb2 import ActRequest, ActResponse, GetContractRequest, GetContractResponse
from omcda_deploy.protos.tensors import answer_tensors, input_tensors
from omcda_deploy.spec import TeamSpec, require_same_contract

CONNECT_LIMIT_S = 5.0
SERVICE = "/omcda.v1.PolicyService/"

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
            raise _error_of(error, f"{self.endpoint}: GetContract", CONNECT_LIMIT_S) from error


class ServedModel:
    """One model of one server. :meth:`ask` is a whole step; :meth:`send` and :meth:`receive` are its halves.

    ``version``: requested in every step. ``latency``: seconds from sending the last step to its answer's arrival,
    however late the answer is read; None without an answer.
    """

    def __init__(self, server: ServerConnection, model: str, deadline_s: float, stream: bool) -> None:
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
        self._arrivals = _Arrivals()
        self._transport: _Calls | _Stream = (_Stream if stream else _Calls)(
            server.channel, deadline_s, self._arrivals, server.metadata
        )
        self._step_id = 0
        self._first = True
        self._sent_at = 0.0

    def reset(self) -> None:
        """Mark the next step as the first of an episode."""
        self._first = True

    def ask(self, rows: Rows) -> Outputs:
        """Send one step and wait for its answer; raises as :meth:`receive`."""
        request = self._request(rows)
        return self._answer(lambda: self._transport.ask(request))

    def send(self, rows: Rows) -> None:
        """Send one step without waiting."""
        self._transport.send(self._request(rows))

    def receive(self) -> Outputs:
        """Wait for the answer to the step that was sent.

        Raises :class:`MissedAnswerError`, :class:`ContractError`, and :class:`EndpointError` for a refusal.
        """
        return self._answer(self._transport.receive)

    def abandon(self) -> None:
        """Forget a request that was sent, so that the next answer is the next request's."""
        self._transport.abandon()

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
        except BaseException as error:
            self._transport.abandon()
            if isinstance(error, (grpc.RpcError, TimeoutError)):
                raise _error_of(error, self._step_name, self._deadline_s) from error
            raise
        if (response.step_id, response.model_version) != (self._step_id, self.version):
            self._transport.abandon()
            raise EndpointError(
                f"{self._step_name}: expected the answer to step {self._step_id} of version {self.version}, got "
                f"that to {response.step_id} of {response.model_version}: the server mixes up its answers, update "
                "it"
            )
        self.latency = self._arrivals.last - self._sent_at
        self._first = False
        # Copies, as bytes are read-only and a caller may change an action in place.
        return {
            tensor.name: tensor.decode(getattr(response, tensor.name), response.batch).copy()
            for tensor in self._outputs
        }


class _Arrivals:
    """Parses answers and records their arrival, as gRPC parses an answer as soon as it has arrived."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, data: bytes) -> ActResponse:
        self.last = time.perf_counter()
        return ActResponse.FromString(data)


class _Calls:
    """One unary call per step."""

    def __init__(
        self,
        channel: grpc.Channel,
        deadline_s: float,
        parse: Callable[[bytes], ActResponse],
        metadata: Metadata,
    ) -> None:
        self._metadata = metadata
        self._act = channel.unary_unary(
            SERVICE + "Act", request_serializer=ActRequest.SerializeToString, response_deserializer=parse
        )
        self._deadline_s = deadline_s
        self._pending: grpc.Future[ActResponse] | None = None

    def ask(self, request: ActRequest) -> ActResponse:
        # A blocking call, which costs less than a future.
        return self._act(request, timeout=self._deadline_s, metadata=self._metadata)

    def send(self, request: ActRequest) -> None:
        self._pending = self._act.future(request, timeout=self._deadline_s, metadata=self._metadata)

    def receive(self) -> ActResponse:
        if self._pending is None:
            raise RuntimeError("receive() before send()")
        pending, self._pending = self._pending, None
        return pending.result()

    def abandon(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None


class _Answers(Protocol):
    """A gRPC stream: an iterator of its answers, which can be cancelled."""

    def __iter__(self) -> Iterator[ActResponse]: ...

    def cancel(self) -> object: ...


_Requests = queue.SimpleQueue["ActRequest | None"]  # None ends the requests
_Arrived = queue.SimpleQueue["ActResponse | Exception"]  # an exception ends the answers


class _Stream:
    """One stream for all steps, opened by the first step, and again by the first step after an error.

    In gRPC a deadline holds for a whole stream, and waiting for a message has none. Hence answers are put into a
    queue, which can be read with a timeout, when gRPC parses them, which is before the stream's iterator returns
    them.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        deadline_s: float,
        parse: Callable[[bytes], ActResponse],
        metadata: Metadata,
    ) -> None:
        self._channel = channel
        self._metadata = metadata
        self._deadline_s = deadline_s
        self._parse = parse
        self._due = 0.0
        self._requests = _Requests()
        self._answers = _Arrived()
        self._call: _Answers | None = None

    def ask(self, request: ActRequest) -> ActResponse:
        self.send(request)
        return self.receive()

    def send(self, request: ActRequest) -> None:
        if not self._answers.empty():  # the stream ended between two steps: open a new one for this step
            self.abandon()
        if self._call is None:
            self._call = self._open()
        self._due = time.monotonic() + self._deadline_s
        self._requests.put(request)

    def receive(self) -> ActResponse:
        if self._call is None:
            raise RuntimeError("receive() before send()")
        try:
            answer = self._answers.get(timeout=max(0.0, self._due - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def abandon(self) -> None:
        if self._call is not None:
            self._requests.put(None)  # ends the thread in which gRPC waits for requests
            self._call.cancel()
            self._call = None

    def _open(self) -> _Answers:
        """Open a stream with new queues, which contain no late answers."""
        self._requests, self._answers = requests, answers = _Requests(), _Arrived()

        def parse(data: bytes) -> ActResponse:
            response = self._parse(data)
            answers.put(response)
            return response

        call: _Answers = self._channel.stream_stream(
            SERVICE + "ActStream",
            request_serializer=ActRequest.SerializeToString,
            response_deserializer=parse,
        )(iter(requests.get, None), metadata=self._metadata)
        threading.Thread(
            target=_read, args=(call, answers), name="answers of a policy stream", daemon=True
        ).start()
        return call


def _read(call: _Answers, answers: _Arrived) -> None:
    """Read a stream to its end, as gRPC parses a message only when the next one is wanted, and add the end."""
    try:
        for _ in call:
            pass
        answers.put(EndpointError("the server ended the stream without an answer: update it"))
    except grpc.RpcError as error:
        answers.put(error)


def _error_of(error: BaseException, call: str, deadline_s: float) -> OmcdaError:
    """Return the error for a failed call, with what the user can do about it."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.DEADLINE_EXCEEDED
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
            return EndpointError(f"{call} was refused: {details}{hint}")
        case _:
            return EndpointError(f"{call} was refused with {code.name}: {details}")
