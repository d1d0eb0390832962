"""Keeper: states that were encoded on demand, in collections that hold nothing else, within a budget of bytes.

    states -> codec -> decoded, the caller's response, at once the same numbers as every later read
                 └---> queue -> a group, by count or seconds -> room made -> one durable write

An id is the SHA-256 of its text in hex, so that any number of workers write one record of a text; a collection with
another id is never written nor evicted from. Everything behind the codec costs the states and never the caller: what
cannot be kept now, because the queue is full or another writer is in the way, is dropped and counted.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Protocol

from cache import errors
from cache.collection import MAX_CLIPPED_SHARE, Collection, StoredPassage
from cache.record import HEADER_BYTES, Header, Record, is_text_id
from cache.states import EncodedPassage, PassageStates, decode_all
from cache.store import Store
from encoder_worker.config import CollectionSettings, EncoderConfig
from encoder_worker.passage_encoder import Encoded, PassageEncoder
from encoder_worker.writing import Target, held

log = logging.getLogger(__name__)

MAX_QUEUED_PASSAGES, MAX_QUEUED_BYTES = 1024, 32 << 20
# A group is written when it has so many passages or its first one is so old.
GROUP_PASSAGES, GROUP_SECONDS = 256, 1.0
OPEN_SECONDS, RETRY_SECONDS = 1.0, 5.0  # longest wait of a caller, and until a collection that failed is tried again
LIST_SHARE = 0.05  # of a worker's time, at most, goes into listing a collection that others write too
MAX_COLLECTIONS = 16  # of one worker: each has a budget
LOW_WATER = 0.9  # share of the budget that eviction leaves, so that it is rare
# Of a passage, next to its record: ids and digests in SQLite's rows and indexes (measured: 320 bytes, 520 after many
# evictions), or in Redis' keys and sets (540).
OVERHEAD_BYTES = 600
MAX_STRANGERS = 100_000  # ids that were asked for and that this worker has not seen yet
_LIST_PAGE = 1000


class Reason(StrEnum):
    """Why states were not kept; constants for machines."""

    QUEUE = "queue"  # it was full
    BUSY = "busy"  # another writer held the collection, or the store
    SHARE = "share"  # more at a time than the caller's share, or the budget, holds
    RATIO = "ratio"  # other than the collection's
    CODEC = "codec"  # the codec cannot hold them, or was not trained for them
    FOREIGN = "foreign"  # the collection holds passages of another writer, or of another encoder
    DENIED = "denied"  # the caller's key may not write there
    FAILED = "failed"  # the store; the log has the cause


class Recorder(Protocol):
    """Counts what a keeper does; called on several threads."""

    def kept(self, num_passages: int) -> None: ...

    def dropped(self, reason: Reason, num_passages: int) -> None: ...

    def evicted(self, num_passages: int) -> None: ...

    def holds(self, collection: str, num_bytes: int) -> None: ...


@dataclass(frozen=True, eq=False, slots=True)
class _Queued:
    """One encoded passage on its way."""

    passage: StoredPassage
    caller: str
    num_bytes: int  # that it will take in the store


@dataclass(eq=False, slots=True)
class _Entry:
    num_bytes: int
    caller: str = ""  # "": not known, or without a name
    asked: float = 1.0  # how often, fading


class Usage:
    """What lies in one collection: bytes by passage and caller, and how often each was asked for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}  # the longest kept first
        self._bytes_of: Counter[str] = Counter()  # by caller
        self._strangers: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return self._bytes_of.total()

    def bytes_of(self, caller: str) -> int:
        return self._bytes_of[caller]

    def touch(self, caller: str, passage_ids: Iterable[str]) -> None:
        """Counts that these were asked for; one without a caller becomes this one's."""
        with self._lock:
            for passage_id in passage_ids:
                if (entry := self._entries.get(passage_id)) is not None:
                    entry.asked += 1
                    if not entry.caller and caller:
                        self._remove(passage_id)
                        self._add(passage_id, _Entry(entry.num_bytes, caller, entry.asked))
                elif len(self._strangers) < MAX_STRANGERS:
                    self._strangers[passage_id] += 1

    def listed(self, found: dict[str, int]) -> None:
        """Takes what a listing of the store found, bytes by id: others write and delete too."""
        with self._lock:
            for passage_id in self._entries.keys() - found.keys():
                self._remove(passage_id)
            for passage_id, num_bytes in found.items():
                if passage_id not in self._entries:
                    self._add(passage_id, _Entry(num_bytes, asked=1 + self._strangers[passage_id]))
            self._strangers.clear()

    def wrote(self, items: Iterable[_Queued]) -> None:
        with self._lock:
            for one in items:
                passage_id = one.passage.passage_id
                before = self._entries.get(passage_id)
                self._remove(passage_id)
                self._add(passage_id, _Entry(one.num_bytes, one.caller, before.asked + 1 if before else 1.0))

    def evicted(self, passage_ids: Iterable[str]) -> None:
        with self._lock:
            for passage_id in passage_ids:
                self._remove(passage_id)

    def victims(self, items: Sequence[_Queued], capacity: int, max_share: float, dead_bytes: int) -> list[str]:
        """Ids to evict so that the items fit: of callers over their share first, then of all; the least asked for.

        Down to LOW_WATER of the share or the capacity; how often the others were asked for fades by half then.
        """
        with self._lock:
            chosen: dict[str, int] = {}
            incoming: Counter[str] = Counter()
            for one in items:
                incoming[one.caller] += one.num_bytes
            for caller, num_bytes in incoming.items():
                limit = max_share * capacity
                if caller and (total := self._bytes_of[caller] + num_bytes) > limit:
                    own = (id_ for id_, entry in self._entries.items() if entry.caller == caller)
                    self._choose(own, total - LOW_WATER * limit, chosen)
            total = self._bytes_of.total() + incoming.total()
            if total + dead_bytes > capacity:  # deleting some of it does not free its bytes yet
                excess = total - sum(chosen.values()) - LOW_WATER * capacity
                self._choose((id_ for id_ in self._entries if id_ not in chosen), excess, chosen)
            return list(chosen)

    def _choose(self, passage_ids: Iterable[str], excess: float, chosen: dict[str, int]) -> None:
        if excess <= 0:
            return
        for passage_id in sorted(passage_ids, key=lambda one: self._entries[one].asked):
            entry = self._entries[passage_id]
            if excess > 0:
                chosen[passage_id] = entry.num_bytes
                excess -= entry.num_bytes
            entry.asked /= 2

    def _add(self, passage_id: str, entry: _Entry) -> None:
        self._entries[passage_id] = entry
        self._bytes_of[entry.caller] += entry.num_bytes

    def _remove(self, passage_id: str) -> None:
        if (entry := self._entries.pop(passage_id, None)) is not None:
            self._bytes_of[entry.caller] -= entry.num_bytes


