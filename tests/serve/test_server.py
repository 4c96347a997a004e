"""The server process: start, limits of what it imports, introspection, drain."""

from __future__ import annotations

import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.remote import RemotePolicy
from omcda_deploy.errors import EndpointError
from omcda_deploy.protos import oip, policy_pb2, policy_pb2_grpc
from omcda_deploy.serve import server as server_module
from omcda_deploy.serve.options import LOOPBACK
from tests.support.server_process import ServerProcess, server_process

GRACE_S = 5.0


# Refusals --------------------------------------------------------------------------------------------------


def one_error_line(status: int, output: str, errors: str) -> str:
    assert status == 2, errors
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    return errors


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error line of a server that does not start, run in this process."""
    status = server_module.main(arguments)
    return one_error_line(status, *capsys.readouterr())


def test_a_process_that_cannot_start_says_so_in_one_line(
    continuous_bundle: Bundle, continuous_server: ServerProcess
) -> None:
    port = continuous_server.endpoint.rpartition(":")[2]
    command = [sys.executable, "-m", "omcda_deploy.serve", str(continuous_bundle.path), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    line = one_error_line(done.returncode, done.stdout, done.stderr)
    assert f"{LOOPBACK}:{port}" in line
    assert "in use" in line


def test_a_port_taken_after_it_was_checked_is_not_shared(
    continuous_bundle: Bundle,
    continuous_server: ServerProcess,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC lets two servers share a port unless an option forbids it."""
    monkeypatch.setattr(server_module, "require_free", lambda host, port: None)
    port = continuous_server.endpoint.rpartition(":")[2]
    line = refusal(capsys, str(continuous_bundle.path), "--model", "agent_0", "--port", port)
    assert "cannot listen on" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "agent_O"), "unknown agent 'agent_O'"),
        (("--host", "192.0.2.1"), "192.0.2.1:0"),  # no address of this machine
        (("--port", "99999"), "99999"),
    ],
)
def test_bad_settings_are_one_clear_line(
    continuous_bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, str(continuous_bundle.path), *arguments)


def test_a_folder_without_bundles_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected a bundle, or a folder of bundles" in refusal(capsys, str(tmp_path))


def test_serving_imports_neither_torch_nor_the_command_line(continuous_bundle: Bundle) -> None:
    code = """if True:
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {"torch", "onnx", "typer", "rich", "gymnasium", "mujoco", "h5py"}:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        import omcda_deploy.serve.supervisor
        from omcda_deploy.serve.server import main
        sys.exit(main(sys.argv[1:]))
    """
    with (
        server_process(continuous_bundle, "agent_0", start=("-c", code)) as server,
        RemotePolicy(server.endpoint) as policy,
    ):
        assert policy.act(np.zeros(4, np.float32)).action.shape == (1,)


def test_listens_on_loopback_alone(continuous_server: ServerProcess) -> None:
    host, _, port = continuous_server.endpoint.rpartition(":")
    assert host == LOOPBACK
    with socket.socket() as other:  # free on another local address: not bound to all of them
        other.bind(("127.0.0.2", int(port)))


# Introspection ---------------------------------------------------------------------------------------------


@pytest.fixture
def channel(continuous_server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(continuous_server.endpoint) as channel:
        yield channel


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "omcda.v1.PolicyService"])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_bytes_that_are_no_request_are_the_callers_fault(channel: grpc.Channel, method: str) -> None:
    call: Any = channel.stream_stream(method)
    with pytest.raises(grpc.RpcError) as raised:
        list(call(iter([b"\xff\xff"]), timeout=10))
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details() == "expected a " + (
        "grpc.health.v1.HealthCheckRequest, got bytes that are none"
        if "health" in method
        else "grpc.reflection.v1alpha.ServerReflectionRequest, got bytes that are none"
    )


def test_health_of_an_unknown_service_is_not_found(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_both_protocols(channel: grpc.Channel, version: str) -> None:
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    symbols = ("inference.GRPCInferenceService", "omcda.v1.PolicyService", "grpc.health.v1.Health")
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    requests += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol) for symbol in symbols]
    listed, *described = ask(iter(requests))
    assert set(symbols) <= {service.name for service in listed.list_services_response.service}
    everything = [service.name for service in listed.list_services_response.service]
    asked = (reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in everything)
    for name, answer in zip(everything, ask(asked), strict=True):
        assert answer.WhichOneof("message_response") == "file_descriptor_response", name
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(data)
            for data in answer.file_descriptor_response.file_descriptor_proto
        ]
        assert name in {f"{file.package}.{service.name}" for file in files for service in file.service}
    methods = set()
    for answer in described:
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            methods |= {f"{file.package}.{s.name}/{m.name}" for s in file.service for m in s.method}
    assert {"inference.GRPCInferenceService/ModelInfer", "omcda.v1.PolicyService/ActStream"} <= methods


# Drain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_tells_watchers_ends_streams_and_exits_0(
    continuous_bundle: Bundle, number: signal.Signals
) -> None:
    with (
        server_process(continuous_bundle, "agent_0") as server,
        RemotePolicy(server.endpoint, stream=True) as policy,
        grpc.insecure_channel(server.endpoint) as channel,
    ):
        policy.act(np.zeros(4, np.float32))  # leaves its stream open, idle
        make: Any = policy_pb2_grpc.PolicyServiceStub
        requests: queue.SimpleQueue[policy_pb2.ActRequest | None] = queue.SimpleQueue()
        idle = make(channel).ActStream(iter(requests.get, None))
        ready = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerReady",
            request_serializer=oip.ServerReadyRequest.SerializeToString,
            response_deserializer=oip.ServerReadyResponse.FromString,
        )
        assert ready(oip.ServerReadyRequest(), timeout=5).ready
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        begin = time.monotonic()
        server.process.send_signal(number)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with suppress(grpc.RpcError):  # on a slow machine the server may have gone meanwhile
            assert not ready(oip.ServerReadyRequest(), timeout=5).ready
        assert server.process.wait(GRACE_S + 5) == 0
        assert time.monotonic() - begin < GRACE_S - 1, "idle streams held the server up"
        with pytest.raises(grpc.RpcError, match=r"(?s)UNAVAILABLE.*the server is stopping"):
            next(idle)
        requests.put(None)
        with pytest.raises(EndpointError, match="cannot be reached"):
            policy.act(np.zeros(4, np.float32))


def test_what_is_in_flight_is_answered(continuous_bundle: Bundle, tmp_path: Path) -> None:
    rows = 100_000
    (tmp_path / "serve.toml").write_text(f"[limits]\nrows = {rows}\nmessage_bytes = 4194304\n")
    request = policy_pb2.ActRequest(model="agent_0", batch=rows, observation=bytes(16 * rows))
    with (
        server_process(
            continuous_bundle, "agent_0", options=("--config", str(tmp_path / "serve.toml"))
        ) as server,
        grpc.insecure_channel(server.endpoint) as channel,
    ):
        make: Any = policy_pb2_grpc.PolicyServiceStub
        stub = make(channel)
        pending = [stub.Act.future(request, timeout=30) for _ in range(16)]
        pending[0].result()
        server.process.terminate()
        assert sum(not call.done() for call in pending) > 3, "nothing was in flight: the test shows nothing"
        assert {call.result().batch for call in pending} == {rows}
        assert server.process.wait(GRACE_S + 5) == 0
