"""Log lines, as JSON for machines or text for people, each with the id of the call it belongs to.

Fields beside the message come as `extra={"fields": {...}}`. Knows logging only.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import IO, Any

from preread.edge.calls import current

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


def set_up(log_format: str, level: str, stream: IO[str] | None = None) -> None:
    """One handler on the root logger; once per process, by whoever owns it."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Ours as asked; libraries stay at warning, or debug would show their bodies.
    for package in ("preread", "decoder_server", "encoder_worker", "cache", "checkpoint"):
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
