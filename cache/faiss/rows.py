"""Connections to the catalogue: rows checked when read and signed when written, and SQLite's errors as the cache's.

A record header, which covers the requested id, is the checksum of its passage's row, and the other columns must agree
with it. All other rows carry a checksum over their columns, and `typed` catches a bit that changed a column's type. All
that finds a damaged row raises StoreDamaged.
"""

import errno
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby, islice, repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
import xxhash
from numpy.typing import NDArray

from cache import errors
from cache.errors import (
    CacheError,
    DamagedRecord,
    StoreAccessDenied,
    StoreDamaged,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
)
from cache.faiss.segments import Segment, SegmentFiles
from cache.manifest import Manifest, storage_name_of
from cache.record import RECORD_VERSION, Damaged, Header, Record, check_name, passage_id_bytes

# Columns that a row's checksum covers, the key first, by table. Rows of catalogue version 1 have a mark in its place,
# longer than a checksum, so that no flipped bit makes one of the other.
COVERED: dict[str, dict[str, type]] = {
    "collections": {"collection_id": int, "name": str},
    "aliases": {"alias": str, "name": str},
    "generations": {"name": str, "generation": int},
    "segments": {"segment_id": int, "collection_id": int, "file_name": str, "num_rows": int, "code_size": int,
                 "codes_offset": int},
}  # fmt: skip
UNCHECKED = b"version 1"
UNREADABLE = "rows that cannot be read:"

_T = TypeVar("_T")
_KINDS: dict[type, str] = {int: "a whole number", bytes: "bytes", str: "UTF-8"}

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

_OS: dict[int | None, tuple[type[CacheError], str]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (StoreFull, "no space left")),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE), (StoreUnavailable, "was removed or replaced")),
    **dict.fromkeys((errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN), (StoreUnavailable, "does not answer")),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), (StoreAccessDenied, "not permitted")),
}
_SQLITE: dict[int, tuple[type[CacheError], str]] = {
    sqlite3.SQLITE_FULL: (StoreFull, "has no space left"),
    sqlite3.SQLITE_READONLY: (StoreAccessDenied, "may not be written"),
    sqlite3.SQLITE_READONLY | 4 << 8: (StoreUnavailable, "was removed or replaced"),  # SQLITE_READONLY_DBMOVED
    sqlite3.SQLITE_IOERR: (StoreUnavailable, "cannot be read or written"),
    sqlite3.SQLITE_CANTOPEN: (StoreAccessDenied, "cannot be opened"),
    **dict.fromkeys((sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH), (StoreAccessDenied, "may not be opened")),
    **dict.fromkeys((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED), (StoreLocked, "is held by another process")),
    sqlite3.SQLITE_CORRUPT: (StoreDamaged, "is damaged"),
    sqlite3.SQLITE_NOTADB: (StoreDamaged, "is not a catalogue"),
    10 | 2 << 8: (StoreDamaged, "is too short"),  # SQLITE_IOERR_SHORT_READ, which the module does not name
    # Our statements are fixed and the schema is ours, so these mean that the file is not what we wrote.
    **dict.fromkeys((
        sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_INTERNAL, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_RANGE, sqlite3.SQLITE_EMPTY,
    ), (StoreDamaged, "is damaged")),
}  # fmt: skip


def typed(kind: type[_T], value: object) -> _T:
    """A column's value, text (which connections to a catalogue give as bytes) decoded."""
    found: Any = value
    if kind is str and type(value) is bytes:
        with suppress(UnicodeDecodeError):
            found = value.decode()
    if type(found) is not kind:
        raise StoreDamaged(f"the catalogue is damaged: {value!r:.40}, expected {_KINDS[kind]}")
    return found


def _checked_row(table: str, row: Sequence[object]) -> tuple[Any, ...]:
    """The covered columns of a row whose checksum comes last."""
    *columns, checksum = row
    kinds = COVERED[table].values()
    values: list[Any] = [typed(kind, one) for kind, one in zip(kinds, columns, strict=True)]
    if checksum not in (_row_checksum(*values), UNCHECKED):
        raise StoreDamaged(f"the catalogue is damaged: checksum of {_row_name(table, columns)} does not match")
    return tuple(values)


