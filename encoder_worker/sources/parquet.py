"""Parquet: one passage per row, read batch by batch. Knows no other format."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from encoder_worker.sources.base import Fields, Item, Place, Reason, Refused, SourceError

_BATCH_ROWS = 1024


def read_parquet(stream: BinaryIO, source: str, fields: Fields, max_line_bytes: int) -> Iterator[Item]:
    """Rows of a Parquet file; the stream is copied to a temporary file first, because Parquet is read from its end.

    Raises:
        SourceError: not Parquet, damaged, or a column is missing or no strings.
    """
    with tempfile.TemporaryFile() as spooled:
        shutil.copyfileobj(stream, spooled)
        spooled.seek(0)
        try:
            with pq.ParquetFile(spooled) as file:
                yield from _rows(file, source, fields, max_line_bytes)
        except pa.ArrowException as exc:
            raise SourceError(f"{source}: cannot be read as Parquet ({exc})") from exc


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
