"""Turns what the file system and SQLite raise into the cache's own errors."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import CacheError, StoreAccessDenied, StoreDamaged, StoreFull, StoreLocked

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_SQLITE: dict[int, tuple[type[CacheError], str]] = {
    sqlite3.SQLITE_FULL: (StoreFull, "no space left"),
    sqlite3.SQLITE_READONLY: (StoreAccessDenied, "may not be written"),
    sqlite3.SQLITE_PERM: (StoreAccessDenied, "may not be opened"),
    sqlite3.SQLITE_CANTOPEN: (StoreAccessDenied, "cannot be opened"),
    sqlite3.SQLITE_AUTH: (StoreAccessDenied, "may not be opened"),
    sqlite3.SQLITE_BUSY: (StoreLocked, "is held by another process"),
    sqlite3.SQLITE_LOCKED: (StoreLocked, "is held by another process"),
    sqlite3.SQLITE_CORRUPT: (StoreDamaged, "is damaged"),
    sqlite3.SQLITE_NOTADB: (StoreDamaged, "is not a catalogue"),
}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise a CacheError that names the store at `path` in place of OSError and sqlite3.Error."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise StoreFull(f"store {path}: no space left: {exc}") from exc
        if exc.errno in _DENIED:
            raise StoreAccessDenied(f"store {path}: not permitted: {exc}") from exc
        raise CacheError(f"store {path}: {exc}") from exc
    except sqlite3.Error as exc:
        # The low byte is the primary code; the rest tells details that the message has too.
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        error, reason = _SQLITE.get(code, (CacheError, "failed"))
        raise error(f"store {path}: the catalogue {reason}: {exc}") from exc
