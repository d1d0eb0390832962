"""Passages on their way to the model: checked, compared with the collection, tokenized, a batch at a time."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TypeVar

from cache.record import is_passage_id
from cache.states import text_digest
from encoder_worker.config import IndexOptions
from encoder_worker.passage_encoder import TOKENIZE_TEXTS, PassageEncoder
from encoder_worker.sources import Item, Reason, Refused, SeenIds, SourceError, SourcePassage
from encoder_worker.writing import Target, Upsert

T = TypeVar("T")
_POLL_SECONDS, _JOIN_SECONDS = 0.1, 1.0


@dataclass
class ReadBatch:
    """The next passages of a source or one message of an upload, ready for the model."""

    upserts: list[Upsert] = field(default_factory=list)
    fraction: float | None = None  # of the source, read up to the end of the batch
    stopped_by: str | None = None  # why nothing was read after it, where that was not the end of the source
    tokenizing: asyncio.Future[None] | None = None  # where the passages are not tokenized yet
    _num_finished: int = 0  # at its front

    @property
    def tokenized(self) -> bool:
        return self.tokenizing is None or self.tokenizing.done()

    @cached_property
    def num_text_bytes(self) -> int:
        return sum(len(one.passage.text) for one in self.upserts)

    @property
    def finished(self) -> bool:
        if not self.tokenized:
            return False
        while self._num_finished < len(self.upserts) and self.upserts[self._num_finished].finished:
            self._num_finished += 1
        return self._num_finished == len(self.upserts)

    @property
    def encoded(self) -> bool:
        """Nothing of it waits for the model."""
        open_ones = islice(self.upserts, self._num_finished, None)
        return self.tokenized and all(one.states is not None or one.finished for one in open_ones)


@dataclass
class Intake:
    """The way in, the same for files and uploads: check, compare with the collection, tokenize."""

    encoder: PassageEncoder
    target: Target
    options: IndexOptions = field(default_factory=IndexOptions)
    max_text_bytes: int | None = None
    seen: SeenIds = field(default_factory=SeenIds)
    num_checked: int = 0

    def check(self, item: Item) -> Upsert:
        """Refuses a bad id, a text without tokens and an id that came before. Call it in the order of the passages."""
        self.num_checked += 1
        if isinstance(item, Refused):
            return Upsert(SourcePassage(item.passage_id or "", "", item.place), refused=item)
        upsert = Upsert(item)
        if not is_passage_id(item.passage_id):
            upsert.refuse(Reason.BAD_ID, "passage_id is empty or over 512 bytes")
        # Before the id counts: a later passage may have the id, and a text.
        elif why := self.encoder.why_not(item.text, self.max_text_bytes):
            upsert.refuse(Reason.EMPTY_TEXT, why)
        elif isinstance(again := self.seen.once(item), Refused):
            upsert.refused = again
        return upsert

    def compare(self, upserts: Sequence[Upsert]) -> list[Upsert]:
        """The passages to encode: not refused, and not stored with the same text. Waits for the store."""
        good = [one for one in upserts if one.refused is None]
        if self.options.force or (collection := self.target.collection) is None:
            return good
        ids = [one.passage.passage_id for one in good]
        cut = [False] * len(ids)
        if self.options.split and collection.stats().num_truncated:
            # The same text, but stored cut by a run without `split`.
            headers = collection.store.headers_many(collection.storage_name, ids, bulk=True)
            cut = [header is not None and header.truncated for header in headers]
        return [
            one
            for one, digest, is_cut in zip(good, collection.digests(ids), cut, strict=True)
            if is_cut or digest is None or digest != text_digest(one.passage.text)
        ]

    def tokenize(self, upserts: Sequence[Upsert]) -> None:
        texts = [one.passage.text for one in upserts]
        for one, tokens in zip(upserts, self.encoder.tokenize(texts, split=self.options.split), strict=True):
            if tokens.failed is None:
                one.tokenized = tokens
            else:
                one.take(tokens.failed)

    def batches(self, source: Iterable[Item]) -> Iterator[ReadBatch]:
        """Every item of a source, in batches ready for the model."""
        limits = self.options.limits
        fraction: Callable[[], float | None] = getattr(source, "fraction", lambda: None)
        items, ended = iter(source), False
        while not ended:
            batch, num_bytes = ReadBatch(), 0
            try:
                for item in items:
                    batch.upserts.append(upsert := self.check(item))
                    num_bytes += len(upsert.passage.text)
                    if self.options.strict and upsert.refused is not None:
                        batch.stopped_by = str(upsert.refused)
                    full = len(batch.upserts) >= limits.batch_passages or num_bytes >= limits.batch_text_bytes
                    if full or batch.stopped_by is not None:
                        break
                else:
                    ended = True
            except SourceError as exc:  # what came before is whole, and is kept
                batch.stopped_by = str(exc)
            ended = ended or batch.stopped_by is not None
            batch.fraction = fraction()
            todo = self.compare(batch.upserts)
            for start in range(0, len(todo), TOKENIZE_TEXTS):
                self.tokenize(todo[start : start + TOKENIZE_TEXTS])
            yield batch


async def ahead(items: Iterable[T], stop: threading.Event, *, name: str = "read ahead") -> AsyncGenerator[T, None]:
    """Iterates on a thread: one item is being used, one waits, one is being made. Setting `stop` ends it."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Queue[tuple[tuple[T, ...], BaseException | None]] = asyncio.Queue()  # no item: the end, and why
    room, closed = threading.Semaphore(), threading.Event()

    def send(*item: T, error: BaseException | None = None) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(ready.put_nowait, (item, error))

    def make() -> None:
        try:
            for item in items:
                send(item)
                room.acquire()
                if closed.is_set():
                    return
            send()
        except BaseException as exc:  # delivered to the consumer, of any kind
            send(error=exc)

    thread = threading.Thread(target=make, name=name, daemon=True)
    thread.start()
    try:
        while not stop.is_set():
            try:  # the source may block for hours: `stop` is looked at in between
                item, error = await asyncio.wait_for(ready.get(), _POLL_SECONDS)
            except TimeoutError:
                continue
            if error is not None:
                raise error
            if not item:
                return
            room.release()
            yield item[0]
    finally:
        closed.set()
        room.release()
        # A read that blocks (a pipe without a writer) cannot be interrupted: the daemon thread is left behind.
        thread.join(timeout=_JOIN_SECONDS)
