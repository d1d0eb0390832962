"""Read cache: encoded states in this process, within a byte budget, in front of any store; and timed reads.

`CachedStore` holds checked records and never serves what the store behind no longer has: before a read it compares the
collection's generation, and after a change the checksums of its records. It keeps what is read more often (TinyLFU, as
in Moka), so a scan of rare passages does not empty it. A passage that several threads miss is read once.
"""

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, cast

from moka_py import Moka

from cache.errors import CacheError
from cache.record import Damaged, Record
from cache.store import Store

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_Method = TypeVar("_Method", bound=Callable[..., Any])

_MAX_ENTRY_BYTES = (1 << 32) - 1  # Moka counts an entry's weight in 32 bits
_ENTRY_OVERHEAD_BYTES = 1024  # a record's Python objects, without its codes and text, generously

_Read = Record | Damaged | None


class ByteBoundedCache(Generic[K, V]):
    """Values in memory within a byte budget, never exceeded once a call has returned. Thread-safe."""

    def __init__(
        self, max_bytes: int, size_bytes: Callable[[V], int], *, policy: Literal["tiny_lfu", "lru"] = "tiny_lfu"
    ) -> None:
        """`size_bytes` counts a value's overhead too; evicts what is least frequently (tiny_lfu) or recently read."""
        self.max_bytes = max_bytes
        self._size_bytes = size_bytes
        self._kept: Moka[K, V] = Moka(max(1, max_bytes), policy=policy, weigher=lambda _, value: size_bytes(value))

    @property
    def num_bytes(self) -> int:
        self._kept.run_pending_tasks()
        return self._kept.weighted_size()

    @property
    def num_entries(self) -> int:
        self._kept.run_pending_tasks()
        return self._kept.count()

    def get(self, key: K) -> V | None:
        return self._kept.get(key)

    def put(self, key: K, value: V) -> bool:
        """False for a value over the whole budget. A full cache may evict the value immediately."""
        if self._size_bytes(value) > min(self.max_bytes, _MAX_ENTRY_BYTES):
            return False
        self._kept.set(key, value)
        self._kept.run_pending_tasks()  # else Moka lets some sixty entries wait, over the budget
        return True

    def remove(self, key: K) -> None:
        self._kept.remove(key)

    def clear(self) -> None:
        self._kept.clear()
        self._kept.run_pending_tasks()


def _forwarded(method: _Method) -> _Method:
    return cast(_Method, lambda self, *args, **kwargs: getattr(self.store, method.__name__)(*args, **kwargs))


