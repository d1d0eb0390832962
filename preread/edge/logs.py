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


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = current()
        if call is not None:
            line["request_id"] = call.request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, fields; the id last."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="milliseconds")
        parts = [when, record.levelname.lower().ljust(7), record.getMessage()]
        # repr, so that a line break in a value does not start a line of its own
        parts += [
            f"{name}={value!r}" if isinstance(value, str) else f"{name}={value}"
            for name, value in getattr(record, "fields", {}).items()
        ]
        call = current()
        if call is not None:
            parts.append(f"request_id={call.request_id}")
        text = " ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text
