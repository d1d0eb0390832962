"""Damage and failures of an embedded store as the cache's own errors, and the checks that find the first.

Values that are read from the catalogue go through `integer`, `text` or `blob`, because a flipped bit may change a
column's type. Rows that no record vouches for carry a checksum over their columns.

The catalogue of an embedded store: SQLite in WAL mode. Schema, connections and transactions.

Where the directory can be written, connections are ordinary ones, and readers see every commit of other processes.
Where it cannot (a read-only mount, or files of another user) and no log is left, the file is opened immutable: SQLite
then takes no locks and makes no files, so any number of readers share one volume. A catalogue that was replaced, or
on such a volume written, is noticed before the next read and opened again. Does not know the meaning of headers or
codes, nor when to write what: see `store.py`.
"""

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import xxhash

from cache.errors import CacheError, StoreAccessDenied, StoreDamaged, StoreFull, StoreLocked, StoreUnavailable
from cache.faiss.segments import fsync_directory

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


CATALOGUE_VERSION = 2

# Counters are kept by triggers, in the transaction that changes the rows. Compaction moves rows without touching the
# counted columns, so it fires nothing. Generations outlive their collection: a name used again continues the count.
_SCHEMA_1 = """
CREATE TABLE collections (
    collection_id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    manifest BLOB NOT NULL,
    num_passages INTEGER NOT NULL DEFAULT 0,
    num_states INTEGER NOT NULL DEFAULT 0,
    num_tokens INTEGER NOT NULL DEFAULT 0,
    num_truncated INTEGER NOT NULL DEFAULT 0,
    size_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE aliases (alias TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE generations (name TEXT PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE removals (num_removed INTEGER NOT NULL);
INSERT INTO removals VALUES (0);
CREATE TABLE segments (
    segment_id INTEGER PRIMARY KEY AUTOINCREMENT,
    collection_id INTEGER NOT NULL,
    file_name TEXT NOT NULL UNIQUE,
    num_rows INTEGER NOT NULL,
    code_size INTEGER NOT NULL,
    codes_offset INTEGER NOT NULL
);
CREATE INDEX segments_by_collection ON segments (collection_id);
CREATE TABLE passages (
    row_key INTEGER PRIMARY KEY,
    collection_id INTEGER NOT NULL,
    passage_id BLOB NOT NULL,
    segment_id INTEGER NOT NULL,
    first_row INTEGER NOT NULL,
    num_states INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    truncated INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    header BLOB NOT NULL,
    windows BLOB NOT NULL,
    text BLOB NOT NULL,
    UNIQUE (collection_id, passage_id)
);
CREATE INDEX passages_by_segment ON passages (segment_id);
CREATE TRIGGER passages_added AFTER INSERT ON passages BEGIN
    UPDATE collections SET num_passages = num_passages + 1, num_states = num_states + NEW.num_states,
        num_tokens = num_tokens + NEW.num_tokens, num_truncated = num_truncated + NEW.truncated,
        size_bytes = size_bytes + NEW.size_bytes WHERE collection_id = NEW.collection_id;
END;
CREATE TRIGGER passages_removed AFTER DELETE ON passages BEGIN
    UPDATE collections SET num_passages = num_passages - 1, num_states = num_states - OLD.num_states,
        num_tokens = num_tokens - OLD.num_tokens, num_truncated = num_truncated - OLD.truncated,
        size_bytes = size_bytes - OLD.size_bytes WHERE collection_id = OLD.collection_id;
END;
CREATE TRIGGER passages_replaced AFTER UPDATE OF num_states, num_tokens, truncated, size_bytes ON passages BEGIN
    UPDATE collections SET num_states = num_states + NEW.num_states - OLD.num_states,
        num_tokens = num_tokens + NEW.num_tokens - OLD.num_tokens,
        num_truncated = num_truncated + NEW.truncated - OLD.truncated,
        size_bytes = size_bytes + NEW.size_bytes - OLD.size_bytes WHERE collection_id = NEW.collection_id;
END;
"""

