"""Rows of the catalogue's tables, as functions over a connection: checked when read, signed when written.

A passage's record header is the checksum of its row: it covers the requested id, and the other columns must agree with
it; a wrong place in a segment holds other codes. All other rows carry a checksum over their columns. Values go through
`integer`, `text` or `blob`, because a flipped bit may change a column's type; these and everything else that finds a
damaged row raise StoreDamaged. Transactions and locks are the caller's.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from cache.errors import CollectionExists, CollectionNotFound, DamagedRecord, ManifestError, StoreDamaged
from cache.faiss.segments import Segment, SegmentFiles, SegmentGone
from cache.manifest import Manifest
from cache.record import RECORD_VERSION, Damaged, Header, Record, check_name, passage_id_bytes

# Columns that a row's checksum covers, the key first, by table. Rows of catalogue version 1 have a mark in its place,
# longer than a checksum, so that no flipped bit makes one of the other.
COVERED: dict[str, dict[str, type]] = {
    "collections": {"collection_id": int, "name": str},
    "aliases": {"alias": str, "name": str},
    "generations": {"name": str, "generation": int},
    "segments": {
        "segment_id": int, "collection_id": int, "file_name": str, "num_rows": int, "code_size": int,
        "codes_offset": int,
    },
}  # fmt: skip
UNCHECKED = b"version 1"

# SQLite's bound on variables per statement is 32,766; larger statements only take longer to prepare.
_LOOKUP_CHUNK = 1000

_PASSAGE = "segment_id, first_row, num_states, num_tokens, truncated, size_bytes, num_clipped, header, windows, text"
_UPSERT = f"""INSERT INTO passages (collection_id, passage_id, {_PASSAGE})
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (collection_id, passage_id) DO UPDATE SET
    {", ".join(f"{column} = excluded.{column}" for column in _PASSAGE.split(", "))}"""
# A row whose segment is not in the catalogue is found, and damaged.
_SELECT = """SELECT passage_id, header, windows, text, first_row, passages.num_states, num_tokens, truncated,
    size_bytes, num_clipped, passages.segment_id, segments.collection_id, file_name, num_rows, code_size, codes_offset,
    checksum
    FROM passages LEFT JOIN segments ON segments.segment_id = passages.segment_id WHERE passages.collection_id = ?"""


def integer(value: object) -> int:
    if type(value) is not int:
        raise StoreDamaged(f"the catalogue is damaged: {value!r:.40}, expected a whole number")
    return value


def blob(value: object) -> bytes:
    if type(value) is not bytes:
        raise StoreDamaged(f"the catalogue is damaged: {value!r:.40}, expected bytes")
    return value


def text(value: object) -> str:
    try:
        return blob(value).decode()  # connections to a catalogue give text as bytes
    except UnicodeDecodeError as exc:
        raise StoreDamaged(f"the catalogue is damaged: {value!r:.40}, expected UTF-8") from exc


def shown(value: object) -> str:
    """A column for a message, as text as far as it is text."""
    return repr(value.decode(errors="replace") if isinstance(value, bytes) else value)


def row_checksum(*columns: int | str | bytes) -> bytes:
    """Checksum of the columns; the function of that name in SQL."""
    return xxhash.xxh3_64_digest(repr(columns).encode())


def checked_row(table: str, row: Sequence[object]) -> tuple[Any, ...]:
    """The covered columns of a row whose checksum comes last."""
    *columns, checksum = row
    kinds = COVERED[table].values()
    values = [integer(one) if kind is int else text(one) for kind, one in zip(kinds, columns, strict=True)]
    if checksum not in (row_checksum(*values), UNCHECKED):
        raise StoreDamaged(f"the catalogue is damaged: checksum of {row_name(table, columns)} does not match")
    return tuple(values)


def checked_rows(connection: sqlite3.Connection, table: str, where: str = "", *values: object) -> Iterator[Any]:
    """The covered columns of rows, each checked; `where` may also order them."""
    for row in connection.execute(f"SELECT {', '.join(COVERED[table])}, checksum FROM {table} {where}", values):
        yield checked_row(table, row)


def put_row(connection: sqlite3.Connection, table: str, **columns: object) -> int | None:
    """Insert a row with its checksum, or replace the row of its key; returns the key where the catalogue assigns it."""
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    query = f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})"
    assigned = connection.execute(query, tuple(columns.values())).lastrowid
    key, *_ = covered = COVERED[table]
    query = f"UPDATE {table} SET checksum = row_checksum({', '.join(covered)}) WHERE {key} = ?"
    connection.execute(query, (columns.get(key, assigned),))
    return assigned


def row_name(table: str, columns: Sequence[object]) -> str:
    """A row in a message: its table, and its first column that is text."""
    key = next((one for one in columns if isinstance(one, bytes)), columns[0])
    return f"{'alias' if table == 'aliases' else table.removesuffix('s')} {shown(key)}"


def find_collection(connection: sqlite3.Connection, name: str) -> int | None:
    """Its number in the catalogue; a name used again gets another one."""
    return next((number for number, _ in checked_rows(connection, "collections", "WHERE name = ?", name)), None)


def require_collection(connection: sqlite3.Connection, name: str) -> int:
    if (collection_id := find_collection(connection, name)) is None:
        raise CollectionNotFound(f"collection: {name!r} does not exist in this store")
    return collection_id


def read_manifest(connection: sqlite3.Connection, name: str) -> Manifest | None:
    row = connection.execute("SELECT manifest FROM collections WHERE name = ?", (name,)).fetchone()
    try:
        return None if row is None else Manifest.from_json(blob(row[0]), name)
    except ManifestError as exc:
        raise StoreDamaged(f"collection {name!r} cannot be read: {exc}") from exc


def set_alias(connection: sqlite3.Connection, alias: str, name: str, *, shadowing: bool) -> None:
    check_name("alias", alias)
    if find_collection(connection, alias) is not None and not shadowing:
        raise CollectionExists(f"alias: {alias!r} is the name of a collection")
    require_collection(connection, name)
    put_row(connection, "aliases", alias=alias, name=name)


def generation(connection: sqlite3.Connection, name: str) -> int:
    return next((number for _, number in checked_rows(connection, "generations", "WHERE name = ?", name)), 0)


def bump(connection: sqlite3.Connection, name: str) -> None:
    """Count up the generation: something of the collection changed."""
    put_row(connection, "generations", name=name, generation=generation(connection, name) + 1)


def segment_of(collection_id: int, row: Sequence[object]) -> Segment | str:
    """A segment from its row, or why there is none."""
    if row[1] is None:
        return f"segment {row[0]} is not in the catalogue"
    try:
        segment_id, owner, *rest = checked_row("segments", row)
    except StoreDamaged as exc:
        return str(exc)
    return Segment(segment_id, *rest) if owner == collection_id else f"segment {segment_id} is of another collection"


class Row(NamedTuple):
    """One passage as the catalogue has it, its columns checked against its header."""

    encoded_id: bytes
    header: Header
    windows: bytes
    text: bytes
    first_row: int
    segment: Segment


class DamagedRow(NamedTuple):
    """A row that does not agree with its header."""

    encoded_id: bytes
    reason: str
    segment: None = None


def read(rows: Iterable[Row | DamagedRow], files: SegmentFiles) -> Iterator[tuple[str, Record | Damaged | SegmentGone]]:
    """The records of rows by passage id, in their order; consecutive rows of one segment are read together.

    A Record is the passage as it was written: everything is checked.
    """
    for _, group in groupby(rows, key=attrgetter("segment")):
        located: list[Row] = []
        for row in group:
            if isinstance(row, Row):
                located.append(row)
            else:
                passage_id = row.encoded_id.decode(errors="replace")
                yield passage_id, Damaged(passage_id, row.reason)
        if not located:
            continue
        try:
            codes = files.codes(located[0].segment, [(row.first_row, row.header.num_states) for row in located])
        except SegmentGone as exc:
            yield from ((row.encoded_id.decode(), exc) for row in located)
            continue
        for row, found in zip(located, codes, strict=True):
            passage_id = row.encoded_id.decode()
            yield passage_id, _joined(passage_id, row, found)


def _joined(passage_id: str, row: Row, codes: NDArray[np.uint8] | DamagedRecord) -> Record | Damaged:
    try:
        if isinstance(codes, DamagedRecord):
            raise codes
        return Record.join(row.header, row.windows, codes, row.text)
    except DamagedRecord as exc:
        return Damaged(passage_id, str(exc))


def insert(connection: sqlite3.Connection, collection_id: int, segment_id: int, records: Mapping[str, Record]) -> None:
    """Point passages at a new segment that holds their codes in this order."""
    rows = []
    first_row = 0
    for passage_id, record in records.items():
        # Software that writes version 1 cannot open this catalogue, so it is not written here.
        header, encoded_id = record.header.latest(), passage_id_bytes(passage_id)
        windows, _, encoded_text = record.payload
        place = collection_id, encoded_id, segment_id, first_row
        rows.append((*place, *header.counts, header.pack(encoded_id), windows, encoded_text))
        first_row += header.num_states
    connection.executemany(_UPSERT, rows)


def find(connection: sqlite3.Connection, collection_id: int, passage_ids: Iterable[str]) -> list[Row | DamagedRow]:
    """Rows of the passages that exist, in the order they lie on disk."""
    found = _chunked(connection, f"{_SELECT} AND passage_id IN", collection_id, passage_ids)
    return sorted(
        _rows(collection_id, found),
        key=lambda row: (row.segment.segment_id, row.first_row) if isinstance(row, Row) else (0, 0),
    )


def page(
    connection: sqlite3.Connection, collection_id: int, after: bytes, limit: int
) -> tuple[list[Row | DamagedRow], bytes]:
    """The next rows in order of passage id bytes, and the last id of those."""
    query = f"{_SELECT} AND passage_id > ? ORDER BY passage_id LIMIT ?"
    values = connection.execute(query, (collection_id, after, limit)).fetchall()
    for encoded_id, *_ in values:
        if blob(encoded_id) <= after:  # a scan over such an index might not end
            raise StoreDamaged("the catalogue is damaged: its index of passage ids is out of order")
        after = encoded_id
    return list(_rows(collection_id, values)), after


def headers(connection: sqlite3.Connection, collection_id: int, passage_ids: Sequence[str]) -> dict[str, Header]:
    """Headers of the passages that exist and whose header is whole, by id."""
    found: dict[str, Header] = {}
    query = "SELECT passage_id, header FROM passages WHERE collection_id = ? AND passage_id IN"
    for encoded_id, packed in _chunked(connection, query, collection_id, passage_ids):
        with suppress(DamagedRecord, StoreDamaged):
            found[text(encoded_id)] = Header.parse(blob(packed), encoded_id)
    return found


def renew(connection: sqlite3.Connection, collection_id: int, after: int, limit: int) -> int | None:
    """Rewrite headers of older versions among the next rows; the last of them, or None where there are no more.

    A damaged header stays as it is, so that its passage keeps being reported.
    """
    query = """SELECT row_key, passage_id, header FROM passages NOT INDEXED
        WHERE row_key > ? AND collection_id = ? ORDER BY row_key LIMIT ?"""
    changed = []
    last = None
    for last, encoded_id, packed in connection.execute(query, (after, collection_id, limit)).fetchall():
        with suppress(DamagedRecord, StoreDamaged):
            header = Header.parse(blob(packed), blob(encoded_id))
            if header.version != RECORD_VERSION:
                latest = header.latest()
                changed.append((latest.pack(encoded_id), latest.total_bytes, last))
    connection.executemany("UPDATE passages SET header = ?, size_bytes = ? WHERE row_key = ?", changed)
    return last


def _chunked(
    connection: sqlite3.Connection, query: str, collection_id: int, passage_ids: Iterable[str]
) -> Iterator[tuple[Any, ...]]:
    """Rows of a query that takes a collection and then, after IN, ids; run for some of the ids at a time."""
    encoded = list(map(passage_id_bytes, dict.fromkeys(passage_ids)))
    for start in range(0, len(encoded), _LOOKUP_CHUNK):
        chunk = encoded[start : start + _LOOKUP_CHUNK]
        yield from connection.execute(f"{query} ({','.join('?' * len(chunk))})", (collection_id, *chunk))


def _rows(collection_id: int, found: Iterable[Sequence[Any]]) -> Iterator[Row | DamagedRow]:
    segments: dict[object, Segment | str] = {}  # most passages of a request share theirs with others
    for values in found:
        encoded_id, packed, windows, written, first_row, *counts = values[:10]
        if type(encoded_id) is not bytes:
            raise StoreDamaged(f"the catalogue is damaged: passage id {encoded_id!r:.40}, expected bytes")
        segment = segments.get(values[10])
        if segment is None:
            segment = segments[values[10]] = segment_of(collection_id, values[10:])
        try:
            if not (type(packed) is type(windows) is type(written) is bytes and type(first_row) is int):
                raise DamagedRecord("a column of its catalogue row is of another type")
            header = Header.parse(packed, encoded_id)
            if header.version == 1:
                _check_utf8(encoded_id)  # which its checksum does not cover
            if tuple(counts) != header.counts:
                raise DamagedRecord("its catalogue row does not agree with its header")
            if isinstance(segment, str):
                raise DamagedRecord(segment)
            if header.code_size != segment.code_size:
                raise DamagedRecord(f"{header.code_size} bytes per state, its segment has {segment.code_size}")
            yield Row(encoded_id, header, windows, written, first_row, segment)
        except DamagedRecord as exc:
            yield DamagedRow(encoded_id, str(exc))


def _check_utf8(encoded_id: bytes) -> None:
    try:
        encoded_id.decode()
    except UnicodeDecodeError as exc:
        raise DamagedRecord("its passage id is not UTF-8") from exc
