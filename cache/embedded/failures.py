"""Damage and failures of an embedded store as the cache's own errors, and the checks that find the first.

Values that are read from the catalogue go through `integer`, `text` or `blob`, because a flipped bit may change a
column's type. Rows that no record vouches for carry a checksum over their columns.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from cache.errors import CacheError, StoreAccessDenied, StoreDamaged, StoreFull, StoreLocked

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_SQLITE: dict[int, tuple[type[CacheError], str]] = {
    sqlite3.SQLITE_FULL: (StoreFull, "has no space left"),
    sqlite3.SQLITE_READONLY: (StoreAccessDenied, "may not be written"),
    sqlite3.SQLITE_PERM: (StoreAccessDenied, "may not be opened"),
    sqlite3.SQLITE_CANTOPEN: (StoreAccessDenied, "cannot be opened"),
    sqlite3.SQLITE_AUTH: (StoreAccessDenied, "may not be opened"),
    sqlite3.SQLITE_BUSY: (StoreLocked, "is held by another process"),
    sqlite3.SQLITE_LOCKED: (StoreLocked, "is held by another process"),
    sqlite3.SQLITE_CORRUPT: (StoreDamaged, "is damaged"),
    sqlite3.SQLITE_NOTADB: (StoreDamaged, "is not a catalogue"),
    # Our statements are fixed and the schema is ours, so these mean that the file is not what we wrote.
    **dict.fromkeys(
        (
            sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_FORMAT,
            sqlite3.SQLITE_INTERNAL, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_RANGE, sqlite3.SQLITE_EMPTY,
        ),
        (StoreDamaged, "is damaged"),
    ),
}  # fmt: skip
_SHORT_READ = 10 | 2 << 8  # SQLITE_IOERR_SHORT_READ, which the module does not name
# In place of a checksum in a row of catalogue version 1, which has none. Longer than a checksum: no flip makes it one.
UNCHECKED = b"version 1"


def integer(value: object) -> int:
    """A whole number out of the catalogue. Raises StoreDamaged for anything else."""
    if type(value) is not int:
        raise StoreDamaged(f"the catalogue is damaged: {value!r:.40}, expected a whole number")
    return value


def blob(value: object) -> bytes:
    """Bytes out of the catalogue. Raises StoreDamaged for anything else."""
    if type(value) is not bytes:
        raise StoreDamaged(f"the catalogue is damaged: {value!r:.40}, expected bytes")
    return value


def text(value: object) -> str:
    """Text out of the catalogue, whose connections give bytes. Raises StoreDamaged where it is no UTF-8."""
    try:
        return blob(value).decode()
    except UnicodeDecodeError as exc:
        raise StoreDamaged(f"the catalogue is damaged: {value!r:.40}, expected UTF-8") from exc


def only(row: tuple[object, ...] | None) -> tuple[object, ...]:
    """A row that is always there. Raises StoreDamaged where it is not."""
    if row is None:
        raise StoreDamaged("the catalogue is damaged: its counters are missing")
    return row


def row_checksum(*columns: int | str | bytes) -> bytes:
    """Of the columns of one row, in an order that its table fixes."""
    return xxhash.xxh3_64_digest(repr(columns).encode())


def is_whole(checksum: object, *columns: int | str | bytes) -> bool:
    """Whether a row's checksum is that of its columns; one of version 1 has none and passes."""
    return checksum in (row_checksum(*columns), UNCHECKED)


def check_row(what: str, checksum: object, *columns: int | str | bytes) -> None:
    """Raises StoreDamaged, naming `what`, where a row's checksum is not that of its columns."""
    if not is_whole(checksum, *columns):
        raise StoreDamaged(f"the catalogue is damaged: checksum of {what} does not match")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise a CacheError that names the store at `path` in place of OSError and sqlite3.Error.

    Its text is ours, with a code of the system's or SQLite's: servers show it to callers. The cause has the rest.
    """
    try:
        yield
    except StoreDamaged as exc:
        if str(path) in str(exc):
            raise
        raise StoreDamaged(f"store {path}: {exc}; see `preread verify`") from exc
    except (UnicodeDecodeError, OverflowError) as exc:  # of the sqlite3 module, about a schema that is no text
        raise StoreDamaged(f"store {path}: the catalogue is damaged; see `preread verify`") from exc
    except OSError as exc:
        if exc.errno in _FULL:
            raise StoreFull(f"store {path}: no space left ({_code(exc)})") from exc
        if exc.errno in _DENIED:
            raise StoreAccessDenied(f"store {path}: not permitted ({_code(exc)})") from exc
        raise CacheError(f"store {path}: {exc.strerror or 'a file failed'} ({_code(exc)})") from exc
    except sqlite3.Error as exc:
        # The low byte is the primary code; the rest tells details, which its name has.
        code = getattr(exc, "sqlite_errorcode", 0)
        error, reason = _SQLITE.get(code & 0xFF, (CacheError, "failed"))
        if code == _SHORT_READ:
            error, reason = StoreDamaged, "is too short"
        raise error(
            f"store {path}: the catalogue {reason} ({getattr(exc, 'sqlite_errorname', type(exc).__name__)})"
        ) from exc


def _code(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
