"""Bytes of an input, decompressed. Knows gzip and zstd by their first bytes, not by name; knows no format."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from typing import Any, BinaryIO

import pyarrow as pa

from encoder_worker.sources.base import Position, SourceError

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
