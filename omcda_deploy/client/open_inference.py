"""Servers of the Open Inference Protocol v2 that hold a bundle's models, as Triton and KServe's do.

They know no teams. The contract comes from where this package has left it: a model's metadata on its own servers,
the parameters of ``config.pbtxt`` on Triton, or else from a copy of the bundle on the client's side. The protocol
has no streams and no messages for several models, so a step is a call for each agent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.channel import Credentials
from omcda_deploy.client.connection import Contract, ServerConnection, status_of
from omcda_deploy.client.served import Outputs, ServedModels
from omcda_deploy.client.transport import Arrivals, Calls
from omcda_deploy.errors import ConfigError, EndpointError, MissedAnswerError, OmcdaError
from omcda_deploy.inputs import Rows
from omcda_deploy.protos import oip
from omcda_deploy.protos.model_config import (
    BUDGETS_PARAMETER,
    KIND_PARAMETER,
    TEAM_PARAMETER,
    contract_parameters,
)
from omcda_deploy.protos.tensors import CONTENTS, Tensor, input_tensors
from omcda_deploy.protos.triton_pb2 import ModelConfigRequest, ModelConfigResponse
from omcda_deploy.spec import TeamSpec

SERVICE = "/inference.GRPCInferenceService/"
DIGEST = "bundle_digest"  # in the metadata of this package's servers, and a parameter of requests to them
FIRST = (TEAM, "agent_0")  # of which a server without a bundle on the client's side must have one


class OpenServer(ServerConnection):
    """A connection to a server of the protocol. ``bundle``: states the contract; None asks the server for it.

    ``contract.models`` are the agents, and ``team`` only where agents are missing: in separate graphs they act as
    in process, to the last digit. ``states_digest``: whether the server says which bundle it has. Raises as
    :class:`ServerConnection`.
    """

    def __init__(
        self,
        endpoint: str,
        credentials: Credentials | None,
        bundle: Bundle | None,
        version: str = "",
        wait_s: float = 0.0,
    ) -> None:
        self._bundle = bundle
        self.states_digest = False
        self._asked = ""  # the version whose contract was asked for last
        super().__init__(endpoint, credentials, version, wait_s)

    def begin(self, version: str, limit_s: float) -> None:
        self._allow(limit_s)
        self._asked = version
        request = oip.ModelMetadataRequest(name=self.contract.models[0], version=version)
        ask = self._method("ModelMetadata", oip.ModelMetadataResponse)
        self._pending = ask.future(request, timeout=limit_s, metadata=self.metadata)

    def describe(self) -> None:
        try:
            metadata = self._pending.result()
        except grpc.RpcError as error:
            raise self._failure(error, "ModelMetadata") from error
        found = self._asked or _version(metadata), self._digest(metadata)
        if found != (self.contract.version, self.contract.bundle_digest):
            self.contract = self._ask(self._asked)

    def _ask(self, version: str) -> Contract:
        first = FIRST if self._bundle is None else (TEAM, *self._bundle.spec.names)
        found = self._held(first, version)
        if not found:
            raise EndpointError(
                f"{self.endpoint} serves none of {', '.join(first)}: load the bundle's models, or give it as "
                "--bundle"
            )
        metadata = next(iter(found.values()))
        stated = self._stated(metadata)
        try:
            team = TeamSpec.from_json(json.loads(stated[TEAM_PARAMETER]))
            kind, budgets = stated[KIND_PARAMETER], json.loads(stated[BUDGETS_PARAMETER])
        except (ValueError, KeyError, OmcdaError) as error:
            raise EndpointError(
                f"{self.endpoint} states no contract that can be read ({error}): give the bundle with --bundle"
            ) from error
        found |= self._held([name for name in (*team.names, TEAM) if name not in first], version)
        for name, described in found.items():
            self._require_tensors(team, name, described)
        agents = tuple(name for name in team.names if name in found)
        models = agents if len(agents) == len(team.names) or TEAM not in found else (*agents, TEAM)
        digest = self._digest(metadata)
        self.states_digest = DIGEST in metadata.properties
        return Contract(
            version or _version(metadata), models, team, team.contract_hash, kind, digest, budgets
        )

    def _digest(self, metadata: oip.ModelMetadataResponse) -> str:
        """Return the bundle's digest as the server states it, or else that of the bundle on the client's side."""
        return metadata.properties.get(DIGEST, self._bundle.digest if self._bundle else "")

    def _held(self, names: Sequence[str], version: str) -> dict[str, oip.ModelMetadataResponse]:
        """Return the descriptions of the models that the server has."""
        found = {}
        for name in names:
            try:
                found[name] = self._metadata(name, version)
            except EndpointError as error:
                cause = error.__cause__
                unknown = cause is not None and status_of(cause) is grpc.StatusCode.NOT_FOUND
                if (
                    isinstance(error, MissedAnswerError) or not unknown
                ):  # a version that is not held is a miss
                    raise
        return found

    def _metadata(self, model: str, version: str) -> oip.ModelMetadataResponse:
        request = oip.ModelMetadataRequest(name=model, version=version)
        answer: oip.ModelMetadataResponse = self._call("ModelMetadata", request, oip.ModelMetadataResponse)
        return answer

    def _stated(self, metadata: oip.ModelMetadataResponse) -> Mapping[str, str]:
        """Return the contract's entries by name."""
        if self._bundle is not None:
            bundle = self._bundle
            return contract_parameters(bundle.spec, bundle.divergence_kind, bundle.budgets)
        if TEAM_PARAMETER in metadata.properties:
            return metadata.properties
        try:
            answer = self._call("ModelConfig", ModelConfigRequest(name=metadata.name), ModelConfigResponse)
        except EndpointError as error:
            raise EndpointError(f"{error}; it states no contract: give the bundle with --bundle") from error
        return {name: entry.string_value for name, entry in answer.config.parameters.items()}

    def _require_tensors(self, team: TeamSpec, model: str, metadata: oip.ModelMetadataResponse) -> None:
        expected = {t.name: (t.datatype, list(t.shape(-1))) for t in input_tensors(team, model)}
        got = {t.name: (t.datatype, list(t.shape)) for t in metadata.inputs}
        if got != expected:
            raise EndpointError(
                f"{self.endpoint}: {model}: expected inputs {expected}, got {got}: serve the bundle of this team"
            )

    def _call(self, method: str, request: Any, answer_type: Any) -> Any:
        ask = self._method(method, answer_type)
        try:
            return ask(request, timeout=self.remaining_s, metadata=self.metadata)
        except grpc.RpcError as error:
            raise self._failure(error, method) from error

    def _method(self, method: str, answer_type: Any) -> Any:
        untyped: Any = self.channel
        return untyped.unary_unary(
            SERVICE + method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_type.FromString,
        )


