"""``inference.GRPCInferenceService``: the Open Inference Protocol v2, for stock clients.

Models are the agents (``agent_0``) and ``team``; their tensors are those of the bundle's graphs
(:mod:`omcda_deploy.bundle`). ``noise`` may be left out, for the deterministic action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from omcda_deploy import __version__
from omcda_deploy.protos import oip
from omcda_deploy.serve.handlers import Traffic, methods
from omcda_deploy.serve.oip_messages import (
    inputs_of,
    metadata_of,
    response_of,
    step_of,
    wanted_outputs,
)
from omcda_deploy.serve.releases import Releases

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class InferenceService:
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
        properties = {
            "contract_hash": models.contract_hash,
            "bundle_digest": models.digest,
            "divergence_kind": models.bundle.divergence_kind,
            "task": models.bundle.spec.task,
            "control_rate": str(models.bundle.spec.control_rate),
            "current_version": self._releases.current,
        }
        versions = [held.version for held, _ in self._releases.held()]
        return metadata_of(models.find(request.name), versions, properties)

    def model_infer(self, request: oip.ModelInferRequest) -> bytes:
        session = self._releases.find(request.model_name, request.model_version)
        wanted = wanted_outputs(request, session)
        rows, answer = 1, None
        if (given := step_of(request, session)) is not None:
            answer = self._releases.step(session, *given)
        if answer is None:
            outputs = self._releases.answer(session, inputs_of(request, session))
            rows, answer = len(outputs["action"]), session.encode(outputs)
        return response_of(request, session, wanted, rows, answer)

    def handlers(self, traffic: Traffic) -> grpc.GenericRpcHandler:
        return methods(
            SERVICE,
            traffic,
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
