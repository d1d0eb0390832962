"""Parquet: one passage per row, read batch by batch. Does not know other formats."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from encoder_worker.sources import Fields, Item, Place, Reason, Refused, SourceError

_BATCH_ROWS = 1024
_MAGIC = b"PAR1"


@dataclass
class ParquetRows:
    """Iterates over the rows of one file. A stream is copied to a temporary file first: Parquet is read from its end.

    Raises:
        SourceError: not Parquet, damaged, or a column is missing or holds no strings.
    """

    stream: BinaryIO
    name: str  # of the file, which is read in place where the stream turns out to be its plain bytes
    source: str  # its name in places
    fields: Fields
    max_row_bytes: int
    _num_rows: int = 0
    _num_read: int = 0

    def share(self) -> float:
        """How much was read, 0 to 1."""
        return self._num_read / self._num_rows if self._num_rows else 0.0

    def __iter__(self) -> Iterator[Item]:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(pq.ParquetFile(self._place(stack)))
                self._num_rows = file.metadata.num_rows
                columns = self._columns(file.schema_arrow.names)
                for batch in file.iter_batches(_BATCH_ROWS, columns=[name for name in columns if name]):
                    rows = [self._values(batch.column(name), name) for name in columns if name]
                    for row in zip(*rows, strict=True):
                        self._num_read += 1
                        yield self._passage(Place(self.source, self._num_read), row)
            except pa.ArrowException as exc:
                raise SourceError(f"{self.source}: cannot be read as Parquet ({exc})") from exc

    def _place(self, stack: ExitStack) -> str | IO[bytes]:
        if Path(self.name).is_file():
            with open(self.name, "rb") as file:
                if file.read(len(_MAGIC)) == _MAGIC:
                    return self.name
        spooled = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        shutil.copyfileobj(self.stream, spooled)
        spooled.seek(0)
        return spooled

    def _columns(self, names: list[str]) -> tuple[str | None, ...]:
        """Of id, text and title; a title may be missing."""
        fields, found = self.fields, ", ".join(names)
        id_name = fields.find_id(names)
        if id_name is None or fields.text not in names:
            missing = fields.text if id_name is not None else " or ".join(fields.id_names)
            raise SourceError(f"{self.source}: no column {missing}; found {found:.200}")
        return id_name, fields.text, fields.title if fields.title in names else None

    def _values(self, column: Any, name: str) -> list[Any]:
        """Whole numbers as they are; strings as bytes, because Parquet does not promise that they are UTF-8."""
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        elif not pa.types.is_integer(column.type) and not pa.types.is_null(column.type):
            raise SourceError(f"{self.source}: column {name} holds {column.type}; expected strings")
        return list(column.to_pylist())

    def _passage(self, place: Place, row: tuple[Any, ...]) -> Item:
        num_bytes = sum(len(value) for value in row if isinstance(value, bytes))
        if num_bytes > self.max_row_bytes:
            message = f"row of {num_bytes:,} bytes; at most {self.max_row_bytes:,} are read"
            return Refused(place, None, Reason.LINE_TOO_LONG, message)
        try:
            return self.fields.passage(place, *(one.decode() if isinstance(one, bytes) else one for one in row))
        except UnicodeDecodeError as exc:
            return Refused(place, None, Reason.INVALID_UTF8, f"not UTF-8: {exc.reason} at byte {exc.start + 1}")
