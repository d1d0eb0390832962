"""Compaction: merges small segments and drops rows nobody points at, beside readers.

A group of segments is rewritten as one new segment; one transaction moves the passages over and forgets the old ones;
then their files are unlinked. Readers keep what they read; readers that find a file gone look into the catalogue
again. Does not take the writer lock: its caller holds it around each group.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.codecs import Codec
from cache.embedded import rows
from cache.embedded.catalogue import Catalogue
from cache.embedded.failures import integer, row_checksum
from cache.embedded.segments import Segment, SegmentFiles, SegmentGone, write_segment
from cache.errors import DamagedRecord, StoreDamaged

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
