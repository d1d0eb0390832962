"""An upsert stream's messages, filled from a caller's passages while the stream asks for them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from preread.client import checks
from preread.client.values import Passage
from preread.v1 import encoder_pb2

# A message goes out when either is reached: small enough to be acknowledged soon, large enough to batch.
MAX_PASSAGES_PER_MESSAGE = 64
MAX_CHARACTERS_PER_MESSAGE = 1 << 20

AnyPassage = Passage | Mapping[str, Any]
Passages = Iterable[AnyPassage] | AsyncIterable[AnyPassage]


class Upload:
    """Iterates over messages, sync or async. `error` is what the caller's passages raised.

    gRPC reads a stream on a thread or task of its own and would answer such an error with CANCELLED or UNKNOWN.
    """

    def __init__(
        self, passages: Passages, collection: str, compression_ratio: int, codec: str, store_text: bool
    ) -> None:
        """
        Raises:
            TypeError, InvalidRequest: an argument that cannot be put on the wire; a passage raises when it is read.
        """
        self.error: Exception | None = None
        self._passages = passages if isinstance(passages, AsyncIterable) else checks.many("passages", passages)
        self._collection = checks.text("collection", collection)
        self._compression_ratio = checks.integer("compression_ratio", compression_ratio)
        self._codec = checks.optional_text("codec", codec)
        self._store_text = checks.flag("store_text", store_text)
        self._waiting: list[encoder_pb2.Passage] = []
        self._num_read = 0
        self._num_characters = 0

    def __iter__(self) -> Iterator[encoder_pb2.UpsertRequest]:
        try:
            if not isinstance(self._passages, Iterable):
                raise TypeError(f"passages is {checks.show(self._passages)}; only AsyncClient reads it")
            for passage in self._passages:
                if self._add(passage):
                    yield self._message()
            if self._waiting:
                yield self._message()
        except Exception as exc:
            self.error = exc
            raise

    async def __aiter__(self) -> AsyncIterator[encoder_pb2.UpsertRequest]:
        if not isinstance(self._passages, AsyncIterable):
            for message in self:
                yield message
            return
        try:
            async for passage in self._passages:
                if self._add(passage):
                    yield self._message()
            if self._waiting:
                yield self._message()
        except Exception as exc:
            self.error = exc
            raise

    def _add(self, passage: AnyPassage) -> bool:
        """True: the message is full."""
        passage_id, text = checks.passage(self._num_read, passage)
        self._num_read += 1
        self._waiting.append(encoder_pb2.Passage(passage_id=passage_id, text=text))
        self._num_characters += len(text)
        return len(self._waiting) >= MAX_PASSAGES_PER_MESSAGE or self._num_characters >= MAX_CHARACTERS_PER_MESSAGE

    def _message(self) -> encoder_pb2.UpsertRequest:
        message = encoder_pb2.UpsertRequest(
            collection=self._collection,
            passages=self._waiting,
            compression_ratio=self._compression_ratio,
            codec=self._codec,
            store_text=self._store_text,
        )
        self._waiting, self._num_characters = [], 0
        return message