def _row_name(table: str, columns: Sequence[object]) -> str:
    """A row in a message: its table, and its first column that is text."""
    key = next((one for one in columns if isinstance(one, bytes)), columns[0])
    shown = key.decode(errors="replace") if isinstance(key, bytes) else key
    return f"{'alias' if table == 'aliases' else table.removesuffix('s')} {shown!r}"


def _row_checksum(*columns: int | str | bytes) -> bytes:
    return xxhash.xxh3_64_digest(repr(columns).encode())


class Connection(sqlite3.Connection):
    """A connection to a catalogue, in autocommit. Transactions and locks are the caller's."""

    is_kept = True  # in the pool; not to a file of version 1, which another process may upgrade

    @classmethod
    def open(cls, path: Path, mode: str = "rw") -> "Connection":
        """`mode` is a URI's, with further parameters; "memory" for a database without a file."""
        options: dict[str, Any] = {"timeout": 10, "isolation_level": None, "check_same_thread": False, "uri": True}
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", factory=cls, **options)
        connection.text_factory = bytes
        connection.create_function("row_checksum", -1, _row_checksum, deterministic=True)
        return connection

    def run(self, script: str) -> None:
        """The statements of a script, in the transaction that is open; `executescript` would commit it."""
        statement = ""
        for line in script.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                self.execute(statement)
                statement = ""

    def schema(self) -> bytes:
        query = "SELECT sql FROM main.sqlite_master WHERE sql NOT NULL ORDER BY name"
        return _row_checksum(*(typed(bytes, sql) for (sql,) in self.execute(query)))

    def num_commits(self) -> int:
        row = self.execute("SELECT num_commits, schema, checksum FROM store").fetchone()
        if row is None or row[2] not in (_row_checksum(typed(int, row[0]), typed(bytes, row[1])), UNCHECKED):
            raise StoreDamaged("the catalogue is damaged: its counters are missing or their checksum does not match")
        return typed(int, row[0])

    def set_num_commits(self, number: int) -> None:
        self.execute("UPDATE store SET num_commits = ?1, checksum = row_checksum(?1, schema)", (number,))

    def lost_commits(self, noted: int) -> Iterator[str]:
        if (commits := self.num_commits()) < noted:
            yield f"the last {noted - commits} of {noted} commits are lost"

    def damaged_pages(self, check: str | int) -> Iterator[str]:
        """SQLite's own check, of a table or up to so many problems; unlike a walk it ends on a damaged index."""
        for (line,) in self.execute(f"PRAGMA integrity_check({check})"):
            if line != b"ok":
                yield f"catalogue: {line.decode(errors='replace')}"

    def checked(self, table: str, where: str = "", *values: object) -> Iterator[Any]:
        """The covered columns of rows, each checked; `where` may also order them."""
        for row in self.execute(f"SELECT {', '.join(COVERED[table])}, checksum FROM {table} {where}", values):
            yield _checked_row(table, row)

    def whole(self, table: str, problems: list[str], also: str = "NULL") -> Iterator[tuple[Any, ...]]:
        """The covered columns of intact rows, and one more; damaged rows become problems."""
        query = f"SELECT {also}, {', '.join(COVERED[table])}, checksum FROM {table}"
        for further, *row in self.salvaged(query, problems):
            try:
                yield (*_checked_row(table, row), further)
            except StoreDamaged as exc:
                problems.append(f"{_row_name(table, row)}: {exc}")

    def salvaged(self, query: str, problems: list[str]) -> Iterator[tuple[Any, ...]]:
        """Rows of a query until one cannot be read, which becomes a problem."""
        try:
            yield from self.execute(query)
        except sqlite3.Error as exc:
            problems.append(f"{UNREADABLE} {exc}")

    def put(self, table: str, **columns: object) -> int:
        """Insert a row with its checksum, or replace that of its key; returns the key that the catalogue assigned."""
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        query = f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})"
        assigned = self.execute(query, tuple(columns.values())).lastrowid
        key, *_ = covered = COVERED[table]
        query = f"UPDATE {table} SET checksum = row_checksum({', '.join(covered)}) WHERE {key} = ?"
        self.execute(query, (columns.get(key, assigned),))
        return assigned or 0

    def find_collection(self, name: str) -> int | None:
        """Its number in the catalogue; a name used again gets another one."""
        return next((number for number, _ in self.checked("collections", "WHERE name = ?", name)), None)

    def has_collection(self, collection_id: int) -> bool:
        return any(self.checked("collections", "WHERE collection_id = ?", collection_id))

    def find_stored(self, storage_name: str) -> int | None:
        """The number of the collection with that storage name, which is looked for first among the names."""
        query = "SELECT name, manifest FROM collections ORDER BY name != ?"
        for name, manifest in self.execute(query, (storage_name,)):
            shown = name.decode(errors="replace") if isinstance(name, bytes) else ""  # a damaged row costs itself
            if isinstance(manifest, bytes) and storage_name_of(manifest, shown) == storage_name:
                return self.find_collection(shown)
        return None

    def storage_name(self, name: str) -> str:
        row = self.execute("SELECT manifest FROM collections WHERE name = ?", (name,)).fetchone()
        return name if row is None else storage_name_of(typed(bytes, row[0]), name)

    def storage_names(self) -> set[str]:
        return {self.storage_name(name) for _, name in self.checked("collections")}

    def require_collection(self, name: str) -> int:
        if (collection_id := self.find_collection(name)) is None:
            raise errors.CollectionNotFound(f"collection: {name!r} does not exist in this store")
        return collection_id

    def manifest(self, name: str) -> Manifest | None:
        row = self.execute("SELECT manifest FROM collections WHERE name = ?", (name,)).fetchone()
        try:
            return None if row is None else Manifest.from_json(typed(bytes, row[0]), name)
        except errors.ManifestError as exc:
            raise StoreDamaged(f"collection {name!r} cannot be read: {exc}") from exc

    def rename_collection(self, name: str, new_name: str) -> None:
        collection_id, manifest = self.require_collection(name), self.manifest(name)
        assert manifest is not None
        # No `put`, which would replace the row, and with it the counts.
        query = (
            "UPDATE collections SET name = ?2, manifest = ?3, checksum = row_checksum(?1, ?2) WHERE collection_id = ?1"
        )
        self.execute(query, (collection_id, new_name, replace(manifest, collection=new_name).to_json()))

    def set_alias(self, alias: str, name: str, *, shadowing: bool) -> None:
        check_name("alias", alias)
        if self.find_collection(alias) is not None and not shadowing:
            raise errors.CollectionExists(f"alias: {alias!r} is the name of a collection")
        self.require_collection(name)
        self.put("aliases", alias=alias, name=name)

    def generation(self, storage_name: str) -> int:
        return next((number for _, number in self.checked("generations", "WHERE name = ?", storage_name)), 0)

    def bump(self, storage_name: str) -> None:
        """Count up the generation: something of the collection changed."""
        self.put("generations", name=storage_name, generation=self.generation(storage_name) + 1)

    def insert_passages(self, collection_id: int, file_name: str, offset: int, records: Mapping[str, Record]) -> None:
        """Point passages at a new durable segment file that holds their codes in this order."""
        headers = [record.header for record in records.values()]
        shape = sum(one.num_states for one in headers), headers[0].code_size
        segment_id = self.insert_segment(collection_id, file_name, shape, offset)
        rows, first_row = [], 0
        for passage_id, record in records.items():
            # Software that writes version 1 cannot open this catalogue, so it is not written here.
            header, encoded_id = record.header.latest(), passage_id_bytes(passage_id)
            windows, _, text = record.payload
            place = collection_id, encoded_id, segment_id, first_row
            rows.append((*place, *header.counts, header.pack(encoded_id), windows, text))
            first_row += header.num_states
        self.executemany(_UPSERT, rows)

    def insert_segment(self, collection_id: int, file_name: str, shape: tuple[int, int], offset: int) -> int:
        """Of so many rows, of so many bytes."""
        _, *names = COVERED["segments"]
        return self.put("segments", **dict(zip(names, (collection_id, file_name, *shape, offset), strict=True)))

    def find_passages(self, collection_id: int, passage_ids: Iterable[str]) -> "list[_Row]":
        """Rows of the passages that exist, in the order they lie on disk."""
        found = self._by_ids(f"{_SELECT} AND passage_id IN", collection_id, passage_ids)
        rows = _rows(collection_id, found)
        return sorted(rows, key=lambda row: (row.segment.segment_id if row.segment else 0, row.first_row))

    def next_passages(self, collection_id: int, after: bytes, limit: int) -> "tuple[list[_Row], bytes]":
        """The next rows in order of passage id bytes, and the last id of those."""
        query = f"{_SELECT} AND passage_id > ? ORDER BY passage_id LIMIT ?"
        values = self.execute(query, (collection_id, after, limit)).fetchall()
        _check_order(after, values)
        return list(_rows(collection_id, values)), values[-1][0] if values else after

    def next_ids(self, collection_id: int, after: bytes, limit: int) -> list[bytes]:
        """The next passage ids in order of their bytes, from the index alone."""
        query = "SELECT passage_id FROM passages WHERE collection_id = ? AND passage_id > ? ORDER BY passage_id LIMIT ?"
        values = self.execute(query, (collection_id, after, limit)).fetchall()
        _check_order(after, values)
        return [encoded_id for (encoded_id,) in values]

    def headers(self, collection_id: int, passage_ids: Sequence[str]) -> dict[str, Header]:
        found: dict[str, Header] = {}
        query = "SELECT passage_id, header FROM passages WHERE collection_id = ? AND passage_id IN"
        for encoded_id, packed in self._by_ids(query, collection_id, passage_ids):
            with suppress(DamagedRecord, StoreDamaged):
                found[typed(str, encoded_id)] = Header.parse(typed(bytes, packed), encoded_id)
        return found

    def renew_headers(self, collection_id: int, after: int, limit: int) -> int | None:
        """Rewrite headers of older versions among the next rows; the last of them, or None where there are no more."""
        query = """SELECT row_key, passage_id, header FROM passages NOT INDEXED
            WHERE row_key > ? AND collection_id = ? ORDER BY row_key LIMIT ?"""
        changed, last = [], None
        for last, encoded_id, packed in self.execute(query, (after, collection_id, limit)).fetchall():
            with suppress(DamagedRecord, StoreDamaged):  # it stays as it is, so that its passage keeps being reported
                header = Header.parse(typed(bytes, packed), typed(bytes, encoded_id))
                if header.version != RECORD_VERSION:
                    latest = header.latest()
                    changed.append((latest.pack(encoded_id), latest.total_bytes, last))
        self.executemany("UPDATE passages SET header = ?, size_bytes = ? WHERE row_key = ?", changed)
        return last

    def _by_ids(self, query: str, collection_id: int, passage_ids: Iterable[str]) -> Iterator[tuple[Any, ...]]:
        """Rows of a query that takes a collection and then, after IN, ids; run for some of the ids at a time."""
        encoded = map(passage_id_bytes, dict.fromkeys(passage_ids))
        while chunk := list(islice(encoded, _LOOKUP_CHUNK)):
            yield from self.execute(f"{query} ({','.join('?' * len(chunk))})", (collection_id, *chunk))


