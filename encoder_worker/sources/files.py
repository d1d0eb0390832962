"""Files, BEIR folders and standard input as one stream of passages, with how much of them was read."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from encoder_worker.sources import Columns, Fields, Item, Position, Refused, SourceError, UnknownFormat
from encoder_worker.sources.lines import (
    DEFAULT_MAX_LINE_BYTES,
    STDIN,
    check_first_bytes,
    json_object,
    open_bytes,
    read_lines,
    read_texts,
)  # fmt: skip
from encoder_worker.sources.tables import csv_rows, separator_of, table_passages

FORMATS = ("jsonl", "tsv", "csv", "parquet", "text", "beir")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "tsv", ".csv": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
_COMPRESSED = {".gz", ".gzip", ".zst", ".zstd"}
_BEIR_NAMES = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst")


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
        self._total_bytes = sum(size for size in sizes if size is not None) if None not in sizes else None
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
        check_first_bytes(stream, source, jsonl=format == "jsonl")
        if format == "csv":
            separator = separator_of(stream)
            rows = csv_rows(read_lines(stream, source, limit), limit, separator)
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
