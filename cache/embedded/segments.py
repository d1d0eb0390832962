"""Segments: immutable FAISS index files of codes, written whole and read through a memory map.

A segment is what `faiss.write_index` writes, and `faiss.read_index` opens it. Reading here maps the file and slices the
codes out at a known offset instead: no copy, and a damaged FAISS header cannot mislead the reader. Does not know which
rows belong to which passage.
"""

import mmap
import os
import resource
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.errors import CacheError, DamagedRecord

# Each map holds a file descriptor, of which the process needs others, and Linux allows 65,530 maps.
MAX_OPEN_SEGMENTS = min(16384, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
_SUFFIX, _ASIDE = ".faiss", ".tmp"


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a committed segment lies and how to find its codes."""

    segment_id: int
    file_name: str
    num_rows: int
    code_size: int
    codes_offset: int


class SegmentGone(Exception):  # noqa: N818 - never leaves the embedded store, and often is no error
    """The file of a segment is not there: removed by a compaction since the catalogue was read, or lost."""


def write_segment(directory: Path, codec: Codec, codes: NDArray[np.uint8]) -> tuple[str, int]:
    """Write codes (num_rows, code_size) as a new segment; durable under its final name on return.

    Returns file name and offset of the codes in it. Raises OSError, and then leaves nothing behind.
    """
    index = codec.new_index()
    index.add_sa_codes(np.ascontiguousarray(codes))
    # To memory first: FAISS's own file writer would lose an error of the last buffered write.
    content = faiss.serialize_index(index)
    offset = _codes_offset(codec)
    if not np.array_equal(content[offset : offset + codes.nbytes], codes.reshape(-1)):
        raise CacheError(f"segment: FAISS did not lay out {codec.factory} codes at offset {offset}")
    name = uuid.uuid4().hex + _SUFFIX
    aside = directory / (name + _ASIDE)
    try:
        with open(aside, "wb", buffering=0) as file:
            rest = content.data
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.rename(aside, directory / name)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_directory(directory)
    return name, offset


def fsync_directory(directory: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_orphans(directory: Path, committed: set[str]) -> int:
    """Remove files that no catalogue row names; only for the holder of the writer lock. Returns their number."""
    orphans = [path for path in directory.iterdir() if path.name not in committed]
    for path in orphans:
        path.unlink(missing_ok=True)
    return len(orphans)


class SegmentMaps:
    """Memory maps of the segments in use, the latest used kept open. Thread-safe.

    A view handed out keeps its map alive, also after the map was dropped here or the file unlinked.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def codes(self, segment: Segment, first_row: int, num_states: int) -> NDArray[np.uint8]:
        """Codes of some rows, a read-only view (num_states * code_size,).

        Raises SegmentGone where there is no file, DamagedRecord where the file is too short.
        """
        mapped = self._map(segment)
        start = segment.codes_offset + first_row * segment.code_size
        length = num_states * segment.code_size
        # The size is asked of the file every time: touching a page that a truncation took away kills the process.
        if start + length > min(len(mapped), mapped.size()):
            raise DamagedRecord(f"segment {segment.file_name} is too short")
        return np.frombuffer(mapped, dtype=np.uint8, count=length, offset=start)

    def keep_only(self, segment_ids: set[int]) -> None:
        """Drop maps of other segments, so that the disk space of removed files comes back."""
        with self._lock:
            for segment_id in self._maps.keys() - segment_ids:
                del self._maps[segment_id]

    def close(self) -> None:
        with self._lock:
            self._maps.clear()

    def _map(self, segment: Segment) -> mmap.mmap:
        with self._lock:
            mapped = self._maps.get(segment.segment_id)
            if mapped is not None:
                self._maps.move_to_end(segment.segment_id)
                return mapped
            try:
                with open(self._directory / segment.file_name, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError as exc:
                raise SegmentGone(segment.file_name) from exc
            except ValueError as exc:
                raise DamagedRecord(f"segment {segment.file_name} is empty") from exc
            self._maps[segment.segment_id] = mapped
            if len(self._maps) > MAX_OPEN_SEGMENTS:
                self._maps.popitem(last=False)
            return mapped


def _codes_offset(codec: Codec) -> int:
    """Where codes begin in a serialised index: the first byte that two one-row indexes of unlike codes differ in."""
    contents = []
    for fill in (0x00, 0xFF):
        index = codec.new_index()
        index.add_sa_codes(np.full((1, codec.code_size_bytes), fill, dtype=np.uint8))
        contents.append(faiss.serialize_index(index))
    return int(np.argmax(contents[0] != contents[1]))