def _check_order(after: bytes, values: Iterable[Sequence[Any]]) -> None:
    """Of rows that begin with a passage id; a walk over an index in another order might not end."""
    for encoded_id, *_ in values:
        if typed(bytes, encoded_id) <= after:
            raise StoreDamaged("the catalogue is damaged: its index of passage ids is out of order")
        after = encoded_id


class _Row(NamedTuple):
    """One passage as the catalogue has it, its columns checked against its header; or with damage and no segment."""

    encoded_id: bytes
    damage: str = ""
    segment: Segment | None = None
    first_row: int = 0
    header: Header | None = None
    windows: bytes = b""
    text: bytes = b""


def read_records(rows: Iterable[_Row], files: SegmentFiles) -> Iterator[tuple[str, Record | Damaged | str]]:
    """Passage ids and whole records, in order; where there is no segment file, its name takes the record's place."""
    for segment, group in groupby(rows, key=attrgetter("segment")):  # read together
        together = list(group)
        codes: Iterable[NDArray[np.uint8] | DamagedRecord | None] = repeat(None, len(together))
        if segment is not None:
            with suppress(FileNotFoundError):
                codes = files.codes(segment, [(row.first_row, row.header.num_states) for row in together if row.header])
        for row, found in zip(together, codes, strict=True):
            passage_id = row.encoded_id.decode(errors="replace")
            record: Record | Damaged | str
            try:
                if segment is None or row.header is None or isinstance(found, DamagedRecord):
                    raise DamagedRecord(row.damage or str(found))
                record = segment.file_name if found is None else Record.join(row.header, row.windows, found, row.text)
            except DamagedRecord as exc:
                record = Damaged(passage_id, str(exc))
            yield passage_id, record


