"""A policy server as its clients see it: what it says of itself, and its models' answers, a step at a time.

A step is missed when its answer does not come before the deadline or the server is gone
(:class:`MissedAnswerError`). Whatever arrives for it later is dropped: a call is cancelled, a stream is left for a
new one, and an answer with another step id than the one asked for is never taken.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
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


class Server:
    """An endpoint and what it says of one version, at first the current one.

    Raises :class:`EndpointError` where it cannot be asked, :class:`MissedAnswerError` where it does not answer.
    """

    def __init__(self, endpoint: str, credentials: Credentials | None = None) -> None:
        self.endpoint = endpoint
        self.channel = open_channel(endpoint, credentials)
        self.metadata: Metadata = () if credentials is None else credentials.metadata
        self._ask = self.channel.unary_unary(
            SERVICE + "GetContract",
            request_serializer=GetContractRequest.SerializeToString,
            response_deserializer=GetContractResponse.FromString,
        )
        try:
            self.describe()
        except BaseException:
            self.close()
            raise

    def current_version(self) -> str:
        """The version that new episodes are answered by."""
        return self._contract("").model_version

    def describe(self, version: str = "") -> None:
        """Take over what the server says of a version that it holds; of the current one if empty."""
        contract = self._contract(version)
        try:
            self.team = TeamSpec.from_json(json.loads(contract.team))
        except (ValueError, OmcdaError) as error:
            raise EndpointError(
                f"{self.endpoint} states a contract that cannot be read ({error}): update it"
            ) from error
        self.version = contract.model_version
        self.models = tuple(contract.models)
        self.contract_hash = contract.contract_hash
        self.divergence_kind = contract.divergence_kind
        self.bundle_digest = contract.bundle_digest
        self.budgets = {name: contract.budgets.get(name) for name in self.team.names}

    def require_contract(self, spec: TeamSpec | None) -> None:
        if spec is not None:
            require_same_contract(spec, self.team, "the client's team", f"the team served at {self.endpoint}")

    def close(self) -> None:
        self.channel.close()

    def _contract(self, version: str) -> GetContractResponse:
        request = GetContractRequest(model_version=version)
        try:
            return self._ask(request, timeout=CONNECT_LIMIT_S, metadata=self.metadata)
        except grpc.RpcError as error:
            raise _failure(error, f"{self.endpoint}: GetContract", CONNECT_LIMIT_S) from error


class ServedModel:
    """One model of one server. ``ask`` is a whole step; ``send`` and ``receive`` are its halves.

    ``latency``: seconds from sending the last step to its answer's arrival, however late that is looked at; None
    without an answer.
    """

    def __init__(self, server: Server, model: str, deadline_s: float, stream: bool) -> None:
        if model not in server.models:
            raise EndpointError(
                f"{server.endpoint} serves {', '.join(server.models)}, not {model}: give the endpoint of {model}"
            )
        self.latency: float | None = None
        self.version = server.version  # that is asked for
        self._model = model
        self._what = f"{server.endpoint}: step of {model}"
        self._contract_hash = server.contract_hash
        self._deadline_s = deadline_s
        self._inputs = {tensor.name: tensor for tensor in input_tensors(server.team, model)}
        self._outputs = answer_tensors(server.team, model)
        self._arrivals = _Arrivals()
        self._line: _Calls | _Stream = (_Stream if stream else _Calls)(
            server.channel, deadline_s, self._arrivals, server.metadata
        )
        self._step = 0
        self._first = True
        self._sent = 0.0

    def reset(self) -> None:
        """Mark the next step as the first of an episode."""
        self._first = True

    def ask(self, rows: Rows) -> Outputs:
        request = self._request(rows)
        return self._answer(lambda: self._line.ask(request))

    def send(self, rows: Rows) -> None:
        self._line.send(self._request(rows))

    def receive(self) -> Outputs:
        return self._answer(self._line.receive)

    def abandon(self) -> None:
        """Forget a request that was sent, so that the next answer is the next request's."""
        self._line.abandon()

    def _request(self, rows: Rows) -> ActRequest:
        self._step += 1
        self.latency = None
        self._sent = time.perf_counter()
        tensors: dict[str, Any] = {name: self._inputs[name].encode(values) for name, values in rows.items()}
        return ActRequest(
            model=self._model,
            model_version=self.version,
            contract_hash=self._contract_hash,
            step_id=self._step,
            reset=self._first,
            batch=len(rows["observation"]),
            **tensors,
        )

    def _answer(self, take: Callable[[], ActResponse]) -> Outputs:
        try:
            response = take()
        except BaseException as error:
            self._line.abandon()
            if isinstance(error, (grpc.RpcError, TimeoutError)):
                raise _failure(error, self._what, self._deadline_s) from error
            raise
        if (response.step_id, response.model_version) != (self._step, self.version):
            self._line.abandon()
            raise EndpointError(
                f"{self._what}: expected the answer to step {self._step} of version {self.version}, got that to "
                f"{response.step_id} of {response.model_version}: the server mixes up its answers, update it"
            )
        self.latency = self._arrivals.last - self._sent
        self._first = False
        # copies: a caller may change an action in place, and bytes are read-only
        return {
            tensor.name: tensor.decode(getattr(response, tensor.name), response.batch).copy()
            for tensor in self._outputs
        }


