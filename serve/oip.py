"""``inference.GRPCInferenceService``: the Open Inference Protocol v2, for stock clients.

Models are the agents (``agent_0``) and ``team``, version 1; their tensors are those of the bundle's graphs
(:mod:`omcda_deploy.bundle`). ``noise`` may be left out, for the deterministic action.
"""

from __future__ import annotations

import grpc

from omcda_deploy import __version__
from omcda_deploy.protos import oip
from omcda_deploy.serve.handlers import Traffic, methods
from omcda_deploy.serve.oip_messages import inputs_of, metadata_of, response_of, wanted_outputs
from omcda_deploy.serve.session import VERSION, Models

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class InferenceService:
    def __init__(self, models: Models) -> None:
        bundle = models.bundle
        self.ready = True
        self._models = models
        self._properties = {
            "contract_hash": models.contract_hash,
            "bundle_digest": models.digest,
            "divergence_kind": bundle.divergence_kind,
            "task": bundle.spec.task,
            "control_rate": str(bundle.spec.control_rate),
        }

    def model_ready(self, request: oip.ModelReadyRequest) -> oip.ModelReadyResponse:
        self._models.find(request.name, request.version)
        return oip.ModelReadyResponse(ready=True)

    def server_metadata(self, request: oip.ServerMetadataRequest) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(name="omcda-deploy", version=__version__)

    def model_metadata(self, request: oip.ModelMetadataRequest) -> oip.ModelMetadataResponse:
        session = self._models.find(request.name, request.version)
        return metadata_of(session, [VERSION], self._properties)

    def model_infer(self, request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        session = self._models.find(request.model_name, request.model_version)
        wanted = wanted_outputs(request, session)
        return response_of(request, session, wanted, session.answer(inputs_of(request, session)))

    def handlers(self, traffic: Traffic) -> grpc.GenericRpcHandler:
        return methods(
            SERVICE,
            traffic,
            {
                "ServerLive": (oip.ServerLiveRequest, lambda _: oip.ServerLiveResponse(live=True)),
                "ServerReady": (oip.ServerReadyRequest, lambda _: oip.ServerReadyResponse(ready=self.ready)),
                "ModelReady": (oip.ModelReadyRequest, self.model_ready),
                "ServerMetadata": (oip.ServerMetadataRequest, self.server_metadata),
                "ModelMetadata": (oip.ModelMetadataRequest, self.model_metadata),
                "ModelInfer": (oip.ModelInferRequest, self.model_infer),
            },
        )
