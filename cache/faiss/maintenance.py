"""Compaction: merges small segments and drops rows nobody points at, beside readers.

A group of segments is rewritten as one new segment; one transaction moves the passages over and forgets the old ones;
then their files are unlinked. Readers keep what they read; readers that find a file gone look into the catalogue
again. Does not take the writer lock: its caller holds it around each group.

Damage of the catalogue as a whole, which reading passages does not show, and its mending.

A passage that is lost together with the catalogue page that names it reads as missing, and only the catalogue can tell
that there was one. `find` looks for such damage; `rebuild` writes the catalogue again out of what is whole.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from cache.codecs import Codec
from cache.errors import CacheError, DamagedRecord, InvalidName, ManifestError, StoreDamaged
from cache.faiss import rows
from cache.faiss.catalogue import (
    Catalogue,
    blob,
    check_row,
    integer,
    is_whole,
    new_file,
    num_committed,
    row_checksum,
    text,
    translated,
)
from cache.faiss.lock import WriterLock
from cache.faiss.segments import Segment, SegmentFiles, SegmentGone, remove_orphans, write_segment
from cache.manifest import Manifest
from cache.record import Header, passage_id_bytes
from cache.store import Audit

# Up to this much is rewritten at a time; FAISS's copies make it about four times that in memory.
TARGET_SEGMENT_BYTES = 128 << 20
# Segments below are merged by themselves once there are this many; larger ones are only touched on request.
SMALL_SEGMENT_BYTES = 8 << 20
MAX_SMALL_SEGMENTS = 64


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did."""

    num_segments_before: int
    num_segments_after: int
    num_bytes_dropped: int


_USE = """
SELECT segment_id, collection_id, file_name, num_rows, code_size, codes_offset, checksum,
    (SELECT coalesce(sum(num_states), 0) FROM passages WHERE passages.segment_id = segments.segment_id)
FROM segments WHERE collection_id = ? ORDER BY segment_id
"""


@dataclass(frozen=True, slots=True)
class SegmentUse:
    """A segment and how many of its rows a passage points at."""

    segment: Segment
    num_live_rows: int

    @property
    def num_live_bytes(self) -> int:
        return self.num_live_rows * self.segment.code_size

    @property
    def is_small(self) -> bool:
        return self.segment.num_rows * self.segment.code_size < SMALL_SEGMENT_BYTES

    @property
    def num_dead_bytes(self) -> int:
        return (self.segment.num_rows - self.num_live_rows) * self.segment.code_size


def segments_in_use(connection: sqlite3.Connection, collection_id: int) -> list[SegmentUse]:
    """All segments of a collection, oldest first."""
    uses = []
    for *values, num_live_rows in connection.execute(_USE, (collection_id,)):
        segment = rows.segment_of(collection_id, tuple(values))
        if isinstance(segment, str):
            raise StoreDamaged(segment)
        uses.append(SegmentUse(segment, integer(num_live_rows)))
    return uses


def num_small_segments(connection: sqlite3.Connection, collection_id: int) -> int:
    """Segments that `merge` of small ones would take up."""
    query = "SELECT count(*) FROM segments WHERE collection_id = ? AND num_rows * code_size < ?"
    return int(connection.execute(query, (collection_id, SMALL_SEGMENT_BYTES)).fetchone()[0])


def plan(uses: list[SegmentUse]) -> list[list[SegmentUse]]:
    """Groups of segments worth rewriting, each at most about TARGET_SEGMENT_BYTES of live codes."""
    groups: list[list[SegmentUse]] = []
    group: list[SegmentUse] = []
    num_bytes = 0
    for use in uses:
        if not use.num_dead_bytes and use.num_live_bytes >= TARGET_SEGMENT_BYTES // 2:
            continue
        if group and num_bytes + use.num_live_bytes > TARGET_SEGMENT_BYTES:
            groups.append(group)
            group, num_bytes = [], 0
        group.append(use)
        num_bytes += use.num_live_bytes
    if group:
        groups.append(group)
    return [group for group in groups if len(group) > 1 or group[0].num_dead_bytes]


