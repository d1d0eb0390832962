"""Collections, aliases and generations in the catalogue, as functions over a connection.

Whatever changes something runs inside a write transaction of the caller. Rows that fail their check raise StoreDamaged.
"""

import sqlite3

from cache.embedded.failures import blob, check_row, integer, row_checksum, text
from cache.errors import CollectionExists, CollectionInUse, CollectionNotFound, ManifestError, StoreDamaged
from cache.manifest import Manifest
from cache.names import check_name
from cache.store import StoreStats


def find_collection(connection: sqlite3.Connection, name: str) -> int | None:
    """Its number in the catalogue; a name used again gets another one."""
    row = connection.execute("SELECT collection_id, checksum FROM collections WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    collection_id = integer(row[0])
    check_row(f"collection {name!r}", row[1], collection_id, name)
    return collection_id


def require_collection(connection: sqlite3.Connection, name: str) -> int:
    collection_id = find_collection(connection, name)
    if collection_id is None:
        raise CollectionNotFound(f"collection: {name!r} does not exist in this store")
    return collection_id


def read_manifest(connection: sqlite3.Connection, name: str) -> Manifest | None:
    row = connection.execute("SELECT manifest FROM collections WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    try:
        return Manifest.from_json(blob(row[0]), name)
    except ManifestError as exc:
        raise StoreDamaged(f"collection {name!r} cannot be read: {exc}") from exc


def write_manifest(connection: sqlite3.Connection, manifest: Manifest) -> None:
    name = manifest.collection
    if find_collection(connection, name) is not None or name in aliases(connection):
        raise CollectionExists(f"collection: {name!r} already exists in this store")
    query = "INSERT INTO collections (name, manifest) VALUES (?, ?)"
    collection_id = connection.execute(query, (name, manifest.to_json())).lastrowid
    assert collection_id is not None
    query = "UPDATE collections SET checksum = ? WHERE collection_id = ?"
    connection.execute(query, (row_checksum(collection_id, name), collection_id))
    bump(connection, name)


def list_collections(connection: sqlite3.Connection) -> list[str]:
    names = []
    for row in connection.execute("SELECT collection_id, name, checksum FROM collections ORDER BY name"):
        collection_id, name = integer(row[0]), text(row[1])
        check_row(f"collection {name!r}", row[2], collection_id, name)
        names.append(name)
    return names


def drop(connection: sqlite3.Connection, name: str) -> list[str]:
    """Remove everything of a collection from the catalogue; returns the segment files that are now nobody's."""
    collection_id = require_collection(connection, name)
    if users := sorted(alias for alias, target in aliases(connection).items() if target == name):
        raise CollectionInUse(f"collection: {name!r} is in use by the aliases {users}; move them first")
    query = "SELECT file_name FROM segments WHERE collection_id = ?"
    file_names = [text(file_name) for (file_name,) in connection.execute(query, (collection_id,))]
    for table in ("passages", "segments", "collections"):
        connection.execute(f"DELETE FROM {table} WHERE collection_id = ?", (collection_id,))
    connection.execute("UPDATE store SET num_removed = num_removed + 1")
    bump(connection, name)
    return file_names


def aliases(connection: sqlite3.Connection) -> dict[str, str]:
    found = {}
    for row in connection.execute("SELECT alias, name, checksum FROM aliases"):
        alias, name = text(row[0]), text(row[1])
        check_row(f"alias {alias!r}", row[2], alias, name)
        found[alias] = name
    return found


def set_alias(connection: sqlite3.Connection, alias: str, name: str, *, shadowing: bool = False) -> None:
    check_name("alias", alias)
    if find_collection(connection, alias) is not None and not shadowing:
        raise CollectionExists(f"alias: {alias!r} is the name of a collection")
    require_collection(connection, name)
    query = """INSERT INTO aliases (alias, name, checksum) VALUES (?, ?, ?)
        ON CONFLICT (alias) DO UPDATE SET name = excluded.name, checksum = excluded.checksum"""
    connection.execute(query, (alias, name, row_checksum(alias, name)))


def remove_alias(connection: sqlite3.Connection, alias: str) -> bool:
    return connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount > 0


def stats(connection: sqlite3.Connection, name: str) -> StoreStats:
    """As the triggers keep count: `audit` compares them with the rows."""
    query = """SELECT num_passages, num_states, num_tokens, num_truncated, size_bytes, num_clipped
        FROM collections WHERE name = ?"""
    row = connection.execute(query, (name,)).fetchone()
    return StoreStats() if row is None else StoreStats(*map(integer, row))


def generation(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("SELECT generation, checksum FROM generations WHERE name = ?", (name,)).fetchone()
    if row is None:
        return 0
    number = integer(row[0])
    check_row(f"the generation of {name!r}", row[1], name, number)
    return number


def bump(connection: sqlite3.Connection, name: str) -> None:
    """Another generation: something of the collection changed."""
    number = generation(connection, name) + 1
    query = """INSERT INTO generations (name, generation, checksum) VALUES (?, ?, ?)
        ON CONFLICT (name) DO UPDATE SET generation = excluded.generation, checksum = excluded.checksum"""
    connection.execute(query, (name, number, row_checksum(name, number)))
