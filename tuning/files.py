"""Lines and rows of judged files, read by the reader of `preread index`. Does not know what they mean.

A line that cannot be used costs itself: it is noted in `refused`, with its place, and the others are read on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from encoder_worker.sources import Place, Refused, SourceError
from encoder_worker.sources.jsonl import json_object
from encoder_worker.sources.lines import DEFAULT_MAX_LINE_BYTES, read_texts
from encoder_worker.sources.streams import STDIN, open_bytes
from tuning.errors import EvaluationError


def numbered_lines(path: Path, refused: list[Refused] | None = None) -> Iterator[tuple[Place, str]]:
    """Lines that are not blank, without their ends, of a text file, plain, gzip or zstd; `-` is standard input.

    Args:
        refused: takes lines that are too long or not UTF-8; None: the first of them is an error.

    Raises:
        EvaluationError: no such file, or a broken compressed stream.
    """
    try:
        with open_bytes(str(path), sys.stdin.buffer) as (stream, _):
            source = "standard input" if str(path) == STDIN else str(path)
            for entry in read_texts(stream, source, DEFAULT_MAX_LINE_BYTES):
                if isinstance(entry, Refused):
                    refuse(entry, refused)
                else:
                    yield entry
    except SourceError as exc:
        raise EvaluationError(str(exc)) from exc


def json_rows(path: Path, refused: list[Refused] | None = None) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The JSON object of each line, and where it stood.

    Args:
        refused: takes lines that hold no object; None: the first of them is an error.

    Raises:
        EvaluationError: as `numbered_lines`.
    """
    for place, line in numbered_lines(path, refused):
        row = json_object(place, line)
        if isinstance(row, Refused):
            refuse(row, refused)
        else:
            yield place, row


def refuse(item: Refused, refused: list[Refused] | None) -> None:
    """Notes a line that cannot be used.

    Raises:
        EvaluationError: there is nowhere to note it.
    """
    if refused is None:
        raise EvaluationError(str(item))
    refused.append(item)


def nothing_left(path: str | Path, what: str, refused: Sequence[Refused] | None) -> EvaluationError:
    """The error of a file without a line of use; the first refused one says why."""
    why = [str(item) for item in refused or () if item.place.source == str(path)]
    return EvaluationError(
        f"{path}: no {what}" + (f"; {len(why):,} lines refused, the first is {why[0]}" if why else "")
    )


def fields(line: str) -> list[str]:
    """Columns of a judgement or run line: by tabs where it has any, by blanks otherwise."""
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def first_existing(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that is a file in `folder`."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