def rewrite(
    group: list[SegmentUse],
    *,
    catalogue: Catalogue,
    directory: Path,
    files: SegmentFiles,
    codec: Codec,
    collection_id: int,
) -> set[int]:
    """Rewrite a group as one segment; returns the segments that could not be.

    A segment whose file is missing or too short is left as it is, so that its passages keep being reported damaged;
    codes are copied unchecked for the same reason: their checksums travel with them. Raises StoreDamaged.
    """
    parts = []
    moved: list[tuple[int, int, int]] = []  # new first row, row key, old segment
    readable: list[SegmentUse] = []
    unreadable: set[int] = set()
    num_rows = 0
    with catalogue.reading() as connection:
        for use in group:
            query = "SELECT row_key, first_row, num_states FROM passages WHERE segment_id = ? ORDER BY first_row"
            places = [
                (integer(row_key), integer(first_row), integer(num_states))
                for row_key, first_row, num_states in connection.execute(query, (use.segment.segment_id,))
            ]
            try:
                codes = list(files.codes(use.segment, [(first_row, num_states) for _, first_row, num_states in places]))
            except SegmentGone:
                codes = []
            whole = [one for one in codes if not isinstance(one, DamagedRecord)]
            if len(whole) < len(places):
                unreadable.add(use.segment.segment_id)
                continue
            readable.append(use)
            parts.extend(whole)
            for row_key, _, num_states in places:
                moved.append((num_rows, row_key, use.segment.segment_id))
                num_rows += num_states
    if not readable:
        return unreadable
    code_size = codec.code_size_bytes
    if num_rows:
        codes_matrix = np.concatenate(parts).reshape(num_rows, code_size)
        file_name, offset = write_segment(directory, codec, codes_matrix)
    with catalogue.writing() as connection:
        if num_rows:
            segment_id = add_segment(connection, collection_id, file_name, num_rows, code_size, offset)
            query = f"UPDATE passages SET segment_id = {segment_id}, first_row = ? WHERE row_key = ? AND segment_id = ?"
            connection.executemany(query, moved)
        forget_segments(connection, [use.segment.segment_id for use in readable])
    for use in readable:
        (directory / use.segment.file_name).unlink(missing_ok=True)
    return unreadable


def add_segment(
    connection: sqlite3.Connection, collection_id: int, file_name: str, num_rows: int, code_size: int, offset: int
) -> int:
    """A catalogue row for a segment file that is already durable; returns its id."""
    query = "INSERT INTO segments (collection_id, file_name, num_rows, code_size, codes_offset) VALUES (?, ?, ?, ?, ?)"
    columns = (collection_id, file_name, num_rows, code_size, offset)
    segment_id = connection.execute(query, columns).lastrowid
    assert segment_id is not None
    query = "UPDATE segments SET checksum = ? WHERE segment_id = ?"
    connection.execute(query, (row_checksum(segment_id, *columns), segment_id))
    return segment_id


def forget_segments(connection: sqlite3.Connection, segment_ids: list[int]) -> None:
    """Remove catalogue rows of segments, and tell readers that some are gone."""
    connection.executemany("DELETE FROM segments WHERE segment_id = ?", [(segment_id,) for segment_id in segment_ids])
    connection.execute("UPDATE store SET num_removed = num_removed + 1")


MAX_SHOWN = 20
_UNREADABLE = "rows that cannot be read:"
_COUNTED = "num_passages, num_states, num_tokens, num_truncated, size_bytes, num_clipped"
_COUNTS = """SELECT count(*), coalesce(sum(num_states), 0), coalesce(sum(num_tokens), 0), coalesce(sum(truncated), 0),
    coalesce(sum(size_bytes), 0), coalesce(sum(num_clipped), 0) FROM passages NOT INDEXED WHERE collection_id = ?"""
_SEGMENT = "segment_id, collection_id, file_name, num_rows, code_size, codes_offset, checksum"


def find(catalogue: Catalogue, directory: Path, lock: WriterLock, collection: str) -> Audit:
    """Damage of the catalogue: its pages and indexes, rows that no record vouches for, counts, lost commits.

    Raises StoreDamaged where it cannot be opened at all.
    """
    noted = lock.noted() or 0  # before the catalogue: a writer commits first
    found: list[str] = []
    if not catalogue.exists:
        return Audit()
    with translated(catalogue.path), catalogue.reading() as connection:
        checks = _pages(connection), _lost_commits(connection, noted), _names(connection)
        for check in (*checks, _counters(connection, collection)):
            try:
                found.extend(check)
            except (CacheError, sqlite3.Error) as exc:
                found.append(f"catalogue: {exc}")
        with suppress(CacheError, sqlite3.Error):
            found.extend(_segments(connection))
    return Audit(tuple(found), tuple(_orphans(catalogue, directory, lock)))


def committed_files(catalogue: Catalogue, lock: WriterLock) -> set[str]:
    """Names of the segments that are in the catalogue: all others may be removed.

    Raises StoreDamaged where that is not certain, so that a damaged catalogue never costs the codes it should name.
    """
    noted = lock.noted() or 0
    with catalogue.reading() as connection:
        for problem in chain(_lost_commits(connection, noted), _pages(connection, "segments")):
            raise StoreDamaged(f"the catalogue is damaged: {problem}")
        found = set()
        for values in connection.execute(f"SELECT {_SEGMENT} FROM segments"):
            segment = rows.segment_of(integer(values[1]), values)
            if isinstance(segment, str):
                raise StoreDamaged(f"the catalogue is damaged: {segment}")
            found.add(segment.file_name)
        return found


