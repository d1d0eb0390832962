"""Files, BEIR folders and standard input as one stream of passages, with how much of them was read.

gzip and zstd are known by their first bytes, not by name. Each line has a limit, a place, and a reason where it cannot
be read.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from encoder_worker.sources import (
    Columns,
    Fields,
    Item,
    Line,
    Place,
    Position,
    Reason,
    Refused,
    SourceError,
    Text,
    UnknownFormat,
    decoded,
)  # fmt: skip
from encoder_worker.sources.tables import csv_rows, separator_of, table_passages

FORMATS = ("jsonl", "tsv", "csv", "parquet", "text", "beir")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "tsv", ".csv": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
_COMPRESSED = {".gz", ".gzip", ".zst", ".zstd"}
_BEIR_NAMES = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst")

STDIN = "-"
DEFAULT_MAX_LINE_BYTES = 16 << 20
_BUFFER_BYTES = _SKIP_BYTES = _HEAD_BYTES = 1 << 16
_GZIP, _ZSTD, _BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"
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


class Source:
    """Iterates over every item of its inputs once: files, BEIR folders, or `-` for standard input.

    Without a `format` (one of FORMATS) each name tells. Lines (records, rows) over `max_line_bytes` are refused without
    being held in memory. `on_columns` is told the columns of every CSV, TSV or Parquet input, which `columns` keeps.
    Raises SourceError for an input that is not there, UnknownFormat where its name does not tell the format.
    """

    def __init__(
        self,
        names: Sequence[str | Path],
        *,
        format: str | None = None,
        fields: Fields | None = None,
        max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
        on_columns: Callable[[Columns], None] = lambda columns: None,
    ) -> None:
        if not names:
            raise SourceError("no input given; expected files, BEIR folders, or - for standard input")
        if format is not None and format not in FORMATS:
            raise SourceError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
        if [str(name) for name in names].count(STDIN) > 1:
            raise SourceError("- is given twice; standard input can be read once")
        self.columns: list[Columns] = []
        self._fields, self._on_columns = fields or Fields(), on_columns
        self._max_line_bytes = max_line_bytes
        self._inputs = [_resolve(str(name), format) for name in names]
        sizes = [_size(name) for name, _ in self._inputs]
        # Of all inputs; None where one's size is not known.
        self.num_bytes = sum(size for size in sizes if size is not None) if None not in sizes else None
        self._done_bytes = 0
        self._position: Position = int  # nothing

    def __iter__(self) -> Iterator[Item]:
        for name, format in self._inputs:
            source = "standard input" if name == STDIN else name
            with open_bytes(name) as (stream, self._position):
                yield from self._read(stream, name, source, format)
                self._done_bytes, self._position = self._done_bytes + (_size(name) or 0), int

    def _read(self, stream: BinaryIO, name: str, source: str, format: str) -> Iterator[Item]:
        limit = self._max_line_bytes
        if format == "parquet":
            from encoder_worker.sources.arrow import parquet_passages  # heavy

            num_bytes = _size(name) or 0

            def at(share: float) -> None:  # it is not read from front to back: its share of rows stands for the bytes
                self._position = lambda: round(share * num_bytes)

            yield from parquet_passages(stream, name, source, self._fields, limit, self._take, at)
            return
        _check_first_bytes(stream, source, jsonl=format == "jsonl")
        if format == "csv":
            separator = separator_of(_first_line(stream))
            rows = csv_rows(_read_lines(stream, source, limit), limit, separator)
            yield from table_passages(rows, source, self._fields, self._take, separator)
        elif format == "tsv":
            texts = read_texts(stream, source, limit)
            rows = (one if isinstance(one, Refused) else (one[0], one[1].split("\t")) for one in texts)
            yield from table_passages(rows, source, self._fields, self._take)
        else:
            yield from self._lines(stream, source, jsonl=format == "jsonl")

    def _take(self, columns: Columns) -> None:
        self.columns.append(columns)
        self._on_columns(columns)

    def fraction(self) -> float | None:
        """How much of the inputs was read, 0 to 1; None where their size is not known."""
        done = self._done_bytes + self._position()
        return None if self.num_bytes is None else min(1.0, done / max(1, self.num_bytes))

    def _lines(self, stream: BinaryIO, source: str, *, jsonl: bool) -> Iterator[Item]:
        # Line numbers of several files would collide.
        prefix = f"{Path(source).name}:" if len(self._inputs) > 1 else ""
        for entry in read_texts(stream, source, self._max_line_bytes, blank=not jsonl):
            if isinstance(entry, Refused):
                yield entry
            elif not jsonl:
                yield self._fields.passage(entry[0], f"{prefix}{entry[0].line}", entry[1])
            elif isinstance(row := json_object(*entry), Refused):
                yield row
            else:
                yield self._fields.of_row(entry[0], row)


def _resolve(name: str, format: str | None) -> tuple[str, str]:
    if name == STDIN:
        if format in (None, "beir"):
            raise UnknownFormat("standard input has no name to tell its format")
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
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in _COMPRESSED]
    found = format or _SUFFIXES.get(suffixes[-1] if suffixes else "")
    if found is None:
        if path.is_file():  # not a pipe, of which that would be the first reader
            with open_bytes(name):  # which says what it is, where that is nothing to read
                pass
        raise UnknownFormat(f"{name}: the name does not tell the format")
    return name, found


def _size(name: str) -> int | None:
    return os.stat(name).st_size if name != STDIN and Path(name).is_file() else None  # a named pipe has none


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


def _first_line(stream: BinaryIO) -> str:
    """The first line that is not blank, or as much of it as a buffer holds; nothing is read past it."""
    head: bytes = stream.peek(_HEAD_BYTES).removeprefix(_BOM)  # type: ignore[attr-defined]  # of BufferedReader
    return head.lstrip(b"\r\n").partition(b"\n")[0].decode(errors="replace")


def _check_first_bytes(stream: BinaryIO, source: str, *, jsonl: bool) -> None:
    """Raises SourceError where a stream for lines is Parquet or one JSON document, or where CR alone ends its lines."""
    first = _first_line(stream)
    if first.startswith("PAR1"):
        raise SourceError(f"{source}: holds Parquet; expected lines of text")
    if "\r" in first[:-1]:
        raise SourceError(f"{source}: CR ends its lines; expected LF or CRLF")
    first = first.strip()
    if jsonl and (first.startswith("[") or first == "{"):
        kind, remedy = (
            ("a JSON array", "jq -c '.[]'") if first.startswith("[") else ("JSON over several lines", "jq -c .")
        )
        raise SourceError(f"{source}: {kind}; expected one object per line, as `{remedy}` writes them")


def _read_lines(stream: BinaryIO, source: str, max_line_bytes: int) -> Iterator[Line]:
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
        yield Refused.too_long(place, "line", num_bytes, max_line_bytes)


def read_texts(stream: BinaryIO, source: str, max_line_bytes: int, *, blank: bool = False) -> Iterator[Text]:
    """Every line as text; without `blank` only those that hold something."""
    for entry in map(decoded, _read_lines(stream, source, max_line_bytes)):
        if blank or isinstance(entry, Refused) or entry[1].strip():
            yield entry


def json_object(place: Place, text: str) -> dict[str, Any] | Refused:
    """The object that a line spells, or why it spells none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as exc:
        return Refused(place, None, Reason.BROKEN_JSON, f"not JSON: {exc}")
    if not isinstance(row, dict):
        return Refused(place, None, Reason.WRONG_TYPE, f"a JSON {type(row).__name__}; expected an object")
    return row
