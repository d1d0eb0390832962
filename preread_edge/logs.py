"""Log lines, the current call whose id each of them carries, and the exporter of spans.

Fields next to the message come as `extra=fields(...)`. A call follows its task and tasks started from it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from preread.channel import is_loopback
from preread.values import USABLE_REQUEST_ID

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

PACKAGES = ("preread", "preread_edge", "preread_cli", "decoder_server", "encoder_worker", "cache", "checkpoint")
MAX_VALUE_CHARS = 2000  # of one value or message in a line; an exception has its own limit
MAX_EXCEPTION_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class _Call:
    """The id of a call, and its place in a distributed trace."""

    request_id: str  # the caller's, or a random one
    traceparent: str = ""  # the caller's W3C header
    rpc: str = ""  # full name of a gRPC method (preread.v1.RerankService/Rerank), "" on other edges


_current: ContextVar[_Call | None] = ContextVar("preread_call", default=None)
current = _current.get  # the call this code runs for; None outside of any


def begin(request_id: str = "", traceparent: str = "", rpc: str = "") -> _Call:
    """Makes this the current call; an id that is missing or unusable is replaced by a random one."""
    call = _Call(request_id if USABLE_REQUEST_ID.fullmatch(request_id) else secrets.token_hex(16), traceparent, rpc)
    _current.set(call)
    return call


def set_up(log_format: str, level: str, stream: IO[str] | None = None) -> None:
    """Put one handler on the root logger, once per process."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Libraries stay at warning, or debug would show their bodies.
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level.upper())


def fields(**values: Any) -> dict[str, Any]:
    """`log.info("...", extra=fields(num_candidates=3))`."""
    return {"fields": values}


def _cut(value: Any, max_chars: int = MAX_VALUE_CHARS) -> Any:
    is_long = isinstance(value, str) and len(value) > max_chars
    return f"{value[:max_chars]}… ({len(value)} characters)" if is_long else value


def _escaped(text: str) -> str:
    r"""The text, cut, on one line: controls, line and text direction marks in it become \xNN, \uNNNN."""
    text = _cut(text)
    escaped = (one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return text if text.isprintable() else "".join(escaped)


class _JsonFormatter(logging.Formatter):
    """One JSON object per line; nothing in it ends the line or changes how it is shown."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = _cut(record.getMessage())
        if call := current():
            line["request_id"] = call.request_id
        line |= {name: _cut(value) for name, value in getattr(record, "fields", {}).items()}
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info), MAX_EXCEPTION_CHARS)
        text = json.dumps(line, ensure_ascii=False, default=lambda value: _cut(str(value)))
        escaped = (one if one.isprintable() else json.dumps(one)[1:-1] for one in text)
        return text if text.isprintable() else "".join(escaped)


class _TextFormatter(logging.Formatter):
    """Time, level, message, fields; the id last. Lines of an exception are indented: none looks like an entry."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="milliseconds")
        parts = [when, record.levelname.lower().ljust(7), _escaped(record.getMessage())]
        for name, value in getattr(record, "fields", {}).items():  # a string in quotes: a space in it begins no field
            shown = repr(value[:MAX_VALUE_CHARS]) if isinstance(value, str) else str(value)
            parts.append(f"{name}={_escaped(shown)}")
        if call := current():
            parts.append(f"request_id={call.request_id}")
        lines = [" ".join(parts)]
        if record.exc_info:
            exception = self.formatException(record.exc_info)[:MAX_EXCEPTION_CHARS]
            lines += [f"  {_escaped(line)}" for line in exception.split("\n")]
        return "\n".join(lines)


def make_tracer(service_name: str) -> tuple[Tracer, Callable[[], None]]:
    """A tracer, and what to call at the end so that no span is lost; ValueError: the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise ValueError("tracing is on and its packages are not installed: pip install 'preread[tracing]'") from exc
    # A collector on this machine is not reached through a proxy. The exporter reads the same variables.
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "localhost")
    is_here = is_loopback(urlsplit(endpoint).netloc or endpoint)
    options: Any = (("grpc.enable_http_proxy", 0),) if is_here else ()  # its annotation knows one option, a string
    resource = Resource.create({"service.name": service_name}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(channel_options=options)))
    return provider.get_tracer("preread"), provider.shutdown
