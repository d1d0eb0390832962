"""Spans arrive at a real OTLP collector, found by the standard variables, and none is lost at the end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from preread_edge.logs import make_tracer


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    service, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    yield service
    server.stop(0).wait()


def test_a_collector_on_this_machine_is_reached_without_the_environments_proxy(collector, monkeypatch) -> None:
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")  # nothing listens there
    tracer, shutdown = make_tracer("preread")
    tracer.start_span("rerank").end()
    shutdown()
    assert len(collector.requests) == 1


@pytest.mark.parametrize("name", [None, "search-reranker"])
def test_spans_arrive(collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    if name is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    tracer, shutdown = make_tracer("preread")
    tracer.start_span("rerank").end()
    shutdown()
    (request,) = collector.requests
    (resource,) = request.resource_spans
    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert attributes["service.name"] == (name or "preread")
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["rerank"]