class _Foreign(Exception):  # noqa: N818 - says what the collection is
    """A collection that something else writes."""


@dataclass(eq=False)
class _Kept:
    """One open collection."""

    name: str  # as the servers call it
    collection: Collection
    usage: Usage = field(default_factory=Usage)
    listed_at: float = float("-inf")
    list_seconds: float = 0.0  # that it took
    generation: int = -1  # when it was last listed or written


class Keeper:
    """All collections of one worker that are written through: `run` as a task until it is closed."""

    def __init__(
        self,
        store: Store,
        encoder: PassageEncoder,
        config: EncoderConfig,
        threads: tuple[Executor, Executor],  # for codecs, and for the store
        recorder: Recorder,
    ) -> None:
        self._store, self._encoder, self._config, self._recorder = store, encoder, config, recorder
        self._threads, self._store_threads = threads
        # What lies in the store and the copy that a compaction makes of it fit the budget together.
        self._capacity = config.max_kept_bytes - min(store.max_copy_bytes, config.max_kept_bytes // 2)
        self._opened: dict[str, tuple[_Kept | Reason, float]] = {}  # and when it was
        self._opening: dict[str, asyncio.Future[_Kept | Reason]] = {}
        self._queue: list[tuple[_Kept, _Queued]] = []
        self._queued_bytes = 0
        self._some, self._many = asyncio.Event(), asyncio.Event()
        self._closing = False
        self._usages: dict[str, Usage] = {}  # they outlast a store that was away
        self._told: dict[str, str] = {}  # by name, what the log has
        self._has_denied = False

    async def keep(self, name: str, caller: str, texts: Sequence[str], encoded: Sequence[Encoded]) -> list[Encoded]:
        """The states as the collection's codec gives them back, queued to be kept; unchanged where that cannot be.

        Waits for the codec, and the first time a moment for the collection; never for the queue or a write.
        """
        kept = await self._open(name)
        loop, recorder = asyncio.get_running_loop(), self._recorder
        if isinstance(kept, Reason):
            recorder.dropped(kept, sum(isinstance(one, PassageStates) for one in encoded))
            return list(encoded)
        code = partial(self._code, kept.collection, caller, texts, encoded)
        coded, decoded = await loop.run_in_executor(self._threads, code)
        for one in coded:
            if len(self._queue) < MAX_QUEUED_PASSAGES and self._queued_bytes + one.num_bytes <= MAX_QUEUED_BYTES:
                self._queue.append((kept, one))
                self._queued_bytes += one.num_bytes
            else:
                recorder.dropped(Reason.QUEUE, 1)
        if self._queue:
            self._some.set()
        if len(self._queue) >= GROUP_PASSAGES:
            self._many.set()
        return decoded

    def deny(self, name: str, num_passages: int) -> None:
        """Counts states of a caller whose key may not write there."""
        self._recorder.dropped(Reason.DENIED, num_passages)
        if not self._has_denied:  # once: callers may make up any number of names
            self._has_denied = True
            log.warning("states are not kept in %s: the server's key lacks the scope index, or the collection", name)

    def touch(self, name: str, caller: str, passage_ids: Iterable[str]) -> None:
        """Counts that kept passages were asked for, also before this worker keeps some there. Any thread."""
        if name in self._usages or len(self._usages) < MAX_COLLECTIONS:
            self._usages.setdefault(name, Usage()).touch(caller, passage_ids)

    async def run(self) -> None:
        """Writes groups, and in the end what is still queued."""
        loop = asyncio.get_running_loop()
        while not self._closing or self._queue:
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(GROUP_SECONDS):
                    await self._many.wait()
            queue, self._queue, self._queued_bytes = self._queue, [], 0
            if not self._closing:
                self._some.clear()
                self._many.clear()
            groups: defaultdict[_Kept, dict[str, _Queued]] = defaultdict(dict)
            for kept, one in queue:
                groups[kept].setdefault(one.passage.passage_id, one)
            for kept, group in groups.items():
                await loop.run_in_executor(self._store_threads, self._write, kept, list(group.values()))

    def close(self) -> None:
        """Lets `run` come to its end."""
        self._closing = True
        self._some.set()
        self._many.set()

    async def _open(self, name: str) -> _Kept | Reason:
        kept, opened_at = self._opened.get(name, (Reason.FAILED, float("-inf")))
        if isinstance(kept, _Kept) or time.monotonic() - opened_at < RETRY_SECONDS:
            return kept
        if name not in self._opening:
            if len(self._opened) >= MAX_COLLECTIONS and name not in self._opened:
                log.warning("states are not kept in %s: this worker keeps some in %d others", name, MAX_COLLECTIONS)
                return Reason.FAILED
            loop = asyncio.get_running_loop()
            self._opening[name] = loop.run_in_executor(self._store_threads, self._open_or_make, name)
            self._opening[name].add_done_callback(partial(self._has_opened, name))
        done, _ = await asyncio.wait([self._opening[name]], timeout=OPEN_SECONDS)  # cancelled, it opens all the same
        return next(iter(done)).result() if done else Reason.FAILED

    def _has_opened(self, name: str, opening: "asyncio.Future[_Kept | Reason]") -> None:
        del self._opening[name]
        if not opening.cancelled():
            self._opened[name] = opening.result(), time.monotonic()

    # Below: on threads.

    def _open_or_make(self, name: str) -> _Kept | Reason:
        make = partial(Target, self._store, name, CollectionSettings(stores_text=None), self._encoder)
        try:
            with self._store.without_waiting(), held(make, shared=True) as target:
                assert target is not None
                if target.collection is None:
                    target.stores_text = self._config.keeps_texts
                collection = target.create()
                kept = _Kept(name, collection, self._usages.setdefault(name, Usage()))
                ids, _ = kept.collection.list_ids(_LIST_PAGE)
                self._check(kept, ids)
                if self._config.keeps_texts and not kept.collection.manifest.stores_text:
                    log.warning("texts are not kept in %s: it was made to hold none", name)
                return kept
        except Exception as exc:
            return self._reason(name, exc)

    def _reason(self, name: str, error: Exception) -> Reason:
        """Why something failed, for the metrics, and for the log where it can tell more."""
        if isinstance(error, errors.StoreLocked):
            return Reason.BUSY
        if isinstance(error, errors.CacheError | _Foreign):
            if self._told.get(name) != str(error):  # of a store that is away, a line and not one each time
                self._told[name] = str(error)
                log.warning("states are not kept in %s: %s", name, error)
            return Reason.FOREIGN if isinstance(error, errors.EncoderMismatch | _Foreign) else Reason.FAILED
        log.error("states are not kept in %s", name, exc_info=error)
        return Reason.FAILED

    def _code(
        self, collection: Collection, caller: str, texts: Sequence[str], encoded: Sequence[Encoded]
    ) -> tuple[list[_Queued], list[Encoded]]:
        """What is to be kept, and for the caller everything: kept states as they will be read."""
        decoded, ratio = list(encoded), collection.manifest.compression_ratio
        coded: dict[int, StoredPassage] = {}
        for i, (text, one) in enumerate(zip(texts, encoded, strict=True)):
            if not isinstance(one, PassageStates):
                continue
            if one.compression_ratio != ratio:
                self._recorder.dropped(Reason.RATIO, 1)
                continue
            text_kept = text if self._config.keeps_texts else None
            passage = StoredPassage(one.text_digest.hex(), one, text_kept)
            try:  # alone: one that the codec cannot hold costs itself
                (own,) = collection.encode([passage])
            except errors.CacheError:
                self._recorder.dropped(Reason.CODEC, 1)
                continue
            if own.num_clipped <= MAX_CLIPPED_SHARE * one.states.size or self._config.allow_clipped:
                coded[i] = own
            else:
                self._recorder.dropped(Reason.CODEC, 1)
        kept_as = decode_all([one.states for one in coded.values()])
        for i, states in zip(coded, kept_as, strict=True):
            assert isinstance(states, PassageStates)
            decoded[i] = states
        return [_Queued(one, caller, _bytes_of(one)) for one in coded.values()], decoded

    def _write(self, kept: _Kept, items: list[_Queued]) -> None:
        """Makes room for a group and writes it; drops it where that cannot be done now."""
        collection, store, recorder = kept.collection, self._store, self._recorder
        try:
            with store.without_waiting(), store.lease(collection.name, shared=True) as check:
                if store.read_manifest(collection.name) != collection.manifest:
                    raise errors.CollectionGone(f"collection: {kept.name!r} is gone, or is another one now")
                is_current = self._list(kept, sum(one.num_bytes for one in items))
                digests = collection.digests([one.passage.passage_id for one in items])
                items = [one for one, digest in zip(items, digests, strict=True) if digest is None]
                fitting = self._fitting(items)
                recorder.dropped(Reason.SHARE, len(items) - len(fitting))
                items = fitting
                self._make_room(kept, items)
                check()
                collection.put_many([one.passage for one in items], allow_clipped=True)  # judged one by one before
                kept.usage.wrote(items)
                if is_current:  # else others wrote, and that is still to be looked at
                    kept.generation = store.generation(collection.storage_name)
                self._told.pop(kept.name, None)
                recorder.kept(len(items))
                recorder.holds(kept.name, self._used(kept))
        except Exception as exc:
            reason = self._reason(kept.name, exc)
            recorder.dropped(reason, len(items))
            if reason is not Reason.BUSY:  # what it is now is looked at again before more is queued
                self._opened[kept.name] = reason, time.monotonic()

    def _list(self, kept: _Kept, num_new_bytes: int) -> bool:
        """Lists the collection where it changed and that matters now; whether it is known as it is. _Foreign."""
        now, name = time.monotonic(), kept.collection.storage_name
        generation = self._store.generation(name)
        if generation == kept.generation and not self._config.max_kept_seconds:  # passages that expire change none
            return True
        over = self._used(kept) + num_new_bytes > self._capacity
        if now - kept.listed_at < kept.list_seconds / LIST_SHARE and not over:
            return generation == kept.generation
        found: dict[str, int] = {}
        after = b""
        while True:
            ids, after = self._store.list_ids(name, _LIST_PAGE, after)
            headers = self._check(kept, ids)
            found |= {one: _size(header) for one, header in zip(ids, headers, strict=True)}
            if not after:
                break
        kept.usage.listed(found)
        kept.listed_at, kept.generation = now, generation
        kept.list_seconds = time.monotonic() - now
        return True

    def _check(self, kept: _Kept, ids: Sequence[str]) -> list[Header | None]:
        """Headers of the ids; raises _Foreign where one is not the SHA-256 of its text."""
        headers = self._store.headers_many(kept.collection.storage_name, ids, bulk=True)
        for one, header in zip(ids, headers, strict=True):
            if not is_text_id(one) or (header is not None and header.text_digest.hex() != one):
                raise _Foreign(f"it holds {one[:100]!r}, which was indexed; expected a collection of kept states alone")
        return headers

    def _used(self, kept: _Kept) -> int:
        return kept.usage.num_bytes + self._store.dead_bytes(kept.collection.storage_name)

    def _fitting(self, items: Sequence[_Queued]) -> list[_Queued]:
        """The first of them that the budget, and of each caller those that its share, can hold at all."""
        taken: Counter[str] = Counter()
        fitting = []
        for one in items:
            limit = LOW_WATER * self._capacity * (self._config.max_kept_share if one.caller else 1)
            num_bytes = taken[one.caller] + one.num_bytes
            if num_bytes <= limit and taken.total() + one.num_bytes <= LOW_WATER * self._capacity:
                taken[one.caller] = num_bytes
                fitting.append(one)
        return fitting

    def _make_room(self, kept: _Kept, items: Sequence[_Queued]) -> None:
        collection, store = kept.collection, self._store
        name = collection.storage_name
        dead_bytes = store.dead_bytes(name)
        victims = kept.usage.victims(items, self._capacity, self._config.max_kept_share, dead_bytes)
        if victims:
            collection.delete_many(victims)
            kept.usage.evicted(victims)
            self._recorder.evicted(len(victims))
        # Bytes of what was deleted lie there until a compaction, which is made when they are in the way.
        if self._used(kept) + sum(one.num_bytes for one in items) > self._capacity:
            store.compact(name)


def _bytes_of(passage: StoredPassage) -> int:
    states = passage.states
    assert isinstance(states, EncodedPassage)
    num_bytes = Record.num_bytes(states.num_states, states.states.codec.code_size_bytes, len(states.window_tokens))
    return num_bytes + len((passage.text or "").encode()) + OVERHEAD_BYTES


def _size(header: Header | None) -> int:
    return OVERHEAD_BYTES + (header.total_bytes if header is not None else HEADER_BYTES)
