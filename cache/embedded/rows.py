"""Rows of the catalogue's `passages` table: written from records, read back into records.

The one place that knows the columns. Transactions and locks are the caller's.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from cache.embedded.segments import Segment, SegmentFiles, SegmentGone
from cache.errors import DamagedRecord
from cache.names import passage_id_bytes
from cache.record import Damaged, Header, Record, join, pack_windows

# SQLite's bound on variables per statement is 32,766; larger statements only take longer to prepare.
_LOOKUP_CHUNK = 1000

_UPSERT = """
INSERT INTO passages (collection_id, passage_id, segment_id, first_row, num_states, num_tokens, truncated, size_bytes,
    header, windows, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (collection_id, passage_id) DO UPDATE SET segment_id = excluded.segment_id,
    first_row = excluded.first_row, num_states = excluded.num_states, num_tokens = excluded.num_tokens,
    truncated = excluded.truncated, size_bytes = excluded.size_bytes, header = excluded.header,
    windows = excluded.windows, text = excluded.text
"""
_SELECT = """
SELECT passage_id, first_row, header, windows, text, segment_id, file_name, num_rows, code_size, codes_offset
FROM passages JOIN segments USING (segment_id) WHERE passages.collection_id = ?
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One passage as the catalogue has it; nothing checked yet."""

    encoded_id: bytes
    first_row: int
    header: bytes
    windows: bytes
    text: bytes
    segment: Segment

    @property
    def passage_id(self) -> str:
        return self.encoded_id.decode(errors="replace")

    def checked_header(self) -> Header:
        """Raises DamagedRecord where the header is damaged, another passage's, or does not fit the row."""
        header = Header.parse(self.header, self.encoded_id)
        if header.code_size != self.segment.code_size:
            raise DamagedRecord(f"{header.code_size} bytes per state, its segment has {self.segment.code_size}")
        return header


def read(rows: Iterable[Row], files: SegmentFiles) -> Iterator[tuple[Row, Record | Damaged | SegmentGone]]:
    """The records of rows, in their order, checked; rows of one segment that follow each other are read together."""
    for _, group in groupby(rows, key=attrgetter("segment.segment_id")):
        headers: list[tuple[Row, Header | DamagedRecord]] = []
        for row in group:
            try:
                headers.append((row, row.checked_header()))
            except DamagedRecord as exc:
                headers.append((row, exc))
        ranges = [(row.first_row, header.num_states) for row, header in headers if isinstance(header, Header)]
        try:
            codes = files.codes(headers[0][0].segment, ranges)
        except SegmentGone as exc:
            yield from ((row, exc) for row, _ in headers)
            continue
        for row, header in headers:
            yield row, _joined(row, header, codes)


def _joined(
    row: Row, header: Header | DamagedRecord, codes: Iterator[NDArray[np.uint8] | DamagedRecord]
) -> Record | Damaged:
    try:
        if isinstance(header, DamagedRecord):
            raise header
        found = next(codes)
        if isinstance(found, DamagedRecord):
            raise found
        return join(header, row.windows, found, row.text)
    except DamagedRecord as exc:
        return Damaged(row.passage_id, str(exc))


def insert(connection: sqlite3.Connection, collection_id: int, segment_id: int, records: Mapping[str, Record]) -> None:
    """Point passages at a new segment that holds their codes in this order."""
    rows = []
    first_row = 0
    for passage_id, record in records.items():
        # Software that writes version 1 cannot open this catalogue, so it is not written here.
        header, encoded_id = record.header.latest(), passage_id_bytes(passage_id)
        text = b"" if record.text is None else record.text.encode()
        rows.append(
            (
                collection_id, encoded_id, segment_id, first_row,
                header.num_states, header.num_tokens, header.truncated, header.total_bytes,
                header.pack(encoded_id), pack_windows(record.window_tokens), text,
            )
        )  # fmt: skip
        first_row += header.num_states
    connection.executemany(_UPSERT, rows)


def find(connection: sqlite3.Connection, collection_id: int, passage_ids: Iterable[str]) -> list[Row]:
    """Rows of the passages that exist, in the order they lie on disk."""
    rows: list[Row] = []
    for chunk, marks in _chunks(passage_ids):
        query = f"{_SELECT} AND passage_id IN ({marks})"
        rows.extend(_rows(connection.execute(query, (collection_id, *chunk))))
    rows.sort(key=attrgetter("segment.segment_id", "first_row"))
    return rows


def page(connection: sqlite3.Connection, collection_id: int, after: bytes, limit: int) -> list[Row]:
    """The next rows in order of passage id bytes."""
    query = f"{_SELECT} AND passage_id > ? ORDER BY passage_id LIMIT ?"
    return list(_rows(connection.execute(query, (collection_id, after, limit))))


def headers(connection: sqlite3.Connection, collection_id: int, passage_ids: Sequence[str]) -> dict[str, Header]:
    """Headers of the passages that exist and whose header is whole, by id."""
    found: dict[str, Header] = {}
    for chunk, marks in _chunks(passage_ids):
        query = f"SELECT passage_id, header FROM passages WHERE collection_id = ? AND passage_id IN ({marks})"
        for encoded_id, packed in connection.execute(query, (collection_id, *chunk)):
            with suppress(DamagedRecord):
                found[encoded_id.decode()] = Header.parse(packed, encoded_id)
    return found


def delete(connection: sqlite3.Connection, collection_id: int, passage_ids: Iterable[str]) -> int:
    """Remove rows; returns how many there were. The codes stay in their segments until a compaction."""
    num_deleted = 0
    for chunk, marks in _chunks(passage_ids):
        query = f"DELETE FROM passages WHERE collection_id = ? AND passage_id IN ({marks})"
        num_deleted += connection.execute(query, (collection_id, *chunk)).rowcount
    return num_deleted


def _chunks(passage_ids: Iterable[str]) -> Iterator[tuple[list[bytes], str]]:
    encoded = list(map(passage_id_bytes, dict.fromkeys(passage_ids)))
    for start in range(0, len(encoded), _LOOKUP_CHUNK):
        chunk = encoded[start : start + _LOOKUP_CHUNK]
        yield chunk, ",".join("?" * len(chunk))


def _rows(found: Iterable[tuple[bytes, int, bytes, bytes, bytes, int, str, int, int, int]]) -> Iterator[Row]:
    segments: dict[int, Segment] = {}  # most passages of a request share theirs with others
    for values in found:
        segment = segments.get(values[5])
        if segment is None:
            segment = segments[values[5]] = Segment(*values[5:])
        yield Row(*values[:5], segment)