def rebuild(catalogue: Catalogue, directory: Path, lock: WriterLock) -> list[str]:
    """Write a new catalogue with all rows of this one that are whole, put it in its place, and say what was left.

    Only for the holder of the writer lock. Counters, indexes and generations are made again.
    """
    left: list[str] = []
    with catalogue.salvaging() as old, closing(new_file(catalogue.aside)) as new:
        new.execute("PRAGMA synchronous = FULL")
        new.execute("BEGIN")
        collections = _copy_names(old, new, left)
        _copy_passages(old, new, collections, left)
        if left and not collections:  # the codes must stay: an older copy of the catalogue may still name them
            raise StoreDamaged(f"no collection can be read, and nothing was changed: {left[0]}")
        commits = 0
        with suppress(StoreDamaged, sqlite3.Error):
            commits = num_committed(old)
        # More than any that was acknowledged: what is lost has been said here.
        commits = max(commits, lock.noted() or 0) + 1
        (schema,) = new.execute("SELECT schema FROM store").fetchone()
        new.execute("UPDATE store SET num_commits = ?, checksum = ?", (commits, row_checksum(commits, schema)))
        new.execute("COMMIT")
    catalogue.replace(catalogue.aside)
    lock.note(commits)
    remove_orphans(directory, committed_files(catalogue, lock))
    return left


def _pages(connection: sqlite3.Connection, table: str = "") -> Iterator[str]:
    """SQLite's own check, which ends where a walk over a damaged index might not: it counts what it has visited."""
    for (line,) in connection.execute(f"PRAGMA integrity_check({table or MAX_SHOWN})"):
        if line != b"ok":
            yield f"catalogue: {line.decode(errors='replace')}"


def _lost_commits(connection: sqlite3.Connection, noted: int) -> Iterator[str]:
    commits = num_committed(connection)
    if commits < noted:
        yield f"the last {noted - commits} of {noted} commits are lost"


def _names(connection: sqlite3.Connection) -> Iterator[str]:
    """Collections, aliases and generations whose row is damaged, or that point nowhere."""
    names = set()
    for collection_id, name, manifest, checksum in connection.execute(
        "SELECT collection_id, name, manifest, checksum FROM collections"
    ):
        try:
            names.add(text(name))
            check_row(f"collection {text(name)!r}", checksum, integer(collection_id), text(name))
            Manifest.from_json(blob(manifest), text(name))
        except CacheError as exc:
            yield f"collection {_shown(name)!r}: {exc}"
    for alias, name, checksum in connection.execute("SELECT alias, name, checksum FROM aliases"):
        if not is_whole(checksum, text(alias), text(name)):
            yield f"checksum of alias {text(alias)!r} does not match"
        elif text(name) not in names:
            yield f"alias {text(alias)!r} points at {text(name)!r}, which does not exist"
    for name, generation, checksum in connection.execute("SELECT name, generation, checksum FROM generations"):
        if not is_whole(checksum, text(name), integer(generation)):
            yield f"checksum of the generation of {text(name)!r} does not match"
        names.discard(text(name))
    for name in sorted(names):
        yield f"collection {name!r} has no generation"


def _counters(connection: sqlite3.Connection, collection: str) -> Iterator[str]:
    """Counters that differ from the rows, and rows that belong to nothing."""
    collection_id = rows.find_collection(connection, collection)
    if collection_id is not None:
        # One statement: both see the same commits.
        query = f"SELECT * FROM (SELECT {_COUNTED} FROM collections WHERE collection_id = ?), ({_COUNTS})"
        both = connection.execute(query, (collection_id, collection_id)).fetchone()
        counted, there = both[:6], both[6:]
        for name, left, right in zip(_COUNTED.split(", "), counted, there, strict=True):
            if left != right:
                yield f"{name} of collection {collection!r} is {left}, its rows have {right}"
    # Neither is found by a scan: an id of another type sorts before all that are bytes.
    for condition, problem in (
        ("collection_id NOT IN (SELECT collection_id FROM collections)", "belong to no collection"),
        ("typeof(passage_id) != 'blob' OR length(passage_id) = 0", "have an id that no passage can have"),
    ):
        (number,) = connection.execute(f"SELECT count(*) FROM passages NOT INDEXED WHERE {condition}").fetchone()
        if number:
            yield f"{number} passages {problem}"


def _segments(connection: sqlite3.Connection) -> Iterator[str]:
    """Rows of segments that are damaged. What is wrong with a file is told by the passages that lie there."""
    for values in connection.execute(f"SELECT {_SEGMENT} FROM segments"):
        segment = rows.segment_of(integer(values[1]), values)
        if isinstance(segment, str):
            yield segment


