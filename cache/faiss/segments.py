"""Segments: immutable FAISS index files of codes, written whole and read by offset; `faiss.read_index` opens them too.

A known offset, so that a damaged FAISS header misleads no reader. Read into memory and not mapped: a mapped file that
is truncated (cp over it, rsync --inplace) kills the process at the next access, which no check before can rule out.
"""

import errno
import os
import resource
import struct
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, repeat
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.errors import CacheError, DamagedRecord

# The process needs descriptors for other things.
_MAX_OPEN_SEGMENTS = min(16384, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
# The codes of one read stay in the processor's cache; those of several share a block, which any one of them keeps.
_MAX_READ_BYTES, _BLOCK_BYTES = 1 << 18, 4 << 20
# Of an open: there is no file, or the process lacks a right, descriptors or memory; anything else is the file's.
_NOT_ITS_FAULT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

# In an index file: behind its kind and the number of dimensions, four bytes each.
_ROWS_OFFSET = 8

_Codes = NDArray[np.uint8]
_Ranges = Sequence[tuple[int, int]]  # first row and number of rows, each


@dataclass(frozen=True, slots=True)
class Segment:
    """Place of a committed segment and of the codes in it."""

    segment_id: int
    file_name: str
    num_rows: int
    code_size: int
    codes_offset: int


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SegmentFiles:
    """The directory of segments, the most recently used kept open, and read buffers for reuse. Thread-safe."""

    def __init__(self, directory: Path, max_kept_bytes: int = 128 << 20, block_bytes: int = _BLOCK_BYTES) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self.memory = _BufferPool(max_kept_bytes, block_bytes)

    def write(self, codec: Codec, parts: Sequence[_Codes]) -> tuple[str, int]:
        """Write codes of passages, (num_rows, code_size) each, as a durable segment, or nothing; file name and offset.

        What FAISS would write, without the copies of all codes that its index and its writer take.
        """
        head, tail = _layout(codec).around(sum(map(len, parts)))
        name = uuid.uuid4().hex + ".faiss"
        aside = self.directory / (name + ".tmp")
        try:
            with open(aside, "wb") as file:
                for part in (head, *parts, tail):
                    file.write(np.ascontiguousarray(part).data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, self.directory / name)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync_directory(self.directory)
        return name, len(head)

    def orphans(self, committed: set[str]) -> list[str]:
        """Files that no catalogue row names; only the holder of the writer lock may remove them."""
        return sorted(name for name in os.listdir(self.directory) if name not in committed)

    def remove(self, file_names: Iterable[str]) -> None:
        for file_name in file_names:
            (self.directory / file_name).unlink(missing_ok=True)

    def codes(self, segment: Segment, ranges: _Ranges) -> Iterator[_Codes | DamagedRecord]:
        """Codes of ranges of rows, (first_row, num_states) each: uint8 (num_states * code_size,) in memory.

        Adjacent ranges are read together, their codes views into one buffer. A range that cannot be read costs itself
        alone: DamagedRecord takes its place. Raises FileNotFoundError where a compaction removed the file since, or it
        is lost, and OSError where no file can be opened now, or this one not by this process.
        """
        try:
            return self._read(segment, self._open(segment), ranges)
        except OSError as exc:
            if exc.errno in _NOT_ITS_FAULT:
                raise
            return repeat(DamagedRecord(f"segment {segment.file_name} cannot be opened: {exc.strerror}"), len(ranges))

    def _read(self, segment: Segment, file: "_OpenFile", ranges: _Ranges) -> Iterator[_Codes | DamagedRecord]:
        # One run after the other, as its reader consumes it: codes are checked while the processor's cache has them.
        for first, run in _runs(ranges, segment.code_size):
            codes = self._read_rows(segment, file, first, sum(run))
            for start, end in pairwise(accumulate(run, initial=0)):
                if isinstance(codes, DamagedRecord):  # each alone then: it may be another's
                    yield self._read_rows(segment, file, first + start, end - start)
                else:
                    yield codes[start * segment.code_size : end * segment.code_size]

    def _read_rows(self, segment: Segment, file: "_OpenFile", first_row: int, num_rows: int) -> _Codes | DamagedRecord:
        """Codes of consecutive rows, (num_rows * code_size,), or why they cannot be read."""
        if min(first_row, segment.codes_offset) < 0 or first_row + num_rows > segment.num_rows:
            return DamagedRecord(f"rows {first_row} to {first_row + num_rows}, its segment has {segment.num_rows}")
        codes = self.memory.take(num_rows * segment.code_size)
        offset, num_read = segment.codes_offset + first_row * segment.code_size, 0
        try:
            while num_read < codes.nbytes:
                if not (count := os.preadv(file.descriptor, [codes[num_read:].data], offset + num_read)):
                    return DamagedRecord(f"segment {segment.file_name} is too short")
                num_read += count
        except OSError as exc:
            return DamagedRecord(f"segment {segment.file_name} cannot be read: {exc.strerror}")
        return codes

    def keep_only(self, segment_ids: set[int]) -> None:
        """Close files of other segments, so that the disk space of removed ones is freed."""
        with self._lock:
            for segment_id in self._files.keys() - segment_ids:
                del self._files[segment_id]

    def _open(self, segment: Segment) -> "_OpenFile":
        with self._lock:
            file = self._files.get(segment.segment_id)
            if file is not None and file.name == segment.file_name:
                self._files.move_to_end(segment.segment_id)
                return file
            file = self._files[segment.segment_id] = _OpenFile(self.directory, segment.file_name)
            if len(self._files) > _MAX_OPEN_SEGMENTS:
                self._files.popitem(last=False)
            return file


class _OpenFile:
    """A descriptor closed with its last reference, so never while another thread reads from it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        # Not blocking: in a segment's place there may be something that is not a file.
        self.descriptor = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _BufferPool:
    """Buffers reused once nothing refers to them: fresh memory costs a page fault for every 4 KiB. Thread-safe."""

    def __init__(self, max_bytes: int, block_bytes: int) -> None:
        self._max_bytes, self._block_bytes = max_bytes, block_bytes
        self._lock = threading.Lock()
        self._blocks: list[NDArray[np.uint8]] = []
        self._num_bytes = 0
        self._rest = np.empty(0, dtype=np.uint8)  # of the latest block, not yet given out

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Uninitialised memory, uint8 (num_bytes,), reserved until the last view of it is gone."""
        with self._lock:
            if self._rest.nbytes < num_bytes:
                self._rest = np.empty(0, dtype=np.uint8)
                self._rest = self._block(num_bytes)
            taken, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
            return taken

    def _block(self, num_bytes: int) -> NDArray[np.uint8]:
        for i in range(len(self._blocks)):
            # Every view, memoryview and tensor over a block refers to it: two references are the list's and the call's.
            if sys.getrefcount(self._blocks[i]) == 2 and num_bytes <= self._blocks[i].nbytes:
                return self._blocks[i][:]
        block = np.empty(max(num_bytes, self._block_bytes), dtype=np.uint8)
        if self._num_bytes + block.nbytes <= self._max_bytes:
            self._blocks.append(block)
            self._num_bytes += block.nbytes
        return block[:]


def _runs(ranges: _Ranges, code_size: int) -> Iterator[tuple[int, list[int]]]:
    """Adjacent ranges joined, in order: first row, and rows of each."""
    max_rows = _MAX_READ_BYTES // code_size
    run: list[int] = []
    first = end = 0
    for start, count in ranges:
        if run and (start != end or start + count - first > max_rows):
            yield first, run
            run = []
        first = first if run else start
        run.append(count)
        end = start + count
    if run:
        yield first, run


@dataclass(frozen=True)
class _Layout:
    """The bytes before and after the codes of a segment file."""

    head: _Codes  # of a file of one row
    counts: dict[int, int]  # by offset in the head: a count of one row, in rows, bytes or numbers
    tail: _Codes

    def around(self, num_rows: int) -> tuple[_Codes, _Codes]:
        head = self.head.copy()
        for at, count in self.counts.items():
            head[at : at + 8] = np.frombuffer(struct.pack("<Q", count * num_rows), np.uint8)
        return head, self.tail


@lru_cache(maxsize=8)  # FAISS writes a codec's tables with every index: 50 ms for a residual quantizer
def _layout(codec: Codec) -> _Layout:
    """Of an index with one row. Raises CacheError where files of a few rows are laid out otherwise."""

    def serialised(num_rows: int, fill: int) -> _Codes:
        index = codec.new_index()
        index.add_sa_codes(np.full((num_rows, codec.code_size_bytes), fill, dtype=np.uint8))
        return np.asarray(faiss.serialize_index(index))

    one = serialised(1, 0x00)
    offset = int(np.argmax(one != serialised(1, 0xFF)))  # the first byte that the codes change
    (length,) = struct.unpack("<Q", one[offset - 8 : offset].data)
    counts = {_ROWS_OFFSET: 1, offset - 8: length}
    layout = _Layout(one[:offset].copy(), counts, one[offset + codec.code_size_bytes :].copy())
    for few in (2, 259):
        head, tail = layout.around(few)
        codes = np.zeros(few * codec.code_size_bytes, np.uint8)
        if not np.array_equal(serialised(few, 0x00), np.concatenate([head, codes, tail])):
            raise CacheError(f"segment: FAISS did not lay out {codec.factory} codes at offset {offset}")
    return layout
