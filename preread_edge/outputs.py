"""Files that commands write: whole or not at all; and streams that are open already, written to as they are.

A path that names an open descriptor (/dev/stdout, /dev/fd/3; - is stdout) means it: opening it by name would truncate a
file that `>>` opened for appending. Imports no package.
"""

import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_DESCRIPTOR = re.compile(r"/dev/(?P<name>stdout|stderr)|/(?:dev|proc/self)/fd/(?P<number>\d{1,9})")


def human_bytes(num_bytes: float) -> str:
    """1536 -> 1.5 KiB."""
    fitting = ((unit, 1 << e) for unit, e in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if num_bytes >= 1 << e)
    return next((f"{num_bytes / size:,.1f} {unit}" for unit, size in fitting), f"{num_bytes:,.0f} B")


def is_stdout(path: str | Path) -> bool:
    """Whether what is written there appears on standard output."""
    return _descriptor(path) == 1


@contextmanager
def open_output(path: str | Path) -> Iterator[IO[str]]:
    """A UTF-8 text file, or what a symbolic link points to, which takes its place when the block ends without an error.

    Raises OSError where it cannot be written; where the folder is at fault, before the block begins.
    """
    number = _descriptor(path)
    if number in (1, 2):
        stream = sys.stdout if number == 1 else sys.stderr
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
        yield stream
        stream.flush()
    elif number is not None:
        with open(os.dup(number), "w", encoding="utf-8") as file:
            yield file
    else:
        with _replacing(path) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n")
            yield text
            text.flush()
            text.detach()


def write_output(path: str | Path, content: str | bytes) -> None:
    """The whole of a file, as `open_output` writes one."""
    opened: Any = open_output if isinstance(content, str) else _replacing
    with opened(path) as file:
        file.write(content)


@contextmanager
def _replacing(path: str | Path) -> Iterator[IO[bytes]]:
    target = Path(os.path.realpath(path))
    found = target.stat() if target.exists() else None
    if found is not None and not stat.S_ISREG(found.st_mode):  # a pipe, a device; a folder is an error
        with target.open("wb") as file:
            yield file
        return
    aside = target.with_name(f".{target.name[:200]}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if found is not None:
            aside.chmod(stat.S_IMODE(found.st_mode))
        try:
            aside.replace(target)
        except OSError:
            if not target.exists():
                raise
            shutil.copyfile(aside, target)  # a mount of this one file cannot be replaced, only written
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()


def _descriptor(path: str | Path) -> int | None:
    """The number of an open descriptor that a path names."""
    if str(path) == "-":
        return 1
    match: Any = _DESCRIPTOR.fullmatch(os.path.normpath(path))
    return int(match["number"] or {"stdout": 1, "stderr": 2}[match["name"]]) if match else None
