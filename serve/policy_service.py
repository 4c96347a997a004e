"""``omcda.v1.PolicyService``: the light protocol of our own client."""

from __future__ import annotations

import json
from collections.abc import Callable

import grpc

from omcda_deploy.bundle import TEAM
from omcda_deploy.errors import ContractError
from omcda_deploy.protos import policy_pb2
from omcda_deploy.serve.handlers import Traffic, methods
from omcda_deploy.serve.policy_messages import inputs_of
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.session import NAME_LIMIT
from omcda_deploy.serve.status import RequestError

SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name


class PolicyService:
    def __init__(self, releases: Releases) -> None:
        self._releases = releases

    def get_contract(self, request: policy_pb2.GetContractRequest) -> bytes:
        held = self._releases.models(request.model_version)
        bundle = held.bundle
        return policy_pb2.GetContractResponse(
            model_version=held.version,
            models=list(held.sessions),
            team=json.dumps(bundle.spec.to_json()),
            contract_hash=held.contract_hash,
            bundle_digest=held.digest,
            divergence_kind=bundle.divergence_kind,
            budgets={name: budget for name, budget in bundle.budgets.items() if budget is not None},
        ).SerializeToString()

    def act(self, request: policy_pb2.ActRequest) -> bytes:
        session = self._releases.find(request.model, request.model_version)
        self._require_contract(request.contract_hash)
        answer = None
        if request.batch == 1:
            answer = self._releases.step(session, request.observation, request.noise, request.action_mask)
        if answer is None:
            answer = session.encode(self._releases.answer(session, inputs_of(request, session)))
        return policy_pb2.ActResponse(
            step_id=request.step_id, model_version=session.version, batch=request.batch, **answer
        ).SerializeToString()

    def team_act(self, request: policy_pb2.ActRequest) -> bytes:
        if request.model not in ("", TEAM):
            raise RequestError(
                f"TeamAct: expected model {TEAM} or none, got {request.model[:NAME_LIMIT]!r}: call Act for an agent"
            )
        request.model = TEAM
        return self.act(request)

    def _require_contract(self, stated: str) -> None:
        """All versions have one contract. Raises :class:`ContractError` when the caller was built for another."""
        if stated and stated != self._releases.contract_hash:
            raise ContractError(
                f"the caller was built for contract {stated[:12]}, this server's is "
                f"{self._releases.contract_hash[:12]}: call GetContract and compare the team"
            )

    def handlers(self, traffic: Traffic) -> grpc.GenericRpcHandler:
        return methods(
            SERVICE,
            traffic,
            {
                "GetContract": (policy_pb2.GetContractRequest, self.get_contract),
                "Act": (policy_pb2.ActRequest, self.act),
                "TeamAct": (policy_pb2.ActRequest, self.team_act),
            },
            {"ActStream": (policy_pb2.ActRequest, lambda: Steps(self.act))},
        )


class Steps:
    """The control steps of one stream: a step that is sent again is not run again.

    What is kept is the last request and response of each model, so a new step costs the comparison of two numbers.
    """

    def __init__(self, act: Callable[[policy_pb2.ActRequest], bytes]) -> None:
        self._act = act
        self._last: dict[str, tuple[int, policy_pb2.ActRequest, bytes]] = {}

    def __call__(self, request: policy_pb2.ActRequest) -> bytes:
        """Raises :class:`RequestError` for another step under the last one's id, and what ``act`` raises."""
        model, step = request.model, request.step_id
        if step and (last := self._last.get(model)) and step == last[0]:
            if request == last[1]:
                return last[2]
            if not request.reset:
                raise RequestError(
                    f"step {step} of {model} was another one before: expected the same request again, or a new "
                    "step_id; a request with reset begins an episode, and its ids anew"
                )
        response = self._act(request)
        self._last[model] = step, request, response
        return response
