"""Container file and Kubernetes manifests: they agree with each other, with the schemas and with the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
import tomllib
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import omcda_deploy
from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.serve import oip, policy_service, server
from omcda_deploy.serve.config import Limits, read_server_config
from omcda_deploy.serve.options import Listen, ServeOptions
from omcda_deploy.serve.repository import CURRENT, Repository
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.hostile import CHECK, WATCH, HostileConnection
from tests.support.server_process import free_port, server_process

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serve" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
SCHEMAS = ("1.27", "1.37")  # the first with stable gRPC probes, and the newest that is installed
OVERLAYS = {"agents": [f"agent_{index}" for index in range(6)], "team": [TEAM]}
COMPONENT = "app.kubernetes.io/component"
HEALTH_SERVICES = ("", oip.SERVICE, policy_service.SERVICE)

Document = dict[str, Any]


# -- the container file --------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def options_of(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> ServeOptions:
    """Return the options with which the server's own ``main`` would start it."""
    started: list[ServeOptions] = []
    monkeypatch.setattr(server, "serve", started.append)
    monkeypatch.setattr(server, "configure_logging", lambda json_lines: None)
    assert server.main(arguments) == 0
    (options,) = started
    return options


def test_the_image_gets_what_the_package_is_built_from() -> None:
    copied = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    sources = {source for line in copied for source in line}
    assert all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = project["tool"]["setuptools"]["package-dir"].values()
    assert sources == {
        *("omcda_deploy", *folders, "pyproject.toml", "constraints.txt"),
        *(project["project"]["readme"], *project["project"]["license-files"]),
    }
    (install,) = (rest for word, rest in instructions() if word == "RUN")
    assert shlex.split(install)[-1] == "/src[serve]"


def test_the_image_starts_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    words = dict(instructions())
    entry, command = json.loads(words["ENTRYPOINT"]), json.loads(words["CMD"])
    assert entry == ["python", "-m", server.__package__]
    options = options_of(monkeypatch, command)
    (pod,) = pods("server/deployment.yaml")
    assert options.listen == Listen("0.0.0.0", 8500, 9600, 9500, 9700)
    assert sorted(map(int, words["EXPOSE"].split())) == [
        port["containerPort"] for port in pod["containers"][0]["ports"]
    ]
    assert int(words["USER"].split(":")[0]) == pod["securityContext"]["runAsUser"] > 0


# -- manifests -----------------------------------------------------------------------------------------------


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


