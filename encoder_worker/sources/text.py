"""Lines of a byte stream, each at most so many bytes in memory. Knows no format.

JSON lines and plain text: one passage per line. Knows no compression, no limits beyond a line's.

CSV and TSV: one passage per record. Knows no compression.

CSV is RFC 4180: a quoted field may hold the separator, quotes and line ends. TSV is what search
collections use (MS MARCO): no quoting at all, a tab always separates. With a header line columns
are found by name; without one the first column is the id, the second the text.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

from encoder_worker.sources import Fields, Item, Place, Reason, Refused, SourceError

DEFAULT_MAX_LINE_BYTES = 16 << 20
_SKIP_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"


def read_lines(stream: BinaryIO, source: str, max_line_bytes: int) -> Iterator[tuple[Place, bytes] | Refused]:
    """Every line without its end, or a Refused for one over the limit, whose rest is read past in pieces."""
    number = 0
    while line := stream.readline(max_line_bytes + 2):  # 2: the longest line end
        number += 1
        place = Place(source, number)
        if number == 1:
            line = line.removeprefix(_BOM)
        whole = line.endswith(b"\n")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) > max_line_bytes:
            num_bytes = len(line)
            while not whole and (piece := stream.readline(_SKIP_BYTES)):
                num_bytes += len(piece)
                whole = piece.endswith(b"\n")
            yield Refused(
                place, None, Reason.LINE_TOO_LONG, f"line of {num_bytes:,} bytes; at most {max_line_bytes:,} are read"
            )
        else:
            yield place, line


def read_texts(
    stream: BinaryIO, source: str, max_line_bytes: int, *, blank: bool = False
) -> Iterator[tuple[Place, str] | Refused]:
    """Every line as text; without `blank` only those that hold something."""
    for entry in read_lines(stream, source, max_line_bytes):
        if isinstance(entry, Refused):
            yield entry
            continue
        text = decode(*entry)
        if isinstance(text, Refused):
            yield text
        elif blank or text.strip():
            yield entry[0], text


def decode(place: Place, line: bytes) -> str | Refused:
    """The line as text, or why it is none."""
    try:
        return line.decode()
    except UnicodeDecodeError as exc:
        return Refused(place, None, Reason.INVALID_UTF8, f"not UTF-8: {exc.reason} at byte {exc.start + 1}")


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


Row = tuple[Place, list[str]]


class _Stop(Exception):  # noqa: N818 - never leaves this module
    """A record ran into something that ends it before its closing quote."""


def read_delimited(
    stream: BinaryIO, source: str, fields: Fields, max_line_bytes: int, *, delimiter: str
) -> Iterator[Item]:
    """
    Raises:
        SourceError: a header line that lacks a column.
    """
    if delimiter == "\t":
        rows = _tsv_rows(read_texts(stream, source, max_line_bytes))
    else:
        rows = _csv_rows(read_lines(stream, source, max_line_bytes), delimiter, max_line_bytes)
    columns: _Columns | None = None
    for row in rows:
        if isinstance(row, Refused):
            yield row
            continue
        place, cells = row
        if columns is None:
            columns = _Columns.of_first(source, cells, fields)
            if columns.named:
                continue
        if len(cells) != columns.count:
            # A separator inside the text would otherwise cut it in silence.
            yield Refused(place, None, Reason.BROKEN_ROW, f"{len(cells)} columns; expected {columns.count}")
            continue
        title = cells[columns.title] if columns.title is not None else None
        yield fields.passage(place, cells[columns.id], cells[columns.text], title)


class _Columns:
    """Which column holds what."""

    def __init__(self, count: int, id: int, text: int, title: int | None, *, named: bool) -> None:
        self.count, self.id, self.text, self.title, self.named = count, id, text, title, named

    @classmethod
    def of_first(cls, source: str, cells: list[str], fields: Fields) -> _Columns:
        """From the first row: a header when it names any of the columns, else data."""
        id_name = fields.find_id(cells)
        if id_name is not None and fields.text in cells:
            title = cells.index(fields.title) if fields.title in cells else None
            return cls(len(cells), cells.index(id_name), cells.index(fields.text), title, named=True)
        if id_name is not None or fields.text in cells:
            missing = fields.text if id_name is not None else " or ".join(fields.id_names)
            raise SourceError(f"{source}: no column {missing}; the header has {', '.join(cells):.200}")
        if fields.id is not None or fields.text != "text":
            raise SourceError(
                f"{source}: no columns {' or '.join(fields.id_names)} and {fields.text}; "
                f"the first line has {', '.join(cells):.200}"
            )
        if len(cells) != 2:
            raise SourceError(
                f"{source}: the first line has {len(cells)} columns and names none of id, _id, text; "
                "expected a header, or two columns: id and text"
            )
        return cls(2, 0, 1, None, named=False)


def _tsv_rows(entries: Iterator[tuple[Place, str] | Refused]) -> Iterator[Row | Refused]:
    for entry in entries:
        yield entry if isinstance(entry, Refused) else (entry[0], entry[1].split("\t"))


def _csv_rows(
    entries: Iterator[tuple[Place, bytes] | Refused], delimiter: str, max_line_bytes: int
) -> Iterator[Row | Refused]:
    """Records, each at most `max_line_bytes` however many lines it spans.

    A quote that nothing closes costs the line it stands in, not the rest of the file: the lines
    after it are read again.
    """
    csv.field_size_limit(max(csv.field_size_limit(), max_line_bytes))  # a setting of the process; only ever raised
    again: deque[tuple[Place, bytes] | Refused] = deque()
    while True:
        taken: list[tuple[Place, bytes] | Refused] = []
        reader = csv.reader(_feed(entries, again, taken, max_line_bytes), delimiter=delimiter, strict=True)
        problem: Refused | None = None
        cells: list[str] = []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (_Stop, csv.Error) as exc:
            first = taken[0]
            problem = first if isinstance(first, Refused) else _refuse(first, str(exc))
        if problem is not None:
            again.extendleft(reversed(taken[1:]))
            yield problem
        elif cells:  # a blank line is a record without cells
            first = taken[0]
            assert not isinstance(first, Refused)
            yield first[0], cells


def _refuse(entry: tuple[Place, bytes], why: str) -> Refused:
    text = decode(*entry)
    return text if isinstance(text, Refused) else Refused(entry[0], None, Reason.BROKEN_ROW, f"not CSV: {why}")


def _feed(
    entries: Iterator[tuple[Place, bytes] | Refused],
    again: deque[tuple[Place, bytes] | Refused],
    taken: list[tuple[Place, bytes] | Refused],
    max_bytes: int,
) -> Iterator[str]:
    """Lines for one record; each is noted in `taken` as it is handed out."""
    num_bytes = 0
    while True:
        entry = again.popleft() if again else next(entries, None)
        if entry is None:
            return
        taken.append(entry)
        if isinstance(entry, Refused):
            raise _Stop(f"a quote is not closed before line {entry.place.line}, which cannot be read")
        num_bytes += len(entry[1])
        if num_bytes > max_bytes:
            raise _Stop(f"a quote is not closed within {max_bytes:,} bytes")
        text = decode(*entry)
        if isinstance(text, Refused):
            raise _Stop(f"a quote is not closed before line {entry[0].line}, which is not UTF-8")
        yield text + "\n"
