"""Bytes of an input, decompressed. Knows gzip and zstd by their first bytes, not by name; knows no format.

Several inputs as one stream of passages, with how much of them was read. Knows names, not contents.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from encoder_worker.sources import Fields, Item, Position, SourceError
from encoder_worker.sources.parquet import ParquetRows
from encoder_worker.sources.text import DEFAULT_MAX_LINE_BYTES, read_delimited, read_jsonl, read_text

STDIN = "-"
_BUFFER_BYTES = 1 << 16
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class _Counting(io.RawIOBase):
    """Passes reads on and counts them: a pipe has no tell()."""

    def __init__(self, raw: BinaryIO | FileIO) -> None:
        self.num_bytes = 0
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._raw.readinto(buffer)  # type: ignore[union-attr]  # binary streams have it; BinaryIO does not say so
        self.num_bytes += num_bytes
        return num_bytes


@contextmanager
def open_bytes(name: str, stdin: BinaryIO | None = None) -> Iterator[tuple[BinaryIO, Position]]:
    """The decompressed bytes of a file, or of standard input for `-`, and how far the input was read.

    Args:
        stdin: what standard input is, where it is not descriptor 0.

    Raises:
        SourceError: no such file, no permission, a directory; also while reading, where compressed
            data is damaged or ends early.
    """
    try:
        # Descriptor 0 itself: a thread waiting for input would hold sys.stdin's lock when the process ends.
        raw = (stdin or FileIO(0, closefd=False)) if name == STDIN else FileIO(name)
    except OSError as exc:
        raise SourceError(f"{name}: {exc.strerror or exc}") from exc
    counting = _Counting(raw)
    buffered = _buffered(counting)
    try:
        yield _decompressed(buffered), lambda: counting.num_bytes
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowInvalid) as exc:
        raise SourceError(f"{name}: compressed data is damaged or ends early ({exc})") from exc
    except OSError as exc:
        raise SourceError(f"{name}: cannot be read further ({exc})") from exc
    finally:
        if raw is not stdin:
            raw.close()


def _buffered(raw: Any) -> io.BufferedReader:
    return io.BufferedReader(raw, _BUFFER_BYTES)


def _decompressed(buffered: io.BufferedReader) -> BinaryIO:
    magic = buffered.peek(4)[:4]
    if magic.startswith(_GZIP):
        return _buffered(gzip.GzipFile(fileobj=buffered))
    if magic == _ZSTD:
        # Arrow's reader: unlike zstandard's it tells a truncated stream from a whole one, and unlike
        # a decompressobj it never inflates more than was asked for.
        stream = pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), "zstd")
        return _buffered(_Arrow(stream))
    return buffered


class _Arrow(io.RawIOBase):
    """An Arrow input stream as Python's buffered reader wants it."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


FORMATS = ("jsonl", "tsv", "csv", "parquet", "text", "beir")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "tsv", ".csv": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
_COMPRESSED = {".gz", ".gzip", ".zst", ".zstd"}
_BEIR_NAMES = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst")


class Source:
    """Iterates over every item of its inputs once.

    Args:
        names: files, BEIR folders, or `-` for standard input.
        format: one of FORMATS; None goes by each name.
        max_line_bytes: lines (records, rows) over it are refused without being held in memory.

    Raises:
        SourceError: an input that is not there, or whose format the name does not tell.
    """

    def __init__(
        self,
        names: Sequence[str | Path],
        *,
        format: str | None = None,
        fields: Fields | None = None,
        max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    ) -> None:
        if not names:
            raise SourceError("no input given; expected files, BEIR folders, or - for standard input")
        if format is not None and format not in FORMATS:
            raise SourceError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
        if [str(name) for name in names].count(STDIN) > 1:
            raise SourceError("- is given twice; standard input can be read once")
        self._fields = fields or Fields()
        self._max_line_bytes = max_line_bytes
        self._inputs = [_resolve(str(name), format) for name in names]
        sizes = [_size(name) for name, _ in self._inputs]
        self._total_bytes = sum(size for size in sizes if size is not None) if None not in sizes else None
        self._done_bytes = 0
        self._position: Position = _nothing

    def __iter__(self) -> Iterator[Item]:
        for name, format in self._inputs:
            with open_bytes(name) as (stream, position):
                self._position = position
                source = "standard input" if name == STDIN else name
                if format == "parquet":
                    rows = ParquetRows(stream, name, source, self._fields, self._max_line_bytes)
                    size = _size(name) or 0
                    self._position = partial(_part, rows, size)
                    yield from rows
                else:
                    yield from self._lines(stream, source, format)
                self._done_bytes, self._position = self._done_bytes + (_size(name) or 0), _nothing

    def fraction(self) -> float | None:
        """How much of the inputs was read, 0 to 1; None where their size is not known."""
        if self._total_bytes is None:
            return None
        return min(1.0, (self._done_bytes + self._position()) / max(1, self._total_bytes))

    def _lines(self, stream: BinaryIO, source: str, format: str) -> Iterator[Item]:
        readers: dict[str, Callable[[BinaryIO, str, Fields, int], Iterator[Item]]] = {
            "jsonl": read_jsonl,
            "tsv": partial(read_delimited, delimiter="\t"),
            "csv": partial(read_delimited, delimiter=","),
            # Line numbers of several files would collide.
            "text": partial(read_text, id_prefix=f"{Path(source).name}:" if len(self._inputs) > 1 else ""),
        }
        return readers[format](stream, source, self._fields, self._max_line_bytes)


def _nothing() -> int:
    return 0


def _part(rows: ParquetRows, size: int) -> int:
    """Parquet is not read from front to back: its share of rows stands for the bytes."""
    return round(rows.share() * size)


def _resolve(name: str, format: str | None) -> tuple[str, str]:
    """The file to open and its format."""
    if name == STDIN:
        if format in (None, "beir"):
            raise SourceError("standard input has no name to tell its format; expected a format (jsonl, tsv, ...)")
        return name, str(format)
    path = Path(name)
    if path.is_dir():
        if format not in (None, "beir"):
            raise SourceError(f"{name}: a folder; expected a {format} file")
        for candidate in _BEIR_NAMES:
            if (path / candidate).is_file():
                return str(path / candidate), "jsonl"
        raise SourceError(f"{name}: a folder without {', '.join(_BEIR_NAMES[:-1])} or {_BEIR_NAMES[-1]}")
    if not path.exists():
        raise SourceError(f"{name}: no such file or folder")
    if format == "beir":
        raise SourceError(f"{name}: not a folder; a BEIR collection is one with corpus.jsonl in it")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    found = format or _SUFFIXES.get(suffixes[-1] if suffixes else "")
    if found is None:
        raise SourceError(f"{name}: the name does not tell the format; expected a format ({', '.join(FORMATS)})")
    return name, found


def _size(name: str) -> int | None:
    if name == STDIN or not Path(name).is_file():  # a named pipe has no size
        return None
    return os.stat(name).st_size
