"""Requests as OpenTelemetry spans: the call, under it fetch, encode and batch, and under batch forward.

Spans are written when a request has ended, from the times it left behind: serving itself knows nothing of traces.
Needs the `tracing` extra; nothing imports this unless tracing is on.
"""

import time
from collections import Counter

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from decoder_server.engine.lifecycle import PassRecord, RequestTrace
from preread_edge.logs import current

# Causes at the caller, or a full queue: no errors of this server (OpenTelemetry's gRPC conventions for servers).
_NOT_ERRORS = ("ok", "cancelled", "invalid_request", "not_found", "refused", "overloaded")

_GRPC_STATUS = {
    "ok": 0, "cancelled": 1, "invalid_request": 3, "deadline_exceeded": 4, "not_found": 5, "overloaded": 8,
    "refused": 9, "unavailable": 14,
}  # fmt: skip


class TracingObserver:
    """Writes the spans of a request when it has ended; preread_edge.logs makes the tracer."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def request_finished(self, trace: RequestTrace) -> None:
        epoch = time.time() - time.monotonic()  # now, not once: clocks are set
        call = current()
        values: dict[str, str | int | None] = {
            "model": trace.model,
            "code": trace.code,
            "num_candidates": len(trace.request.candidates),
            "num_queries": len(trace.queries) or None,
            "request_id": call.request_id if call else None,
            "degraded": trace.degraded.reason if trace.degraded else None,
            "stopped_early": trace.stopped_early or None,
            **{f"num_{status}": count for status, count in Counter(one.status for one in trace.results).items()},
        }
        attributes = {f"preread.{name}": value for name, value in values.items() if value is not None}
        rpc = call.rpc if call else ""
        if rpc:  # by OpenTelemetry's semantic conventions for gRPC
            service, _, method = rpc.rpartition("/")
            attributes |= {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
            attributes["rpc.grpc.status_code"] = _GRPC_STATUS.get(trace.code, 2)
        # The caller's span, or an empty context: what else happens to be current is no parent of a request.
        carrier = {"traceparent": call.traceparent} if call and call.traceparent else {}
        parent = TraceContextTextMapPropagator().extract(carrier, Context())

        def at(seconds: float) -> int:
            return int((seconds + epoch) * 1e9)

        def write(name: str, within: Context, start: float, end: float, **attributes: int) -> Context:
            span = self._tracer.start_span(name, within, attributes=attributes, start_time=at(start))
            span.end(at(end))
            return set_span_in_context(span)

        name = rpc or trace.kind
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=at(trace.start))
        if trace.code not in _NOT_ERRORS:
            span.set_status(Status(StatusCode.ERROR, trace.code))
        within = set_span_in_context(span)
        for name, intervals in (("fetch", trace.fetches), ("encode", trace.encodings)):
            for start, end, num_passages in intervals:
                write(name, within, start, end, **{"preread.num_passages": num_passages})
        for ready, start, end in trace.passes:
            write("forward", write("batch", within, ready, end), start, end)
        span.end(at(trace.end))

    def pass_finished(self, one: PassRecord) -> None:
        """A pass serves several requests; each has it in its own trace."""
