"""Finds what a model reads of a request's candidates: states, in the store, else by encoding their texts.

Reads in chunks and delivers each as it arrives, so that the model works on the first while the
next is read. Does not know queries, scores or the order among requests.

The source of a model that reads text: what came with the request, else what the collection keeps.

Tokenizes where it reads, off the event loop. Does not know queries, scores or the order among requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from cache.collection import Collection
from cache.errors import CacheError, StoreUnavailable
from cache.record import Damaged
from cache.states import AnyStates, EncodedPassage, PassageStates, all_at_ratio, text_digest
from decoder_server.engine.lifecycle import Fetch, Stopwatch
from decoder_server.engine.on_demand import InlineStates, Refusal
from decoder_server.engine.plan import Indexed
from decoder_server.models.backend import Pair
from preread.types import OnMiss, Status

T = TypeVar("T")

log = logging.getLogger(__name__)

# Texts per call of the encoder worker, and calls under way for one request.
ENCODE_CHUNK = 8
MAX_ENCODE_CALLS = 2


@dataclass(frozen=True, slots=True)
class Found:
    """What a model reads of one candidate, states or text; or why there is nothing."""

    candidate: Indexed
    status: Status
    passage: AnyStates | str | None = None
    message: str = ""
    items: Sequence[Pair] = ()  # made already where that takes time, as tokenizing does
    empty: bool = False  # there is nothing, because nothing of the text is a token

    @property
    def states(self) -> AnyStates | None:
        return self.passage if isinstance(self.passage, PassageStates | EncodedPassage) else None


@dataclass(frozen=True, slots=True)
class _Miss:
    """A candidate that has to be encoded, if anything."""

    candidate: Indexed
    digest: bytes | None  # None: no text
    status: Status  # what it is when it is not encoded
    message: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request wants read, and how."""

    candidates: Sequence[Indexed]
    collection: Collection | None
    compression_ratio: int
    on_miss: OnMiss
    max_text_bytes: int
    pairs: Callable[[AnyStates | str], Sequence[Pair]]  # of a passage under the request's prompt
    is_empty: Callable[[str], bool]  # whether nothing of a text is a token
    fetching: Stopwatch = field(default_factory=Stopwatch)
    encoding: Stopwatch = field(default_factory=Stopwatch)
    fetches: list[Fetch] = field(default_factory=list)
    encodings: list[Fetch] = field(default_factory=list)
    unavailable: list[StoreUnavailable] = field(default_factory=list)  # after one, the store is not waited for again


_Stored = AnyStates | Damaged | CacheError | None  # of one passage id, at the wanted ratio
Deliver = Callable[[list[Found]], None]
Room = Callable[[], Awaitable[None]]


class Source(Protocol):
    """Where one served model's passages come from."""

    @property
    def inline(self) -> InlineStates | None:
        """What encodes texts; None where nothing does."""
        ...

    async def feed(self, wanted: Wanted, room: Room, deliver: Deliver) -> None:
        """Delivers every candidate exactly once, in any order.

        Args:
            room: returns when the queue wants more of this request.
            deliver: takes what was found; called on the event loop.
        """
        ...