def pods(name: str) -> list[Document]:
    return [document["spec"]["template"]["spec"] for document in documents(KUBERNETES / name)]


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rendered(overlay: str) -> list[Document]:
    """Render the manifests that  kubectl apply -k  would send to a cluster; no cluster is needed."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, for its kustomize")
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / overlay)],
        capture_output=True,
        text=True,
        env={**os.environ, "KUBECONFIG": os.devnull},
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(rendered: list[Document], kind: str) -> list[Document]:
    documents = [document for document in rendered if document["kind"] == kind]
    assert documents
    return documents


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
@pytest.mark.parametrize("version", SCHEMAS)
def test_manifests_fit_the_schemas(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)
        broken = {**document, "spec": {**document["spec"], "replica": 1}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, version, strict=True)


def test_rendered_manifests_fit_the_schemas(rendered: list[Document]) -> None:
    for document in rendered:
        for version in SCHEMAS:
            kubernetes_validate.validate(document, version, strict=True)


def test_every_model_has_one_server_that_its_service_finds(overlay: str, rendered: list[Document]) -> None:
    deployments, services = of_kind(rendered, "Deployment"), of_kind(rendered, "Service")
    models = [deployment["metadata"]["labels"][COMPONENT] for deployment in deployments]
    assert models == OVERLAYS[overlay]
    for deployment, service in zip(deployments, services, strict=True):
        spec = deployment["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert service["metadata"]["name"] == deployment["metadata"]["name"]
        assert service["spec"]["selector"] == spec["selector"]["matchLabels"] == labels
        (container,) = spec["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert [ports[port["targetPort"]] for port in service["spec"]["ports"]] == [8500]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
        assert container["image"].endswith(f":{omcda_deploy.__version__}")
    selectors = [json.dumps(service["spec"]["selector"], sort_keys=True) for service in services]
    assert len(set(selectors)) == len(services), "a service finds servers of several agents"


def test_servers_are_started_as_their_ports_probes_and_files_say(
    rendered: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = of_kind(rendered, "ConfigMap")
    (claim,) = of_kind(rendered, "PersistentVolumeClaim")
    ((name, text),) = config["data"].items()
    (tmp_path / name).write_text(text)
    for deployment in of_kind(rendered, "Deployment"):
        template = deployment["spec"]["template"]
        pod, model = template["spec"], template["metadata"]["labels"][COMPONENT]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/releases"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (config_at,) = (at for at, volume in mounts.items() if "configMap" in volume)
        assert mounts[config_at]["configMap"]["name"] == config["metadata"]["name"]
        (variable,) = container["env"]
        assert variable["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{COMPONENT}']"
        arguments = [a.replace(f"$({variable['name']})", model) for a in container["args"]]
        assert f"--config={config_at}/{name}" in arguments
        options = options_of(monkeypatch, [a.replace(config_at, str(tmp_path)) for a in arguments])
        assert (options.source, options.models) == (Path("/releases"), (model,))
        read_server_config(options.config)
        assert options.log_json
        listen = options.listen
        reachable = {"grpc": listen.port, "metrics": listen.metrics_port, "health": listen.health_port}
        assert {port["name"]: port["containerPort"] for port in container["ports"]} == reachable
        assert listen.admin_port not in reachable.values()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["grpc"]
            assert asked["port"] == listen.health_port
            assert asked.get("service", "") in HEALTH_SERVICES
        scraped = template["metadata"]["annotations"]
        assert scraped["prometheus.io/port"] == str(listen.metrics_port)
        assert pod["terminationGracePeriodSeconds"] > options.grace_s + server.NOTICE_S + 1


def mebibytes(quantity: str) -> int:
    assert quantity.endswith("Mi")
    return int(quantity.removesuffix("Mi"))


def test_memory_and_probes_fit_what_callers_may_occupy(rendered: list[Document], tmp_path: Path) -> None:
    """The arithmetic of docs/serving.md: an idle server, and each place twice with the largest message."""
    (config,) = of_kind(rendered, "ConfigMap")
    file = tmp_path / "serve.toml"
    file.write_text(next(iter(config["data"].values())))
    limits = read_server_config(file).limits
    assert limits == Limits(), "the manifests state other limits than the defaults"
    places = limits.concurrent_calls + limits.streams + limits.large_requests
    for deployment in of_kind(rendered, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        resources = container["resources"]
        idle = mebibytes(resources["requests"]["memory"])
        assert idle + 2 * places * limits.message_bytes / 2**20 < mebibytes(resources["limits"]["memory"])
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["timeoutSeconds"] >= 5, "a busy machine is no dead server"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for its kustomize")
@pytest.mark.parametrize("base", OVERLAYS)
def test_two_teams_share_a_namespace(base: str, tmp_path: Path) -> None:
    """As docs/serving.md says: each has a prefix and an instance."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    page = (ROOT / "docs" / "serving.md").read_text()
    (overlay,) = re.findall(r"```yaml\n(# left/kustomization.yaml\n.*?)```", page, flags=re.DOTALL)
    teams = []
    for name in ("left", "right"):
        folder = tmp_path / "kubernetes" / name
        folder.mkdir()
        text = overlay.replace("left", name).replace("../agents", f"../{base}")
        (folder / "kustomization.yaml").write_text(text)
        done = subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True
        )
        teams.append(list(yaml.safe_load_all(done.stdout)))
    left, right = teams
    assert not {(d["kind"], d["metadata"]["name"]) for d in left} & {
        (d["kind"], d["metadata"]["name"]) for d in right
    }
    for service in of_kind(left, "Service"):
        chosen = service["spec"]["selector"].items()
        pods = [d["spec"]["template"]["metadata"]["labels"].items() for d in of_kind(left, "Deployment")]
        others = [d["spec"]["template"]["metadata"]["labels"].items() for d in of_kind(right, "Deployment")]
        assert sum(chosen <= labels for labels in pods) == 1
        assert not any(chosen <= labels for labels in others), "it finds servers of the other team"
    (policy,) = of_kind(left, "NetworkPolicy")
    client = {"key": "omcda-deploy/client", "operator": "In", "values": ["true"]}
    assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": {"matchExpressions": [client]}}]


def test_the_volume_can_be_filled() -> None:
    (pod,) = documents(KUBERNETES / "fill" / "pod.yaml")
    (server_pod,) = pods("server/deployment.yaml")
    assert pod["spec"]["securityContext"] == server_pod["securityContext"], "may not write, or may be refused"
    mine, theirs = ({v["name"]: v for v in spec["volumes"]}["releases"] for spec in (pod["spec"], server_pod))
    assert mine == theirs
    (fill,), (serving,) = pod["spec"]["containers"], server_pod["containers"]
    assert fill["securityContext"] == serving["securityContext"]
    assert fill["volumeMounts"] == [{"name": "releases", "mountPath": "/releases"}]