class OpenModels(ServedModels):
    """Models of such a server: a call for each, all at once."""

    def _transport_to(self, server: ServerConnection, deadline_s: float, stream: bool) -> Calls:
        if stream:
            raise ConfigError(
                "stream: expected none, as the Open Inference Protocol has calls alone: leave it out"
            )
        self._server = server
        self._arrivals = Arrivals(oip.ModelInferResponse.FromString)
        return Calls(server.channel, deadline_s, self._arrivals, server.metadata, SERVICE + "ModelInfer")

    def _messages(self, rows: Mapping[str, Rows]) -> list[bytes]:
        self._begin()
        self._batch = len(rows[self.models[0]]["observation"])
        return [self._request(model, rows[model]) for model in self.models]

    def _request(self, model: str, rows: Rows) -> bytes:
        request = oip.ModelInferRequest(model_name=model, model_version=self._version, id=str(self._step_id))
        if isinstance(self._server, OpenServer) and self._server.states_digest:
            request.parameters[DIGEST].string_param = self._bundle_digest
        for tensor in self._inputs[model]:
            data = (
                tensor.encode(rows[tensor.name]) if tensor.name in rows else bytes(tensor.size(self._batch))
            )
            request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape(self._batch))
            request.raw_input_contents.append(data)
        return request.SerializeToString()

    def _read(self, messages: Sequence[Any]) -> dict[str, Outputs]:
        return {
            model: self._outputs_of(model, answer)
            for model, answer in zip(self.models, messages, strict=True)
        }

    def _outputs_of(self, model: str, answer: oip.ModelInferResponse) -> Outputs:
        if answer.id not in ("", str(self._step_id)) or answer.model_name != model:
            raise self._mixed_up(
                f"the answer to step {self._step_id} of {model}", f"{answer.id} of {answer.model_name}"
            )
        known = {tensor.name: tensor for tensor in self._outputs[model]}
        outputs = {}
        for index, entry in enumerate(answer.outputs):
            tensor = known.pop(entry.name, None)
            if tensor is not None:
                raw = answer.raw_output_contents[index : index + 1]
                data = raw[0] if raw else tensor.encode(_numbers(entry, tensor))
                outputs[entry.name] = self._array(tensor, data)
        if missing := known.keys() - {"policy_weight"}:
            raise self._mixed_up(f"outputs {', '.join(sorted(missing))}", f"{', '.join(outputs) or 'none'}")
        return outputs

    def _array(self, tensor: Tensor, data: bytes) -> Any:
        if len(data) != (size := tensor.size(self._batch)):
            raise self._mixed_up(f"{size} bytes of {tensor.name}", f"{len(data)}")
        return tensor.decode(data, self._batch).copy()


def _numbers(entry: Any, tensor: Tensor) -> Any:
    """Return an output that was sent as numbers rather than bytes."""
    return np.array(getattr(entry.contents, CONTENTS[tensor.datatype]))


def _version(metadata: oip.ModelMetadataResponse) -> str:
    """Return the version that answers new episodes: the one that the server states, or its highest."""
    stated = metadata.properties.get("current_version", "")
    return stated or max(
        metadata.versions, key=lambda name: (name.isdecimal() and int(name), name), default=""
    )