# Added in version 2: num_clipped, a checksum in every row that no record vouches for, a count of all commits, and
# a checksum of the schema itself. A new catalogue is made by both scripts, so there is one schema.
_SCHEMA_2 = """
ALTER TABLE collections ADD COLUMN num_clipped INTEGER NOT NULL DEFAULT 0;
ALTER TABLE collections ADD COLUMN checksum BLOB;
UPDATE collections SET checksum = row_checksum(collection_id, name);
ALTER TABLE aliases ADD COLUMN checksum BLOB;
UPDATE aliases SET checksum = row_checksum(alias, name);
ALTER TABLE generations ADD COLUMN checksum BLOB;
UPDATE generations SET checksum = row_checksum(name, generation);
ALTER TABLE segments ADD COLUMN checksum BLOB;
UPDATE segments
    SET checksum = row_checksum(segment_id, collection_id, file_name, num_rows, code_size, codes_offset);
ALTER TABLE passages ADD COLUMN num_clipped INTEGER NOT NULL DEFAULT 0;
DROP TABLE removals;
CREATE TABLE store (num_removed INTEGER NOT NULL, num_commits INTEGER NOT NULL, schema BLOB NOT NULL, checksum BLOB);
DROP TRIGGER passages_added;
DROP TRIGGER passages_removed;
DROP TRIGGER passages_replaced;
CREATE TRIGGER passages_added AFTER INSERT ON passages BEGIN
    UPDATE collections SET num_passages = num_passages + 1, num_states = num_states + NEW.num_states,
        num_tokens = num_tokens + NEW.num_tokens, num_truncated = num_truncated + NEW.truncated,
        size_bytes = size_bytes + NEW.size_bytes, num_clipped = num_clipped + NEW.num_clipped
        WHERE collection_id = NEW.collection_id;
END;
CREATE TRIGGER passages_removed AFTER DELETE ON passages BEGIN
    UPDATE collections SET num_passages = num_passages - 1, num_states = num_states - OLD.num_states,
        num_tokens = num_tokens - OLD.num_tokens, num_truncated = num_truncated - OLD.truncated,
        size_bytes = size_bytes - OLD.size_bytes, num_clipped = num_clipped - OLD.num_clipped
        WHERE collection_id = OLD.collection_id;
END;
CREATE TRIGGER passages_replaced AFTER UPDATE OF num_states, num_tokens, truncated, size_bytes, num_clipped ON passages
BEGIN
    UPDATE collections SET num_states = num_states + NEW.num_states - OLD.num_states,
        num_tokens = num_tokens + NEW.num_tokens - OLD.num_tokens,
        num_truncated = num_truncated + NEW.truncated - OLD.truncated,
        size_bytes = size_bytes + NEW.size_bytes - OLD.size_bytes,
        num_clipped = num_clipped + NEW.num_clipped - OLD.num_clipped WHERE collection_id = NEW.collection_id;
END;
PRAGMA user_version = 2;
"""
_SCHEMA_OF = "SELECT sql FROM main.sqlite_master WHERE sql NOT NULL ORDER BY name"

# A catalogue of version 1 that cannot be written, or was not written since, read as if it were version 2.
_AS_VERSION_2 = f"""
CREATE TEMP VIEW collections AS SELECT collection_id, name, manifest, num_passages, num_states, num_tokens,
    num_truncated, size_bytes, 0 AS num_clipped, x'{UNCHECKED.hex()}' AS checksum FROM main.collections;
CREATE TEMP VIEW aliases AS SELECT alias, name, x'{UNCHECKED.hex()}' AS checksum FROM main.aliases;
CREATE TEMP VIEW generations AS SELECT name, generation, x'{UNCHECKED.hex()}' AS checksum FROM main.generations;
CREATE TEMP VIEW segments AS SELECT segment_id, collection_id, file_name, num_rows, code_size, codes_offset,
    x'{UNCHECKED.hex()}' AS checksum FROM main.segments;
CREATE TEMP VIEW passages AS SELECT row_key, collection_id, passage_id, segment_id, first_row, num_states, num_tokens,
    truncated, size_bytes, header, windows, text, 0 AS num_clipped FROM main.passages;
CREATE TEMP VIEW store AS SELECT num_removed, 0 AS num_commits, x'' AS schema, x'{UNCHECKED.hex()}' AS checksum
    FROM main.removals;
"""


