"""Runs an iterator on a thread of its own, a bounded number of items ahead. Knows nothing about the items.

Which ids came already, and where. Some 20 bytes an id, so that a hundred million fit.

Reading ahead of the model: items are read, compared with what is stored, and tokenized, a window at a time.

A window is what is sorted by length together, and what bounds memory. Knows no model and no writes.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.states import text_digest
from encoder_worker.passage_encoder import PassageEncoder, Tokenized
from encoder_worker.sources import Passage, Place, Reason, Refused, SourceError
from encoder_worker.writing import Target

T = TypeVar("T")
_POLL_SECONDS = 0.1
_LEAVE_SECONDS = 1.0


class _End:
    """Marks the end of the items, or the error that ended them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Ahead(Generic[T]):
    """Iterate inside `with`; leaving it stops the thread at its next item, setting `stop` ends the iteration.

    At most `depth` finished items wait while one is being made and one is being used.
    """

    def __init__(self, items: Iterable[T], *, stop: threading.Event, depth: int = 1, name: str = "ahead") -> None:
        self._items = items
        self._stop = stop
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        # A read that blocks (a pipe nobody writes to) cannot be interrupted: the thread is a daemon
        # and is left behind after a moment.
        self._thread.join(timeout=_LEAVE_SECONDS)

    def _take(self) -> Iterator[T]:
        while not self._stop.is_set():
            # With a timeout, because the one who makes the items may itself wait for ever.
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as exc:  # delivered to the consumer, whatever it is
            error = exc
        self._put(_End(error))

    def _put(self, item: T | _End) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False


_MERGE_AT = 1 << 16
_LINE_BITS = 40


class SeenIds:
    """Ids by 64-bit hash: a dict of the latest, merged into sorted arrays of doubling size.

    Two different ids share a hash once in some three hundred thousand runs of ten million ids; the
    second one is then refused as a duplicate, visibly.
    """

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._latest: dict[int, int] = {}  # hash -> number of the source and line in one
        self._sorted: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []  # the same, large to small

    def once(self, passage: Passage) -> Passage | Refused:
        """The passage, or why it is refused where its id came before."""
        first = self.first_place(passage.passage_id, passage.place)
        if first is None:
            return passage
        message = f"id {passage.passage_id!r} came before, at {first}; the first one counts"
        return Refused(passage.place, passage.passage_id, Reason.DUPLICATE_ID, message)

    def first_place(self, passage_id: str, place: Place) -> Place | None:
        """Where the id came first, or None where this is the first time; remembers it then."""
        key = int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")
        found = self._latest.get(key)
        if found is None:
            found = self._search(key)
        if found is not None:
            return Place(self._sources[found >> _LINE_BITS], found & ((1 << _LINE_BITS) - 1))
        if not self._sources or self._sources[-1] != place.source:
            self._sources.append(place.source)
        self._latest[key] = (len(self._sources) - 1) << _LINE_BITS | place.line
        if len(self._latest) >= _MERGE_AT:
            self._merge()
        return None

    def _search(self, key: int) -> int | None:
        wanted = np.uint64(key)
        for hashes, places in self._sorted:
            at = int(np.searchsorted(hashes, wanted))
            if at < len(hashes) and hashes[at] == wanted:
                return int(places[at])
        return None

    def _merge(self) -> None:
        hashes = np.fromiter(self._latest.keys(), np.uint64, len(self._latest))
        places = np.fromiter(self._latest.values(), np.uint64, len(self._latest))
        self._latest = {}
        while self._sorted and len(self._sorted[-1][0]) <= len(hashes):
            more_hashes, more_places = self._sorted.pop()
            hashes, places = np.concatenate([more_hashes, hashes]), np.concatenate([more_places, places])
        order = np.argsort(hashes)
        self._sorted.append((hashes[order], places[order]))


_TOKENIZE_PASSAGES = 256


