"""Lines of a byte stream, each at most so many bytes in memory. Knows no format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from encoder_worker.sources.base import Place, Reason, Refused

DEFAULT_MAX_LINE_BYTES = 16 << 20
_SKIP_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"


def read_lines(stream: BinaryIO, source: str, max_line_bytes: int) -> Iterator[tuple[Place, bytes] | Refused]:
    """Every line without its end, or a Refused for one over the limit, whose rest is read past in pieces."""
    number = 0
    while line := stream.readline(max_line_bytes + 2):  # 2: the longest line end
        number += 1
        place = Place(source, number)
        if number == 1:
            line = line.removeprefix(_BOM)
        whole = line.endswith(b"\n")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) > max_line_bytes:
            num_bytes = len(line)
            while not whole and (piece := stream.readline(_SKIP_BYTES)):
                num_bytes += len(piece)
                whole = piece.endswith(b"\n")
            yield Refused(
                place, None, Reason.LINE_TOO_LONG, f"line of {num_bytes:,} bytes; at most {max_line_bytes:,} are read"
            )
        else:
            yield place, line


def read_texts(
    stream: BinaryIO, source: str, max_line_bytes: int, *, blank: bool = False
) -> Iterator[tuple[Place, str] | Refused]:
    """Every line as text; without `blank` only those that hold something."""
    for entry in read_lines(stream, source, max_line_bytes):
        if isinstance(entry, Refused):
            yield entry
            continue
        text = decode(*entry)
        if isinstance(text, Refused):
            yield text
        elif blank or text.strip():
            yield entry[0], text


def decode(place: Place, line: bytes) -> str | Refused:
    """The line as text, or why it is none."""
    try:
        return line.decode()
    except UnicodeDecodeError as exc:
        return Refused(place, None, Reason.INVALID_UTF8, f"not UTF-8: {exc.reason} at byte {exc.start + 1}")
