"""Served policies over gRPC: the same :class:`~omcda_deploy.policy.Policy` protocols as in process.

Endpoints are gRPC targets, ``127.0.0.1:8500``. On connecting, a client asks each server for its contract and
refuses one that does not fit. Policies are for one thread; their channels may be shared.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM, parameter_names
from omcda_deploy.errors import ContractError, EndpointError, OmcdaError
from omcda_deploy.local import batch_of, decision_of, first_row, observation_of, split_decisions
from omcda_deploy.policy import Decision, Float
from omcda_deploy.protos.policy_pb2 import ActRequest, ActResponse, GetContractRequest, GetContractResponse
from omcda_deploy.protos.tensors import answer_tensors, input_tensors
from omcda_deploy.spec import AgentSpec, TeamSpec, require_same_contract

CONNECT_LIMIT_S = 5.0
SERVICE = "/omcda.v1.PolicyService/"

Mask: TypeAlias = NDArray[np.uint8]
Rows: TypeAlias = dict[str, NDArray[Any]]  # a model's inputs by name, one row per sample
Outputs: TypeAlias = dict[str, NDArray[Any]]


def open_channel(endpoint: str) -> grpc.Channel:
    """A plaintext channel that reconnects within a second, and never through an HTTP proxy."""
    return grpc.insecure_channel(
        endpoint,
        (
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ),
    )


class RemotePolicy:
    """One served agent.

    ``agent``: its name; None for the only agent that the endpoint serves. ``spec``: the team that the caller was
    built for; None takes the server's word. ``deadline_s``: seconds for one answer. ``stream``: one message per
    step on one gRPC stream, about half the cost of a call per step.

    Raises :class:`EndpointError` when the endpoint cannot be reached, does not serve the agent, refuses a
    request or misses the deadline, and :class:`ContractError` when its contract is another one than ``spec``'s.
    """

    def __init__(
        self,
        endpoint: str,
        agent: str | None = None,
        *,
        spec: TeamSpec | None = None,
        deadline_s: float = 1.0,
        stream: bool = False,
    ) -> None:
        self._server = _Server(endpoint)
        try:
            self._server.require_contract(spec)
            name = _only_agent(self._server) if agent is None else agent
            self.spec: AgentSpec = self._server.team.agent(name)
            self._model = _Model(self._server, name, deadline_s, stream)
        except BaseException:
            self._server.close()
            raise
        self.team = self._server.team
        self._parameters = parameter_names(self.team)

    @property
    def latency(self) -> float | None:
        """Seconds from sending the last request to having its answer; None before the first."""
        return self._model.latency

    def reset(self) -> None:
        """Mark the next step as the first of an episode."""
        self._model.reset()

    def act(
        self, observation: Float, *, noise: Float | None = None, action_mask: Mask | None = None
    ) -> Decision:
        """``observation`` [B, O] or [O]; ``noise`` and ``action_mask`` [B, A] or [A]."""
        outputs = self._model.ask(_rows(self.spec, observation, noise, action_mask))
        decision = decision_of(outputs, self._parameters)
        return decision if np.ndim(observation) == 2 else first_row(decision)

    def close(self) -> None:
        self._model.abandon()
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RemoteTeam:
    """A served team: one endpoint per agent, one for several agents, or one that serves the joint graph.

    ``endpoints``: addresses in any order, each taken for the agents that it serves, or a mapping from agent
    (or ``"team"``) to address. Other arguments are :class:`RemotePolicy`'s. A step sends all requests before it
    waits for the first answer.

    Raises :class:`EndpointError` as :class:`RemotePolicy` does, when an agent is served twice or not at all, and
    when the servers do not hold one and the same bundle.
    """

    def __init__(
        self,
        endpoints: Sequence[str] | Mapping[str, str],
        *,
        spec: TeamSpec | None = None,
        deadline_s: float = 1.0,
        stream: bool = False,
    ) -> None:
        if isinstance(endpoints, str):
            endpoints = [endpoints]
        addresses = endpoints.values() if isinstance(endpoints, Mapping) else endpoints
        self._servers: dict[str, _Server] = {}
        self._models: dict[str, _Model] = {}
        try:
            for endpoint in addresses:
                if endpoint in self._servers and not isinstance(endpoints, Mapping):
                    raise EndpointError(f"{endpoint} was given twice: give every endpoint once")
                if endpoint not in self._servers:
                    self._servers[endpoint] = _Server(endpoint)
            if not self._servers:
                raise EndpointError(
                    "expected at least one endpoint, got none: start servers with  omcda-deploy serve"
                )
            first = _agreement(self._servers.values(), spec)
            placed = (
                _named(endpoints, self._servers, first.team)
                if isinstance(endpoints, Mapping)
                else _placed(self._servers, first.team)
            )
            for model, server in placed.items():
                self._models[model] = _Model(server, model, deadline_s, stream)
        except BaseException:
            self.close()
            raise
        self.spec: TeamSpec = first.team
        self.divergence_kind: str = first.divergence_kind
        self.bundle_digest: str = first.bundle_digest
        self.budgets: dict[str, float | None] = first.budgets
        self.endpoints: dict[str, str] = {model: server.endpoint for model, server in placed.items()}
        self._parameters = parameter_names(self.spec)

    @property
    def latencies(self) -> dict[str, float]:
        """Seconds of the last step by agent (``"team"`` for the joint graph), from sending to having the answer.

        Answers are taken in team order, so a later agent's time includes waiting for the earlier ones'.
        """
        return {name: m.latency for name, m in self._models.items() if m.latency is not None}

    def reset(self) -> None:
        """Mark the next step as the first of an episode."""
        for model in self._models.values():
            model.reset()

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, Mask] | None = None,
    ) -> dict[str, Decision]:
        """One step of every agent; shapes are :meth:`RemotePolicy.act`'s. After an error no answer is pending."""
        rows = {
            agent.name: _rows(
                agent,
                observation_of(observations, agent.name),
                noise[agent.name] if noise else None,
                action_masks[agent.name] if action_masks else None,
            )
            for agent in self.spec.agents
        }
        if TEAM in self._models:
            outputs = {TEAM: self._models[TEAM].ask(_joined(self.spec, rows))}
        else:
            outputs = self._ask_all(rows)
        decisions = (
            split_decisions(self.spec, outputs[TEAM])
            if TEAM in outputs
            else {name: decision_of(answer, self._parameters) for name, answer in outputs.items()}
        )
        return {
            name: decision if np.ndim(observations[name]) == 2 else first_row(decision)
            for name, decision in decisions.items()
        }

    def _ask_all(self, rows: Mapping[str, Rows]) -> dict[str, Outputs]:
        try:
            for name, model in self._models.items():
                model.send(rows[name])
            return {name: model.receive() for name, model in self._models.items()}
        except BaseException:
            for model in self._models.values():
                model.abandon()
            raise

    def close(self) -> None:
        for model in self._models.values():
            model.abandon()
        for server in self._servers.values():
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server:
    """An endpoint and what it says of itself."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.channel = open_channel(endpoint)
        ask = self.channel.unary_unary(
            SERVICE + "GetContract",
            request_serializer=GetContractRequest.SerializeToString,
            response_deserializer=GetContractResponse.FromString,
        )
        try:
            contract = ask(GetContractRequest(), timeout=CONNECT_LIMIT_S)
            self.team = TeamSpec.from_json(json.loads(contract.team))
        except grpc.RpcError as error:
            self.close()
            raise _failure(error, f"{endpoint}: GetContract", CONNECT_LIMIT_S) from error
        except (ValueError, OmcdaError) as error:
            self.close()
            raise EndpointError(
                f"{endpoint} states a contract that cannot be read ({error}): update it"
            ) from error
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


class _Model:
    """One model of one server. ``ask`` is a whole step; ``send`` and ``receive`` are its halves."""

    def __init__(self, server: _Server, model: str, deadline_s: float, stream: bool) -> None:
        if model not in server.models:
            raise EndpointError(
                f"{server.endpoint} serves {', '.join(server.models)}, not {model}: give the endpoint of {model}"
            )
        self.latency: float | None = None
        self._model = model
        self._what = f"{server.endpoint}: step of {model}"
        self._contract_hash = server.contract_hash
        self._deadline_s = deadline_s
        self._inputs = {tensor.name: tensor for tensor in input_tensors(server.team, model)}
        self._outputs = answer_tensors(server.team, model)
        self._line: _Calls | _Stream = (_Stream if stream else _Calls)(server.channel, deadline_s)
        self._step = 0
        self._first = True
        self._sent = 0.0

    def reset(self) -> None:
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
        self._sent = time.perf_counter()
        tensors: dict[str, Any] = {name: self._inputs[name].encode(values) for name, values in rows.items()}
        return ActRequest(
            model=self._model,
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
        self.latency = time.perf_counter() - self._sent
        if response.step_id != self._step:
            self._line.abandon()
            raise EndpointError(
                f"{self._what}: expected the answer to step {self._step}, got that to {response.step_id}: "
                "the server mixes up its answers, update it"
            )
        self._first = False
        # copies: a caller may change an action in place, and bytes are read-only
        return {
            tensor.name: tensor.decode(getattr(response, tensor.name), response.batch).copy()
            for tensor in self._outputs
        }


class _Calls:
    """One unary call per step."""

    def __init__(self, channel: grpc.Channel, deadline_s: float) -> None:
        self._act = channel.unary_unary(
            SERVICE + "Act",
            request_serializer=ActRequest.SerializeToString,
            response_deserializer=ActResponse.FromString,
        )
        self._deadline_s = deadline_s
        self._pending: grpc.Future[ActResponse] | None = None

    def ask(self, request: ActRequest) -> ActResponse:
        return self._act(request, timeout=self._deadline_s)  # blocking: cheaper than a future

    def send(self, request: ActRequest) -> None:
        self._pending = self._act.future(request, timeout=self._deadline_s)

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

    def __next__(self) -> ActResponse: ...

    def cancel(self) -> object: ...


class _Stream:
    """One stream for all steps: opened by the first, and again by the first after an error.

    gRPC's deadline is the whole stream's, and waiting for a message has none. So a thread cancels the stream when
    an answer is overdue; it wakes about once per deadline, not once per step.
    """

    def __init__(self, channel: grpc.Channel, deadline_s: float) -> None:
        self._open = channel.stream_stream(
            SERVICE + "ActStream",
            request_serializer=ActRequest.SerializeToString,
            response_deserializer=ActResponse.FromString,
        )
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._due: float | None = None
        self._late = False
        self._requests: queue.SimpleQueue[ActRequest | None] = queue.SimpleQueue()
        self._call: _Answers | None = None
        self._ended = threading.Event()

    def ask(self, request: ActRequest) -> ActResponse:
        self.send(request)
        return self.receive()

    def send(self, request: ActRequest) -> None:
        if self._call is None:
            self._requests, self._ended, self._late = queue.SimpleQueue(), threading.Event(), False
            self._call = self._open(iter(self._requests.get, None))
            watch = threading.Thread(
                target=self._watch,
                args=(self._call, self._ended),
                name="deadline of a policy stream",
                daemon=True,
            )
            watch.start()
        with self._lock:
            self._due = time.monotonic() + self._deadline_s
        self._requests.put(request)

    def receive(self) -> ActResponse:
        if self._call is None:
            raise RuntimeError("receive() before send()")
        try:
            return next(self._call)
        except (grpc.RpcError, StopIteration) as error:
            if self._late:
                raise TimeoutError from error
            if isinstance(error, StopIteration):
                raise EndpointError("the server ended the stream without an answer: update it") from error
            raise
        finally:
            with self._lock:
                self._due = None

    def abandon(self) -> None:
        if self._call is not None:
            self._ended.set()
            self._requests.put(None)  # ends the thread in which gRPC waits for requests
            self._call.cancel()
            self._call = None

    def _watch(self, call: _Answers, ended: threading.Event) -> None:
        wait = self._deadline_s
        while not ended.wait(wait):
            with self._lock:
                left = self._deadline_s if self._due is None else self._due - time.monotonic()
                if left <= 0 and not ended.is_set():
                    self._late = True
                    call.cancel()
                    return
            wait = max(left, 0.0)


def _failure(error: BaseException, what: str, deadline_s: float) -> OmcdaError:
    """What a user can do about a call that failed."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.DEADLINE_EXCEEDED
    details = (error.details() if isinstance(error, grpc.Call) else None) or "no details"
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return EndpointError(
                f"{what} failed, the server cannot be reached ({details}). "
                "Start it with  omcda-deploy serve BUNDLE  or correct the endpoint"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return EndpointError(
                f"{what} failed, no answer within {1000 * deadline_s:g} ms. "
                "Raise the deadline, send smaller batches, or look at the server's load"
            )
        case grpc.StatusCode.FAILED_PRECONDITION:
            return ContractError(f"{what} was refused: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return EndpointError(f"{what} failed, this is no policy server ({details}): correct the endpoint")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return EndpointError(f"{what} was refused: {details}. Send smaller batches")
        case _:
            return EndpointError(f"{what} was refused with {code.name}: {details}")


def _only_agent(server: _Server) -> str:
    agents = [name for name in server.models if name != TEAM]
    if len(agents) != 1:
        raise EndpointError(
            f"{server.endpoint} serves {', '.join(server.models)}: say which agent, or use RemoteTeam"
        )
    return agents[0]


def _agreement(servers: Iterable[_Server], spec: TeamSpec | None) -> _Server:
    """One of the servers, which all hold one bundle of the contract asked for."""
    first, *others = servers
    first.require_contract(spec)
    for other in others:
        require_same_contract(
            first.team,
            other.team,
            f"the team served at {first.endpoint}",
            f"the team served at {other.endpoint}",
        )
        if other.bundle_digest != first.bundle_digest:
            raise EndpointError(
                f"{first.endpoint} serves bundle {first.bundle_digest[:12]}, {other.endpoint} serves "
                f"{other.bundle_digest[:12]}: start all servers of a team from one bundle"
            )
    return first


def _placed(servers: Mapping[str, _Server], team: TeamSpec) -> dict[str, _Server]:
    """Each agent's server, in team order; or the joint graph's, where one server has it and is the only one."""
    if len(servers) == 1:
        (only,) = servers.values()
        if TEAM in only.models:
            return {TEAM: only}
    placed = {}
    for name in team.names:
        holders = [server for server in servers.values() if name in server.models]
        if not holders:
            served = "; ".join(f"{s.endpoint} serves {', '.join(s.models)}" for s in servers.values())
            raise EndpointError(
                f"no endpoint serves {name} of {', '.join(team.names)} ({served}): add its endpoint"
            )
        if len(holders) > 1:
            raise EndpointError(
                f"{name} is served by {' and by '.join(server.endpoint for server in holders)}: give one of them"
            )
        placed[name] = holders[0]
    return placed


def _named(
    endpoints: Mapping[str, str], servers: Mapping[str, _Server], team: TeamSpec
) -> dict[str, _Server]:
    """Each agent's server as the caller named it, in team order; or the joint graph's."""
    if set(endpoints) == {TEAM}:
        return {TEAM: servers[endpoints[TEAM]]}
    if set(endpoints) != set(team.names):
        raise EndpointError(
            f"expected endpoints of {', '.join(team.names)}, or of {TEAM}, got those of {', '.join(endpoints)}"
        )
    return {name: servers[endpoints[name]] for name in team.names}


def _rows(agent: AgentSpec, observation: Float, noise: Float | None, action_mask: Mask | None) -> Rows:
    """An agent's inputs as [B, O] and [B, A]; noise that is absent stays away from the wire."""
    rows: Rows = {
        "observation": batch_of(observation, agent.observation_size, f"observation of {agent.name}")
    }
    batch, actions = len(rows["observation"]), agent.action.size
    if noise is not None:
        rows["noise"] = batch_of(noise, actions, f"noise of {agent.name}")
    if agent.action.kind == "discrete":
        rows["action_mask"] = (
            np.ones((batch, actions), np.uint8)
            if action_mask is None
            else batch_of(action_mask, actions, f"action_mask of {agent.name}")
        )
    for name, values in rows.items():
        if len(values) != batch:
            raise ContractError(
                f"{name} of {agent.name}: expected {batch} rows as in the observation, got {len(values)}"
            )
    return rows


def _joined(spec: TeamSpec, rows: Mapping[str, Rows]) -> Rows:
    """The joint graph's inputs: the agents' side by side."""
    batches = {name: len(own["observation"]) for name, own in rows.items()}
    if len(set(batches.values())) > 1:
        raise ContractError(f"expected as many observations of every agent, got {batches}")
    return {
        name: np.concatenate([rows[agent][name] for agent in spec.names], axis=1)
        for name in rows[spec.names[0]]
    }
