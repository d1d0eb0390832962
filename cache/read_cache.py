"""ByteBounded: values in memory within a byte budget, evicted by Moka. Does not know what they are.

StatesTier: pooled states in this process, within a byte budget, in front of any store.

Holds records that were checked once, so a hit costs neither a checksum nor a page fault. It never serves what the store
behind no longer has: before a read it asks for the collection's generation, and after a change compares the checksums
of what it holds, not the states. When it is full, what is asked for more often stays (TinyLFU, as Moka does it), so
that a scan of rare passages does not empty it. A passage that several threads miss is read once. Does not know which
store is behind it.

A store whose reads are timed and weighed. Does not know who listens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, cast

from moka_py import Moka

from cache.errors import CacheError
from cache.manifest import Manifest
from cache.record import Damaged, Header, Record
from cache.store import Audit, Store, StoreStats

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# More than Moka counts an entry's weight in.
MAX_ENTRY_BYTES = (1 << 32) - 1


class ByteBoundedCache(Generic[K, V]):
    """Thread-safe. Never holds more than its bytes once a call has returned."""

    def __init__(
        self, max_bytes: int, size_bytes: Callable[[V], int], *, policy: Literal["tiny_lfu", "lru"] = "tiny_lfu"
    ) -> None:
        """
        Args:
            max_bytes: 0 holds nothing.
            size_bytes: of a value, what it takes beside its numbers included.
            policy: who leaves when it is full: what is asked for least (tiny_lfu), or longest ago (lru).
        """
        self.max_bytes = max_bytes
        self._size_bytes = size_bytes
        self._kept: Moka[K, V] = Moka(max(1, max_bytes), policy=policy, weigher=lambda _, value: size_bytes(value))

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        self._kept.run_pending_tasks()
        return self._kept.weighted_size()

    @property
    def num_entries(self) -> int:
        self._kept.run_pending_tasks()
        return self._kept.count()

    def get(self, key: K) -> V | None:
        return self._kept.get(key)

    def put(self, key: K, value: V) -> bool:
        """False where it is over the whole budget. Where it is full, a value may be let go of at once."""
        if self._size_bytes(value) > min(self.max_bytes, MAX_ENTRY_BYTES):
            return False
        self._kept.set(key, value)
        self._kept.run_pending_tasks()  # else Moka lets some sixty entries wait, over the budget
        return True

    def remove(self, key: K) -> None:
        self._kept.remove(key)

    def clear(self) -> None:
        self._kept.clear()
        self._kept.run_pending_tasks()


# A record's Python objects beside its codes and text, generously.
_ENTRY_OVERHEAD_BYTES = 1024

_Read = Record | Damaged | None


@dataclass(slots=True)
class _Entry:
    record: Record
    generation: int  # of the collection, read before the record was


class CachedStore:
    """The records most asked for, at most `max_bytes` of them; see `Store` for the contract.

    staleness_seconds: for how long a generation may be taken as still current; with 0 every read asks.
    """

    def __init__(self, store: Store, *, max_bytes: int, staleness_seconds: float = 0.0) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes: {max_bytes}, expected at least 1")
        self.store = store
        self.num_hits = 0
        self.num_misses = 0
        self._staleness_seconds = staleness_seconds
        self._lock = threading.Lock()
        self._entries: ByteBoundedCache[tuple[str, str], _Entry] = ByteBoundedCache(max_bytes, _size_bytes)
        self._generations: dict[str, tuple[int, float]] = {}
        # Reads under way, by what they were begun for: a later generation does not take an earlier one's answer.
        self._flights: dict[tuple[str, int, str], Future[_Read]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._entries.num_bytes

    def get_many(self, collection: str, passage_ids: Sequence[str]) -> list[_Read]:
        generation = self.generation(collection)
        found: dict[str, _Read] = {}
        aged: dict[str, _Entry] = {}
        for passage_id in passage_ids:
            entry = self._entries.get((collection, passage_id))
            if entry is not None and entry.generation == generation:
                found[passage_id] = entry.record
            elif entry is not None:
                aged[passage_id] = entry
        if aged:
            # Something in the collection changed. A header's checksum covers the whole record, so it settles which.
            for (passage_id, entry), header in zip(
                aged.items(), self.store.headers_many(collection, list(aged)), strict=True
            ):
                if header is not None and header.checksum == entry.record.checksum:
                    entry.generation = generation
                    found[passage_id] = entry.record
        missing = [passage_id for passage_id in dict.fromkeys(passage_ids) if passage_id not in found]
        self.num_hits += len(found)
        self.num_misses += len(missing)
        found |= self._fetch(collection, generation, missing)
        return [found[passage_id] for passage_id in passage_ids]

    def generation(self, collection: str) -> int:
        known = self._generations.get(collection)
        now = time.monotonic()
        if known is not None and now - known[1] < self._staleness_seconds:
            return known[0]
        generation = self.store.generation(collection)
        self._generations[collection] = (generation, now)
        return generation

    def put_many(self, collection: str, records: Mapping[str, Record]) -> None:
        try:
            self.store.put_many(collection, records)
        finally:  # also after an error: some of them may have been written
            self._forget(collection, records)

    def delete_many(self, collection: str, passage_ids: Sequence[str]) -> int:
        try:
            return self.store.delete_many(collection, passage_ids)
        finally:
            self._forget(collection, passage_ids)

    def drop_collection(self, collection: str) -> None:
        try:
            self.store.drop_collection(collection)
        finally:
            self._generations.pop(collection, None)
            self._entries.clear()  # dropping is rare, and a cache that can be listed would be slower

    def close(self) -> None:
        self._entries.clear()
        self.store.close()

    # The rest is the store's own answer.

    def contains_many(self, collection: str, passage_ids: Sequence[str]) -> list[bytes | None]:
        return self.store.contains_many(collection, passage_ids)

    def headers_many(self, collection: str, passage_ids: Sequence[str]) -> list[Header | None]:
        return self.store.headers_many(collection, passage_ids)

    def scan(self, collection: str) -> Iterator[tuple[str, Record | Damaged]]:
        return self.store.scan(collection)

    def stats(self, collection: str) -> StoreStats:
        return self.store.stats(collection)

    def audit(self, collection: str) -> Audit:
        return self.store.audit(collection)

    def mend(self) -> list[str]:
        try:
            return self.store.mend()
        finally:
            self._generations.clear()
            self._entries.clear()

    def read_manifest(self, collection: str) -> Manifest | None:
        return self.store.read_manifest(collection)

    def write_manifest(self, manifest: Manifest) -> None:
        self.store.write_manifest(manifest)

    def list_collections(self) -> list[str]:
        return self.store.list_collections()

    def aliases(self) -> dict[str, str]:
        return self.store.aliases()

    def set_alias(self, alias: str, collection: str, *, shadowing: bool = False) -> None:
        self.store.set_alias(alias, collection, shadowing=shadowing)

    def remove_alias(self, alias: str) -> bool:
        return self.store.remove_alias(alias)

    def _fetch(self, collection: str, generation: int, passage_ids: Sequence[str]) -> dict[str, _Read]:
        """From the store, or from a read of it that another thread has under way."""
        own: dict[str, Future[_Read]] = {}
        flights: dict[str, Future[_Read]] = {}
        with self._lock:
            for passage_id in passage_ids:
                key = collection, generation, passage_id
                if key not in self._flights:
                    own[passage_id] = self._flights[key] = Future()
                flights[passage_id] = self._flights[key]
        if own:
            try:
                fetched = dict(zip(own, self.store.get_many(collection, list(own)), strict=True))
                self._admit(collection, generation, fetched)
                for passage_id, record in fetched.items():
                    own[passage_id].set_result(record)
            except BaseException as exc:
                for flight in own.values():
                    flight.set_exception(exc)
                raise
            finally:
                with self._lock:
                    for passage_id in own:
                        del self._flights[collection, generation, passage_id]
        return {passage_id: flight.result() for passage_id, flight in flights.items()}

    def _admit(self, collection: str, generation: int, fetched: Mapping[str, _Read]) -> None:
        for passage_id, record in fetched.items():
            if not isinstance(record, Record):
                continue
            # A copy: the codes may be a view into a larger buffer, which would stay alive uncounted.
            self._entries.put((collection, passage_id), _Entry(replace(record, codes=record.codes.copy()), generation))

    def _forget(self, collection: str, passage_ids: Sequence[str] | Mapping[str, Record]) -> None:
        self._generations.pop(collection, None)
        for passage_id in passage_ids:
            self._entries.remove((collection, passage_id))


def _size_bytes(entry: _Entry) -> int:
    return entry.record.size_bytes + _ENTRY_OVERHEAD_BYTES


# seconds, bytes of the records that came, whether it went well; called on the thread that read
OnRead = Callable[[float, int, bool], None]


def timed(store: Store, on_read: OnRead) -> Store:
    """`store` itself in all but `get_many`, which tells `on_read` of every call."""
    return cast(Store, _Timed(store, on_read))


class _Timed:
    def __init__(self, store: Store, on_read: OnRead) -> None:
        self._store = store
        self._on_read = on_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_many(self, collection: str, passage_ids: Sequence[str]) -> list[Record | Damaged | None]:
        start = time.monotonic()
        try:
            records = self._store.get_many(collection, passage_ids)
        except CacheError:
            self._on_read(time.monotonic() - start, 0, False)
            raise
        num_bytes = sum(record.size_bytes for record in records if isinstance(record, Record))
        self._on_read(time.monotonic() - start, num_bytes, True)
        return records
