"""Bytes of files, decompressed, as lines; each line has a limit, a place, and a reason where it cannot be read.

gzip and zstd are known by their first bytes, not by name.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from typing import Any, BinaryIO

from encoder_worker.sources import Place, Position, Reason, Refused, SourceError

Line = tuple[Place, bytes] | Refused
Text = tuple[Place, str] | Refused

STDIN = "-"
DEFAULT_MAX_LINE_BYTES = 16 << 20
_BUFFER_BYTES = _SKIP_BYTES = _HEAD_BYTES = 1 << 16
_GZIP, _ZSTD, _BOM, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf", b"PAR1"
_UTF_16 = "text in UTF-16 or UTF-32; expected UTF-8, as `iconv -f UTF-16 -t UTF-8` writes it"
_FOREIGN = {  # by first bytes
    b"PK\x03\x04": "a zip archive or an Excel workbook; expected the file in it, a workbook saved as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; expected it saved as CSV UTF-8",
    b"BZh": "compressed with bzip2; expected gzip, zstd or no compression",
    b"\xfd7zXZ": "compressed with xz; expected gzip, zstd or no compression",
    b"ARROW1": "an Arrow (Feather) file; expected Parquet, CSV, TSV or JSON lines",
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
}


class _Raw(io.RawIOBase):
    """Reads of a file, counted: a pipe has no tell()."""

    def __init__(self, raw: Any) -> None:
        self._raw, self.num_bytes = raw, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.num_bytes += len(data)
        return len(data)


@contextmanager
def open_bytes(name: str, stdin: BinaryIO | None = None) -> Iterator[tuple[BinaryIO, Position]]:
    """The decompressed bytes of a file, for `-` of standard input (descriptor 0 or `stdin`), and how far it was read.

    Raises SourceError for what cannot be opened, or is known to be no text (nor Parquet) by its first bytes; also while
    reading, where compressed data is damaged or ends early.
    """
    source = "standard input" if name == STDIN else name
    try:
        # Descriptor 0 itself: a thread waiting for input would hold sys.stdin's lock when the process ends.
        raw = (stdin or FileIO(0, closefd=False)) if name == STDIN else FileIO(name)
    except OSError as exc:
        raise SourceError(f"{source}: {exc.strerror or exc}") from exc
    counting = _Raw(raw)
    buffered: io.BufferedReader[Any] = io.BufferedReader(counting, _BUFFER_BYTES)
    try:
        magic, stream = buffered.peek(4)[:4], buffered
        if magic.startswith(_GZIP):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BUFFER_BYTES)  # is raw enough
        elif magic == _ZSTD:
            from encoder_worker.sources.arrow import ZstdReader  # heavy

            stream = io.BufferedReader(ZstdReader(buffered), _BUFFER_BYTES)
        head = stream.peek(_HEAD_BYTES)
        for first_bytes, what in _FOREIGN.items():
            if head.startswith(first_bytes):
                raise SourceError(f"{source}: {what}")
        if b"\0" in head[:4]:
            raise SourceError(f"{source}: {_UTF_16}")
        yield stream, lambda: counting.num_bytes
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise SourceError(f"{source}: compressed data is damaged or ends early ({exc})") from exc
    except OSError as exc:
        raise SourceError(f"{source}: cannot be read further ({exc})") from exc
    finally:
        if raw is not stdin:
            raw.close()


def first_line(stream: BinaryIO) -> str:
    """The first line that is not blank, or as much of it as a buffer holds; nothing is read past it."""
    head: bytes = stream.peek(_HEAD_BYTES).removeprefix(_BOM)  # type: ignore[attr-defined]  # of BufferedReader
    return head.lstrip(b"\r\n").partition(b"\n")[0].decode(errors="replace")


def check_first_bytes(stream: BinaryIO, source: str, *, jsonl: bool) -> None:
    """Raises SourceError where a stream for lines is Parquet or one JSON document, or where CR alone ends its lines."""
    first = first_line(stream).rstrip("\n")
    if first.startswith(_PARQUET.decode()):
        raise SourceError(f"{source}: holds Parquet; expected lines of text")
    if "\r" in first[:-1]:
        raise SourceError(f"{source}: CR ends its lines; expected LF or CRLF")
    first = first.strip()
    if jsonl and (first.startswith("[") or first == "{"):
        kind, remedy = (
            ("a JSON array", "jq -c '.[]'") if first.startswith("[") else ("JSON over several lines", "jq -c .")
        )
        raise SourceError(f"{source}: {kind}; expected one object per line, as `{remedy}` writes them")


def read_lines(stream: BinaryIO, source: str, max_line_bytes: int) -> Iterator[Line]:
    """Every line without its end, or a Refused for one over the limit, whose rest is read past in pieces."""
    number = 0
    while line := stream.readline(max_line_bytes + 2):  # 2: the longest line end
        number += 1
        place = Place(source, number)
        line = line.removeprefix(_BOM) if number == 1 else line
        whole = line.endswith(b"\n")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) <= max_line_bytes:
            yield place, line
            continue
        num_bytes = len(line)
        while not whole and (piece := stream.readline(_SKIP_BYTES)):
            num_bytes += len(piece)
            whole = piece.endswith(b"\n")
        yield _too_long(place, "line", num_bytes, max_line_bytes)


def _too_long(place: Place, kind: str, num_bytes: int, limit: int) -> Refused:
    return Refused(place, None, Reason.LINE_TOO_LONG, f"{kind} of {num_bytes:,} bytes; at most {limit:,} are read")


def _not_utf8(place: Place, exc: UnicodeDecodeError) -> Refused:
    return Refused(place, None, Reason.INVALID_UTF8, f"not UTF-8: {exc.reason} at byte {exc.start + 1}")


def read_texts(stream: BinaryIO, source: str, max_line_bytes: int, *, blank: bool = False) -> Iterator[Text]:
    """Every line as text; without `blank` only those that hold something."""
    for entry in map(decoded, read_lines(stream, source, max_line_bytes)):
        if blank or isinstance(entry, Refused) or entry[1].strip():
            yield entry


def decoded(line: Line) -> Text:
    if isinstance(line, Refused):
        return line
    place, data = line
    try:
        return place, data.decode()
    except UnicodeDecodeError as exc:
        return _not_utf8(place, exc)


def json_object(place: Place, text: str) -> dict[str, Any] | Refused:
    """The object that a line spells, or why it spells none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as exc:
        return Refused(place, None, Reason.BROKEN_JSON, f"not JSON: {exc}")
    if not isinstance(row, dict):
        return Refused(place, None, Reason.WRONG_TYPE, f"a JSON {type(row).__name__}; expected an object")
    return row
