"""Requests as OpenTelemetry spans: the call, under it fetch, encode and batch, and under batch forward.

An Observer: spans are written when a request has ended, from the times it left behind, so that
serving itself knows nothing of traces. Needs the `tracing` extra; nothing imports this unless
tracing is on.
"""

from __future__ import annotations

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

        def at(seconds: float) -> int:
            return int((seconds + epoch) * 1e9)

        call = current()
        rpc, traceparent = (call.rpc, call.traceparent) if call is not None else ("", "")
        span = self._tracer.start_span(
            rpc or trace.kind,
            _parent(traceparent),
            SpanKind.SERVER,
            _rpc_attributes(rpc, trace.code),
            start_time=at(trace.start),
        )
        counts = Counter(result.status for result in trace.results)
        values: dict[str, str | int | None] = {
            "model": trace.model,
            "code": trace.code,
            "num_candidates": len(trace.request.candidates),
            "request_id": call.request_id if call is not None else None,
            "degraded": trace.degraded or None,
            "stopped_early": trace.stopped_early or None,
            **{f"num_{status}": count for status, count in counts.items()},
        }
        span.set_attributes({f"preread.{name}": value for name, value in values.items() if value is not None})
        if trace.code not in _NOT_ERRORS:
            span.set_status(Status(StatusCode.ERROR, trace.code))
        within = set_span_in_context(span)
        for name, intervals in (("fetch", trace.fetches), ("encode", trace.encodings)):
            for start, end, num_passages in intervals:
                self._write(name, within, at(start), at(end), num_passages=num_passages)
        for ready, start, end in trace.passes:
            batch = self._write("batch", within, at(ready), at(end))
            self._write("forward", batch, at(start), at(end))
        span.end(at(trace.end))

    def pass_finished(self, one: PassRecord) -> None:
        """A pass serves several requests; each has it in its own trace."""

    def _write(self, name: str, within: Context, start: int, end: int, **attributes: int) -> Context:
        own = {f"preread.{key}": value for key, value in attributes.items()}
        span = self._tracer.start_span(name, within, attributes=own, start_time=start)
        span.end(end)
        return set_span_in_context(span)


def _rpc_attributes(rpc: str, code: str) -> dict[str, str | int]:
    """OpenTelemetry's semantic conventions for gRPC; none on other edges."""
    if not rpc:
        return {}
    service, _, method = rpc.rpartition("/")
    status = _GRPC_STATUS.get(code, 2)
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "rpc.grpc.status_code": status}


def _parent(traceparent: str) -> Context:
    """The caller's span, or an empty context: what else happens to be current is no parent of a request."""
    carrier = {"traceparent": traceparent} if traceparent else {}
    return TraceContextTextMapPropagator().extract(carrier, Context())
