"""MemoryStore: `memory:`, records in this process, for a service whose two halves share one, and for tests."""

import heapq
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cache.errors import CollectionExists, CollectionInUse, CollectionNotFound
from cache.manifest import Manifest
from cache.record import Damaged, Header, Record, check_name, passage_id_bytes
from cache.store import (
    MAX_IDS_OF_TEXT,
    OnProgress,
    Store,
    StoreStats,
    aliases_of_renamed,
    locked_by,
    this_writer,
)


class MemoryStore(Store):
    """Packed records in dictionaries, checked on every read like Redis', so code that works here works there."""

    _shared: dict[str | None, tuple["MemoryStore", int]] = {}  # noqa: RUF012 - by URL name, with the number of openers
    _shared_lock = threading.Lock()

    def __init__(self) -> None:
        self._name: str | None = None
        self._lock = threading.RLock()
        self._manifests: dict[str, Manifest] = {}
        self._values: dict[str, dict[str, bytes]] = {}
        self._texts: dict[str, defaultdict[bytes, set[str]]] = {}  # ids of each text's digest
        self._aliases: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._writers: dict[str, list[tuple[bool, str]]] = {}  # whether they share a collection, and which they are
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
            store, num_openers = self._shared.pop(self._name, (self, 0))
            if num_openers > 1:
                self._shared[self._name] = (store, num_openers - 1)

    def put_many(self, storage_name: str, records: Mapping[str, Record]) -> None:
        packed = {id_: record.pack(passage_id_bytes(id_)) for id_, record in records.items()}
        with self._lock:
            self._require_stored(storage_name)
            self._forget_texts(storage_name, packed)
            self._values[storage_name].update(packed)
            for passage_id, record in records.items():
                self._texts[storage_name][record.header.text_digest].add(passage_id)
            self._touch(storage_name)

    def get_many(self, storage_name: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        return list(map(Record.checked, passage_ids, self._find(storage_name, passage_ids)))

    def delete_many(self, storage_name: str, passage_ids: Sequence[str]) -> int:
        with self._lock:
            self._forget_texts(storage_name, passage_ids)
            values = self._values.get(storage_name, {})
            num_deleted = sum(values.pop(passage_id, None) is not None for passage_id in passage_ids)
            if num_deleted:
                self._touch(storage_name)
            return num_deleted

    def headers_many(self, storage_name: str, passage_ids: Sequence[str], *, bulk: bool = False) -> list[Header | None]:
        return list(map(Header.checked, passage_ids, self._find(storage_name, passage_ids)))

    def scan(self, storage_name: str) -> Iterator[tuple[str, Record | Damaged]]:
        for passage_id in self._ids(storage_name):
            (record,) = self.get_many(storage_name, [passage_id])
            if record is not None:
                yield passage_id, record

    def list_ids(self, storage_name: str, limit: int, after: bytes = b"") -> tuple[list[str], bytes]:
        with self._lock:
            later = (one for id_ in self._values.get(storage_name, {}) if (one := id_.encode()) > after)
            page = heapq.nsmallest(limit + 1, later)
        return [one.decode() for one in page[:limit]], page[limit - 1] if len(page) > limit else b""

    def ids_of_texts(
        self, storage_name: str, digests: Sequence[bytes], limit: int = MAX_IDS_OF_TEXT
    ) -> list[list[str]]:
        with self._lock:
            known: Mapping[bytes, set[str]] = self._texts.get(storage_name, {})
            return [heapq.nsmallest(limit, known.get(digest, ()), key=str.encode) for digest in digests]

    def finds_texts(self, storage_name: str) -> bool:
        return True

    def index_texts(self, storage_name: str, on_progress: OnProgress | None = None) -> None:
        self._require_stored(storage_name)  # the index is kept with every write

    def stats(self, storage_name: str) -> StoreStats:
        return StoreStats.of(self.headers_many(storage_name, self._ids(storage_name)))

    def generation(self, storage_name: str) -> int:
        return self._generations.get(storage_name, 0)

    def read_manifest(self, collection: str) -> Manifest | None:
        return self._manifests.get(collection)

    @contextmanager
    def lease(self, collection: str, *, shared: bool = False) -> Iterator[Callable[[], None]]:
        check_name("collection", collection)
        own = shared, this_writer()
        with self._lock:
            writers = self._writers.setdefault(collection, [])
            for is_shared, writer in writers:
                if not (shared and is_shared):
                    raise locked_by(collection, writer.encode())
            writers.append(own)
        try:
            yield lambda: None
        finally:
            with self._lock:
                writers.remove(own)

    def write_manifest(self, manifest: Manifest) -> Manifest:
        with self._lock:
            name = manifest.collection
            if name in self._manifests or name in self._aliases:
                raise CollectionExists(f"collection: {name!r} already exists in this store")
            manifest = manifest.stored(self._values)
            self._manifests[name], self._values[manifest.storage_name] = manifest, {}
            self._texts[manifest.storage_name] = defaultdict(set)
            self._touch(manifest.storage_name)
            return manifest

    def list_collections(self) -> list[str]:
        with self._lock:
            return sorted(self._manifests)

    def drop_collection(self, collection: str) -> None:
        with self._lock:
            self._require(collection)
            CollectionInUse.check(collection, self._aliases)
            storage_name = self._manifests.pop(collection).storage_name
            del self._values[storage_name], self._texts[storage_name]
            self._touch(storage_name)

    def rename_collection(self, collection: str, name: str, alias: str | None = None) -> list[str]:
        with self._lock:
            aliases = aliases_of_renamed(collection, name, alias, self._manifests, self._aliases)
            with self.lease(collection), self.lease(name):
                self._manifests[name] = replace(self._manifests.pop(collection), collection=name)
            self._aliases |= dict.fromkeys(aliases, name)
            return aliases

    def aliases(self) -> dict[str, str]:
        with self._lock:
            return dict(self._aliases)

    def set_alias(self, alias: str, collection: str, *, shadowing: bool = False) -> None:
        check_name("alias", alias)
        with self._lock:
            if alias in self._manifests and not shadowing:
                raise CollectionExists(f"alias: {alias!r} is the name of a collection")
            self._require(collection)
            self._aliases[alias] = collection

    def remove_alias(self, alias: str) -> bool:
        with self._lock:
            return self._aliases.pop(alias, None) is not None

    def _require(self, collection: str) -> None:
        if collection not in self._manifests:
            raise CollectionNotFound(f"collection: {collection!r} does not exist in this store")

    def _ids(self, storage_name: str) -> list[str]:
        with self._lock:
            return list(self._values.get(storage_name, {}))

    def _forget_texts(self, storage_name: str, passage_ids: Iterable[str]) -> None:
        for passage_id in passage_ids:
            header = Header.checked(passage_id, self._values.get(storage_name, {}).get(passage_id))
            if header is not None and (ids := self._texts[storage_name].get(header.text_digest)) is not None:
                ids.discard(passage_id)
                if not ids:
                    del self._texts[storage_name][header.text_digest]

    def _require_stored(self, storage_name: str) -> None:
        if storage_name not in self._values:
            raise CollectionNotFound(f"collection: {storage_name!r} does not exist in this store")

    def _find(self, storage_name: str, passage_ids: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            values = self._values.get(storage_name, {})
            return [values.get(passage_id) for passage_id in passage_ids]

    def _touch(self, storage_name: str) -> None:
        self._generations[storage_name] = next(self._next_generation)
