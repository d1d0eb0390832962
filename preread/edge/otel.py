"""Where spans go: an OTLP collector, by OpenTelemetry's own OTEL_* variables (endpoint, service name, sampler).

Needs the `tracing` extra. The SDK reads those variables; nothing else of ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


def make_tracer(service_name: str) -> tuple[Tracer, Callable[[], None]]:
    """A tracer, and what to call at the end so that no span is lost.

    Args:
        service_name: unless OTEL_SERVICE_NAME says another.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise ValueError("tracing is on and its packages are not installed: pip install 'preread[tracing]'") from exc
    resource = Resource.create({"service.name": service_name}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("preread"), provider.shutdown
