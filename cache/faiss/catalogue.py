"""The catalogue of an embedded store: SQLite in WAL mode. Schema, connections, transactions and the writers' lock.

Where the directory cannot be written (a read-only mount, or files of another user) and no log is left, the file is
opened immutable: SQLite then takes no locks and makes no files, so any number of readers share one volume. A catalogue
that was replaced, or written on such a volume, is noticed before the next read and opened again.
"""

import fcntl
import os
import secrets
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import xxhash

from cache.errors import StoreAccessDenied, StoreDamaged, StoreLocked, StoreUnavailable
from cache.faiss.rows import COVERED, UNCHECKED, Connection, translated
from cache.faiss.segments import fsync_directory
from cache.faiss.texts import TEXT_INDEX
from cache.store import locked_by, this_writer

_VERSION = 2

_POLL_SECONDS = 0.005
# In the lock's file, after the holder's process id: number of commits u64, and its checksum.
_NOTE, _NOTE_OFFSET = struct.Struct("<QQ"), 16

# Columns of `collections` that triggers keep as sums over columns of `passages`, in the transaction of a change.
# Compaction moves rows without touching the summed columns, so it fires none.
SUMS = {"num_states": "num_states", "num_tokens": "num_tokens", "num_truncated": "truncated",
        "size_bytes": "size_bytes", "num_clipped": "num_clipped"}  # fmt: skip


def _trigger(name: str, event: str, row: str, passages: str, change: str) -> str:
    sums = ", ".join(f"{total} = {total} {change.format(column)}" for total, column in SUMS.items())
    return (
        f"CREATE TRIGGER passages_{name} AFTER {event} ON passages BEGIN UPDATE collections SET "
        f"num_passages = num_passages {passages}, {sums} WHERE collection_id = {row}.collection_id;\nEND;"
    )


# Generations outlive their collection: a name used again continues the count. `store` counts all commits, and has a
# checksum of the schema itself.
_VERSION_2 = f"""
CREATE TABLE store (num_removed INTEGER NOT NULL, num_commits INTEGER NOT NULL, schema BLOB NOT NULL, checksum BLOB);
{_trigger("added", "INSERT", "NEW", "+ 1", "+ NEW.{0}")}
{_trigger("removed", "DELETE", "OLD", "- 1", "- OLD.{0}")}
{_trigger("replaced", f"UPDATE OF {', '.join(SUMS.values())}", "NEW", "+ 0", "+ NEW.{0} - OLD.{0}")}
PRAGMA user_version = {_VERSION};
"""
_NEW = f"""
CREATE TABLE collections (collection_id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
    manifest BLOB NOT NULL, num_passages INTEGER NOT NULL DEFAULT 0,
    {", ".join(f"{total} INTEGER NOT NULL DEFAULT 0" for total in SUMS)}, checksum BLOB);
CREATE TABLE aliases (alias TEXT PRIMARY KEY, name TEXT NOT NULL, checksum BLOB) WITHOUT ROWID;
CREATE TABLE generations (name TEXT PRIMARY KEY, generation INTEGER NOT NULL, checksum BLOB) WITHOUT ROWID;
CREATE TABLE segments (segment_id INTEGER PRIMARY KEY AUTOINCREMENT, collection_id INTEGER NOT NULL,
    file_name TEXT NOT NULL UNIQUE, num_rows INTEGER NOT NULL, code_size INTEGER NOT NULL,
    codes_offset INTEGER NOT NULL, checksum BLOB);
CREATE INDEX segments_by_collection ON segments (collection_id);
CREATE TABLE passages (row_key INTEGER PRIMARY KEY, collection_id INTEGER NOT NULL, passage_id BLOB NOT NULL,
    segment_id INTEGER NOT NULL, first_row INTEGER NOT NULL,
    {", ".join(f"{column} INTEGER NOT NULL" for column in SUMS.values())},
    header BLOB NOT NULL, windows BLOB NOT NULL, text BLOB NOT NULL, UNIQUE (collection_id, passage_id));
CREATE INDEX passages_by_segment ON passages (segment_id);
{TEXT_INDEX}
{_VERSION_2}"""
_CHECKSUMS = "".join(
    f"ALTER TABLE {table} ADD COLUMN checksum BLOB;\n"
    f"UPDATE {table} SET checksum = row_checksum({', '.join(columns)});\n"
    for table, columns in COVERED.items()
)
_UPGRADE = f"""
ALTER TABLE collections ADD COLUMN num_clipped INTEGER NOT NULL DEFAULT 0;
ALTER TABLE passages ADD COLUMN num_clipped INTEGER NOT NULL DEFAULT 0;
DROP TABLE removals;
DROP TRIGGER passages_added;
DROP TRIGGER passages_removed;
DROP TRIGGER passages_replaced;
{_CHECKSUMS}
{TEXT_INDEX}
{_VERSION_2}"""
# A catalogue of version 1 that cannot be written, or was not written since, read as if it were version 2.
_MARK = f"x'{UNCHECKED.hex()}' AS checksum"
_AS_VERSION_2 = f"""
CREATE TEMP VIEW collections AS SELECT *, 0 AS num_clipped, {_MARK} FROM main.collections;
CREATE TEMP VIEW aliases AS SELECT *, {_MARK} FROM main.aliases;
CREATE TEMP VIEW generations AS SELECT *, {_MARK} FROM main.generations;
CREATE TEMP VIEW segments AS SELECT *, {_MARK} FROM main.segments;
CREATE TEMP VIEW passages AS SELECT *, 0 AS num_clipped FROM main.passages;
CREATE TEMP VIEW store AS SELECT num_removed, 0 AS num_commits, x'' AS schema, {_MARK} FROM main.removals;
"""


