"""``omcda.v1.PolicyService``: the protocol of this package's own client, lighter than the open one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import grpc

from omcda_deploy.bundle import TEAM
from omcda_deploy.errors import ContractError
from omcda_deploy.protos import policy_pb2
from omcda_deploy.protos.packing import tag, varint
from omcda_deploy.serve.handlers import CallTracker, service_handlers
from omcda_deploy.serve.recording import require_origin
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.session import NAME_LIMIT
from omcda_deploy.serve.status import RequestError
from omcda_deploy.serve.wire import WireTensors

Act: TypeAlias = Callable[[policy_pb2.ActRequest], bytes]

OTHERS = tag(policy_pb2.ActResponse.OTHERS_FIELD_NUMBER)
SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name


class PolicyService:
    """Translates the messages of ``omcda.v1``; each method takes a request and returns a serialised response."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases

    def get_contract(self, request: policy_pb2.GetContractRequest) -> bytes:
        """Describe the team and the models of a version."""
        models = self._releases.models(request.model_version)
        bundle = models.bundle
        return policy_pb2.GetContractResponse(
            model_version=models.version,
            models=list(models.sessions),
            team=json.dumps(bundle.spec.to_json()),
            contract_hash=models.contract_hash,
            bundle_digest=models.digest,
            divergence_kind=bundle.divergence_kind,
            budgets={name: budget for name, budget in bundle.budgets.items() if budget is not None},
        ).SerializeToString()

    def act(self, request: policy_pb2.ActRequest) -> bytes:
        """Answer one control step of one model, for one or more rows, and the steps that came with it."""
        return together(self._act)(request)

    def _act(self, request: policy_pb2.ActRequest) -> bytes:
        session = self._releases.find(request.model, request.model_version, request.bundle_digest)
        self._require_contract(request.contract_hash)
        tensors = WireTensors(request.batch, request.observation, request.noise, request.action_mask)
        require_origin(request.episode_id, request.temperature)
        answer: Mapping[str, Any] = self._releases.answer(session, tensors, request)
        return policy_pb2.ActResponse(
            step_id=request.step_id, model_version=session.version, batch=request.batch, **answer
        ).SerializeToString()

    def team_act(self, request: policy_pb2.ActRequest) -> bytes:
        """Answer one control step of all agents by the joint graph."""
        if request.model not in ("", TEAM):
            raise RequestError(
                f"TeamAct: expected model {TEAM} or none, got {request.model[:NAME_LIMIT]!r}: call Act for an agent"
            )
        request.model = TEAM
        return self.act(request)

    def _require_contract(self, contract_hash: str) -> None:
        """Raise :class:`ContractError` if the caller was built for another contract than all versions here have."""
        if contract_hash and contract_hash != self._releases.contract_hash:
            raise ContractError(
                f"the caller was built for contract {contract_hash[:12]}, this server's is "
                f"{self._releases.contract_hash[:12]}: call GetContract and compare the team"
            )

    def handlers(self, tracker: CallTracker) -> grpc.GenericRpcHandler:
        return service_handlers(
            SERVICE,
            tracker,
            {
                "GetContract": (policy_pb2.GetContractRequest, self.get_contract),
                "Act": (policy_pb2.ActRequest, self.act),
                "TeamAct": (policy_pb2.ActRequest, self.team_act),
            },
            {"ActStream": (policy_pb2.ActRequest, lambda: together(StreamMemory(self._act)))},
        )


def together(act: Act) -> Act:
    """Return a function that answers a step and those that came with it, by ``act`` one after another.

    It raises :class:`RequestError` for a step of a model that has one already, so that a message takes no longer
    than all models do, and for steps that came with those.
    """

    def answer(request: policy_pb2.ActRequest) -> bytes:
        if not request.others:
            return act(request)
        models = [request.model, *(other.model for other in request.others)]
        if len(set(models)) < len(models):
            raise RequestError(
                f"expected one step of each model in a request, got {len(models)} of {len(set(models))} models"
            )
        if any(other.others for other in request.others):
            raise RequestError("others: expected steps without others of their own: put all into one list")
        parts = [act(request)]
        for response in map(act, request.others):
            parts += (OTHERS, varint(len(response)), response)
        return b"".join(parts)

    return answer


class StreamMemory:
    """Answers the control steps of one stream; a step that is sent again is not run again.

    It remembers the last request and response of each model, so a new step costs the comparison of two numbers.
    """

    def __init__(self, act: Act) -> None:
        self._act = act
        self._last: dict[str, tuple[int, policy_pb2.ActRequest, bytes]] = {}

    def __call__(self, request: policy_pb2.ActRequest) -> bytes:
        """Return the response to a step.

        Raises :class:`RequestError` for another step under the last one's id, and what ``act`` raises.
        """
        model, step_id = request.model, request.step_id
        if step_id and (last := self._last.get(model)) and step_id == last[0]:
            if request == last[1]:
                return last[2]
            if not request.reset:
                raise RequestError(
                    f"step {step_id} of {model} was another one before: expected the same request again, or a new "
                    "step_id; a request with reset begins an episode, and its ids anew"
                )
        response = self._act(request)
        self._last[model] = step_id, request, response
        return response