class _Arrivals:
    """Parses answers. gRPC does so as soon as it has one, whoever waits for it, so this knows when it came."""

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
        # blocking: cheaper than a future
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
    """What gRPC returns for a stream: its answers, and the call itself."""

    def __iter__(self) -> Iterator[ActResponse]: ...

    def cancel(self) -> object: ...


_Requests = queue.SimpleQueue["ActRequest | None"]  # None ends them
_Arrived = queue.SimpleQueue["ActResponse | Exception"]  # an exception ends them


class _Stream:
    """One stream for all steps: opened by the first, and again by the first after an error.

    gRPC's deadline is the whole stream's, and its wait for a message has none. So answers go to a queue, whose
    wait has: from where gRPC parses them, which is sooner than from where they can be iterated over.
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
        if not self._answers.empty():  # it ended while nothing was asked: no reason to miss this step too
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
        """A stream with queues of its own, so that nothing late comes out of them."""
        self._requests, self._answers = requests, answers = _Requests(), _Arrived()

        def note(data: bytes) -> ActResponse:
            response = self._parse(data)
            answers.put(response)
            return response

        call: _Answers = self._channel.stream_stream(
            SERVICE + "ActStream", request_serializer=ActRequest.SerializeToString, response_deserializer=note
        )(iter(requests.get, None), metadata=self._metadata)
        threading.Thread(
            target=_read, args=(call, answers), name="answers of a policy stream", daemon=True
        ).start()
        return call


def _read(call: _Answers, answers: _Arrived) -> None:
    """Keep asking gRPC for the next message, and note the end."""
    try:
        for _ in call:
            pass
        answers.put(EndpointError("the server ended the stream without an answer: update it"))
    except grpc.RpcError as error:
        answers.put(error)


def _failure(error: BaseException, what: str, deadline_s: float) -> OmcdaError:
    """What a user can do about a call that failed."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.DEADLINE_EXCEEDED
    details = (error.details() if isinstance(error, grpc.Call) else None) or "no details"
    match code:
        # the server was killed, or broke the call off because it stops
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return MissedAnswerError(
                f"{what} failed, the server cannot be reached ({details}). "
                "Start it with  omcda-deploy serve BUNDLE  or correct the endpoint; both sides need TLS, or neither"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return MissedAnswerError(
                f"{what} failed, no answer within {1000 * deadline_s:g} ms. "
                "Raise the deadline, send smaller batches, or look at the server's load"
            )
        case grpc.StatusCode.FAILED_PRECONDITION:
            return ContractError(f"{what} was refused: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return EndpointError(f"{what} failed, this is no policy server ({details}): correct the endpoint")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Our server's own words say what to do; gRPC's are of messages and calls in general.
            hint = "" if "expected" in details else ". Send smaller batches, or fewer calls at once"
            return EndpointError(f"{what} was refused: {details}{hint}")
        case _:
            return EndpointError(f"{what} was refused with {code.name}: {details}")
