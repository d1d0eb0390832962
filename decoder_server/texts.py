"""The source of a model that reads text: what came with the request, else what the collection keeps.

Tokenizes where it reads, off the event loop. Does not know queries, scores or the order among requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

from cache.errors import CacheError
from decoder_server.observer import Fetch
from decoder_server.passages import Deliver, Found, Room, Wanted, guarded, read_unless_unavailable, text_of
from decoder_server.request import Candidate, Status


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
                found = await loop.run_in_executor(self._executor, _read, wanted, chunk)
            wanted.fetches.append(Fetch(began, time.monotonic(), len(chunk)))
            deliver(found)


def _read(wanted: Wanted, chunk: Sequence[Candidate]) -> list[Found]:
    sent = [guarded(candidate, partial(text_of, wanted, candidate)) for candidate in chunk]
    named = [c.passage_id for c, text in zip(chunk, sent, strict=True) if text is None and c.passage_id is not None]
    stored, failure = _stored(wanted, named)
    return [guarded(c, partial(_settle, wanted, c, text, stored, failure)) for c, text in zip(chunk, sent, strict=True)]


def _stored(wanted: Wanted, ids: Sequence[str]) -> tuple[dict[str, str | None], CacheError | None]:
    collection = wanted.collection
    if collection is None or not collection.manifest.stores_text or not ids:
        return {}, None
    unique = list(dict.fromkeys(ids))
    try:
        return dict(zip(unique, read_unless_unavailable(wanted, collection.get_texts, unique), strict=True)), None
    except CacheError as exc:  # the store is down: that costs these candidates, not the request
        return {}, exc


def _settle(
    wanted: Wanted,
    candidate: Candidate,
    sent: str | Found | None,
    stored: dict[str, str | None],
    failure: CacheError | None,
) -> Found:
    if isinstance(sent, Found):
        return sent
    if sent is not None:
        return _found(wanted, candidate, Status.ENCODED, sent)
    text = stored.get(candidate.passage_id or "")
    if text and wanted.is_empty(text):
        return Found(candidate, Status.FAILED, message="the stored text is empty to this model", empty=True)
    if text:
        return _found(wanted, candidate, Status.HIT, text)
    if failure is not None:
        return Found(candidate, Status.FAILED, message=f"the store could not be read: {failure}")
    if wanted.collection is not None and not wanted.collection.manifest.stores_text:
        name = wanted.collection.name
        message = f"collection {name!r} keeps no texts, and this model reads text: send it, or index with --store-text"
        return Found(candidate, Status.MISSING, message=message)
    return Found(candidate, Status.MISSING, message="no text is stored")


def _found(wanted: Wanted, candidate: Candidate, status: Status, text: str) -> Found:
    try:
        return Found(candidate, status, text, items=wanted.items(text))
    except ValueError as exc:  # query and instruction leave no room: no later attempt finds any
        return Found(candidate, Status.TOO_LONG, message=str(exc))
