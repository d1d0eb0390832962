"""Collections, aliases and generations in the catalogue, as functions over a connection.

Whatever changes something runs inside a write transaction of the caller. Rows that fail their check raise StoreDamaged.

Rows of the catalogue's `passages` table: written from records, read back into records.

The one place that knows the columns, and where rows are checked: a record's header is the checksum of its row. It holds
the id it was asked for, and what the other columns say must agree with it; a wrong place in a segment has other codes.
Transactions and locks are the caller's.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.errors import (
    CollectionExists,
    CollectionInUse,
    CollectionNotFound,
    DamagedRecord,
    ManifestError,
    StoreDamaged,
)
from cache.faiss.catalogue import blob, check_row, integer, row_checksum, text
from cache.faiss.segments import Segment, SegmentFiles, SegmentGone
from cache.manifest import Manifest
from cache.record import RECORD_VERSION, Damaged, Header, Record, check_name, passage_id_bytes
from cache.store import StoreStats


def find_collection(connection: sqlite3.Connection, name: str) -> int | None:
    """Its number in the catalogue; a name used again gets another one."""
    row = connection.execute("SELECT collection_id, checksum FROM collections WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    collection_id = integer(row[0])
    check_row(f"collection {name!r}", row[1], collection_id, name)
    return collection_id


def require_collection(connection: sqlite3.Connection, name: str) -> int:
    collection_id = find_collection(connection, name)
    if collection_id is None:
        raise CollectionNotFound(f"collection: {name!r} does not exist in this store")
    return collection_id


def read_manifest(connection: sqlite3.Connection, name: str) -> Manifest | None:
    row = connection.execute("SELECT manifest FROM collections WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    try:
        return Manifest.from_json(blob(row[0]), name)
    except ManifestError as exc:
        raise StoreDamaged(f"collection {name!r} cannot be read: {exc}") from exc


def write_manifest(connection: sqlite3.Connection, manifest: Manifest) -> None:
    name = manifest.collection
    if find_collection(connection, name) is not None or name in aliases(connection):
        raise CollectionExists(f"collection: {name!r} already exists in this store")
    query = "INSERT INTO collections (name, manifest) VALUES (?, ?)"
    collection_id = connection.execute(query, (name, manifest.to_json())).lastrowid
    assert collection_id is not None
    query = "UPDATE collections SET checksum = ? WHERE collection_id = ?"
    connection.execute(query, (row_checksum(collection_id, name), collection_id))
    bump(connection, name)


def list_collections(connection: sqlite3.Connection) -> list[str]:
    names = []
    for row in connection.execute("SELECT collection_id, name, checksum FROM collections ORDER BY name"):
        collection_id, name = integer(row[0]), text(row[1])
        check_row(f"collection {name!r}", row[2], collection_id, name)
        names.append(name)
    return names


def drop(connection: sqlite3.Connection, name: str) -> list[str]:
    """Remove everything of a collection from the catalogue; returns the segment files that are now nobody's."""
    collection_id = require_collection(connection, name)
    if users := sorted(alias for alias, target in aliases(connection).items() if target == name):
        raise CollectionInUse(f"collection: {name!r} is in use by the aliases {users}; move them first")
    query = "SELECT file_name FROM segments WHERE collection_id = ?"
    file_names = [text(file_name) for (file_name,) in connection.execute(query, (collection_id,))]
    for table in ("passages", "segments", "collections"):
        connection.execute(f"DELETE FROM {table} WHERE collection_id = ?", (collection_id,))
    connection.execute("UPDATE store SET num_removed = num_removed + 1")
    bump(connection, name)
    return file_names


def aliases(connection: sqlite3.Connection) -> dict[str, str]:
    found = {}
    for row in connection.execute("SELECT alias, name, checksum FROM aliases"):
        alias, name = text(row[0]), text(row[1])
        check_row(f"alias {alias!r}", row[2], alias, name)
        found[alias] = name
    return found


def set_alias(connection: sqlite3.Connection, alias: str, name: str, *, shadowing: bool = False) -> None:
    check_name("alias", alias)
    if find_collection(connection, alias) is not None and not shadowing:
        raise CollectionExists(f"alias: {alias!r} is the name of a collection")
    require_collection(connection, name)
    query = """INSERT INTO aliases (alias, name, checksum) VALUES (?, ?, ?)
        ON CONFLICT (alias) DO UPDATE SET name = excluded.name, checksum = excluded.checksum"""
    connection.execute(query, (alias, name, row_checksum(alias, name)))