class _WriterLock:
    """One writer at a time, over threads and processes: an flock that the kernel drops when its holder dies.

    Its file keeps the number of acknowledged commits, to tell when the last were lost: a log ends where its damage is.
    """

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._thread_lock = threading.Lock()
        self._this_thread = threading.local()  # holds a timeout where a thread does not wait
        self._descriptor = -1  # while it is held

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; StoreLocked, naming the holder, after the timeout."""
        timeout_seconds = getattr(self._this_thread, "timeout_seconds", self._timeout_seconds)
        deadline = time.monotonic() + timeout_seconds
        with ExitStack() as cleanup:
            if not self._thread_lock.acquire(timeout=timeout_seconds):
                raise StoreLocked(f"{self._path}: another thread has been writing for {timeout_seconds:g} s")
            cleanup.callback(self._thread_lock.release)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            cleanup.callback(os.close, descriptor)  # which releases the lock
            # flock has no timeout, and a blocking call could not be interrupted from a thread, so it is repeated.
            while not _locked(descriptor, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 12, 0).decode(errors="replace").strip() or "unknown"
                    why = f"process {holder} has been writing for more than {timeout_seconds:g} s"
                    raise StoreLocked(f"{self._path}: {why}")
                time.sleep(_POLL_SECONDS)
            os.pwrite(descriptor, f"{os.getpid():<12}".encode(), 0)
            self._descriptor = descriptor
            cleanup.callback(setattr, self, "_descriptor", -1)
            yield

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Within the block `held` raises StoreLocked immediately, on this thread."""
        self._this_thread.timeout_seconds = 0.0
        try:
            yield
        finally:
            del self._this_thread.timeout_seconds

    @contextmanager
    def idle(self) -> Iterator[bool]:
        """Yield whether there is no writer, and keep writers out meanwhile, if the lock file can be read at all."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield True
            return
        with open(descriptor, "rb"):  # which closes it
            yield _locked(descriptor, fcntl.LOCK_SH)

    def note(self, num_commits: int) -> None:
        """Keep the number of commits, while the lock is held; not synced: a smaller one does no harm."""
        os.pwrite(self._descriptor, _packed_note(num_commits), _NOTE_OFFSET)

    def noted(self) -> int:
        """The number that was kept last; 0 where there is none, or a damaged one."""
        with suppress(OSError, struct.error):
            note = self._path.read_bytes()[_NOTE_OFFSET : _NOTE_OFFSET + _NOTE.size]
            num_commits, _ = _NOTE.unpack(note)
            return int(num_commits) if note == _packed_note(num_commits) else 0
        return 0


class WriterLeases:
    """A file for each writer that holds a collection, locked until its process ends at the latest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def take(self, collection: str, *, shared: bool) -> ExitStack:
        """A lease, which ends when it is closed; raises StoreLocked."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held, ExitStack() as cleanup:
            directory = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
            cleanup.callback(os.close, directory)
            fcntl.flock(directory, fcntl.LOCK_EX)  # one at a time, for a moment
            for path in self._directory.glob(f"{collection}~*"):
                if (writer := _living(path)) is not None and not (shared and "~shared~" in path.name):
                    raise locked_by(collection, writer)
            path = self._directory / f"{collection}~{'shared' if shared else 'alone'}~{secrets.token_hex(8)}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            held.callback(os.close, descriptor)
            held.callback(_remove, path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, this_writer().encode())
            return held.pop_all()


def _living(path: Path) -> bytes | None:
    """What a lease's file says, or None where its process is gone, and now the file too."""
    try:
        with open(path, "rb") as file:
            if not _locked(file.fileno(), fcntl.LOCK_SH):
                return file.read()
    except FileNotFoundError:
        return None
    _remove(path)
    return None