class Passages:
    """The source of a model that reads states."""

    def __init__(self, executor: Executor, inline: InlineStates | None, *, fetch_chunk: int) -> None:
        """
        Args:
            executor: where the store is read; never the model's thread.
            inline: None where no encoder worker is configured.
            fetch_chunk: candidates per read of the store: enough to make its round trip cheap, few
                enough that the first reach the model early.
        """
        self._fetch_chunk = fetch_chunk
        self.inline = inline
        self._executor = executor

    async def feed(self, wanted: Wanted, room: Room, deliver: Deliver) -> None:
        """As Source says."""
        loop = asyncio.get_running_loop()
        calls = asyncio.Semaphore(MAX_ENCODE_CALLS)
        async with asyncio.TaskGroup() as encoding:
            for start in range(0, len(wanted.candidates), self._fetch_chunk):
                await room()
                chunk = wanted.candidates[start : start + self._fetch_chunk]
                start_seconds = time.monotonic()
                with wanted.fetching:
                    read = await loop.run_in_executor(self._executor, _read, wanted, chunk)
                wanted.fetches.append(Fetch(start_seconds, time.monotonic(), len(chunk)))
                decided, to_encode = self._decide(wanted, read)
                deliver(decided)
                for first in range(0, len(to_encode), ENCODE_CHUNK):
                    misses = to_encode[first : first + ENCODE_CHUNK]
                    encoding.create_task(self._encode(wanted, misses, calls, room, deliver))

    def _decide(self, wanted: Wanted, read: list[Found | _Miss]) -> tuple[list[Found], list[_Miss]]:
        """What is settled without encoding, and what is to be encoded."""
        decided: list[Found] = []
        to_encode: list[_Miss] = []
        for item in read:
            if isinstance(item, Found):
                decided.append(item)
            elif item.digest is None:
                decided.append(Found(item.candidate, item.status, message=item.message))
            elif self.inline and (states := self.inline.kept(item.digest, wanted.compression_ratio)):
                decided.append(Found(item.candidate, "hit", states))
            elif self.inline is None:
                # Asked to encode and unable to is a failure; left to the default, it is a miss.
                status = "failed" if wanted.on_miss == "encode" else item.status
                message = f"{item.message}; no encoder worker is configured"
                decided.append(Found(item.candidate, status, message=message))
            elif wanted.on_miss != "encode":
                decided.append(Found(item.candidate, item.status, message=item.message))
            else:
                to_encode.append(item)
        return decided, to_encode

    async def _encode(
        self, wanted: Wanted, misses: list[_Miss], calls: asyncio.Semaphore, room: Room, deliver: Deliver
    ) -> None:
        assert self.inline is not None
        texts = {miss.digest: miss.candidate.text or "" for miss in misses if miss.digest is not None}
        async with calls:
            await room()
            start = time.monotonic()
            with wanted.encoding:
                encoded = await self.inline.encode(texts, wanted.compression_ratio)
            wanted.encodings.append(Fetch(start, time.monotonic(), len(texts)))
        found = []
        for miss in misses:
            result = encoded[miss.digest or b""]
            if isinstance(result, Refusal):
                found.append(Found(miss.candidate, "failed", message=result.reason))
            else:
                found.append(Found(miss.candidate, "encoded", result))
        deliver(found)


def _read(wanted: Wanted, chunk: Sequence[Indexed]) -> list[Found | _Miss]:
    """Reads one chunk, pools what is wanted coarser than it is stored; off the event loop."""
    stored = _stored(wanted, [c for c in chunk if c.passage_id is not None])
    return [guarded(candidate, partial(_settle, wanted, candidate, stored)) for candidate in chunk]


def guarded(candidate: Indexed, settle: Callable[[], T]) -> T | Found:
    """Result of `settle` for a candidate. An exception of it costs this candidate and no other."""
    try:
        return settle()
    except Exception:
        log.exception("candidates[%d] could not be read", candidate.index)
        return Found(candidate, "failed", message="it could not be read; the server's log has the cause")


def text_of(wanted: Wanted, candidate: Indexed) -> str | Found | None:
    """The text that came with a candidate; a Found where it is refused; None where there is none to read.

    An empty text is no text: beside an id, the id alone decides.
    """
    if candidate.problem:
        return Found(candidate, "failed", message=candidate.problem)
    if candidate.text is None:
        return None
    size = len(candidate.text.encode())
    if size > wanted.max_text_bytes:
        message = f"the text is {size} bytes long; expected at most {wanted.max_text_bytes}"
        return Found(candidate, "too_long", message=message)
    if not wanted.is_empty(candidate.text):
        return candidate.text
    if candidate.passage_id is None:
        return Found(candidate, "failed", message="the text is empty", empty=True)
    return None


def _stored(wanted: Wanted, candidates: Sequence[Indexed]) -> dict[str, _Stored]:
    if wanted.collection is None or not candidates:
        return {}
    ids = list(dict.fromkeys(c.passage_id for c in candidates if c.passage_id is not None))
    try:
        read = read_unless_unavailable(wanted, wanted.collection.get_encoded_many, ids)
    except CacheError as exc:  # the store is down: that costs these candidates, not the request
        return dict.fromkeys(ids, exc)
    states = iter(all_at_ratio([one for one in read if isinstance(one, EncodedPassage)], wanted.compression_ratio))
    return {
        passage_id: next(states) if isinstance(one, EncodedPassage) else one
        for passage_id, one in zip(ids, read, strict=True)
    }