def remove_alias(connection: sqlite3.Connection, alias: str) -> bool:
    return connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount > 0


def stats(connection: sqlite3.Connection, name: str) -> StoreStats:
    """As the triggers keep count: `audit` compares them with the rows."""
    query = """SELECT num_passages, num_states, num_tokens, num_truncated, size_bytes, num_clipped
        FROM collections WHERE name = ?"""
    row = connection.execute(query, (name,)).fetchone()
    return StoreStats() if row is None else StoreStats(*map(integer, row))


def generation(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("SELECT generation, checksum FROM generations WHERE name = ?", (name,)).fetchone()
    if row is None:
        return 0
    number = integer(row[0])
    check_row(f"the generation of {name!r}", row[1], name, number)
    return number


def bump(connection: sqlite3.Connection, name: str) -> None:
    """Another generation: something of the collection changed."""
    number = generation(connection, name) + 1
    query = """INSERT INTO generations (name, generation, checksum) VALUES (?, ?, ?)
        ON CONFLICT (name) DO UPDATE SET generation = excluded.generation, checksum = excluded.checksum"""
    connection.execute(query, (name, number, row_checksum(name, number)))


# SQLite's bound on variables per statement is 32,766; larger statements only take longer to prepare.
_LOOKUP_CHUNK = 1000

_UPSERT = """
INSERT INTO passages (collection_id, passage_id, segment_id, first_row, num_states, num_tokens, truncated, size_bytes,
    num_clipped, header, windows, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (collection_id, passage_id) DO UPDATE SET segment_id = excluded.segment_id,
    first_row = excluded.first_row, num_states = excluded.num_states, num_tokens = excluded.num_tokens,
    truncated = excluded.truncated, size_bytes = excluded.size_bytes, num_clipped = excluded.num_clipped,
    header = excluded.header, windows = excluded.windows, text = excluded.text
"""
# A row whose segment is not in the catalogue is found, and damaged.
_SELECT = """
SELECT passage_id, header, windows, text, first_row, passages.num_states, num_tokens, truncated, size_bytes,
    num_clipped, passages.segment_id, segments.collection_id, file_name, num_rows, code_size, codes_offset, checksum
FROM passages LEFT JOIN segments ON segments.segment_id = passages.segment_id WHERE passages.collection_id = ?
"""
_Values = tuple[object, ...]


class Row(NamedTuple):
    """One passage as the catalogue has it, its columns checked against its header."""

    encoded_id: bytes
    header: Header
    windows: bytes
    text: bytes
    first_row: int
    segment: Segment

    @property
    def passage_id(self) -> str:
        return self.encoded_id.decode()


class DamagedRow(NamedTuple):
    """A row that its header does not vouch for."""

    encoded_id: bytes
    reason: str
    segment: None = None

    @property
    def passage_id(self) -> str:
        return self.encoded_id.decode(errors="replace")


def read(rows: Iterable[Row | DamagedRow], files: SegmentFiles) -> Iterator[tuple[str, Record | Damaged | SegmentGone]]:
    """The records of rows by passage id, in their order; those of one segment that follow each other are read together.

    Checked: what comes back as a Record is that passage as it was written.
    """
    for _, group in groupby(rows, key=attrgetter("segment")):
        located: list[Row] = []
        for row in group:
            if isinstance(row, Row):
                located.append(row)
            else:
                yield row.passage_id, Damaged(row.passage_id, row.reason)
        if not located:
            continue
        try:
            codes = files.codes(located[0].segment, [(row.first_row, row.header.num_states) for row in located])
        except SegmentGone as exc:
            yield from ((row.passage_id, exc) for row in located)
            continue
        for row, found in zip(located, codes, strict=True):
            yield row.passage_id, _joined(row, found)


def _joined(row: Row, codes: NDArray[np.uint8] | DamagedRecord) -> Record | Damaged:
    try:
        if isinstance(codes, DamagedRecord):
            raise codes
        return Record.join(row.header, row.windows, codes, row.text)
    except DamagedRecord as exc:
        return Damaged(row.passage_id, str(exc))


def insert(connection: sqlite3.Connection, collection_id: int, segment_id: int, records: Mapping[str, Record]) -> None:
    """Point passages at a new segment that holds their codes in this order."""
    rows = []
    first_row = 0
    for passage_id, record in records.items():
        # Software that writes version 1 cannot open this catalogue, so it is not written here.
        header, encoded_id = record.header.latest(), passage_id_bytes(passage_id)
        written = b"" if record.text is None else record.text.encode()
        rows.append(
            (
                collection_id, encoded_id, segment_id, first_row,
                header.num_states, header.num_tokens, header.truncated, header.total_bytes, header.num_clipped,
                header.pack(encoded_id), record.payload[0], written,
            )
        )  # fmt: skip
        first_row += header.num_states
    connection.executemany(_UPSERT, rows)


def find(connection: sqlite3.Connection, collection_id: int, passage_ids: Iterable[str]) -> list[Row | DamagedRow]:
    """Rows of the passages that exist, in the order they lie on disk."""
    rows: list[Row | DamagedRow] = []
    for chunk, marks in _chunks(passage_ids):
        query = f"{_SELECT} AND passage_id IN ({marks})"
        rows.extend(_rows(collection_id, connection.execute(query, (collection_id, *chunk))))
    rows.sort(key=_place)
    return rows


def page(
    connection: sqlite3.Connection, collection_id: int, after: bytes, limit: int
) -> tuple[list[Row | DamagedRow], bytes]:
    """The next rows in order of passage id bytes, and the last of those.

    Raises StoreDamaged where they are not in order: a scan over such an index might not end.
    """
    query = f"{_SELECT} AND passage_id > ? ORDER BY passage_id LIMIT ?"
    values = connection.execute(query, (collection_id, after, limit)).fetchall()
    for encoded_id, *_ in values:
        if blob(encoded_id) <= after:
            raise StoreDamaged("the catalogue is damaged: its index of passage ids is out of order")
        after = encoded_id
    return list(_rows(collection_id, values)), after


def headers(connection: sqlite3.Connection, collection_id: int, passage_ids: Sequence[str]) -> dict[str, Header]:
    """Headers of the passages that exist and whose header is whole, by id."""
    found: dict[str, Header] = {}
    for chunk, marks in _chunks(passage_ids):
        query = f"SELECT passage_id, header FROM passages WHERE collection_id = ? AND passage_id IN ({marks})"
        for encoded_id, packed in connection.execute(query, (collection_id, *chunk)):
            with suppress(DamagedRecord, StoreDamaged):
                found[text(encoded_id)] = Header.parse(blob(packed), encoded_id)
    return found


def renew(connection: sqlite3.Connection, collection_id: int, after: int, limit: int) -> int | None:
    """Rewrite headers of older versions among the next rows; the last of them, or None where there are no more.

    A header that is damaged stays as it is, so that its passage keeps being reported.
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


def _rows(collection_id: int, found: Iterable[_Values]) -> Iterator[Row | DamagedRow]:
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
            if counts != [
                header.num_states, header.num_tokens, header.truncated, header.total_bytes, header.num_clipped,
            ]:  # fmt: skip
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


def segment_of(collection_id: int, values: _Values) -> Segment | str:
    """A segment out of its whole row, or why there is none."""
    segment_id, owner, file_name, num_rows, code_size, codes_offset, checksum = values
    if owner is None:
        return f"segment {segment_id} is not in the catalogue"
    try:
        segment = Segment(
            integer(segment_id), text(file_name), integer(num_rows), integer(code_size), integer(codes_offset)
        )
        check_row(
            f"segment {segment_id}", checksum, segment.segment_id, integer(owner), segment.file_name,
            segment.num_rows, segment.code_size, segment.codes_offset,
        )  # fmt: skip
    except StoreDamaged as exc:
        return str(exc)
    return segment if owner == collection_id else f"segment {segment_id} is another collection's"


def _place(row: Row | DamagedRow) -> tuple[int, int]:
    return (row.segment.segment_id, row.first_row) if isinstance(row, Row) else (0, 0)