def _orphans(catalogue: Catalogue, directory: Path, lock: WriterLock) -> list[str]:
    with lock.idle() as is_idle, suppress(CacheError, OSError, sqlite3.Error):
        if is_idle and directory.is_dir():
            committed = committed_files(catalogue, lock)
            return sorted(path.name for path in directory.iterdir() if path.name not in committed)
    return []


def _copy_names(old: sqlite3.Connection, new: sqlite3.Connection, left: list[str]) -> set[int]:
    """Copy collections, aliases, generations and segments; returns the numbers of the collections."""
    kept: dict[str, int] = {}
    for collection_id, name, manifest, checksum in _salvaged(
        old, "SELECT collection_id, name, manifest, checksum FROM collections", left
    ):
        try:
            check_row(f"collection {_shown(name)!r}", checksum, integer(collection_id), text(name))
            Manifest.from_json(blob(manifest), text(name))
        except (StoreDamaged, ManifestError) as exc:
            left.append(f"collection {_shown(name)!r}: {exc}")
            continue
        query = "INSERT INTO collections (collection_id, name, manifest, checksum) VALUES (?, ?, ?, ?)"
        new.execute(query, (collection_id, text(name), manifest, row_checksum(integer(collection_id), text(name))))
        kept[text(name)] = integer(collection_id)
    for alias, name, checksum in _salvaged(old, "SELECT alias, name, checksum FROM aliases", left):
        try:
            check_row(f"alias {_shown(alias)!r}", checksum, text(alias), text(name))
            rows.set_alias(new, text(alias), text(name), shadowing=True)
        except CacheError as exc:
            left.append(f"alias {_shown(alias)!r}: {exc}")
    for name, generation, checksum in _salvaged(old, "SELECT name, generation, checksum FROM generations", left):
        if type(generation) is int and is_whole(checksum, _shown(name), generation):
            query = "INSERT OR IGNORE INTO generations (name, generation, checksum) VALUES (?, ?, ?)"
            new.execute(query, (text(name), generation, row_checksum(text(name), generation)))
    for name in kept:
        rows.bump(new, name)
    for values in _salvaged(old, f"SELECT {_SEGMENT} FROM segments", left):
        if type(values[1]) is not int or isinstance(segment := rows.segment_of(values[1], values), str):
            left.append(f"the row of segment {values[0]!r}")
        elif values[1] in kept.values():
            columns = values[0], values[1], segment.file_name, segment.num_rows, segment.code_size, segment.codes_offset
            query = f"INSERT INTO segments ({_SEGMENT}) VALUES (?, ?, ?, ?, ?, ?, ?)"
            new.execute(query, (*columns, row_checksum(*columns)))  # type: ignore[arg-type]  # segment_of checked them
    return set(kept.values())


def _copy_passages(old: sqlite3.Connection, new: sqlite3.Connection, collections: set[int], left: list[str]) -> None:
    segments = {segment_id for (segment_id,) in new.execute("SELECT segment_id FROM segments")}
    insert = """INSERT OR IGNORE INTO passages (row_key, collection_id, passage_id, segment_id, first_row, num_states,
        num_tokens, truncated, size_bytes, num_clipped, header, windows, text)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
    # From both ends: a page that cannot be read ends either way.
    for order in ("ASC", "DESC"):
        query = f"""SELECT row_key, collection_id, passage_id, segment_id, first_row, header, windows, text
            FROM passages NOT INDEXED ORDER BY row_key {order}"""
        complete = len(left)
        for row_key, collection_id, passage_id, segment_id, first_row, packed, windows, written in _salvaged(
            old, query, left
        ):
            try:
                header = Header.parse(blob(packed), passage_id_bytes(text(passage_id)))
                if segment_id not in segments or collection_id not in collections:
                    raise DamagedRecord("belongs to no collection or segment")
                counts = header.num_states, header.num_tokens, header.truncated, header.total_bytes, header.num_clipped
                place = integer(row_key), collection_id, passage_id, segment_id, integer(first_row)
                new.execute(insert, (*place, *counts, packed, blob(windows), blob(written)))
            except (DamagedRecord, InvalidName, StoreDamaged) as exc:
                left.append(f"passage {_shown(passage_id)!r}: {exc}")
        if len(left) == complete or not left[-1].startswith(_UNREADABLE):
            return


def _salvaged(connection: sqlite3.Connection, query: str, left: list[str]) -> Iterator[tuple[object, ...]]:
    """Rows of a query until one cannot be read; that is put down."""
    try:
        yield from connection.execute(query)
    except sqlite3.Error as exc:
        left.append(f"{_UNREADABLE} {exc}")


def _shown(value: object) -> str:
    """The text of a column, as far as it is text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
