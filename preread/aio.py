"""The async client: the sync one's methods, awaited. Does not know message bodies; preread.wire does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from preread import arguments as checks
from preread import wire
from preread.channel import DEFAULT_ADDRESS, ClientOptions, RetryBudget, check_address, translate
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
from preread.wire import Passages, Upload


class _Service:
    """One channel, and the one way a single answer is asked for."""

    def __init__(self, address: str, options: ClientOptions) -> None:
        self.address = address
        self.options = options
        arguments = options.channel_arguments(address)
        if options.tls is None:
            self.channel = grpc.aio.insecure_channel(address, options=arguments)
        else:
            self.channel = grpc.aio.secure_channel(address, options.tls.credentials(), options=arguments)
        self._budget = RetryBudget()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with the next call."""
        return self.options.call_metadata()

    async def call(self, method: Callable[..., Any], request: object, timeout: float | None) -> Any:
        """Asks until there is an answer, an error that stays, or no time."""
        timeout = self.options.call_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        attempt = 1
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                answer = await method(request, timeout=remaining, metadata=self.metadata)
            except grpc.RpcError as exc:
                error = translate(exc, self.address)
                remaining = None if deadline is None else deadline - time.monotonic()
                wait = self.options.retry.wait_seconds(error, attempt, remaining)
                if wait is None or not self._budget.take():
                    raise error from exc
                await asyncio.sleep(wait)
                attempt += 1
            else:
                self._budget.give()
                return answer


class AsyncClient:
    """Calls a reranking server and, where `encoder_address` is given, an encoder worker.

    Made and used on one running event loop. Every method raises PrereadError; its tree is in preread.errors.
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
            encoder_address: host:port of an encoder worker; upsert, delete, stats and describe ask it.
        """
        options = options or ClientOptions()
        check_address("address", address)
        if encoder_address is not None:
            check_address("encoder_address", encoder_address)
        self._server = _Service(address, options)
        self._reranker = rerank_pb2_grpc.RerankServiceStub(self._server.channel)
        self._worker: _Service | None = None
        if encoder_address is not None:
            self._worker = _Service(encoder_address, options)

    async def close(self) -> None:
        await self._server.channel.close(None)
        if self._worker is not None:
            await self._worker.channel.close(None)

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
        """Scores candidates and returns the best first; see Client.rerank."""
        request = wire.pack_request(query, candidates, options)
        return wire.unpack_response(await self._server.call(self._reranker.Rerank, request, timeout))

    def rerank_stream(
        self,
        query: str,
        candidates: Iterable[str | Candidate | Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **options: Unpack[RerankOptions],
    ) -> AsyncRerankingStream:
        """Like rerank, but yields results as they are scored, in no particular order; never tried again."""
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
        """Has the server compute and keep what queries over these passages will need; see Client.warm."""
        request = wire.pack_warm(passage_ids, collection, instruction, compression_ratio, model)
        return wire.unpack_warmed(await self._server.call(self._reranker.Warm, request, timeout))

    async def list_models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        answer = await self._server.call(self._reranker.ListModels, rerank_pb2.ListModelsRequest(), timeout)
        return tuple(wire.unpack_model(model) for model in answer.models)

    async def list_collections(self, *, timeout: float | None = None) -> tuple[CollectionInfo, ...]:
        request = rerank_pb2.ListCollectionsRequest()
        answer = await self._server.call(self._reranker.ListCollections, request, timeout)
        return tuple(wire.unpack_collection(collection) for collection in answer.collections)

    def upsert(
        self,
        passages: Passages,
        *,
        collection: str,
        compression_ratio: int = 0,
        codec: str = "",
        store_text: bool = True,
        timeout: float | None = None,
    ) -> AsyncIterator[UpsertResult]:
        """Encodes and stores passages; yields each acknowledgement after the store has it. See Client.upsert."""
        upload = Upload(passages, collection, compression_ratio, codec, store_text)
        return self._upsert(upload, checks.seconds("timeout", timeout))

    async def _upsert(self, upload: Upload, timeout: float | None) -> AsyncIterator[UpsertResult]:
        worker, stub = self._encoder()
        upsert: Any = stub.Upsert  # the stubs know sync iterators only
        call = upsert(aiter(upload), timeout=timeout, metadata=worker.metadata)
        try:
            async for message in call:
                for result in wire.unpack_upserts(message):
                    yield result
        except (grpc.RpcError, asyncio.CancelledError) as exc:
            # grpc.aio cancels the call when the passages raise.
            if upload.error is not None:
                raise upload.error from None
            if isinstance(exc, grpc.RpcError):
                raise translate(exc, worker.address) from exc
            raise
        finally:
            call.cancel()  # the caller may leave early; after the end this does nothing

    async def delete(self, passage_ids: Iterable[str], *, collection: str, timeout: float | None = None) -> int:
        """Removes passages; returns how many there were. Many ids go in several calls, `timeout` being that of each."""
        worker, stub = self._encoder()
        num_deleted = 0
        for request in wire.pack_deletes(passage_ids, collection):
            answer: encoder_pb2.DeleteResponse = await worker.call(stub.Delete, request, timeout)
            num_deleted += answer.num_deleted
        return num_deleted

    async def stats(self, collection: str = "", *, timeout: float | None = None) -> tuple[CollectionInfo, ...]:
        """What the worker's store holds: one collection, or all of them."""
        worker, stub = self._encoder()
        answer = await worker.call(stub.GetStats, wire.pack_stats(collection), timeout)
        return tuple(wire.unpack_collection(info) for info in answer.collections)

    async def describe(self, *, timeout: float | None = None) -> EncoderInfo:
        """Which encoder the worker runs, and how it stores by default."""
        worker, stub = self._encoder()
        return wire.unpack_encoder(await worker.call(stub.Describe, encoder_pb2.DescribeRequest(), timeout))

    def _encoder(self) -> tuple[_Service, encoder_pb2_grpc.EncoderServiceStub]:
        if self._worker is None:
            raise ValueError("encoder_address is not set; upsert, delete, stats and describe ask an encoder worker")
        return self._worker, encoder_pb2_grpc.EncoderServiceStub(self._worker.channel)


class AsyncRerankingStream:
    """Results as they are scored; `summary` is there after the last of them. Leaving early: `cancel`."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self.summary: Summary | None = None

    async def __aiter__(self) -> AsyncIterator[Result]:
        try:
            async for event in self._call:
                if event.HasField("summary"):
                    self.summary = wire.unpack_summary(event.summary)
                for result in wire.unpack_results(event.batch.results):
                    yield result
        except grpc.RpcError as exc:
            raise translate(exc, self._address) from exc
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        self._call.cancel()