def _remove(path: Path) -> None:
    with suppress(OSError):  # the whole directory may be gone
        path.unlink()


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _packed_note(num_commits: int) -> bytes:
    return _NOTE.pack(num_commits, xxhash.xxh3_64_intdigest(struct.pack("<Q", num_commits)))


class CatalogueFile:
    """Connections to one catalogue file, a pool of them, and the lock of its writers. Thread-safe."""

    def __init__(self, path: Path, *, lock_timeout_seconds: float) -> None:
        self.path = path
        self.lock = _WriterLock(path.with_name("writer.lock"), lock_timeout_seconds)
        self._aside = path.with_name(path.name + ".tmp")  # a new catalogue, possibly of a process that died
        self._pool_lock = threading.Lock()
        self._idle: list[Connection] = []
        self._seen: _Seen | None = None
        self._closed = False
        self.num_reopened = 0  # times that another file was found, which invalidates what is known of the old one

    @property
    def exists(self) -> bool:
        with translated(self.path):
            return self.path.exists()

    def create(self) -> None:
        """Make the file where there is none and should be none, or upgrade one of version 1; under the writer lock."""
        if not self.path.exists():
            self._check_missing()
            with self.new_file():
                pass  # closing it folds the log into the file
            os.rename(self._aside, self.path)  # so no reader ever sees a catalogue without its tables
            fsync_directory(self.path.parent)
            fsync_directory(self.path.parent.parent)
            return
        with self.reading() as connection:
            if connection.is_kept:
                return
        with translated(self.path), closing(Connection.open(self.path)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            _make(connection, _UPGRADE)

    @contextmanager
    def new_file(self) -> Iterator[Connection]:
        for leftover in self._aside.parent.glob(self._aside.name + "*"):
            leftover.unlink(missing_ok=True)
        with closing(Connection.open(self._aside, "rwc")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            _make(connection, _NEW)
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection in autocommit; an empty catalogue where there is no file yet.

        Raises StoreDamaged where it is no catalogue of this store, StoreAccessDenied where a log cannot be applied,
        StoreUnavailable where a read-only volume was written meanwhile, so reads may not fit.
        """
        with translated(self.path):
            seen = _Seen.of(self.path, self._seen)
            stale: list[Connection] = []
            with self._pool_lock:
                if seen != self._seen:
                    stale, self._idle = self._idle, []
                    if self._seen is not None:  # the same file counts on, unless it cannot be known
                        goes_on = seen is not None and seen[:2] == self._seen[:2] and not seen.is_immutable
                        self.num_reopened += not goes_on
                    self._seen = seen
                idle = self._idle.pop() if self._idle else None
            for one in stale:
                one.close()
            connection = idle or self._connected(seen)
            try:
                yield connection
            finally:
                with self._pool_lock:
                    is_kept = seen is not None and seen == self._seen and connection.is_kept and not self._closed
                    if is_kept:
                        self._idle.append(connection)
                if not is_kept:
                    connection.close()
            if seen is not None and seen.is_immutable and seen != _Seen.of(self.path, seen):
                raise StoreUnavailable(f"store {self.path}: was written while it was read; read it again")

    @contextmanager
    def salvaging(self) -> Iterator[Connection]:
        """A connection to a catalogue that `reading` may reject, with all of its schema that SQLite can parse."""
        with translated(self.path), closing(Connection.open(self.path)) as connection:
            for pragma in ("writable_schema = ON", "mmap_size = 0", "cell_size_check = ON"):  # skips what is not SQL
                connection.execute(f"PRAGMA {pragma}")
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'removals'").fetchone():
                connection.run(_AS_VERSION_2)
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed durably at the end, rolled back on any error; under the writer lock."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                num_commits = connection.num_commits() + 1
                connection.set_num_commits(num_commits)
                connection.execute("COMMIT")
                if not self.path.exists():  # then it went into a file that was unlinked, or into none
                    raise StoreUnavailable(f"store {self.path}: was removed while it was written")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            self.lock.note(num_commits)

    def checkpoint(self) -> None:
        """Fold the log into the file, as far as readers let it, so that the directory can be copied or mounted."""
        with self.reading() as connection:
            connection.execute("PRAGMA busy_timeout = 1000")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            connection.execute("PRAGMA busy_timeout = 10000")

    def committed_files(self) -> set[str]:
        """Names of all segments that may not be removed; raises StoreDamaged where the catalogue may lack some."""
        noted = self.lock.noted()
        with self.reading() as connection:
            for problem in chain(connection.lost_commits(noted), connection.damaged_pages("segments")):
                raise StoreDamaged(f"the catalogue is damaged: {problem}")
            return {file_name for _, _, file_name, *_ in connection.checked("segments")}

    def replace(self) -> None:
        """Put the new file in place of this one, under the writer lock; readers keep the old one while they have it."""
        with suppress(StoreDamaged):
            self.checkpoint()
        for suffix in ("-wal", "-shm"):  # of the old file: what a reader has open stays, and a new one makes its own
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        os.rename(self._aside, self.path)
        fsync_directory(self.path.parent)

    def close(self) -> None:
        with self._pool_lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connected(self, seen: "_Seen | None") -> Connection:
        if seen is None:
            self._check_missing()
        mode = "memory" if seen is None else "ro&immutable=1" if seen.is_immutable else "rw"
        connection = Connection.open(self.path, mode)
        try:
            if seen is None:
                _make(connection, _NEW)
                return connection
            # Not mapped: a mapped file that is truncated kills the process.
            # Deleted content is overwritten: a text that was erased is in no free page.
            pragmas = ("synchronous = FULL", "cache_size = -16384", "mmap_size = 0", "cell_size_check = ON")
            for pragma in (*pragmas, "secure_delete = ON"):
                connection.execute(f"PRAGMA {pragma}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 1:
                connection.run(_AS_VERSION_2)
                connection.is_kept = False
            elif version != _VERSION:
                raise StoreDamaged(f"{self.path}: version {version} is unknown, expected 1 or {_VERSION}")
            elif not connection.execute("SELECT 1 FROM store WHERE schema = ?", (connection.schema(),)).fetchone():
                damage = "the catalogue is damaged: its schema is not the one it was made with"
                raise StoreDamaged(f"store {self.path}: {damage}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_missing(self) -> None:
        segments = self.path.parent / "segments"
        if segments.is_dir() and any(segments.iterdir()):
            raise StoreDamaged(f"store {self.path}: is missing, and {segments} holds codes that only it can tell apart")


class _Seen(NamedTuple):
    """A catalogue file as found; connections are opened again when it changes."""

    device: int
    inode: int
    modified_ns: int  # also by a checkpoint; a connection would not notice a copy over the file
    num_bytes: int
    is_immutable: bool = False

    @classmethod
    def of(cls, path: Path, known: "_Seen | None") -> "_Seen | None":
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return None
        ordinary = cls(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        if os.access(path.parent, os.W_OK):
            return ordinary
        immutable = ordinary._replace(is_immutable=True)
        log, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
        # A newer log belongs to a writer elsewhere, and the file is unchanged.
        if immutable == known or not (log.exists() and log.stat().st_size):
            return immutable
        if os.statvfs(path.parent).f_flag & os.ST_RDONLY or not index.exists():
            holds = f"its log {log.name} holds writes that cannot be applied in a read-only directory"
            remedy = "checkpoint it first: run `preread stats` on the store where it can be written"
            raise StoreAccessDenied(f"store {path}: {holds}; {remedy}")
        return ordinary  # next to a writer whose files may be read


def _make(connection: Connection, script: str) -> None:
    """Run a schema's script in a transaction, and count the commits from here on."""
    connection.execute("BEGIN IMMEDIATE")
    connection.run(script)
    connection.execute("INSERT INTO store VALUES (0, 0, ?, NULL)", (connection.schema(),))
    connection.set_num_commits(0)
    connection.execute("COMMIT")
