"""Where spans go: an OTLP collector, by OpenTelemetry's own OTEL_* variables (endpoint, service name, sampler).

Needs the `tracing` extra. The SDK reads those variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from preread.edge.addresses import proxy_options

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
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(channel_options=_channel_options())))
    return provider.get_tracer("preread"), provider.shutdown


def _channel_options() -> Any:  # the exporter's annotation knows one option, a string
    """A collector on this machine is not reached through a proxy. The exporter reads the same variables."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "localhost")
    return tuple(proxy_options(urlsplit(endpoint).netloc or endpoint))
