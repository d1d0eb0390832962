"""Parquet: one passage per row, read batch by batch. Knows no other format."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from encoder_worker.sources import Fields, Item, Place, Reason, Refused, SourceError

_BATCH_ROWS = 1024
_MAGIC = b"PAR1"


class ParquetRows:
    """Iterates over the rows of one file. A stream is copied to a temporary file first: Parquet is read from its end.

    Raises:
        SourceError: not Parquet, damaged, or a column is missing or holds no strings.
    """

    def __init__(self, stream: BinaryIO, name: str, source: str, fields: Fields, max_line_bytes: int) -> None:
        """
        Args:
            name: of the file, which is read in place where the stream turns out to be its plain bytes.
            source: what to call it in places.
        """
        self._stream, self._name, self._source = stream, name, source
        self._fields, self._max_line_bytes = fields, max_line_bytes
        self._num_rows = self._num_read = 0

    def share(self) -> float:
        """How much was read, 0 to 1."""
        return self._num_read / self._num_rows if self._num_rows else 0.0

    def __iter__(self) -> Iterator[Item]:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(pq.ParquetFile(self._place(stack)))
                self._num_rows = file.metadata.num_rows
                for item in _rows(file, self._source, self._fields, self._max_line_bytes):
                    self._num_read += 1
                    yield item
            except pa.ArrowException as exc:
                raise SourceError(f"{self._source}: cannot be read as Parquet ({exc})") from exc

    def _place(self, stack: ExitStack) -> str | IO[bytes]:
        if Path(self._name).is_file():
            with open(self._name, "rb") as file:
                if file.read(len(_MAGIC)) == _MAGIC:
                    return self._name
        spooled = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        shutil.copyfileobj(self._stream, spooled)
        spooled.seek(0)
        return spooled


def _rows(file: Any, source: str, fields: Fields, max_line_bytes: int) -> Iterator[Item]:
    names = file.schema_arrow.names
    id_name = fields.find_id(names)
    for wanted, found in ((" or ".join(fields.id_names), id_name is not None), (fields.text, fields.text in names)):
        if not found:
            raise SourceError(f"{source}: no column {wanted}; found {', '.join(names):.200}")
    title_name = fields.title if fields.title in names else None
    number = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=[n for n in (id_name, fields.text, title_name) if n]):
        ids = _values(batch.column(id_name), source, id_name)
        texts = _values(batch.column(fields.text), source, fields.text)
        titles = _values(batch.column(title_name), source, title_name) if title_name else [None] * len(ids)
        for row in zip(ids, texts, titles, strict=True):
            number += 1
            yield _passage(Place(source, number), row, fields, max_line_bytes)


def _values(column: Any, source: str, name: Any) -> list[Any]:
    """Whole numbers as they are; strings as bytes, because Parquet does not promise that they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        return list(column.to_pylist())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return list(column.cast(pa.large_binary()).to_pylist())
    if pa.types.is_null(column.type):
        return [None] * len(column)
    raise SourceError(f"{source}: column {name} holds {column.type}; expected strings")


def _passage(place: Place, row: tuple[Any, ...], fields: Fields, max_line_bytes: int) -> Item:
    num_bytes = sum(len(value) for value in row if isinstance(value, bytes))
    if num_bytes > max_line_bytes:
        message = f"row of {num_bytes:,} bytes; at most {max_line_bytes:,} are read"
        return Refused(place, None, Reason.LINE_TOO_LONG, message)
    try:
        return fields.passage(place, *(value.decode() if isinstance(value, bytes) else value for value in row))
    except UnicodeDecodeError as exc:
        return Refused(place, None, Reason.INVALID_UTF8, f"not UTF-8: {exc.reason} at byte {exc.start + 1}")
