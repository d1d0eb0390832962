"""Collections, aliases and generations in the catalogue, as functions over a connection.

Whatever changes something runs inside a write transaction of the caller.
"""

import sqlite3

from cache.errors import CollectionExists, CollectionInUse, CollectionNotFound
from cache.manifest import Manifest
from cache.names import check_name
from cache.store import StoreStats


def find_collection(connection: sqlite3.Connection, name: str) -> int | None:
    """Its number in the catalogue; a name used again gets another one."""
    row = connection.execute("SELECT collection_id FROM collections WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def require_collection(connection: sqlite3.Connection, name: str) -> int:
    collection_id = find_collection(connection, name)
    if collection_id is None:
        raise CollectionNotFound(f"collection: {name!r} does not exist in this store")
    return collection_id


def read_manifest(connection: sqlite3.Connection, name: str) -> Manifest | None:
    row = connection.execute("SELECT manifest FROM collections WHERE name = ?", (name,)).fetchone()
    return None if row is None else Manifest.from_json(row[0])


def write_manifest(connection: sqlite3.Connection, manifest: Manifest) -> None:
    name = manifest.collection
    if find_collection(connection, name) is not None or name in aliases(connection):
        raise CollectionExists(f"collection: {name!r} already exists in this store")
    connection.execute("INSERT INTO collections (name, manifest) VALUES (?, ?)", (name, manifest.to_json()))
    bump(connection, name)


def list_collections(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM collections ORDER BY name")]


def drop(connection: sqlite3.Connection, name: str) -> list[str]:
    """Remove everything of a collection from the catalogue; returns the segment files that are now nobody's."""
    collection_id = require_collection(connection, name)
    if users := sorted(alias for alias, target in aliases(connection).items() if target == name):
        raise CollectionInUse(f"collection: {name!r} is in use by the aliases {users}; move them first")
    query = "SELECT file_name FROM segments WHERE collection_id = ?"
    file_names = [file_name for (file_name,) in connection.execute(query, (collection_id,))]
    for table in ("passages", "segments", "collections"):
        connection.execute(f"DELETE FROM {table} WHERE collection_id = ?", (collection_id,))
    connection.execute("UPDATE removals SET num_removed = num_removed + 1")
    bump(connection, name)
    return file_names


def aliases(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT alias, name FROM aliases"))


def set_alias(connection: sqlite3.Connection, alias: str, name: str) -> None:
    check_name("alias", alias)
    if find_collection(connection, alias) is not None:
        raise CollectionExists(f"alias: {alias!r} is the name of a collection")
    require_collection(connection, name)
    connection.execute(
        "INSERT INTO aliases VALUES (?, ?) ON CONFLICT (alias) DO UPDATE SET name = excluded.name", (alias, name)
    )


def remove_alias(connection: sqlite3.Connection, alias: str) -> bool:
    return connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount > 0


def stats(connection: sqlite3.Connection, name: str) -> StoreStats:
    query = "SELECT num_passages, num_states, num_tokens, num_truncated, size_bytes FROM collections WHERE name = ?"
    row = connection.execute(query, (name,)).fetchone()
    return StoreStats() if row is None else StoreStats(*row)


def generation(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("SELECT generation FROM generations WHERE name = ?", (name,)).fetchone()
    return 0 if row is None else int(row[0])


def bump(connection: sqlite3.Connection, name: str) -> None:
    """Another generation: something of the collection changed."""
    query = "INSERT INTO generations VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET generation = generation + 1"
    connection.execute(query, (name,))
