"""One Upsert stream: messages in, passages encoded and stored, acknowledgements out, in the order they came.

    read a message -> compare digests -> tokenize -> encode      as many at once as the window has room for
    -> store -> acknowledge                                      in order; what is ready is one durable write

Backpressure is flow control: the next message is not read before there is room for unacknowledged
passages. Does not know gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from cache.collection import Collection, StoredPassage
from cache.record import is_passage_id
from cache.states import PassageStates, text_digest
from encoder_worker.errors import FailedPrecondition, InvalidRequest
from encoder_worker.passage_encoder import EncodingFailed
from encoder_worker.reading import SeenIds
from encoder_worker.scheduler import Priority, Worker
from encoder_worker.sources import Place
from encoder_worker.writing import CollectionSettings, Target, put
from preread.v1 import encoder_pb2
from preread_edge.steps import Pace, Step, stepped

MANY = 1000  # passages of one message, which are then checked in steps

UNCHANGED, STORED, REFUSED = (
    encoder_pb2.UPSERT_STATUS_UNCHANGED,
    encoder_pb2.UPSERT_STATUS_STORED,
    encoder_pb2.UPSERT_STATUS_REFUSED,
)


@dataclass(eq=False, slots=True)
class _Entry:
    """One passage of a message, until it is acknowledged."""

    passage_id: str
    text: str
    digest: bytes = b""
    refused: str = ""
    states: PassageStates | None = None
    num_clipped: int = 0

    def result(self) -> encoder_pb2.UpsertResult:
        if self.refused:
            return encoder_pb2.UpsertResult(passage_id=self.passage_id, status=REFUSED, message=self.refused)
        if self.states is None:
            return encoder_pb2.UpsertResult(passage_id=self.passage_id, status=UNCHANGED)
        return encoder_pb2.UpsertResult(
            passage_id=self.passage_id,
            status=STORED,
            num_tokens=self.states.num_tokens,
            num_states=self.states.num_states,
            truncated=self.states.truncated,
            num_clipped=self.num_clipped,
        )


class _Room:
    """Passages and bytes that are unacknowledged, and who waits for fewer."""

    def __init__(self, max_passages: int, max_bytes: int) -> None:
        self._max_passages, self._max_bytes = max_passages, max_bytes
        self._passages = self._bytes = 0
        self._changed = asyncio.Event()

    def take(self, entries: Sequence[_Entry], sign: int = 1) -> None:
        self._passages += sign * len(entries)
        self._bytes += sign * sum(len(entry.text) for entry in entries)
        self._changed.set()

    def give_back(self, entries: Sequence[_Entry]) -> None:
        self.take(entries, -1)

    async def wait(self) -> None:
        """Returns when one more message may be read."""
        while self._passages >= self._max_passages or self._bytes >= self._max_bytes:
            self._changed.clear()
            await self._changed.wait()


_Encoding = asyncio.Task[list[_Entry]]


class Upload:
    """Made for one stream."""

    def __init__(self, engine: Worker) -> None:
        self._engine = engine
        self._name = ""
        self._collection: Collection | None = None
        self._seen = SeenIds()
        self._num_read = 0
        self._room = _Room(engine.config.max_unacknowledged_passages, engine.config.max_unacknowledged_bytes)
        self._messages: deque[_Encoding] = deque()  # read and not yet stored, in order
        self._read_more = asyncio.Event()  # a message came, or none will

    async def run(
        self, requests: AsyncIterator[encoder_pb2.UpsertRequest]
    ) -> AsyncGenerator[encoder_pb2.UpsertResponse, None]:
        """One response per request, after the store has its passages.

        Raises:
            InvalidRequest, Refused, CacheError: the stream cannot go on; what was acknowledged stays.
        """
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._read_more.set())
        try:
            while ready := await self._ready(reader):
                await self._store([entry for entries in ready for entry in entries])
                for entries in ready:
                    results = []
                    pace = Pace()  # one message may hold tens of thousands of refused passages
                    for entry in entries:
                        results.append(entry.result())
                        await pace.worked()
                    yield encoder_pb2.UpsertResponse(results=results)
                    self._room.give_back(entries)
            await reader  # raises what ended it
        finally:
            for task in (reader, *self._messages):
                task.cancel()
            await asyncio.gather(reader, *self._messages, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[encoder_pb2.UpsertRequest]) -> None:
        async for request in requests:
            collection = await self._open(request)
            if len(request.passages) > MANY:
                entries = await stepped(self._checked, request)
            else:
                entries = await self._engine.call(self._checked, lambda: None, request)
            self._room.take(entries)
            todo = await self._changed(collection, entries)
            self._messages.append(asyncio.create_task(self._encode(collection, entries, todo)))
            self._read_more.set()
            await self._room.wait()

    async def _open(self, request: encoder_pb2.UpsertRequest) -> Collection:
        """The stream's collection; the first message names it and may make it."""
        if self._collection is not None:
            if request.collection not in ("", self._name):
                raise InvalidRequest("collection", request.collection, f"{self._name!r}, as in the first message")
            return self._collection
        if not request.collection:
            raise InvalidRequest("collection", "", "the name of a collection in the first message")
        if request.compression_ratio < 0:
            raise InvalidRequest("compression_ratio", request.compression_ratio, "0 (the default) or more")
        self._name = request.collection
        self._collection = await self._engine.call_store(self._open_or_make, request)
        return self._collection

    def _open_or_make(self, request: encoder_pb2.UpsertRequest) -> Collection:
        encoder = self._engine.encoder
        settings = CollectionSettings(request.compression_ratio or None, request.codec or None)
        target = Target(self._engine.store, request.collection, settings, encoder.identity, encoder.settings)
        if target.num_training_states:
            raise FailedPrecondition(
                "CODEC_NEEDS_TRAINING",
                request.collection,
                f"codec {target.codec.factory} is trained on a sample of the passages, which a stream does not "
                "give at once; make the collection with `preread index`, or take another codec",
            )
        target.stores_text = target.stores_text if target.collection is not None else request.store_text
        return target.create(None)

    def _checked(self, step: Step, request: encoder_pb2.UpsertRequest) -> list[_Entry]:
        """The passages of one message, the refused ones with why; off the event loop, one message at a time."""
        entries = []
        for passage in request.passages:
            entries.append(self._check(passage))
            step()
        return entries

    def _check(self, passage: encoder_pb2.Passage) -> _Entry:
        entry = _Entry(passage.passage_id, passage.text)
        self._num_read += 1
        if not is_passage_id(passage.passage_id):
            entry.refused = "passage_id is empty or over 512 bytes"
        elif reason := self._engine.why_not(passage.text):
            entry.refused = reason
        elif first := self._seen.first_place(passage.passage_id, Place("upload", self._num_read)):
            entry.refused = f"id {entry.passage_id!r} came before, as passage {first.line}; the first one counts"
        return entry

    async def _changed(self, collection: Collection, entries: list[_Entry]) -> list[_Entry]:
        """Those to encode. The others are refused, or stored with the same text."""
        good = [entry for entry in entries if not entry.refused]
        stored = await self._engine.call_store(collection.digests, [entry.passage_id for entry in good])
        todo: list[_Entry] = []
        for entry, digest in zip(good, stored, strict=True):
            entry.digest = text_digest(entry.text)
            if digest != entry.digest:
                todo.append(entry)
        return todo

    async def _encode(self, collection: Collection, entries: list[_Entry], todo: list[_Entry]) -> list[_Entry]:
        ratio = collection.manifest.compression_ratio
        tokenized = await self._engine.tokenize([entry.text for entry in todo])
        windows = await self._engine.scheduler.encode(tokenized, ratio, Priority.BULK)
        for entry, tokens, encoded in zip(todo, tokenized, windows, strict=True):
            joined = tokens.join(encoded, ratio, entry.digest)
            if isinstance(joined, EncodingFailed):
                entry.refused = str(joined)
            else:
                entry.states = joined
        return entries

    async def _ready(self, reader: asyncio.Task[None]) -> list[list[_Entry]]:
        """The next messages in order whose passages are all encoded; empty at the end of the stream."""
        while not self._messages and not reader.done():
            self._read_more.clear()
            await self._read_more.wait()
        ready: list[list[_Entry]] = []
        while self._messages and (not ready or self._messages[0].done()):
            ready.append(await self._messages[0])
            self._messages.popleft()
        return ready

    async def _store(self, entries: list[_Entry]) -> None:
        encoded = {entry.passage_id: entry for entry in entries if entry.states is not None}  # ids are distinct
        passages = [
            StoredPassage(entry.passage_id, entry.states, entry.text)
            for entry in encoded.values()
            if entry.states is not None
        ]
        if not passages or self._collection is None:
            return
        store = partial(put, allow_clipped=self._engine.config.allow_clipped)
        written = await self._engine.call_store(store, self._collection, passages)
        for passage_id, reason in written.refused.items():
            encoded[passage_id].refused = reason
        for passage_id, num_clipped in written.clipped.items():
            encoded[passage_id].num_clipped = num_clipped