def _rows(collection_id: int, found: Iterable[Sequence[Any]]) -> Iterator[_Row]:
    segments: dict[object, Segment | str] = {}  # most passages of a request share one with others
    for encoded_id, packed, windows, text, first_row, *rest in found:
        typed(bytes, encoded_id)
        counts, place = tuple(rest[:5]), rest[5:]
        segment_id, owner, *_ = place
        if (segment := segments.get(segment_id)) is None:
            try:
                if owner is None:
                    raise StoreDamaged(f"segment {segment_id} is not in the catalogue")
                _, owner, *fields = _checked_row("segments", place)
                if owner != collection_id:
                    raise StoreDamaged(f"segment {segment_id} is of another collection")
                segment = Segment(segment_id, *fields)
            except StoreDamaged as exc:
                segment = str(exc)
            segments[segment_id] = segment
        try:
            if not (type(packed) is type(windows) is type(text) is bytes and type(first_row) is int):
                raise DamagedRecord("a column of its catalogue row is of another type")
            header = Header.parse(packed, encoded_id)
            if header.version == 1:
                encoded_id.decode()  # which its checksum does not cover
            if counts != header.counts:
                raise DamagedRecord("its catalogue row does not agree with its header")
            if isinstance(segment, str):
                raise DamagedRecord(segment)
            if header.code_size != segment.code_size:
                raise DamagedRecord(f"{header.code_size} bytes per state, its segment has {segment.code_size}")
            yield _Row(encoded_id, "", segment, first_row, header, windows, text)
        except UnicodeDecodeError:
            yield _Row(encoded_id, "its passage id is not UTF-8")
        except DamagedRecord as exc:
            yield _Row(encoded_id, str(exc))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise a CacheError in place of OSError and sqlite3.Error; its text may be shown, and the cause has the rest."""
    try:
        yield
    except StoreDamaged as exc:
        if str(path) in str(exc):
            raise
        raise StoreDamaged(f"store {path}: {exc}; see `preread verify`") from exc
    except (UnicodeDecodeError, OverflowError) as exc:  # of the sqlite3 module, about a schema that is no text
        raise StoreDamaged(f"store {path}: the catalogue is damaged; see `preread verify`") from exc
    except OSError as exc:
        error, reason = _OS.get(exc.errno, (CacheError, exc.strerror or "a file failed"))
        name = errno.errorcode.get(exc.errno or 0, type(exc).__name__)
        raise error(f"store {path}: {reason} ({name})") from exc
    except sqlite3.Error as exc:
        code, name = getattr(exc, "sqlite_errorcode", 0), getattr(exc, "sqlite_errorname", type(exc).__name__)
        # The low byte is the primary code; the rest tells details, which its name has.
        error, reason = _SQLITE.get(code) or _SQLITE.get(code & 0xFF, (CacheError, "failed"))
        raise error(f"store {path}: the catalogue {reason} ({name})") from exc
