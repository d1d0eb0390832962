"""The call under way: its id and its place in a distributed trace. Follows the task, and tasks started from it.

An edge sets it, whoever logs or traces reads it. Knows no transport.

Log lines, as JSON for machines or text for people, each with the id of the call it belongs to.

Fields beside the message come as `extra={"fields": {...}}`. Knows logging only.

Where spans go: an OTLP collector, by OpenTelemetry's own OTEL_* variables (endpoint, service name, sampler).

Needs the `tracing` extra. The SDK reads those variables.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from preread.channel import proxy_options

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


# What other systems use as ids; anything else could forge lines in a log.
_USABLE = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


@dataclass(frozen=True, slots=True)
class Call:
    """
    request_id: the caller's, or our own
    traceparent: the caller's W3C header, "" where there is none
    rpc: full name of a gRPC method (preread.v1.RerankService/Rerank), "" on other edges
    """

    request_id: str
    traceparent: str = ""
    rpc: str = ""


_current: ContextVar[Call | None] = ContextVar("preread_call", default=None)


def begin(request_id: str = "", traceparent: str = "", rpc: str = "") -> Call:
    """Makes this the current call; an id that is missing or unusable is replaced by a random one."""
    call = Call(request_id if _USABLE.fullmatch(request_id) else secrets.token_hex(16), traceparent, rpc)
    _current.set(call)
    return call


def current() -> Call | None:
    """The call this code runs for; None outside of any."""
    return _current.get()


FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
PACKAGES = ("preread", "preread_edge", "preread_cli", "decoder_server", "encoder_worker", "cache", "checkpoint")


def set_up(log_format: str, level: str, stream: IO[str] | None = None) -> None:
    """One handler on the root logger; once per process, by whoever owns it."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Ours as asked; libraries stay at warning, or debug would show their bodies.
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level.upper())


def fields(**values: Any) -> dict[str, Any]:
    """`log.info("...", extra=fields(num_candidates=3))`."""
    return {"fields": values}


MAX_VALUE_CHARS = 2000  # of one value or message in a line; an exception has its own limit
MAX_EXCEPTION_CHARS = 20_000


def escaped(text: str, max_chars: int = MAX_VALUE_CHARS) -> str:
    r"""The text on one line, whatever a caller put there: controls, line and text direction marks as \xNN, \uNNNN.

    Longer texts are cut, and say so.
    """
    if len(text) > max_chars:
        text = f"{text[:max_chars]}… ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _shown(value: Any) -> str:
    """A field's value: strings in quotes, so that a space in one does not begin a field."""
    return escaped(repr(value[:MAX_VALUE_CHARS]) if isinstance(value, str) else str(value))


class JsonFormatter(logging.Formatter):
    """One JSON object per line; nothing in it ends the line or changes how it is shown."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        call = current()
        if call is not None:
            line["request_id"] = call.request_id
        line |= {name: _cut(value) for name, value in getattr(record, "fields", {}).items()}
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info), MAX_EXCEPTION_CHARS)
        text = json.dumps(line, ensure_ascii=False, default=lambda value: _cut(str(value)))
        if text.isprintable():
            return text
        return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)


def _cut(value: Any, max_chars: int = MAX_VALUE_CHARS) -> Any:
    if not isinstance(value, str) or len(value) <= max_chars:
        return value
    return f"{value[:max_chars]}… ({len(value)} characters)"


class TextFormatter(logging.Formatter):
    """Time, level, message, fields; the id last. Lines of an exception are indented: none looks like an entry."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="milliseconds")
        parts = [when, record.levelname.lower().ljust(7), escaped(record.getMessage())]
        parts += [f"{name}={_shown(value)}" for name, value in getattr(record, "fields", {}).items()]
        call = current()
        if call is not None:
            parts.append(f"request_id={call.request_id}")
        lines = [" ".join(parts)]
        if record.exc_info:
            exception = self.formatException(record.exc_info)[:MAX_EXCEPTION_CHARS]
            lines += [f"  {escaped(line)}" for line in exception.split("\n")]
        return "\n".join(lines)


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
