"""Files, BEIR folders and standard input as one stream of passages, with how much of them was read.

gzip and zstd are known by their first bytes, not by name. CSV is RFC 4180: a quoted field may hold the separator,
quotes and line ends. TSV is what search collections use (MS MARCO): no quoting, a tab always separates.
"""

import csv
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from encoder_worker.sources import Fields, Item, Place, Position, Reason, Refused, SourceError

Line = tuple[Place, bytes] | Refused
Text = tuple[Place, str] | Refused
Row = tuple[Place, list[str]] | Refused

FORMATS = ("jsonl", "tsv", "csv", "parquet", "text", "beir")
STDIN = "-"
DEFAULT_MAX_LINE_BYTES = 16 << 20
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "tsv", ".csv": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
_COMPRESSED = {".gz", ".gzip", ".zst", ".zstd"}
_BEIR_NAMES = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst")
_BATCH_ROWS = 1024
_BUFFER_BYTES = _SKIP_BYTES = 1 << 16
_GZIP, _ZSTD, _BOM, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf", b"PAR1"


class Source:
    """Iterates over every item of its inputs once: files, BEIR folders, or `-` for standard input.

    Without a `format` (one of FORMATS) each name tells. Lines (records, rows) over `max_line_bytes` are refused without
    being held in memory. Raises SourceError for an input that is not there, or whose format its name does not tell.
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
        self._position: Position = int  # nothing

    def __iter__(self) -> Iterator[Item]:
        limit = self._max_line_bytes
        for name, format in self._inputs:
            source = "standard input" if name == STDIN else name
            with open_bytes(name) as (stream, self._position):
                if format == "parquet":
                    yield from self._parquet(stream, name, source)
                elif format == "csv":
                    yield from _columns(_csv_rows(_read_lines(stream, source, limit), limit), source, self._fields)
                elif format == "tsv":
                    texts = read_texts(stream, source, limit)
                    rows = (one if isinstance(one, Refused) else (one[0], one[1].split("\t")) for one in texts)
                    yield from _columns(rows, source, self._fields)
                else:
                    yield from self._lines(stream, source, jsonl=format == "jsonl")
                self._done_bytes, self._position = self._done_bytes + (_size(name) or 0), int

    def fraction(self) -> float | None:
        """How much of the inputs was read, 0 to 1; None where their size is not known."""
        done = self._done_bytes + self._position()
        return None if self._total_bytes is None else min(1.0, done / max(1, self._total_bytes))

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

    def _parquet(self, stream: BinaryIO, name: str, source: str) -> Iterator[Item]:
        """Rows; a stream is copied to a temporary file first, because Parquet is read from its end."""
        with ExitStack() as stack:
            try:
                file = stack.enter_context(pq.ParquetFile(_seekable(stream, name, stack)))
                try:
                    columns = [column for column in self._fields.find(file.schema_arrow.names) if column]
                except KeyError as exc:
                    raise SourceError("{}: no column {}; found {}".format(source, *exc.args)) from exc
                num_read, bytes_per_row = 0, (_size(name) or 0) / max(1, file.metadata.num_rows)
                # It is not read from front to back: its share of rows stands for the bytes.
                self._position = lambda: round(num_read * bytes_per_row)
                for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                    values = [_values(batch.column(column), f"{source}: column {column}") for column in columns]
                    for row in zip(*values, strict=True):
                        num_read += 1
                        yield self._row(Place(source, num_read), row)
            except pa.ArrowException as exc:
                raise SourceError(f"{source}: cannot be read as Parquet ({exc})") from exc

    def _row(self, place: Place, row: tuple[Any, ...]) -> Item:
        if (num_bytes := sum(len(value) for value in row if isinstance(value, bytes))) > self._max_line_bytes:
            return _too_long(place, "row", num_bytes, self._max_line_bytes)
        try:
            return self._fields.passage(place, *(one.decode() if isinstance(one, bytes) else one for one in row))
        except UnicodeDecodeError as exc:
            return _not_utf8(place, exc)


def _seekable(stream: BinaryIO, name: str, stack: ExitStack) -> str | IO[bytes]:
    """The file itself where its plain bytes are Parquet, else a copy of what it decompresses to."""
    if Path(name).is_file():
        with open(name, "rb") as file:
            if file.read(len(_PARQUET)) == _PARQUET:
                return name
    spooled = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(stream, spooled)
    spooled.seek(0)
    return spooled


def _values(column: Any, label: str) -> list[Any]:
    """Whole numbers as they are; strings as bytes, because Parquet does not promise that they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    elif not pa.types.is_integer(column.type) and not pa.types.is_null(column.type):
        raise SourceError(f"{label} holds {column.type}; expected strings")
    return list(column.to_pylist())


def _resolve(name: str, format: str | None) -> tuple[str, str]:
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
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in _COMPRESSED]
    found = format or _SUFFIXES.get(suffixes[-1] if suffixes else "")
    if found is None:
        raise SourceError(f"{name}: the name does not tell the format; expected a format ({', '.join(FORMATS)})")
    return name, found


def _size(name: str) -> int | None:
    return os.stat(name).st_size if name != STDIN and Path(name).is_file() else None  # a named pipe has none


