"""The models of one server that a client asks: their steps travel together, and are answered or missed together.

A message has fixed costs of its own, in which threads wake each other up, and they are several times those of an
agent's tensors. So agents of one server share one message per step; the server answers each of them by itself. Only
requests so large that servers answer them one after another have messages of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from omcda_deploy.client.channel import require_seconds
from omcda_deploy.client.circuit import Circuit, NotAwaitedError
from omcda_deploy.client.connection import ServerConnection, error_of, status_of
from omcda_deploy.client.episode import EpisodeClock
from omcda_deploy.client.transport import Arrivals, Calls, Stream
from omcda_deploy.errors import EndpointError, MissedAnswerError
from omcda_deploy.inputs import Rows
from omcda_deploy.protos.packing import tag, varint
from omcda_deploy.protos.policy_pb2 import ActRequest, ActResponse
from omcda_deploy.protos.tensors import answer_tensors, input_tensors

TOGETHER_BYTES = 1 << 14  # what servers answer at once; larger requests wait for each other there

Outputs: TypeAlias = dict[str, NDArray[np.generic]]  # of one model, by name

_OTHERS = tag(ActRequest.OTHERS_FIELD_NUMBER)


class ServedModels:
    """Models of one server. :meth:`ask` is a whole step; :meth:`send` and :meth:`receive` are its halves.

    ``latency``: seconds from sending the last step to its answer's arrival, however late the answer is read; None
    without an answer. ``deadline_s``: seconds for one answer. ``replaceable``: whether a fallback can act instead,
    so that a circuit opens after misses. ``episode``: the client's, whose steps all its models take.
    """

    def __init__(
        self,
        server: ServerConnection,
        models: Sequence[str],
        deadline_s: float,
        stream: bool,
        replaceable: bool,
        episode: EpisodeClock,
    ) -> None:
        require_seconds("deadline_s", deadline_s)
        contract = server.contract
        for model in models:
            if model not in contract.models:
                raise EndpointError(
                    f"{server.endpoint} serves {', '.join(contract.models)}, not {model}: give the endpoint of "
                    f"{model}"
                )
        self.latency: float | None = None
        self.models = tuple(models)
        self._step_name = f"{server.endpoint}: step of {', '.join(models)}"
        self._contract_hash = contract.contract_hash
        self.deadline_s, self.replaceable = deadline_s, replaceable
        self._tags = {
            tensor.name: tag(ActRequest.DESCRIPTOR.fields_by_name[tensor.name].number)
            for tensor in input_tensors(contract.team, models[0])
        }
        self._inputs = {model: input_tensors(contract.team, model) for model in models}
        self._outputs = {model: answer_tensors(contract.team, model) for model in models}
        self.take(contract.version, contract.bundle_digest)
        self._arrivals = Arrivals(ActResponse.FromString)
        self._transport = self._transport_to(server, deadline_s, stream)
        self._step_id = 0
        self._episode = episode
        self._first = True
        self._sent_at = 0.0
        self._under_way = False  # a step that was sent and not answered
        self._circuit = server.circuit = Circuit(breaks=replaceable)

    def take(self, version: str, bundle_digest: str) -> None:
        """Request a version in every step from now on, and no other bundle under its name."""
        self._version, self._bundle_digest = version, bundle_digest
        self._constant = {
            model: ActRequest(
                model=model,
                model_version=version,
                contract_hash=self._contract_hash,
                bundle_digest=bundle_digest,
            ).SerializeToString()
            for model in self.models
        }

    def reset(self) -> None:
        """Mark the next step as the first of an episode."""
        if self._under_way:
            self.abandon()
        self._first = True

    def ask(self, rows: Mapping[str, Rows]) -> dict[str, Outputs]:
        """Send one step, with each model's rows, and wait for its answer; raises as :meth:`receive`."""
        if self._circuit.open:
            self.send(rows)
            return self.receive()
        messages = self._messages(rows)
        return self._answer(lambda: self._transport.ask(messages))

    def send(self, rows: Mapping[str, Rows]) -> None:
        """Send one step without waiting; while the circuit is open, only if no other one is under way."""
        if self._circuit.open and not self._settled():
            self.latency = None
            return
        self._transport.send(self._messages(rows))
        self._under_way = True

    def receive(self) -> dict[str, Outputs]:
        """Wait for the answers to the step that was sent, by model.

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

    def _transport_to(self, server: ServerConnection, deadline_s: float, stream: bool) -> Calls | Stream:
        """Return what sends the requests of steps, and parses their answers."""
        if stream:
            return Stream(server.channel, deadline_s, self._arrivals, server.metadata)
        return Calls(server.channel, deadline_s, self._arrivals, server.metadata)

    def _settled(self) -> bool:
        """Return whether no step is under way; an answer in time to the last one closes the circuit."""
        if self._under_way and self._transport.arrived():
            with suppress(MissedAnswerError):
                self._answer(self._transport.receive)
        return not self._under_way

    def _messages(self, rows: Mapping[str, Rows]) -> list[bytes]:
        """Return the next step as one serialised request, or as one for each model where they are large."""
        self._begin()
        common = ActRequest(
            step_id=self._step_id,
            reset=self._first,
            batch=len(rows[self.models[0]]["observation"]),
            episode_id=self._episode.id,
            episode_step=self._episode.step,
            temperature=self._episode.temperature,
        ).SerializeToString()
        steps = [b"".join(self._parts(model, rows[model], common)) for model in self.models]
        if len(steps) == 1 or sum(map(len, steps)) > TOGETHER_BYTES:
            return steps
        first, *others = steps
        return [first + b"".join(part for step in others for part in (_OTHERS, varint(len(step)), step))]

    def _begin(self) -> None:
        """Count a step that is sent now."""
        self._step_id += 1
        self.latency = None
        self._sent_at = time.perf_counter()

    def _parts(self, model: str, rows: Rows, common: bytes) -> Iterator[bytes]:
        """Yield the fields of one model's step."""
        yield self._constant[model]
        yield common
        for tensor in self._inputs[model]:
            if tensor.name in rows:
                data = tensor.encode(rows[tensor.name])
                yield self._tags[tensor.name] + varint(len(data))
                yield data

    def _answer(self, receive: Callable[[], Sequence[Any]]) -> dict[str, Outputs]:
        try:
            messages = receive()
            self._under_way = False
        except BaseException as error:
            self.abandon()
            if isinstance(error, (grpc.RpcError, TimeoutError)):
                if status_of(error) is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._circuit.miss(time.perf_counter() - self._sent_at)
                raise error_of(error, self._step_name, self.deadline_s) from error
            raise
        outputs = self._read(messages)
        self.latency = self._arrivals.last - self._sent_at
        self._circuit.close()
        self._first = False
        return outputs

    def _read(self, messages: Sequence[Any]) -> dict[str, Outputs]:
        """Return the outputs of a step's answers by model, as arrays of their own, which a caller may change."""
        answers = [answer for message in messages for answer in (message, *message.others)]
        outputs = {
            model: self._decode(model, answer) for model, answer in zip(self.models, answers, strict=False)
        }
        if len(answers) != len(self.models):
            raise self._mixed_up(f"{len(self.models)} answers", f"{len(answers)}")
        return outputs

    def _decode(self, model: str, answer: ActResponse) -> Outputs:
        if answer.step_id != self._step_id or answer.model_version != self._version:
            raise self._mixed_up(
                f"the answer to step {self._step_id} of version {self._version}",
                f"that to {answer.step_id} of {answer.model_version}",
            )
        batch = answer.batch
        return {
            tensor.name: tensor.decode(getattr(answer, tensor.name), batch).copy()
            for tensor in self._outputs[model]
        }

    def _mixed_up(self, expected: str, got: str) -> EndpointError:
        self.abandon()
        return EndpointError(
            f"{self._step_name}: expected {expected}, got {got}: the server mixes up its answers, update it"
        )