class Catalogue:
    """Connections to one catalogue file. Thread-safe: every reading call takes its own from a pool.

    on_commit: called after each commit with the number of commits that the catalogue then has
    """

    def __init__(self, path: Path, on_commit: Callable[[int], None]) -> None:
        self.path = path
        self._on_commit = on_commit
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._seen: _Seen | None = None
        self._closed = False
        self.num_reopened = 0  # another file than before: what was known of the old one may not hold

    @property
    def exists(self) -> bool:
        with translated(self.path):
            return self.path.exists()

    def create(self) -> None:
        """Make the file where there is none, or bring one of version 1 up; only for the holder of the writer lock.

        A new one is built aside and renamed, so no reader ever sees a catalogue without its tables. Raises StoreDamaged
        where there is none and should be.
        """
        if self.path.exists():
            self._upgrade()
            return
        self._check_missing()
        build(self.path, self.aside)
        fsync_directory(self.path.parent.parent)

    @property
    def aside(self) -> Path:
        """Where a new catalogue is built; of a process that died, if there is one."""
        return self.path.with_name(self.path.name + ".tmp")

    @contextmanager
    def reading(self) -> "Iterator[_Connection]":
        """A connection in autocommit; an empty catalogue where there is no file yet.

        Raises StoreDamaged for what is no catalogue of ours, StoreAccessDenied where a log would have to be applied and
        cannot, and StoreUnavailable where a read-only volume was written meanwhile: what was read may not fit together.
        """
        with translated(self.path):
            connection, seen = self._take()
            try:
                yield connection
            finally:
                self._give_back(connection, seen)
            if seen is not None and seen.is_immutable and seen != _Seen.of(self.path, seen):
                raise StoreUnavailable(f"store {self.path}: was written while it was read; read it again")

    @contextmanager
    def salvaging(self) -> "Iterator[_Connection]":
        """A connection to a catalogue that `reading` may refuse: whatever of its schema SQLite still understands."""
        with translated(self.path), closing(_open(f"file:{quote(str(self.path))}?mode=rw")) as connection:
            connection.execute("PRAGMA writable_schema = ON")  # what cannot be parsed is passed over
            connection.execute("PRAGMA mmap_size = 0")
            connection.execute("PRAGMA cell_size_check = ON")
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'removals'").fetchone():
                _run(connection, _AS_VERSION_2)
            yield connection

    @contextmanager
    def writing(self) -> "Iterator[_Connection]":
        """A transaction, committed durably at the end, rolled back on any error; under the writer lock."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                num_commits = num_committed(connection) + 1
                query = "UPDATE store SET num_commits = ?, checksum = ?"
                connection.execute(query, (num_commits, row_checksum(num_commits, _schema(connection))))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            self._on_commit(num_commits)

    def checkpoint(self) -> None:
        """Fold the log into the file, as far as readers let it, so that the directory can be copied or mounted."""
        with self.reading() as connection:
            connection.execute("PRAGMA busy_timeout = 1000")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            connection.execute("PRAGMA busy_timeout = 10000")

    def replace(self, new: Path) -> None:
        """Put another catalogue file in the place of this one, beside readers; only for the holder of the writer lock.

        Connections to the old file keep it until they are given back.
        """
        with suppress(StoreDamaged):
            self.checkpoint()
        for suffix in ("-wal", "-shm"):  # of the old file: what a reader has open stays, and a new one makes its own
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        os.rename(new, self.path)
        fsync_directory(self.path.parent)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> "tuple[_Connection, _Seen | None]":
        seen = _Seen.of(self.path, self._seen)
        with self._lock:
            stale: list[_Connection] = []
            if seen != self._seen:
                stale, self._idle = self._idle, []
                self.num_reopened += self._seen is not None and not (seen and seen.continues(self._seen))
                self._seen = seen
            idle = self._idle.pop() if self._idle else None
        for connection in stale:
            connection.close()
        if idle is not None:
            return idle, seen
        if seen is None:
            # Reading before the first write: everything is empty.
            self._check_missing()
            connection = _open(":memory:")
            _make(connection, _SCHEMA_1 + _SCHEMA_2)
            return connection, seen
        return _connect(self.path, seen), seen

    def _give_back(self, connection: "_Connection", seen: "_Seen | None") -> None:
        with self._lock:
            if seen is not None and seen == self._seen and connection.is_kept and not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _check_missing(self) -> None:
        segments = self.path.parent / "segments"
        if segments.is_dir() and any(segments.iterdir()):
            raise StoreDamaged(f"store {self.path}: is missing, and {segments} holds codes that only it can tell apart")

    def _upgrade(self) -> None:
        with self.reading() as connection:
            if connection.is_kept:
                return
        with translated(self.path):
            connection = _open(f"file:{quote(str(self.path))}?mode=rw")
            try:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                _make(connection, _SCHEMA_2)
                connection.execute("COMMIT")
            finally:
                connection.close()


class _Connection(sqlite3.Connection):
    """A connection whose text is bytes; see `failures.text`."""

    is_kept = True  # in the pool; not to a file of version 1, which another process may bring up


class _Seen(NamedTuple):
    """A catalogue file as it is found: another value means that connections to it are to be opened again."""

    device: int
    inode: int
    modified_ns: int  # also by a checkpoint; a connection would not notice a copy over the file
    num_bytes: int
    is_immutable: bool = False

    def continues(self, earlier: "_Seen") -> bool:
        """Whether it is the same file, whose writers raise its generations."""
        return self[:2] == earlier[:2] and not self.is_immutable

    @classmethod
    def of(cls, path: Path, known: "_Seen | None") -> "_Seen | None":
        """The file as it is now; `known` is how it was found last."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return None
        ordinary = cls(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        if os.access(path.parent, os.W_OK):
            return ordinary
        immutable = ordinary._replace(is_immutable=True)
        log, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
        # A log that came since belongs to a writer elsewhere, and the file is still what it was.
        if immutable == known or not (log.exists() and log.stat().st_size):
            return immutable
        if os.statvfs(path.parent).f_flag & os.ST_RDONLY or not index.exists():
            raise StoreAccessDenied(
                f"store {path}: its log {log.name} holds writes that cannot be applied in a read-only directory; "
                "checkpoint it first: run `preread stats` on the store where it can be written"
            )
        return ordinary  # beside a writer whose files we may read


def build(path: Path, aside: Path) -> None:
    """Make an empty catalogue under a name aside, and rename it to `path`, durably."""
    new_file(aside).close()  # which folds the log into the file
    os.rename(aside, path)
    fsync_directory(path.parent)


def new_file(aside: Path) -> _Connection:
    """An empty catalogue in a file that replaces one left there by a process that died."""
    for leftover in aside.parent.glob(aside.name + "*"):
        leftover.unlink(missing_ok=True)
    connection = _open(str(aside))
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN")
        _make(connection, _SCHEMA_1 + _SCHEMA_2)
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def num_committed(connection: sqlite3.Connection) -> int:
    """Transactions that this catalogue has seen. Raises StoreDamaged."""
    number, schema, checksum = only(connection.execute("SELECT num_commits, schema, checksum FROM store").fetchone())
    check_row("its counters", checksum, integer(number), blob(schema))
    return integer(number)


def num_removed(connection: sqlite3.Connection) -> int:
    """Another number after every removal of segments."""
    return integer(only(connection.execute("SELECT num_removed FROM store").fetchone())[0])


def _connect(path: Path, seen: _Seen) -> _Connection:
    connection = _open(f"file:{quote(str(path))}?{'mode=ro&immutable=1' if seen.is_immutable else 'mode=rw'}")
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -16384")
        connection.execute("PRAGMA mmap_size = 0")  # a mapped file that is truncated kills the process
        connection.execute("PRAGMA cell_size_check = ON")
        (version,) = only(connection.execute("PRAGMA user_version").fetchone())
        if version == 1:
            _run(connection, _AS_VERSION_2)
            connection.is_kept = False
        elif version != CATALOGUE_VERSION:
            raise StoreDamaged(f"{path}: version {version} is unknown, expected 1 or {CATALOGUE_VERSION}")
        elif _schema(connection) != only(connection.execute("SELECT schema FROM store").fetchone())[0]:
            raise StoreDamaged(f"store {path}: the catalogue is damaged: its schema is not the one it was made with")
    except BaseException:
        connection.close()
        raise
    return connection


def _open(database: str) -> _Connection:
    connection = sqlite3.connect(
        database,
        uri=database.startswith("file:"),
        timeout=10.0,
        isolation_level=None,
        check_same_thread=False,
        factory=_Connection,
    )
    connection.text_factory = bytes
    return connection


def _schema(connection: sqlite3.Connection) -> bytes:
    """A checksum of the schema as it is."""
    return row_checksum(*(blob(sql) for (sql,) in connection.execute(_SCHEMA_OF)))


def _make(connection: sqlite3.Connection, script: str) -> None:
    """Run a schema's script, and count the commits from here on."""
    connection.create_function("row_checksum", -1, row_checksum, deterministic=True)
    _run(connection, script)
    schema = _schema(connection)
    connection.execute("INSERT INTO store VALUES (0, 0, ?, ?)", (schema, row_checksum(0, schema)))


def _run(connection: sqlite3.Connection, script: str) -> None:
    """The statements of a script, in the transaction that is open; `executescript` would commit it."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
