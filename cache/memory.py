"""MemoryStore: `memory:`, records in this process.

A product part, for tests and for a service whose two halves share one process. It keeps packed bytes and checks them on
every read, like the shared store, so that code which works here works there. Does not know about sharing between
processes.
"""

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence

from cache.errors import CollectionExists, CollectionInUse, CollectionNotFound, DamagedRecord
from cache.manifest import Manifest
from cache.record import HEADER_BYTES, Damaged, Header, Record, check_name, pack, passage_id_bytes, unpack
from cache.store import Audit, StoreStats, sum_headers


class MemoryStore:
    """Packed records in dictionaries; see `Store` for the contract."""

    _shared: dict[str, tuple["MemoryStore", int]] = {}  # noqa: RUF012 - by URL name, with the number of openers
    _shared_lock = threading.Lock()

    def __init__(self) -> None:
        self._name: str | None = None
        self._lock = threading.RLock()
        self._manifests: dict[str, Manifest] = {}
        self._values: dict[str, dict[str, bytes]] = {}
        self._aliases: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._next_generation = itertools.count(1)

    @classmethod
    def shared(cls, name: str) -> "MemoryStore":
        """The process's store of that name; it lives until everyone who opened it has closed it."""
        with cls._shared_lock:
            store, num_openers = cls._shared.get(name) or (cls(), 0)
            store._name = name
            cls._shared[name] = (store, num_openers + 1)
            return store

    def close(self) -> None:
        with self._shared_lock:
            if self._name is None or self._name not in self._shared:
                return
            store, num_openers = self._shared.pop(self._name)
            if num_openers > 1:
                self._shared[self._name] = (store, num_openers - 1)

    def put_many(self, collection: str, records: Mapping[str, Record]) -> None:
        packed = {id_: pack(record, passage_id_bytes(id_)) for id_, record in records.items()}
        with self._lock:
            if collection not in self._manifests:
                raise CollectionNotFound(f"collection: {collection!r} does not exist in this store")
            self._values[collection].update(packed)
            self._touch(collection)

    def get_many(self, collection: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        return [
            None if value is None else _checked(passage_id, value)
            for passage_id, value in zip(passage_ids, self._find(collection, passage_ids), strict=True)
        ]

    def delete_many(self, collection: str, passage_ids: Sequence[str]) -> int:
        with self._lock:
            values = self._values.get(collection, {})
            num_deleted = sum(values.pop(passage_id, None) is not None for passage_id in passage_ids)
            if num_deleted:
                self._touch(collection)
            return num_deleted

    def headers_many(self, collection: str, passage_ids: Sequence[str]) -> list[Header | None]:
        return [
            None if value is None else _header(passage_id, value)
            for passage_id, value in zip(passage_ids, self._find(collection, passage_ids), strict=True)
        ]

    def contains_many(self, collection: str, passage_ids: Sequence[str]) -> list[bytes | None]:
        return [None if header is None else header.text_digest for header in self.headers_many(collection, passage_ids)]

    def scan(self, collection: str) -> Iterator[tuple[str, Record | Damaged]]:
        with self._lock:
            passage_ids = list(self._values.get(collection, {}))
        for passage_id in passage_ids:
            (record,) = self.get_many(collection, [passage_id])
            if record is not None:
                yield passage_id, record

    def stats(self, collection: str) -> StoreStats:
        with self._lock:
            passage_ids = list(self._values.get(collection, {}))
        return sum_headers(self.headers_many(collection, passage_ids))

    def audit(self, collection: str) -> Audit:
        return Audit()

    def mend(self) -> list[str]:
        return []

    def generation(self, collection: str) -> int:
        with self._lock:
            return self._generations.get(collection, 0)

    def read_manifest(self, collection: str) -> Manifest | None:
        with self._lock:
            return self._manifests.get(collection)

    def write_manifest(self, manifest: Manifest) -> None:
        with self._lock:
            name = manifest.collection
            if name in self._manifests or name in self._aliases:
                raise CollectionExists(f"collection: {name!r} already exists in this store")
            self._manifests[name] = manifest
            self._values[name] = {}
            self._touch(name)

    def list_collections(self) -> list[str]:
        with self._lock:
            return sorted(self._manifests)

    def drop_collection(self, collection: str) -> None:
        with self._lock:
            if collection not in self._manifests:
                raise CollectionNotFound(f"collection: {collection!r} does not exist in this store")
            if users := sorted(alias for alias, name in self._aliases.items() if name == collection):
                raise CollectionInUse(f"collection: {collection!r} is in use by the aliases {users}; move them first")
            del self._manifests[collection], self._values[collection]
            self._touch(collection)

    def aliases(self) -> dict[str, str]:
        with self._lock:
            return dict(self._aliases)

    def set_alias(self, alias: str, collection: str, *, shadowing: bool = False) -> None:
        check_name("alias", alias)
        with self._lock:
            if alias in self._manifests and not shadowing:
                raise CollectionExists(f"alias: {alias!r} is the name of a collection")
            if collection not in self._manifests:
                raise CollectionNotFound(f"collection: {collection!r} does not exist in this store")
            self._aliases[alias] = collection

    def remove_alias(self, alias: str) -> bool:
        with self._lock:
            return self._aliases.pop(alias, None) is not None

    def _find(self, collection: str, passage_ids: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            values = self._values.get(collection, {})
            return [values.get(passage_id) for passage_id in passage_ids]

    def _touch(self, collection: str) -> None:
        self._generations[collection] = next(self._next_generation)


def _checked(passage_id: str, value: bytes) -> Record | Damaged:
    try:
        return unpack(value, passage_id)
    except DamagedRecord as exc:
        return Damaged(passage_id, str(exc))


def _header(passage_id: str, value: bytes) -> Header | None:
    try:
        return Header.parse(value[:HEADER_BYTES], passage_id)
    except DamagedRecord:
        return None
