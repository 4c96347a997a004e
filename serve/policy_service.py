"""``omcda.v1.PolicyService``: the light protocol of our own client."""

from __future__ import annotations

import json

import grpc

from omcda_deploy.protos import policy_pb2
from omcda_deploy.serve.handlers import Traffic, methods
from omcda_deploy.serve.policy_messages import inputs_of, response_of
from omcda_deploy.serve.session import VERSION, Models

SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name


class PolicyService:
    def __init__(self, models: Models) -> None:
        self._models = models

    def get_contract(self, request: policy_pb2.GetContractRequest) -> policy_pb2.GetContractResponse:
        self._models.require_version(request.model_version)
        bundle = self._models.bundle
        return policy_pb2.GetContractResponse(
            model_version=VERSION,
            models=list(self._models.sessions),
            team=json.dumps(bundle.spec.to_json()),
            contract_hash=self._models.contract_hash,
            bundle_digest=self._models.digest,
            divergence_kind=bundle.divergence_kind,
            budgets={name: budget for name, budget in bundle.budgets.items() if budget is not None},
        )

    def act(self, request: policy_pb2.ActRequest) -> policy_pb2.ActResponse:
        session = self._models.find(request.model, request.model_version)
        self._models.require_contract(request.contract_hash)
        return response_of(request, session, session.answer(inputs_of(request, session)))

    def handlers(self, traffic: Traffic) -> grpc.GenericRpcHandler:
        return methods(
            SERVICE,
            traffic,
            {
                "GetContract": (policy_pb2.GetContractRequest, self.get_contract),
                "Act": (policy_pb2.ActRequest, self.act),
            },
            {"ActStream": (policy_pb2.ActRequest, self.act)},
        )
