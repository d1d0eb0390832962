"""What Arrow reads, Parquet and zstd; loaded only for these, because it takes 40 MB."""

import io
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from encoder_worker.sources import Columns, Fields, Item, Place, Refused, SourceError

_BATCH_ROWS = 1024
_types = pa.types


def parquet_passages(
    stream: BinaryIO,
    name: str,
    source: str,
    fields: Fields,
    max_row_bytes: int,
    on_columns: Callable[[Columns], None],
    on_share: Callable[[float], None],
) -> Iterator[Item]:
    """Rows; a stream is copied to a temporary file first, because Parquet is read from its end."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(pq.ParquetFile(_seekable(stream, name, stack)))
            try:
                found = fields.find(file.schema_arrow.names)
            except KeyError as exc:
                raise SourceError("{}: {}; found {}; {}".format(source, *exc.args, fields.advice)) from exc
            columns = [column for column in found if column is not None]
            for column in columns:
                _check_type(
                    file.schema_arrow.field(column).type, f"{source}: column {column}", is_id=column == found[0]
                )
            on_columns(Columns(source, *found))
            num_read, num_rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for row in zip(*(_values(batch.column(column)) for column in columns), strict=True):
                    num_read += 1
                    on_share(num_read / num_rows)
                    yield _passage(fields, Place(source, num_read), row, max_row_bytes)
        except pa.ArrowException as exc:
            raise SourceError(f"{source}: cannot be read as Parquet ({exc})") from exc


def _seekable(stream: BinaryIO, name: str, stack: ExitStack) -> str | IO[bytes]:
    """The file itself where its plain bytes are Parquet, else a copy of what it decompresses to."""
    if Path(name).is_file():
        with open(name, "rb") as file:
            if file.read(4) == b"PAR1":
                return name
    spooled = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(stream, spooled)
    spooled.seek(0)
    return spooled


def _check_type(kind: Any, label: str, *, is_id: bool) -> None:
    kind = kind.value_type if _types.is_dictionary(kind) else kind
    numeric = _types.is_integer(kind) or _types.is_floating(kind) or _types.is_decimal(kind)
    if not (_is_text(kind) or _types.is_null(kind) or (is_id and numeric)):
        raise SourceError(f"{label} holds {kind}; expected strings{' or whole numbers' if is_id else ''}")


def _is_text(kind: Any) -> bool:
    """Also binary: what does not say that its strings are strings, Spark for one, writes them so."""
    strings = _types.is_string(kind) or _types.is_large_string(kind) or _types.is_string_view(kind)
    return bool(strings or _types.is_binary(kind) or _types.is_large_binary(kind) or _types.is_binary_view(kind))


def _values(column: Any) -> list[Any]:
    """Numbers as they are; strings as bytes, because Parquet does not promise that they are UTF-8."""
    if _types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _types.is_string(column.type) or _types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    elif _types.is_string_view(column.type):
        column = column.cast(pa.binary_view())
    return list(column.to_pylist())


def _passage(fields: Fields, place: Place, row: tuple[Any, ...], max_bytes: int) -> Item:
    if (num_bytes := sum(len(value) for value in row if isinstance(value, bytes))) > max_bytes:
        return Refused.too_long(place, "row", num_bytes, max_bytes)
    try:
        return fields.passage(place, *(one.decode() if isinstance(one, bytes) else one for one in row))
    except UnicodeDecodeError as exc:
        return Refused.not_utf8(place, exc)


class ZstdReader(io.RawIOBase):
    """Arrow's reader: unlike zstandard's it tells a truncated stream from a whole one, and unlike a decompressobj it
    never inflates more than was asked for. Raises zlib.error for damage.
    """

    def __init__(self, compressed: BinaryIO) -> None:
        self._inflated = pa.CompressedInputStream(pa.PythonFile(compressed, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inflated.read(len(buffer))
        except pa.ArrowInvalid as exc:
            raise zlib.error(str(exc)) from exc
        buffer[: len(data)] = data
        return len(data)
