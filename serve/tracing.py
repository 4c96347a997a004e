"""OpenTelemetry spans of a server started with ``--trace``: one per call, and one per message of a stream.

Their destination is set by OpenTelemetry's own environment variables (``OTEL_EXPORTER_OTLP_ENDPOINT``,
``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``, …). A caller's trace is continued by the W3C header ``traceparent``.
The stock gRPC instrumentation is not used, as its asyncio interceptor fails on streams that read and write
(open-telemetry/opentelemetry-python-contrib#3066), which control streams do.

A span says by which model and version it was answered (``omcda.model``, ``omcda.version``), and its gRPC status.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omcda_deploy.errors import MissingExtraError
from omcda_deploy.serve.status import code_of

CLOSE_LIMIT_S = 1.0
_SERVICE, _STATUS = "service.name", "rpc.grpc.status_code"


class Tracing:
    """Starts spans for this server's calls. Raises :class:`MissingExtraError` without OpenTelemetry's SDK."""

    def __init__(self) -> None:
        try:
            from opentelemetry import propagate
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, get_current_span
        except ImportError as error:
            raise MissingExtraError("OpenTelemetry's SDK with its OTLP exporter", "tracing") from error
        resource = Resource.create()  # as the environment says
        if str(resource.attributes[_SERVICE]).startswith("unknown_service"):
            resource = resource.merge(Resource({_SERVICE: "omcda-deploy"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("omcda_deploy.serve")
        self._extract, self._kind, self._current = propagate.extract, SpanKind.SERVER, get_current_span

    @contextmanager
    def span(self, service: str, method: str, metadata: Any) -> Iterator[None]:
        """Return a context for one answer; an exception inside it becomes the span's status."""
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        with self._tracer.start_as_current_span(
            f"{service}/{method}",
            context=self._extract(carrier),
            kind=self._kind,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        ) as span:
            try:
                yield
            except Exception as error:
                span.set_attribute(_STATUS, code_of(error).value[0])
                raise
            span.set_attribute(_STATUS, 0)

    def answered(self, model: str, version: str) -> None:
        """Note on the span of the present answer by what it was given."""
        self._current().set_attributes({"omcda.model": model, "omcda.version": version})

    def close(self) -> None:
        """Send the spans that have not been sent, if their collector takes them at once."""
        # It would try for much longer than a server may take to stop.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_LIMIT_S)