@dataclass(frozen=True)
class ReadLimits:
    """A window ends at whichever it reaches first."""

    max_passages: int = 4096
    max_text_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class Todo:
    """One passage to encode."""

    passage: Passage
    digest: bytes
    tokenized: Tokenized


@dataclass
class ReadBatch:
    """The next passages, ready for the model, and what became of the items between them."""

    num_read: int = 0
    num_unchanged: int = 0
    refused: list[Refused] = field(default_factory=list)
    todo: list[Todo] = field(default_factory=list)
    fraction: float | None = None  # of the source, read up to the window's end
    stopped_by: str | None = None  # why nothing was read after it, where that was not the source's end


def read_batches(
    source: Iterable[Passage | Refused],
    encoder: PassageEncoder,
    target: Target,
    *,
    split: bool = False,
    strict: bool = False,
    force: bool = False,
    limits: ReadLimits | None = None,
) -> Iterator[ReadBatch]:
    """Every item of the source, in windows.

    Args:
        split: passages over the token limit become several token windows instead of being cut.
        strict: end at the first refused item.
        force: encode also what is stored with the same text.
    """
    limits = limits or ReadLimits()
    fraction: Callable[[], float | None] = getattr(source, "fraction", lambda: None)
    seen = SeenIds()
    window, fresh, num_bytes = ReadBatch(), list[Passage](), 0
    items = iter(source)
    while True:
        try:
            item = next(items)
        except StopIteration:
            break
        except SourceError as exc:  # what came before is whole, and is kept
            window.stopped_by = str(exc)
            break
        window.num_read += 1
        if isinstance(item, Passage):
            item = _accepted(item, encoder, seen)
        if isinstance(item, Refused):
            window.refused.append(item)
            if strict:
                window.stopped_by = str(item)
                break
        else:
            fresh.append(item)
            num_bytes += len(item.text)
        if window.num_read >= limits.max_passages or num_bytes >= limits.max_text_bytes:
            window.fraction = fraction()
            yield _prepare(window, fresh, encoder, target, split=split, force=force)
            window, fresh, num_bytes = ReadBatch(), [], 0
    window.fraction = fraction()
    yield _prepare(window, fresh, encoder, target, split=split, force=force)


def _accepted(passage: Passage, encoder: PassageEncoder, seen: SeenIds) -> Passage | Refused:
    if encoder.is_empty(passage.text):  # before its id counts: a later passage may have it, and a text
        return Refused(passage.place, passage.passage_id, Reason.EMPTY_TEXT, "text is empty")
    return seen.once(passage)


def _prepare(
    window: ReadBatch, passages: list[Passage], encoder: PassageEncoder, target: Target, *, split: bool, force: bool
) -> ReadBatch:
    digests = [text_digest(passage.text) for passage in passages]
    changed = [True] * len(passages) if force else _changed(passages, digests, target, split=split)
    window.num_unchanged = changed.count(False)
    todo = [pair for pair, is_changed in zip(zip(passages, digests, strict=True), changed, strict=True) if is_changed]
    for start in range(0, len(todo), _TOKENIZE_PASSAGES):
        chunk = todo[start : start + _TOKENIZE_PASSAGES]
        tokenized = encoder.tokenize([passage.text for passage, _ in chunk], split=split)
        for (passage, digest), tokens in zip(chunk, tokenized, strict=True):
            if (failed := tokens.failed) is None:
                window.todo.append(Todo(passage, digest, tokens))
            else:
                window.refused.append(Refused(passage.place, passage.passage_id, Reason(failed.reason), str(failed)))
    return window


def _changed(passages: list[Passage], digests: list[bytes], target: Target, *, split: bool) -> list[bool]:
    ids = [passage.passage_id for passage in passages]
    changed = [stored != digest for stored, digest in zip(target.digests(ids), digests, strict=True)]
    if split:
        # The same text, but stored cut by a run without --split.
        changed = [c or cut for c, cut in zip(changed, target.stored_truncated(ids), strict=True)]
    return changed