class _Raw(io.RawIOBase):
    """Reads of a file or an Arrow stream, counted: a pipe has no tell()."""

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

    Raises SourceError for what cannot be opened; also while reading, where compressed data is damaged or ends early.
    """
    try:
        # Descriptor 0 itself: a thread waiting for input would hold sys.stdin's lock when the process ends.
        raw = (stdin or FileIO(0, closefd=False)) if name == STDIN else FileIO(name)
    except OSError as exc:
        raise SourceError(f"{name}: {exc.strerror or exc}") from exc
    counting = _Raw(raw)
    buffered = io.BufferedReader(counting, _BUFFER_BYTES)
    try:
        stream, magic = buffered, buffered.peek(4)[:4]
        if magic.startswith(_GZIP):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BUFFER_BYTES)  # type: ignore[arg-type]  # is raw enough
        elif magic == _ZSTD:
            # Arrow's reader: unlike zstandard's it tells a truncated stream from a whole one, and unlike
            # a decompressobj it never inflates more than was asked for.
            inflated = pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), "zstd")
            stream = io.BufferedReader(_Raw(inflated), _BUFFER_BYTES)
        yield stream, lambda: counting.num_bytes
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowInvalid) as exc:
        raise SourceError(f"{name}: compressed data is damaged or ends early ({exc})") from exc
    except OSError as exc:
        raise SourceError(f"{name}: cannot be read further ({exc})") from exc
    finally:
        if raw is not stdin:
            raw.close()


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
        yield _too_long(place, "line", num_bytes, max_line_bytes)


def _too_long(place: Place, kind: str, num_bytes: int, limit: int) -> Refused:
    return Refused(place, None, Reason.LINE_TOO_LONG, f"{kind} of {num_bytes:,} bytes; at most {limit:,} are read")


def _not_utf8(place: Place, exc: UnicodeDecodeError) -> Refused:
    return Refused(place, None, Reason.INVALID_UTF8, f"not UTF-8: {exc.reason} at byte {exc.start + 1}")


def read_texts(stream: BinaryIO, source: str, max_line_bytes: int, *, blank: bool = False) -> Iterator[Text]:
    """Every line as text; without `blank` only those that hold something."""
    for entry in map(_decoded, _read_lines(stream, source, max_line_bytes)):
        if blank or isinstance(entry, Refused) or entry[1].strip():
            yield entry


def _decoded(line: Line) -> Text:
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


def _columns(rows: Iterator[Row], source: str, fields: Fields) -> Iterator[Item]:
    """Passages of records. The first row is a header when it names any of the columns, else data: an id and a text."""
    count = 0
    for row in rows:
        if isinstance(row, Refused):
            yield row
            continue
        place, cells = row
        if not count:
            count, header = len(cells), _find_columns(source, cells, fields)
            columns = header or [0, 1]
            if header:
                continue
        if len(cells) == count:
            yield fields.passage(place, *(cells[column] for column in columns))
        else:  # a separator inside the text would otherwise cut it in silence
            yield Refused(place, None, Reason.BROKEN_ROW, f"{len(cells)} columns; expected {count}")


def _find_columns(source: str, cells: list[str], fields: Fields) -> list[int]:
    """Where id, text and perhaps a title are, by the header; empty where the first row is none."""
    try:
        return [cells.index(name) for name in fields.find(cells) if name is not None]
    except KeyError as exc:
        missing, found = exc.args
        if fields.text in cells or any(name in cells for name in fields.id_names):
            why = f"no column {missing}; the header has {found}"
        elif fields.id is not None or fields.text != "text":
            why = f"no columns {' or '.join(fields.id_names)} and {fields.text}; the first line has {found}"
        elif len(cells) != 2:
            why = f"the first line has {len(cells)} columns and names none of id, _id, text; "
            why += "expected a header, or two columns: id and text"
        else:
            return []
        raise SourceError(f"{source}: {why}") from None


def _csv_rows(entries: Iterator[Line], max_bytes: int) -> Iterator[Row]:
    """Records, each at most `max_bytes` however many lines it spans.

    A quote that nothing closes costs the line it stands in, not the rest of the file: the next lines are read again.
    """
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))  # a setting of the process; only ever raised
    again: deque[Line] = deque()
    taken: list[Line] = []  # for the record in hand

    def feed() -> Iterator[str]:
        num_bytes = 0
        while (entry := again.popleft() if again else next(entries, None)) is not None:
            taken.append(entry)
            if isinstance(entry, Refused):
                raise csv.Error(f"a quote is not closed before line {entry.place.line}, which cannot be read")
            num_bytes += len(entry[1])
            if num_bytes > max_bytes:
                raise csv.Error(f"a quote is not closed within {max_bytes:,} bytes")
            text = _decoded(entry)
            if isinstance(text, Refused):
                raise csv.Error(f"a quote is not closed before line {text.place.line}, which is not UTF-8")
            yield text[1] + "\n"

    while True:
        taken.clear()
        try:
            cells = next(csv.reader(feed(), strict=True))
        except StopIteration:
            return
        except csv.Error as exc:
            again.extendleft(reversed(taken[1:]))
            first = _decoded(taken[0])
            yield first if isinstance(first, Refused) else Refused(first[0], None, Reason.BROKEN_ROW, f"not CSV: {exc}")
            continue
        if cells:  # a blank line is a record without cells
            assert not isinstance(taken[0], Refused)
            yield taken[0][0], cells
