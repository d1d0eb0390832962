"""JSON lines and plain text: one passage per line. Knows no compression, no limits beyond a line's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from encoder_worker.sources.base import Fields, Item, Reason, Refused
from encoder_worker.sources.lines import decode, read_lines


def read_jsonl(stream: BinaryIO, source: str, fields: Fields, max_line_bytes: int) -> Iterator[Item]:
    """One JSON object per line; other keys are ignored. Blank lines hold nothing and are passed over."""
    for entry in read_lines(stream, source, max_line_bytes):
        if isinstance(entry, Refused):
            yield entry
            continue
        place, line = entry
        text = decode(place, line)
        if isinstance(text, Refused):
            yield text
            continue
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as exc:
            yield Refused(place, None, Reason.BROKEN_JSON, f"not JSON: {exc}")
            continue
        if not isinstance(row, dict):
            yield Refused(place, None, Reason.WRONG_TYPE, f"a JSON {type(row).__name__}; expected an object")
            continue
        id_name = fields.find_id(row)
        missing = " or ".join(fields.id_names) if id_name is None else fields.text if fields.text not in row else None
        if id_name is None or missing is not None:
            yield Refused(place, None, Reason.MISSING_FIELD, f"no {missing}; found {', '.join(row) or 'no keys':.200}")
            continue
        title = row.get(fields.title) if fields.title is not None else None
        yield fields.passage(place, row[id_name], row[fields.text], title)


def read_text(
    stream: BinaryIO, source: str, fields: Fields, max_line_bytes: int, *, id_prefix: str = ""
) -> Iterator[Item]:
    """One passage per line; its id is the line's number after `id_prefix`."""
    for entry in read_lines(stream, source, max_line_bytes):
        if isinstance(entry, Refused):
            yield entry
            continue
        place, line = entry
        text = decode(place, line)
        yield text if isinstance(text, Refused) else fields.passage(place, f"{id_prefix}{place.line}", text)
