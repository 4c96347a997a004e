"""OpenTelemetry spans of a server started with ``--trace``: one per call, and one per message of a stream.

Their destination is set by OpenTelemetry's own environment variables (``OTEL_EXPORTER_OTLP_ENDPOINT``,
``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``, …). A caller's trace is continued by the W3C header ``traceparent``.
The stock gRPC instrumentation is not used, as its asyncio interceptor fails on streams that read and write
(open-telemetry/opentelemetry-python-contrib#3066), which control streams do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from omcda_deploy.errors import MissingExtraError


class Tracing:
    """Starts spans for this server's calls. Raises :class:`MissingExtraError` without OpenTelemetry's SDK."""

    def __init__(self) -> None:
        try:
            from opentelemetry import propagate
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
        except ImportError as error:
            raise MissingExtraError("OpenTelemetry's SDK with its OTLP exporter", "tracing") from error
        # A default, which OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override.
        resource = Resource({"service.name": "omcda-deploy"}).merge(Resource.create())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("omcda_deploy.serve")
        self._extract, self._kind = propagate.extract, SpanKind.SERVER

    def span(self, service: str, method: str, metadata: Any) -> AbstractContextManager[Any]:
        """Return a context for one answer; an exception inside it becomes the span's status."""
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        return self._tracer.start_as_current_span(
            f"{service}/{method}",
            context=self._extract(carrier),
            kind=self._kind,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )

    def close(self) -> None:
        """Send the spans that have not been sent."""
        self._provider.shutdown()
