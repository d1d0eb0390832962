"""Compaction of segments beside readers, audit of the catalogue, and its repair.

Compaction rewrites a group of segments as one; one transaction moves the passages over and forgets the old segments;
then their files are unlinked. A passage lost together with the catalogue page that names it reads as missing: `audit`
looks for such damage, and `rebuild` writes the catalogue again from its intact rows.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.errors import CacheError, DamagedRecord, InvalidName, ManifestError, StoreDamaged
from cache.faiss.catalogue import SUMS, CatalogueFile
from cache.faiss.rows import COVERED, UNREADABLE, Connection, translated, typed
from cache.faiss.segments import Segment, SegmentFiles
from cache.manifest import Manifest
from cache.record import Header, passage_id_bytes
from cache.store import Audit

# Up to this much is rewritten at a time; FAISS's copies make it about four times that in memory.
TARGET_SEGMENT_BYTES = 128 << 20
# Smaller segments are merged automatically once there are many; larger ones only on request.
_SMALL_SEGMENT_BYTES = 8 << 20

_MAX_SHOWN = 20


class Compaction(NamedTuple):
    """Effect of a compaction."""

    num_segments_before: int
    num_segments_after: int
    num_bytes_dropped: int


class _Use(NamedTuple):
    """A segment, and how much of it passages point at."""

    segment: Segment
    num_live_bytes: int
    num_dead_bytes: int


class Compactor:
    """One compaction; its caller holds the writer lock during each step."""

    def __init__(self, catalogue: CatalogueFile, files: SegmentFiles) -> None:
        self._catalogue = catalogue
        self._files = files
        self._before: list[_Use] = []
        self._unreadable: set[int] = set()

    def step(self, collection_id: int, codec: Codec) -> Compaction | None:
        """Rewrite a group of segments, or return the effect where there is nothing left to rewrite."""
        uses = self._uses(collection_id)
        self._before = self._before or uses
        if group := _worthwhile([use for use in uses if use.segment.segment_id not in self._unreadable]):
            self._rewrite(group, collection_id, codec)
            return None
        before, after = (sum(use.num_dead_bytes for use in state) for state in (self._before, uses))
        return Compaction(len(self._before), len(uses), before - after)

    def merge_small(self, collection_id: int, codec: Codec, min_segments: int) -> None:
        with self._catalogue.reading() as connection:
            query = "SELECT count(*) FROM segments WHERE collection_id = ? AND num_rows * code_size < ?"
            (number,) = connection.execute(query, (collection_id, _SMALL_SEGMENT_BYTES)).fetchone()
        if number >= min_segments:
            uses = self._uses(collection_id)
            small = [use for use in uses if use.num_live_bytes + use.num_dead_bytes < _SMALL_SEGMENT_BYTES]
            if group := _worthwhile(small):
                self._rewrite(group, collection_id, codec)

    def _uses(self, collection_id: int) -> list[_Use]:
        query = "SELECT segment_id, sum(num_states) FROM passages WHERE collection_id = ? GROUP BY segment_id"
        uses = []
        with self._catalogue.reading() as connection:
            live = dict(connection.execute(query, (collection_id,)))
            where = "WHERE collection_id = ? ORDER BY segment_id"
            for segment_id, _, *rest in connection.checked("segments", where, collection_id):
                segment, num_live = Segment(segment_id, *rest), typed(int, live.get(segment_id, 0))
                num_dead = segment.num_rows - num_live
                uses.append(_Use(segment, num_live * segment.code_size, num_dead * segment.code_size))
        return uses

    def _rewrite(self, group: list[_Use], collection_id: int, codec: Codec) -> None:
        # A segment whose file is missing or too short is left as it is, so that its passages keep being reported
        # damaged; codes are copied unchecked for the same reason: their checksums travel with them.
        parts: list[NDArray[np.uint8]] = []
        moved: list[tuple[int, int, int]] = []  # new first row, row key, old segment
        readable: list[Segment] = []
        num_rows = 0
        query = "SELECT row_key, first_row, num_states FROM passages WHERE segment_id = ? ORDER BY first_row"
        with self._catalogue.reading() as connection:
            for segment, *_ in group:
                places = [[typed(int, one) for one in row] for row in connection.execute(query, (segment.segment_id,))]
                codes: list[NDArray[np.uint8] | DamagedRecord] = []
                with suppress(FileNotFoundError):
                    codes = list(self._files.codes(segment, [(first, number) for _, first, number in places]))
                whole = [one for one in codes if not isinstance(one, DamagedRecord)]
                if len(whole) < len(places):
                    self._unreadable.add(segment.segment_id)
                    continue
                readable.append(segment)
                parts.extend(whole)
                for row_key, _, num_states in places:
                    moved.append((num_rows, row_key, segment.segment_id))
                    num_rows += num_states
        if not readable:
            return
        if num_rows:
            shape = num_rows, codec.code_size_bytes
            file_name, offset = self._files.write(codec, [part.reshape(-1, shape[1]) for part in parts])
        with self._catalogue.writing() as connection:
            if num_rows:
                new = connection.insert_segment(collection_id, file_name, shape, offset)
                query = f"UPDATE passages SET segment_id = {new}, first_row = ? WHERE row_key = ? AND segment_id = ?"
                connection.executemany(query, moved)
            connection.executemany("DELETE FROM segments WHERE segment_id = ?", [(one.segment_id,) for one in readable])
            connection.execute("UPDATE store SET num_removed = num_removed + 1")
        self._files.remove(segment.file_name for segment in readable)


def _worthwhile(uses: list[_Use]) -> list[_Use]:
    """The first group of segments worth rewriting as one, at most about TARGET_SEGMENT_BYTES of live codes."""
    group: list[_Use] = []
    num_bytes = 0
    for use in uses:
        if not use.num_dead_bytes and use.num_live_bytes >= TARGET_SEGMENT_BYTES // 2:
            continue
        if group and num_bytes + use.num_live_bytes > TARGET_SEGMENT_BYTES:
            if len(group) > 1 or group[0].num_dead_bytes:
                break
            group, num_bytes = [], 0
        group.append(use)
        num_bytes += use.num_live_bytes
    return group if len(group) > 1 or (group and group[0].num_dead_bytes) else []


def audit(catalogue: CatalogueFile, files: SegmentFiles, collection: str) -> Audit:
    """Damage of a catalogue that can be opened: pages, indexes, rows that no record vouches for, counts, commits."""
    noted = catalogue.lock.noted()  # before the catalogue: a writer commits first
    problems: list[str] = []
    if not catalogue.exists:
        return Audit()
    with translated(catalogue.path), catalogue.reading() as connection:
        checks = [connection.damaged_pages(_MAX_SHOWN), connection.lost_commits(noted)]
        for check in (*checks, _damaged_names(connection), _wrong_counts(connection, collection)):
            try:
                problems.extend(check)
            except (CacheError, sqlite3.Error) as exc:
                problems.append(f"catalogue: {exc}")
        for _ in connection.whole("segments", problems):
            pass  # a damaged file is reported by its passages
    orphans: list[str] = []
    with catalogue.lock.idle() as is_idle, suppress(CacheError, OSError, sqlite3.Error):
        if is_idle:
            orphans = files.orphans(catalogue.committed_files())
    return Audit(tuple(problems), tuple(orphans))


def rebuild(catalogue: CatalogueFile, files: SegmentFiles) -> list[str]:
    """Replace the catalogue by one with all its intact rows; returns what was left behind. Needs the writer lock."""
    left: list[str] = []
    with catalogue.salvaging() as old, catalogue.new_file() as new:
        new.execute("BEGIN")
        kept: dict[str, int] = {}  # by storage name
        for collection_id, manifest in _whole_collections(old, left):
            name = manifest.collection
            new.put("collections", collection_id=collection_id, name=name, manifest=manifest.to_json())
            kept[manifest.storage_name] = collection_id
        for alias, name, _ in old.whole("aliases", left):
            try:
                new.set_alias(alias, name, shadowing=True)
            except CacheError as exc:
                left.append(f"alias {alias!r}: {exc}")
        lost: list[str] = []  # a damaged generation loses nothing
        for name, generation, _ in old.whole("generations", lost):
            new.put("generations", name=name, generation=generation)
        left.extend(problem for problem in lost if problem.startswith(UNREADABLE))
        for name in kept:
            new.bump(name)
        for *row, _ in old.whole("segments", left):
            if row[1] in kept.values():
                new.put("segments", **dict(zip(COVERED["segments"], row, strict=True)))
        _copy_passages(old, new, set(kept.values()), left)
        if left and not kept:  # the codes must stay: an older copy of the catalogue may still name them
            raise StoreDamaged(f"no collection can be read, and nothing was changed: {left[0]}")
        commits = catalogue.lock.noted()
        with suppress(StoreDamaged, sqlite3.Error):
            commits = max(commits, old.num_commits())
        commits += 1  # more than any that was acknowledged: losses have been reported
        new.set_num_commits(commits)
        new.execute("COMMIT")
    catalogue.replace()
    catalogue.lock.note(commits)
    files.remove(files.orphans(catalogue.committed_files()))
    return left


def _damaged_names(connection: Connection) -> Iterator[str]:
    problems: list[str] = []
    manifests = [manifest for _, manifest in _whole_collections(connection, problems)]
    names = {manifest.collection for manifest in manifests}
    for alias, name, _ in connection.whole("aliases", problems):
        if name not in names:
            problems.append(f"alias {alias!r} points at {name!r}, which does not exist")
    counted = {name for name, *_ in connection.whole("generations", problems)}
    yield from problems
    for manifest in manifests:
        if manifest.storage_name not in counted:
            yield f"collection {manifest.collection!r} has no generation"


def _wrong_counts(connection: Connection, collection: str) -> Iterator[str]:
    collection_id = connection.find_collection(collection)
    if collection_id is not None:
        sums = ", ".join(f"coalesce(sum({column}), 0)" for column in SUMS.values())
        # One statement: both see the same commits.
        query = f"""SELECT * FROM (SELECT num_passages, {", ".join(SUMS)} FROM collections WHERE collection_id = ?1),
            (SELECT count(*), {sums} FROM passages NOT INDEXED WHERE collection_id = ?1)"""
        both = connection.execute(query, (collection_id,)).fetchone()
        half = len(both) // 2
        for name, counted, there in zip(("num_passages", *SUMS), both[:half], both[half:], strict=True):
            if counted != there:
                yield f"{name} of collection {collection!r} is {counted}, its rows have {there}"
    # Neither is found by a scan: an id of another type sorts before all that are bytes.
    conditions = {
        "belong to no collection": "collection_id NOT IN (SELECT collection_id FROM collections)",
        "have an id that no passage can have": "typeof(passage_id) != 'blob' OR length(passage_id) = 0",
    }
    for problem, condition in conditions.items():
        (number,) = connection.execute(f"SELECT count(*) FROM passages NOT INDEXED WHERE {condition}").fetchone()
        if number:
            yield f"{number} passages {problem}"


def _whole_collections(connection: Connection, problems: list[str]) -> Iterator[tuple[int, Manifest]]:
    for collection_id, name, manifest in connection.whole("collections", problems, "manifest"):
        try:
            yield collection_id, Manifest.from_json(typed(bytes, manifest), name)
        except (ManifestError, StoreDamaged) as exc:
            problems.append(f"collection {name!r}: {exc}")


def _copy_passages(old: Connection, new: Connection, collections: set[int], left: list[str]) -> None:
    segments = {segment_id for (segment_id,) in new.execute("SELECT segment_id FROM segments")}
    insert = f"""INSERT OR IGNORE INTO passages (row_key, collection_id, passage_id, segment_id, first_row,
        {", ".join(SUMS.values())}, header, windows, text) VALUES ({",".join("?" * (8 + len(SUMS)))})"""
    for order in ("ASC", "DESC"):  # from both ends: a page that cannot be read ends either way
        query = f"""SELECT row_key, collection_id, passage_id, segment_id, first_row, header, windows, text
            FROM passages NOT INDEXED ORDER BY row_key {order}"""
        complete = len(left)
        for row in old.salvaged(query, left):
            row_key, collection_id, passage_id, segment_id, first_row, packed, windows, written = row
            try:
                header = Header.parse(typed(bytes, packed), passage_id_bytes(typed(str, passage_id)))
                if segment_id not in segments or collection_id not in collections:
                    raise DamagedRecord("belongs to no collection or segment")
                place = typed(int, row_key), collection_id, passage_id, segment_id, typed(int, first_row)
                new.execute(insert, (*place, *header.counts, packed, typed(bytes, windows), typed(bytes, written)))
            except (DamagedRecord, InvalidName, StoreDamaged) as exc:
                shown = passage_id.decode(errors="replace") if isinstance(passage_id, bytes) else passage_id
                left.append(f"passage {shown!r}: {exc}")
        if len(left) == complete or not left[-1].startswith(UNREADABLE):
            return
