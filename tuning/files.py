"""Lines and rows of judged files: JSON lines and tables, plain or gzipped. Does not know what they mean."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuning.errors import EvaluationError


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-empty lines of a text file with their numbers, from 1, without their line ends.

    Raises:
        EvaluationError: no such file, not UTF-8, or a broken gzip stream.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as exc:
        raise EvaluationError(f"{path}: not UTF-8 text ({exc})") from exc
    except (OSError, EOFError, zlib.error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise EvaluationError(f"{path}: cannot be read ({reason})") from exc


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line; `where` is path:line, for errors.

    Raises:
        EvaluationError: a line that is not a JSON object.
    """
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise EvaluationError(f"{where}: not JSON ({exc})") from exc
        if not isinstance(row, dict):
            raise EvaluationError(f"{where}: {type(row).__name__}; expected a JSON object")
        yield where, row


def fields(line: str) -> list[str]:
    """Columns of a judgement or run line: by tabs where it has any, by blanks otherwise."""
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def first_existing(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that is a file in `folder`."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
