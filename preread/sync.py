"""The sync client. Thread-safe: one client, many threads. Does not know message bodies; preread.wire does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

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
from preread.wire import AnyPassage, Upload

A = TypeVar("A")


class _Service:
    """One channel, and the one way a single answer is asked for."""

    def __init__(self, address: str, options: ClientOptions) -> None:
        self.address = address
        self.options = options
        arguments = options.channel_arguments(address)
        if options.tls is None:
            self.channel = grpc.insecure_channel(address, options=arguments)
        else:
            self.channel = grpc.secure_channel(address, options.tls.credentials(), options=arguments)
        self._budget = RetryBudget()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with the next call."""
        return self.options.call_metadata()

    def call(self, method: Callable[..., A], request: object, timeout: float | None) -> A:
        """Asks until there is an answer, an error that stays, or no time."""
        timeout = self.options.call_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        attempt = 1
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                answer = method(request, timeout=remaining, metadata=self.metadata)
            except grpc.RpcError as exc:
                error = translate(exc, self.address)
                remaining = None if deadline is None else deadline - time.monotonic()
                wait = self.options.retry.wait_seconds(error, attempt, remaining)
                if wait is None or not self._budget.take():
                    raise error from exc
                time.sleep(wait)
                attempt += 1
            else:
                self._budget.give()
                return answer


class Client:
    """Calls a reranking server and, where `encoder_address` is given, an encoder worker.

    Connects at the first call. Every method raises PrereadError; its tree is in preread.errors.
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

    def close(self) -> None:
        self._server.channel.close()
        if self._worker is not None:
            self._worker.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rerank(
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
        return wire.unpack_response(self._server.call(self._reranker.Rerank, request, timeout))

    def rerank_stream(
        self,
        query: str,
        candidates: Iterable[str | Candidate | Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **options: Unpack[RerankOptions],
    ) -> RerankingStream:
        """Like rerank, but yields results as they are scored, in no particular order; never tried again."""
        request = rerank_pb2.RerankStreamRequest(request=wire.pack_request(query, candidates, options))
        timeout = self._server.options.call_timeout(timeout)
        call = self._reranker.RerankStream(request, timeout=timeout, metadata=self._server.metadata)
        return RerankingStream(call, self._server.address)

    def warm(
        self,
        passage_ids: Iterable[str],
        *,
        collection: str,
        instruction: str | None = None,
        compression_ratio: int = 0,
        model: str = "",
        timeout: float | None = None,
    ) -> Warmed:
        """Has the server compute and keep what queries over these passages will need; changes no score.

        Args:
            passage_ids: at most ModelInfo.max_candidates of them.
            instruction: what queries will be asked under; None: the model's default; "": nothing.
            compression_ratio: what they will be read at; 0: the server's default.
        """
        request = wire.pack_warm(passage_ids, collection, instruction, compression_ratio, model)
        return wire.unpack_warmed(self._server.call(self._reranker.Warm, request, timeout))

    def list_models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        answer = self._server.call(self._reranker.ListModels, rerank_pb2.ListModelsRequest(), timeout)
        return tuple(wire.unpack_model(model) for model in answer.models)

    def list_collections(self, *, timeout: float | None = None) -> tuple[CollectionInfo, ...]:
        answer = self._server.call(self._reranker.ListCollections, rerank_pb2.ListCollectionsRequest(), timeout)
        return tuple(wire.unpack_collection(collection) for collection in answer.collections)

    def upsert(
        self,
        passages: Iterable[AnyPassage],
        *,
        collection: str,
        compression_ratio: int = 0,
        codec: str = "",
        store_text: bool = True,
        timeout: float | None = None,
    ) -> Iterator[UpsertResult]:
        """Encodes and stores passages; yields each acknowledgement after the store has that passage.

        Nothing is sent before the first acknowledgement is asked for. `passages` is read as fast as the worker takes
        them. Has no timeout unless one is given, and is never tried again: repeat the call, and what is stored already
        is answered "unchanged".

        Args:
            passages: Passage values, or mappings as `preread index` reads them ("id" or "_id", "text", perhaps
                "title"). Of several with one id the first is stored and the others are refused.
            compression_ratio, codec, store_text: how to make a collection that does not exist yet.

        Raises:
            TypeError: anything else, named by its index; what was acknowledged before it stays.
        """
        upload = Upload(passages, collection, compression_ratio, codec, store_text)
        return self._upsert(upload, checks.seconds("timeout", timeout))

    def _upsert(self, upload: Upload, timeout: float | None) -> Iterator[UpsertResult]:
        worker, stub = self._encoder()
        call: Any = stub.Upsert(iter(upload), timeout=timeout, metadata=worker.metadata)
        try:
            for message in call:
                yield from wire.unpack_upserts(message)
        except grpc.RpcError as exc:
            raise upload.error or translate(exc, worker.address) from exc
        finally:
            call.cancel()  # the caller may leave early; after the end this does nothing

    def delete(self, passage_ids: Iterable[str], *, collection: str, timeout: float | None = None) -> int:
        """Removes passages; returns how many there were. Many ids go in several calls, `timeout` being that of each."""
        worker, stub = self._encoder()
        num_deleted = 0
        for request in wire.pack_deletes(passage_ids, collection):
            num_deleted += worker.call(stub.Delete, request, timeout).num_deleted
        return num_deleted

    def stats(self, collection: str = "", *, timeout: float | None = None) -> tuple[CollectionInfo, ...]:
        """What the worker's store holds: one collection, or all of them."""
        worker, stub = self._encoder()
        answer = worker.call(stub.GetStats, wire.pack_stats(collection), timeout)
        return tuple(wire.unpack_collection(info) for info in answer.collections)

    def describe(self, *, timeout: float | None = None) -> EncoderInfo:
        """Which encoder the worker runs, and how it stores by default."""
        worker, stub = self._encoder()
        return wire.unpack_encoder(worker.call(stub.Describe, encoder_pb2.DescribeRequest(), timeout))

    def _encoder(self) -> tuple[_Service, encoder_pb2_grpc.EncoderServiceStub]:
        if self._worker is None:
            raise ValueError("encoder_address is not set; upsert, delete, stats and describe ask an encoder worker")
        return self._worker, encoder_pb2_grpc.EncoderServiceStub(self._worker.channel)


class RerankingStream:
    """Results as they are scored; `summary` is there after the last of them. Leaving early: `cancel`."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self.summary: Summary | None = None

    def __iter__(self) -> Iterator[Result]:
        try:
            for event in self._call:
                if event.HasField("summary"):
                    self.summary = wire.unpack_summary(event.summary)
                yield from wire.unpack_results(event.batch.results)
        except grpc.RpcError as exc:
            raise translate(exc, self._address) from exc
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        self._call.cancel()