class _StoreWrapper(Store):
    """Another store under it, whose answer every method gives; subclasses override some."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.max_copy_bytes = store.max_copy_bytes

    put_many = _forwarded(Store.put_many)
    get_many = _forwarded(Store.get_many)
    delete_many = _forwarded(Store.delete_many)
    headers_many = _forwarded(Store.headers_many)
    scan = _forwarded(Store.scan)
    list_ids = _forwarded(Store.list_ids)
    ids_of_texts = _forwarded(Store.ids_of_texts)
    finds_texts = _forwarded(Store.finds_texts)
    index_texts = _forwarded(Store.index_texts)
    one_read = _forwarded(Store.one_read)
    without_waiting = _forwarded(Store.without_waiting)
    stats = _forwarded(Store.stats)
    dead_bytes = _forwarded(Store.dead_bytes)
    compact = _forwarded(Store.compact)
    audit = _forwarded(Store.audit)
    mend = _forwarded(Store.mend)
    generation = _forwarded(Store.generation)
    read_manifest = _forwarded(Store.read_manifest)
    lease = _forwarded(Store.lease)
    write_manifest = _forwarded(Store.write_manifest)
    list_collections = _forwarded(Store.list_collections)
    drop_collection = _forwarded(Store.drop_collection)
    rename_collection = _forwarded(Store.rename_collection)
    aliases = _forwarded(Store.aliases)
    set_alias = _forwarded(Store.set_alias)
    remove_alias = _forwarded(Store.remove_alias)
    close = _forwarded(Store.close)


@dataclass(slots=True)
class _CachedRecord:
    record: Record
    generation: int  # of the collection, read before the record was


class CachedStore(_StoreWrapper):
    """Keeps the most frequently read records; a collection's generation counts as current for `staleness_seconds`."""

    def __init__(self, store: Store, *, max_bytes: int, staleness_seconds: float = 0.0) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes: {max_bytes}, expected at least 1")
        super().__init__(store)
        self.num_hits = self.num_misses = 0
        self._staleness_seconds = staleness_seconds
        self._lock = threading.Lock()
        self._entries = ByteBoundedCache[tuple[str, str], _CachedRecord](
            max_bytes, lambda entry: entry.record.header.total_bytes + _ENTRY_OVERHEAD_BYTES
        )
        self._generations: dict[str, tuple[int, float]] = {}  # with the time of reading
        # Reads in flight, by collection, generation and id: a later generation does not take an earlier one's answer.
        self._flights: dict[tuple[str, int, str], Future[_Read]] = {}

    @property
    def num_bytes(self) -> int:
        return self._entries.num_bytes

    def get_many(self, storage_name: str, passage_ids: Sequence[str]) -> list[_Read]:
        generation = self.generation(storage_name)
        held = {id_: entry for id_ in passage_ids if (entry := self._entries.get((storage_name, id_))) is not None}
        if aged := {id_: entry for id_, entry in held.items() if entry.generation != generation}:
            # Something in the collection changed. A header's checksum covers the whole record, so it settles which.
            headers = self.store.headers_many(storage_name, list(aged))
            for (passage_id, entry), header in zip(aged.items(), headers, strict=True):
                if header is not None and header.checksum == entry.record.header.checksum:
                    entry.generation = generation
                else:
                    del held[passage_id]
        found: dict[str, _Read] = {passage_id: entry.record for passage_id, entry in held.items()}
        missing = [passage_id for passage_id in dict.fromkeys(passage_ids) if passage_id not in found]
        self.num_hits += len(found)
        self.num_misses += len(missing)
        found |= self._fetch(storage_name, generation, missing)
        return [found[passage_id] for passage_id in passage_ids]

    def generation(self, storage_name: str) -> int:
        now = time.monotonic()
        generation, read_at = self._generations.get(storage_name, (0, -math.inf))
        if now - read_at >= self._staleness_seconds:
            generation = self.store.generation(storage_name)
            self._generations[storage_name] = (generation, now)
        return generation

    def put_many(self, storage_name: str, records: Mapping[str, Record]) -> None:
        with self._forgetting(storage_name, records):
            self.store.put_many(storage_name, records)

    def delete_many(self, storage_name: str, passage_ids: Sequence[str]) -> int:
        with self._forgetting(storage_name, passage_ids):
            return self.store.delete_many(storage_name, passage_ids)

    def drop_collection(self, collection: str) -> None:
        with self._forgetting():  # dropping is rare, and a cache that can be listed would be slower
            self.store.drop_collection(collection)

    def mend(self) -> list[str]:
        with self._forgetting():
            return self.store.mend()

    def close(self) -> None:
        with self._forgetting():
            self.store.close()

    def _fetch(self, storage_name: str, generation: int, passage_ids: Sequence[str]) -> dict[str, _Read]:
        own: dict[str, Future[_Read]] = {}
        flights: dict[str, Future[_Read]] = {}
        with self._lock:
            for passage_id in passage_ids:
                key = storage_name, generation, passage_id
                if key not in self._flights:
                    own[passage_id] = self._flights[key] = Future()
                flights[passage_id] = self._flights[key]
        if own:
            try:
                for passage_id, record in zip(own, self.store.get_many(storage_name, list(own)), strict=True):
                    if isinstance(record, Record):
                        # A copy: the codes may be a view into a larger buffer, which would stay alive uncounted.
                        kept = replace(record, codes=record.codes.copy())
                        self._entries.put((storage_name, passage_id), _CachedRecord(kept, generation))
                    own[passage_id].set_result(record)
            except BaseException as exc:
                for flight in own.values():
                    if not flight.done():
                        flight.set_exception(exc)
                raise
            finally:
                with self._lock:
                    for passage_id in own:
                        del self._flights[storage_name, generation, passage_id]
        return {passage_id: flight.result() for passage_id, flight in flights.items()}

    @contextmanager
    def _forgetting(self, storage_name: str | None = None, passage_ids: Iterable[str] = ()) -> Iterator[None]:
        """Forget passages, or all, at the end: also after an error, because some of a write may be done."""
        try:
            yield
        finally:
            if storage_name is None:
                self._generations.clear()
                self._entries.clear()
            else:
                self._generations.pop(storage_name, None)
                for passage_id in passage_ids:
                    self._entries.remove((storage_name, passage_id))


class TimedStore(_StoreWrapper):
    """Reports every `get_many` as seconds, bytes of its records and success, on the thread that read."""

    def __init__(self, store: Store, on_read: Callable[[float, int, bool], None]) -> None:
        super().__init__(store)
        self._on_read = on_read

    def get_many(self, storage_name: str, passage_ids: Sequence[str]) -> list[_Read]:
        start = time.monotonic()
        try:
            records = self.store.get_many(storage_name, passage_ids)
        except CacheError:
            self._on_read(time.monotonic() - start, 0, False)
            raise
        num_bytes = sum(record.header.total_bytes for record in records if isinstance(record, Record))
        self._on_read(time.monotonic() - start, num_bytes, True)
        return records
