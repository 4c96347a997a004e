"""KServe's manifests agree with the server, with each other and with Kubernetes' schemas of what is a pod's.

KServe's own custom resources are not validated here: their schemas are megabytes of another project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from omcda_deploy.bundle import TEAM
from omcda_deploy.serve import oip
from omcda_deploy.serve.options import Listen
from tests.serve.test_deploy import DEPLOY, SCHEMAS, options_of

FOLDER = DEPLOY / "kserve"


def documents(kind: str) -> list[dict[str, Any]]:
    files = sorted(FOLDER.glob("*.yaml"))
    found = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    return [document for document in found if document["kind"] == kind]


@pytest.mark.parametrize("version", SCHEMAS)
def test_the_runtimes_container_is_one_of_a_pod(version: str) -> None:
    (runtime,) = documents("ServingRuntime")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "policy"},
        "spec": {"containers": runtime["spec"]["containers"]},
    }
    kubernetes_validate.validate(pod, version, strict=True)
    for service in documents("InferenceService"):
        model = service["spec"]["predictor"]["model"]
        container = {key: model[key] for key in ("ports", "resources") if key in model}
        pod["spec"] = {"containers": [{"name": "kserve-container", **container}]}
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_runtime_starts_our_server(monkeypatch: pytest.MonkeyPatch) -> None:
    (runtime,) = documents("ServingRuntime")
    (container,) = runtime["spec"]["containers"]
    options = options_of(monkeypatch, container["args"])
    assert options.listen == Listen("::", 8500, 9600, None, 9700)
    assert options.source == Path("/mnt/models")  # where KServe puts a model
    assert list(options.models) == [TEAM]
    assert [port["containerPort"] for port in container["ports"]] == [8500]
    probes = [container[f"{name}Probe"]["grpc"] for name in ("startup", "readiness", "liveness")]
    assert {probe["port"] for probe in probes} == {9700}
    assert {probe.get("service", "") for probe in probes} == {"", oip.SERVICE}


def test_the_services_name_runtimes_and_formats_that_there_are() -> None:
    (runtime,) = documents("ServingRuntime")
    formats = {entry["name"] for entry in runtime["spec"]["supportedModelFormats"]}
    known = {runtime["metadata"]["name"]: formats, "kserve-tritonserver": {"triton"}}
    services = documents("InferenceService")
    assert len(services) == 2
    for service in services:
        predictor = service["spec"]["predictor"]
        model = predictor["model"]
        assert model["modelFormat"]["name"] in known.pop(model["runtime"])
        assert (model["protocolVersion"], predictor["maxReplicas"]) == ("grpc-v2", 1)
        assert model["storageUri"].startswith("pvc://policy-releases/")