def read_unless_unavailable(wanted: Wanted, read: Callable[[Sequence[str]], list[T]], ids: Sequence[str]) -> list[T]:
    """Result of `read`. Raises a CacheError, without a wait where the store has kept this request waiting before."""
    if wanted.unavailable:
        raise wanted.unavailable[0]
    try:
        return read(ids)
    except StoreUnavailable as exc:
        wanted.unavailable.append(exc)
        raise


def _settle(wanted: Wanted, candidate: Indexed, stored: dict[str, _Stored]) -> Found | _Miss:
    text = text_of(wanted, candidate)
    if isinstance(text, Found):
        return text
    digest = text_digest(text) if text is not None else None
    states = stored.get(candidate.passage_id) if candidate.passage_id is not None else None
    if isinstance(states, PassageStates | EncodedPassage):
        if digest is None or digest == states.text_digest:
            return Found(candidate, "hit", states)
        return _Miss(candidate, digest, "missing", "the stored states are of another text")
    if isinstance(states, Damaged):
        return _Miss(candidate, digest, "corrupt", f"the stored states are damaged: {states.reason}")
    if isinstance(states, CacheError):
        return _Miss(candidate, digest, "failed", f"the store could not be read: {states}")
    return _Miss(candidate, digest, "missing", "no states are stored")


class Texts:
    """Reads and tokenizes in chunks, each delivered as it is ready."""

    inline = None  # nothing is encoded: nothing has to be

    def __init__(self, executor: Executor, *, fetch_chunk: int) -> None:
        """
        Args:
            executor: where the store is read and texts are tokenized; never the model's thread.
            fetch_chunk: candidates per read.
        """
        self._executor = executor
        self._fetch_chunk = fetch_chunk

    async def feed(self, wanted: Wanted, room: Room, deliver: Deliver) -> None:
        """As Source says."""
        loop = asyncio.get_running_loop()
        for start in range(0, len(wanted.candidates), self._fetch_chunk):
            await room()
            chunk = wanted.candidates[start : start + self._fetch_chunk]
            began = time.monotonic()
            with wanted.fetching:
                found = await loop.run_in_executor(self._executor, _read_texts, wanted, chunk)
            wanted.fetches.append(Fetch(began, time.monotonic(), len(chunk)))
            deliver(found)


def _read_texts(wanted: Wanted, chunk: Sequence[Indexed]) -> list[Found]:
    sent = [guarded(candidate, partial(text_of, wanted, candidate)) for candidate in chunk]
    named = [c.passage_id for c, text in zip(chunk, sent, strict=True) if text is None and c.passage_id is not None]
    stored, failure = _stored_texts(wanted, named)
    return [
        guarded(c, partial(_settle_texts, wanted, c, text, stored, failure))
        for c, text in zip(chunk, sent, strict=True)
    ]


def _stored_texts(wanted: Wanted, ids: Sequence[str]) -> tuple[dict[str, str | None], CacheError | None]:
    collection = wanted.collection
    if collection is None or not collection.manifest.stores_text or not ids:
        return {}, None
    unique = list(dict.fromkeys(ids))
    try:
        return dict(zip(unique, read_unless_unavailable(wanted, collection.get_texts, unique), strict=True)), None
    except CacheError as exc:  # the store is down: that costs these candidates, not the request
        return {}, exc


def _settle_texts(
    wanted: Wanted,
    candidate: Indexed,
    sent: str | Found | None,
    stored: dict[str, str | None],
    failure: CacheError | None,
) -> Found:
    if isinstance(sent, Found):
        return sent
    if sent is not None:
        return _found_texts(wanted, candidate, "encoded", sent)
    text = stored.get(candidate.passage_id or "")
    if text and wanted.is_empty(text):
        return Found(candidate, "failed", message="the stored text is empty to this model", empty=True)
    if text:
        return _found_texts(wanted, candidate, "hit", text)
    if failure is not None:
        return Found(candidate, "failed", message=f"the store could not be read: {failure}")
    if wanted.collection is not None and not wanted.collection.manifest.stores_text:
        name = wanted.collection.name
        message = f"collection {name!r} keeps no texts, and this model reads text: send it, or index with --store-text"
        return Found(candidate, "missing", message=message)
    return Found(candidate, "missing", message="no text is stored")


def _found_texts(wanted: Wanted, candidate: Indexed, status: Status, text: str) -> Found:
    try:
        return Found(candidate, status, text, items=wanted.pairs(text))
    except ValueError as exc:  # query and instruction leave no room: no later attempt finds any
        return Found(candidate, "too_long", message=str(exc))
