"""JSON lines and plain text: one passage per line. Knows no compression, no limits beyond a line's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from encoder_worker.sources.base import Fields, Item, Place, Reason, Refused
from encoder_worker.sources.lines import read_texts


def read_jsonl(stream: BinaryIO, source: str, fields: Fields, max_line_bytes: int) -> Iterator[Item]:
    """One JSON object per line; other keys are ignored. Blank lines hold nothing and are passed over."""
    for entry in read_texts(stream, source, max_line_bytes):
        if isinstance(entry, Refused):
            yield entry
        else:
            row = json_object(*entry)
            yield row if isinstance(row, Refused) else fields.of_row(entry[0], row)


def json_object(place: Place, text: str) -> dict[str, Any] | Refused:
    """The object that a line spells, or why it spells none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as exc:
        return Refused(place, None, Reason.BROKEN_JSON, f"not JSON: {exc}")
    if not isinstance(row, dict):
        return Refused(place, None, Reason.WRONG_TYPE, f"a JSON {type(row).__name__}; expected an object")
    return row


def read_text(
    stream: BinaryIO, source: str, fields: Fields, max_line_bytes: int, *, id_prefix: str = ""
) -> Iterator[Item]:
    """One passage per line; its id is the line's number after `id_prefix`."""
    for entry in read_texts(stream, source, max_line_bytes, blank=True):
        if isinstance(entry, Refused):
            yield entry
        else:
            place, text = entry
            yield fields.passage(place, f"{id_prefix}{place.line}", text)