def test_the_configuration_holds_with_tls_and_tokens_too(rendered: list[Document], tmp_path: Path) -> None:
    (config,) = of_kind(rendered, "ConfigMap")
    ((name, text),) = config["data"].items()
    file = tmp_path / name
    file.write_text(text)
    assert read_server_config(file).tls is None
    file.write_text(re.sub(r"^# (?=\[|\w+ =)", "", text, flags=re.MULTILINE))
    read = read_server_config(file)
    assert read.tls is not None
    assert read.tls.client_ca is not None
    assert read.token_file is not None
    folders = {Path(at).parent for at in (read.tls.certificate, read.tls.key, read.tls.client_ca)}
    (container,) = of_kind(rendered, "Deployment")[0]["spec"]["template"]["spec"]["containers"]
    mounts = {Path(mount["mountPath"]): mount["name"] for mount in container["volumeMounts"]}
    assert [mounts[at] for at in (*folders, read.token_file.parent)] == ["tls", "access"]


def test_only_policies_and_metrics_can_be_reached(rendered: list[Document]) -> None:
    (policy,) = of_kind(rendered, "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["egress"] == []
    assert [rule["ports"] for rule in policy["spec"]["ingress"]] == [[{"port": 8500}], [{"port": 9600}]]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    labels = policy["spec"]["podSelector"]["matchLabels"].items()
    for deployment in of_kind(rendered, "Deployment"):
        assert labels <= deployment["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("host", ["::", "0.0.0.0"])
def test_a_server_of_all_addresses_is_found_at_each(continuous_bundle: Bundle, host: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    metrics, health = free_port(), free_port()
    options = ("--host", host, "--metrics-port", str(metrics), "--health-port", str(health))
    with server_process(continuous_bundle, "agent_0", options=options) as process:
        port = process.endpoint.rpartition(":")[2]
        for address in ("127.0.0.1", "[::1]") if host == "::" else ("127.0.0.1",):
            for place in (port, health):
                with grpc.insecure_channel(f"{address}:{place}") as channel:
                    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            with urlopen(f"http://{address}:{metrics}/metrics", timeout=5) as answer:
                assert b"omcda_answers_total" in answer.read()


def test_without_ipv6_all_addresses_are_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: int, kind: int) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr("omcda_deploy.serve.options.socket.socket", refuse)
    assert Listen("::", 8500).usable() == Listen("0.0.0.0", 8500)
    assert Listen("10.0.0.1", 8500).usable() == Listen("10.0.0.1", 8500)


# -- requirements of the manifests to the server -------------------------------------------------------------------


def test_probes_need_neither_token_nor_a_free_place(continuous_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("sesame\n")
    config = tmp_path / "serve.toml"
    config.write_text('[limits]\nconcurrent_calls = 1\nstreams = 1\n[access]\ntoken_file = "tokens"\n')
    port = free_port()
    options = ("--config", str(config), "--health-port", str(port))
    with (
        server_process(continuous_bundle, "agent_0", options=options) as process,
        grpc.insecure_channel(process.endpoint) as busy,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ExitStack() as stack,
    ):
        held = [stack.enter_context(closing(HostileConnection(process.endpoint))) for _ in range(4)]
        for connection in held:
            for _ in range(30):
                connection.open(WATCH, b"")
                connection.open(CHECK)
        time.sleep(0.2)
        health_pb2_grpc.HealthStub(busy).Check(health_pb2.HealthCheckRequest(), timeout=5)
        health = health_pb2_grpc.HealthStub(channel)
        for service in HEALTH_SERVICES:
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            channel.unary_unary(f"/{policy_service.SERVICE}/GetContract")(b"", timeout=5)  # type: ignore[arg-type]
        ends = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(ends).status == health_pb2.HealthCheckResponse.SERVING
        process.process.send_signal(signal.SIGTERM)
        assert next(ends).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert process.process.wait(10) == 0


def test_servers_of_one_folder_note_the_version_at_once(tmp_path: Path) -> None:
    """In containers they all have the same process id."""
    write_test_bundle(tmp_path / "1", continuous_spec())
    failures: list[BaseException] = []

    def note() -> None:
        try:
            for _ in range(30):
                Repository(tmp_path).write_current("1", "")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=note) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", CURRENT]
