"""Spans of a real server, received by an OTLP collector."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.remote import RemotePolicy
from omcda_deploy.protos import policy_pb2
from tests.support.server_process import free_port, server_process

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


services: set[Any] = set()  # names of the services that sent spans


def attributes(entry: Any) -> dict[str, Any]:
    """The attributes of a span or a resource."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in entry.attributes}


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Yield an OTLP endpoint, and the spans that were sent to it."""
    spans: list[Any] = []
    services.clear()

    def export(request: Any, context: Any) -> Any:
        for resource_spans in request.resource_spans:
            services.add(attributes(resource_spans.resource)["service.name"])
            spans.extend(span for scope in resource_spans.scope_spans for span in scope.spans)
        return otlp.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=otlp.ExportTraceServiceRequest.FromString,
        response_serializer=otlp.ExportTraceServiceResponse.SerializeToString,
    )
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", spans
    server.stop(None).wait()


def test_calls_and_messages_of_streams_are_spans_of_the_callers_trace(
    continuous_bundle: Bundle, collector: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, spans = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    observation = np.zeros((1, 4), np.float32)
    with server_process(continuous_bundle, "agent_0", options=("--trace",)) as server:
        with RemotePolicy(server.endpoint, stream=True) as policy:
            for _ in range(3):
                policy.act(observation)
        request = policy_pb2.ActRequest(model="agent_9", batch=1, observation=observation.tobytes())
        with grpc.insecure_channel(server.endpoint) as channel:
            act: Any = channel.unary_unary("/omcda.v1.PolicyService/Act")
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                act(
                    request.SerializeToString(),
                    timeout=10,
                    metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),),
                )
        server.process.terminate()
        server.process.wait(15)
    names = [span.name.removeprefix("omcda.v1.PolicyService/") for span in spans]
    assert sorted(names) == ["Act", "ActStream", "ActStream", "ActStream", "GetContract"]
    failed = spans[names.index("Act")]
    assert (failed.trace_id.hex(), failed.parent_span_id.hex()) == (TRACE, PARENT)
    assert "unknown model 'agent_9'" in failed.status.message
    assert all(span.trace_id.hex() != TRACE for span in spans if span is not failed)
    assert services == {"omcda-deploy"}
    assert attributes(failed)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    for span, name in zip(spans, names, strict=True):
        if name == "ActStream":
            said = attributes(span)
            assert (said["omcda.model"], said["omcda.version"]) == ("agent_0", "1")
            assert said["rpc.grpc.status_code"] == 0


def test_a_service_has_the_name_that_the_environment_gives_it(
    continuous_bundle: Bundle, collector: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector[0])
    monkeypatch.setenv("OTEL_SERVICE_NAME", "left-hand")
    with server_process(continuous_bundle, "agent_0", options=("--trace",)) as server:
        RemotePolicy(server.endpoint).close()
    assert services == {"left-hand"}


def test_an_absent_collector_delays_no_exit(
    continuous_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with server_process(continuous_bundle, "agent_0", options=("--trace",)) as server:
        with RemotePolicy(server.endpoint) as policy:
            for _ in range(600):  # more than one batch of the exporter
                policy.act(np.zeros((1, 4), np.float32))
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(15) == 0
        assert time.monotonic() - began < 4.0
