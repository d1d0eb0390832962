"""The async client, and the template of the sync one: scripts/generate-client writes preread/sync.py from this file.

Message bodies are preread.wire's.
"""

from __future__ import annotations

from asyncio import sleep
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from time import monotonic
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from preread import wire
from preread.arguments import Argument
from preread.channel import DEFAULT_ADDRESS, ClientOptions, RetryBudget, check_address
from preread.types import (
    Candidate,
    CollectionInfo,
    EncoderInfo,
    ModelInfo,
    Reranking,
    RerankOptions,
    Result,
    Summary,
    UpsertResult,
    Warmed,
)
from preread.v1 import encoder_pb2, encoder_pb2_grpc, rerank_pb2, rerank_pb2_grpc


class _AsyncService:
    """One channel, and its unary calls with their retries."""

    def __init__(self, address: str, options: ClientOptions) -> None:
        self.address = address
        self.options = options
        self.channel = options.channel(grpc.aio, address)
        self._budget = RetryBudget()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of the next call."""
        return self.options.call_metadata()

    async def call(self, method: Callable[..., Any], request: object, timeout: float | None) -> Any:
        """The response, after retries as the options allow them."""
        timeout = self.options.call_timeout(timeout)
        deadline = None if timeout is None else monotonic() + timeout
        attempt = 1
        while True:
            remaining = None if deadline is None else max(0.0, deadline - monotonic())
            try:
                response = await method(request, timeout=remaining, metadata=self.metadata)
            except grpc.RpcError as exc:
                error = wire.translate(exc, self.address)
                remaining = None if deadline is None else deadline - monotonic()
                wait = self.options.retry.wait_seconds(error, attempt, remaining)
                if wait is None or not self._budget.take():
                    raise error from exc
                await sleep(wait)
                attempt += 1
            else:
                self._budget.give()
                return response


class AsyncClient:
    """Calls a reranking server and, where `encoder_address` is given, an encoder worker.

    Connects at the first call. Client is thread-safe; AsyncClient belongs to the event loop it was made on. Every
    method raises PrereadError; its tree is in preread.errors.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        encoder_address: str | None = None,
        options: ClientOptions | None = None,
    ) -> None:
        """
        Args:
            address: host:port of the reranking server.
            encoder_address: host:port of an encoder worker; upsert, delete, stats and describe go to it.
        """
        options = options or ClientOptions()
        check_address("address", address)
        if encoder_address is not None:
            check_address("encoder_address", encoder_address)
        self._server = _AsyncService(address, options)
        self._reranker = rerank_pb2_grpc.RerankServiceStub(self._server.channel)
        self._worker = None if encoder_address is None else _AsyncService(encoder_address, options)

    async def close(self) -> None:
        await self._server.channel.close()
        if self._worker is not None:
            await self._worker.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def rerank(
        self,
        query: str,
        candidates: Iterable[str | Candidate | Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **options: Unpack[RerankOptions],
    ) -> Reranking:
        """Scores candidates and returns the best first.

        Args:
            candidates: plain strings are passage ids where `collection` is given, else texts; a Candidate, or a
                mapping {"id": ..., "text": ...} with one or both, says which.
            options: see preread.types.RerankOptions.
        """
        request = wire.pack_request(query, candidates, options)
        response = await self._server.call(self._reranker.Rerank, request, timeout)
        return Reranking(wire.unpack_results(response.results), wire.unpack(Summary, response))

    def rerank_stream(
        self,
        query: str,
        candidates: Iterable[str | Candidate | Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **options: Unpack[RerankOptions],
    ) -> AsyncRerankingStream:
        """Like rerank, but yields results as they are scored, in no particular order; never retried."""
        request = rerank_pb2.RerankStreamRequest(request=wire.pack_request(query, candidates, options))
        timeout = self._server.options.call_timeout(timeout)
        call = self._reranker.RerankStream(request, timeout=timeout, metadata=self._server.metadata)
        return AsyncRerankingStream(call, self._server.address)

    async def warm(
        self,
        passage_ids: Iterable[str],
        *,
        collection: str,
        instruction: str | None = None,
        compression_ratio: int = 0,
        model: str = "",
        timeout: float | None = None,
    ) -> Warmed:
        """Pre-fills the server's caches for queries over these passages; changes no score.

        Args:
            passage_ids: at most ModelInfo.max_candidates of them.
            instruction: the instruction of those queries; None: the model's default; "": none.
            compression_ratio: the ratio they will be scored at; 0: the server's default.
        """
        request = wire.pack_warm(passage_ids, collection, instruction, compression_ratio, model)
        return wire.unpack(Warmed, await self._server.call(self._reranker.Warm, request, timeout))

    async def list_models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        response = await self._server.call(self._reranker.ListModels, rerank_pb2.ListModelsRequest(), timeout)
        return tuple(wire.unpack(ModelInfo, model) for model in response.models)

    async def list_collections(self, *, timeout: float | None = None) -> tuple[CollectionInfo, ...]:
        request = rerank_pb2.ListCollectionsRequest()
        response = await self._server.call(self._reranker.ListCollections, request, timeout)
        return tuple(wire.unpack(CollectionInfo, collection) for collection in response.collections)

    def upsert(
        self,
        passages: wire.AsyncPassages,
        *,
        collection: str,
        compression_ratio: int = 0,
        codec: str = "",
        store_text: bool = True,
        timeout: float | None = None,
    ) -> AsyncIterator[UpsertResult]:
        """Encodes and stores passages; yields each acknowledgement after the store has that passage.

        Nothing is sent before the first acknowledgement is requested. `passages` is read as fast as the worker takes
        them. Has no timeout unless one is given, and is never retried: repeat the call, and passages that are stored
        already are acknowledged as "unchanged".

        Args:
            passages: Passage values, or mappings as `preread index` reads them ("id" or "_id", "text", perhaps
                "title"). Of several with one id the first is stored and the others are refused.
            compression_ratio, codec, store_text: of the collection, where this call creates it.

        Raises:
            TypeError: anything else, named by its index; what was acknowledged before it stays.
        """
        upload = wire.Upload(passages, collection, compression_ratio, codec, store_text)
        return self._upsert(upload, Argument("timeout", timeout).seconds())

    async def _upsert(self, upload: wire.Upload, timeout: float | None) -> AsyncIterator[UpsertResult]:
        worker, stub = self._encoder()
        upsert: Any = stub.Upsert  # the stubs know sync iterators only
        call = upsert(aiter(upload), timeout=timeout, metadata=worker.metadata)
        try:
            async for message in call:
                for result in message.results:
                    yield wire.unpack(UpsertResult, result)
        except wire.ENDED_BY_GRPC as exc:
            if upload.error is not None:
                raise upload.error from None
            if isinstance(exc, grpc.RpcError):
                raise wire.translate(exc, worker.address) from exc
            raise
        finally:
            call.cancel()  # the caller may leave early; after the end this does nothing

    async def delete(self, passage_ids: Iterable[str], *, collection: str, timeout: float | None = None) -> int:
        """Deletes passages; returns how many there were. Many ids go in several calls, each with this `timeout`."""
        worker, stub = self._encoder()
        num_deleted = 0
        for request in wire.pack_deletes(passage_ids, collection):
            num_deleted += (await worker.call(stub.Delete, request, timeout)).num_deleted
        return num_deleted

    async def stats(self, collection: str = "", *, timeout: float | None = None) -> tuple[CollectionInfo, ...]:
        """Counts of one collection of the worker's store, or of all of them."""
        worker, stub = self._encoder()
        request = encoder_pb2.GetStatsRequest(collection=Argument("collection", collection).text_or_default())
        response = await worker.call(stub.GetStats, request, timeout)
        return tuple(wire.unpack(CollectionInfo, collection) for collection in response.collections)

    async def describe(self, *, timeout: float | None = None) -> EncoderInfo:
        """The worker's encoder, and how it stores by default."""
        worker, stub = self._encoder()
        return wire.unpack(EncoderInfo, await worker.call(stub.Describe, encoder_pb2.DescribeRequest(), timeout))

    def _encoder(self) -> tuple[_AsyncService, encoder_pb2_grpc.EncoderServiceStub]:
        if self._worker is None:
            raise ValueError("encoder_address is not set; upsert, delete, stats and describe need an encoder worker")
        return self._worker, encoder_pb2_grpc.EncoderServiceStub(self._worker.channel)


class AsyncRerankingStream:
    """Results as they are scored; `summary` is set after the last one. `cancel` ends the stream early."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self.summary: Summary | None = None

    async def __aiter__(self) -> AsyncIterator[Result]:
        try:
            async for event in self._call:
                if event.HasField("summary"):
                    self.summary = wire.unpack(Summary, event.summary)
                for result in wire.unpack_results(event.batch.results):
                    yield result
        except grpc.RpcError as exc:
            raise wire.translate(exc, self._address) from exc
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        self._call.cancel()
