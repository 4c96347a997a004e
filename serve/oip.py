"""``inference.GRPCInferenceService``: the Open Inference Protocol v2, for stock clients.

Models are the agents (``agent_0``) and ``team``; their tensors are those of the bundle's graphs
(:mod:`omcda_deploy.bundle`). Without ``noise`` the action is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from omcda_deploy.protos import oip
from omcda_deploy.protos.model_config import contract_parameters
from omcda_deploy.serve.handlers import CallTracker, service_handlers
from omcda_deploy.serve.oip_messages import (
    encode_response,
    model_metadata,
    requested_outputs,
    wire_tensors,
)
from omcda_deploy.serve.recording import origin_of, parameter_of
from omcda_deploy.serve.releases import Releases
from omcda_deploy.version import __version__

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class InferenceService:
    """Translates the messages of the Open Inference Protocol.

    ``ready``: False when the server is about to stop.
    """

    def __init__(self, releases: Releases) -> None:
        self.ready = True
        self._releases = releases

    def model_ready(self, request: oip.ModelReadyRequest) -> oip.ModelReadyResponse:
        self._releases.find(request.name, request.version)
        return oip.ModelReadyResponse(ready=True)

    def server_metadata(self, request: oip.ServerMetadataRequest) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(name="omcda-deploy", version=__version__)

    def model_metadata(self, request: oip.ModelMetadataRequest) -> oip.ModelMetadataResponse:
        models = self._releases.models(request.version)
        bundle = models.bundle
        properties = contract_parameters(bundle.spec, bundle.divergence_kind, bundle.budgets) | {
            "bundle_digest": models.digest,
            "task": bundle.spec.task,
            "control_rate": str(bundle.spec.control_rate),
            "current_version": self._releases.current,
        }
        versions = [version.models.version for version in self._releases.held_versions()]
        return model_metadata(models.find(request.name), versions, properties)

    def model_infer(self, request: oip.ModelInferRequest) -> bytes:
        """Answer one inference request; returns the serialised response."""
        digest = parameter_of(request, "bundle_digest") if "bundle_digest" in request.parameters else ""
        session = self._releases.find(request.model_name, request.model_version, digest)
        outputs = requested_outputs(request, session)
        tensors = wire_tensors(request, session)
        if request.parameters:
            origin_of(request)  # which the recorder reads later
        answer = self._releases.answer(session, tensors, request)
        return encode_response(request, session, outputs, tensors.batch, answer)

    def handlers(self, tracker: CallTracker) -> grpc.GenericRpcHandler:
        return service_handlers(
            SERVICE,
            tracker,
            {
                "ServerLive": (
                    oip.ServerLiveRequest,
                    _serialized(lambda _: oip.ServerLiveResponse(live=True)),
                ),
                "ServerReady": (
                    oip.ServerReadyRequest,
                    _serialized(lambda _: oip.ServerReadyResponse(ready=self.ready)),
                ),
                "ModelReady": (oip.ModelReadyRequest, _serialized(self.model_ready)),
                "ServerMetadata": (oip.ServerMetadataRequest, _serialized(self.server_metadata)),
                "ModelMetadata": (oip.ModelMetadataRequest, _serialized(self.model_metadata)),
                "ModelInfer": (oip.ModelInferRequest, self.model_infer),
            },
        )


def _serialized(answer: Callable[[Any], Message]) -> Callable[[Any], bytes]:
    return lambda request: answer(request).SerializeToString()
