"""The catalogue of an embedded store: SQLite in WAL mode. Schema, connections and transactions.

Does not know the meaning of headers or codes, nor when to write what: see `store.py`.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from cache.embedded.failures import translated
from cache.embedded.segments import fsync_directory
from cache.errors import StoreDamaged

CATALOGUE_VERSION = 1

# Counters are kept by triggers, in the transaction that changes the rows. Compaction moves rows without touching the
# counted columns, so it fires nothing. Generations outlive their collection: a name used again continues the count.
_SCHEMA = f"""
PRAGMA user_version = {CATALOGUE_VERSION};
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


class Catalogue:
    """Connections to one catalogue file. Thread-safe: every reading call takes a connection of its own from a pool."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    def create(self) -> None:
        """Make the file where there is none; only for the holder of the writer lock.

        It is built aside and renamed, so nobody ever sees a catalogue without its tables.
        """
        if self._path.exists():
            return
        aside = self._path.with_name(self._path.name + ".tmp")
        for leftover in aside.parent.glob(aside.name + "*"):
            leftover.unlink(missing_ok=True)
        connection = sqlite3.connect(aside)
        try:
            connection.executescript(f"PRAGMA journal_mode = WAL; BEGIN; {_SCHEMA} COMMIT;")
        finally:
            connection.close()  # folds the log into the file
        os.rename(aside, self._path)
        fsync_directory(self._path.parent)
        fsync_directory(self._path.parent.parent)

    @property
    def exists(self) -> bool:
        return self._path.exists()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit; an empty catalogue where there is no file yet."""
        with translated(self._path):
            connection, is_pooled = self._take()
            try:
                yield connection
            finally:
                self._give_back(connection, is_pooled)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, committed durably at the end, rolled back on any error; under the writer lock."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> tuple[sqlite3.Connection, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        if not self._path.exists():
            # Reading before the first write: everything is empty. Not pooled, so the file is seen once it is there.
            connection = sqlite3.connect(":memory:", isolation_level=None)
            connection.executescript(_SCHEMA)
            return connection, False
        connection = sqlite3.connect(
            f"file:{quote(str(self._path))}?mode=rw",
            uri=True,
            timeout=10.0,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA cache_size = -16384")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != CATALOGUE_VERSION:
                raise StoreDamaged(f"{self._path}: version {version} is unknown, expected {CATALOGUE_VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection, True

    def _give_back(self, connection: sqlite3.Connection, is_pooled: bool) -> None:
        with self._lock:
            if is_pooled and not self._closed:
                self._idle.append(connection)
                return
        connection.close()
