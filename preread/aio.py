"""The async client, and the template of the sync one: scripts/generate-client writes preread/sync.py from this file."""

from asyncio import sleep
from collections.abc import AsyncIterator, Iterable
from time import monotonic
from typing import Any, Self, Unpack

import grpc

from preread import values, wire
from preread.arguments import Argument
from preread.channel import BaseClient, Service
from preread.v1 import encoder_pb2, rerank_pb2
from preread.values import Reranking, RerankOptions


async def _call(server: Service, method: str, request: object, timeout: float | None) -> Any:
    """The response, after retries as the client's options allow them."""
    deadline, attempt = monotonic() + server.seconds(timeout), 0
    while True:
        try:
            response = await server.start(method, request, deadline - monotonic())
        except grpc.RpcError as exc:
            attempt += 1
            await sleep(server.wait_seconds(exc, attempt, deadline - monotonic()))
        else:
            server.succeeded()
            return response


class AsyncClient(BaseClient):
    """Calls a reranking server and an encoder worker; preread.channel.BaseClient says how one is made."""

    _grpc = grpc.aio

    async def close(self) -> None:
        for service in filter(None, (self._server, self._worker)):
            await service.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def rerank(self, query: str, candidates: wire.Candidates, **options: Unpack[RerankOptions]) -> Reranking:
        """Scores candidates and returns the best first; `options` as in preread.values.RerankOptions.

        Plain strings are passage ids where `collection` is given, else texts; a Candidate, or a mapping {"id": ...,
        "text": ...} with one or both, says which.
        """
        request = wire.pack_request(query, candidates, options)
        response = await _call(self._server, "Rerank", request, options.get("timeout"))
        return Reranking(wire.unpack_results(response.results), wire.unpack(values.Summary, response))

    def rerank_stream(
        self, query: str, candidates: wire.Candidates, **options: Unpack[RerankOptions]
    ) -> "AsyncRerankingStream":
        """Like rerank, but yields results as they are scored, in no particular order; never retried."""
        request = rerank_pb2.RerankStreamRequest(request=wire.pack_request(query, candidates, options))
        call = self._server.start("RerankStream", request, self._server.seconds(options.get("timeout")))
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
    ) -> values.Warmed:
        """Pre-fills the server's caches for queries over at most ModelInfo.max_candidates passages; changes no score.

        `instruction` (None: the model's default, "": none) and ratio (0: the server's default) are the queries'.
        """
        queries: dict[str, Any] = {"instruction": instruction, "compression_ratio": compression_ratio, "model": model}
        queries |= {"passage_ids": passage_ids, "collection": collection}
        request = wire.pack(rerank_pb2.WarmRequest, "collection", **queries)
        return wire.unpack(values.Warmed, await _call(self._server, "Warm", request, timeout))

    async def list_models(self, *, timeout: float | None = None) -> tuple[values.ModelInfo, ...]:
        response = await _call(self._server, "ListModels", rerank_pb2.ListModelsRequest(), timeout)
        return tuple(wire.unpack(values.ModelInfo, model) for model in response.models)

    async def list_collections(self, *, timeout: float | None = None) -> tuple[values.CollectionInfo, ...]:
        response = await _call(self._server, "ListCollections", rerank_pb2.ListCollectionsRequest(), timeout)
        return tuple(wire.unpack(values.CollectionInfo, collection) for collection in response.collections)

    def list_passages(self, collection: str, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[str]:
        """The ids of a collection's passages, in the store's order, fetched in pages of about `page_size` (0: 1,000).

        Passages written or deleted meanwhile may or may not be among them; from Redis an id may come twice. `timeout`
        is of each page. InvalidRequest where the collection was replaced, or Redis restarted: list it again.
        """
        request = wire.pack(rerank_pb2.ListPassagesRequest, "collection", collection=collection, page_size=page_size)
        return self._list_passages(request, Argument("timeout", timeout).seconds())

    async def _list_passages(
        self, request: rerank_pb2.ListPassagesRequest, timeout: float | None
    ) -> AsyncIterator[str]:
        while True:
            response = await _call(self._server, "ListPassages", request, timeout)
            for passage_id in response.passage_ids:
                yield passage_id
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def upsert(
        self,
        passages: wire.AsyncPassages,
        *,
        collection: str,
        compression_ratio: int = 0,
        codec: str = "",
        store_text: bool = True,
        timeout: float | None = None,
    ) -> AsyncIterator[values.UpsertResult]:
        """Encodes and stores passages; yields each acknowledgement after the store has that passage.

        Passages are Passage values, or mappings as `preread index` reads them ("id" or "_id", "text", perhaps "title");
        anything else is a TypeError, named by its index: what was acknowledged before stays. Of several with one id the
        first is stored, the others refused. Ratio, codec and store_text count where this call creates the collection.
        Nothing is sent before the first acknowledgement is requested; then `passages` is read as fast as the worker
        takes them. No timeout unless one is given; never retried: repeat the call, what is stored is "unchanged".
        """
        settings = {"compression_ratio": compression_ratio, "codec": codec, "store_text": store_text}
        upload = wire.Upload(passages, collection=collection, **settings)
        return self._upsert(upload, Argument("timeout", timeout).seconds())

    async def _upsert(self, upload: wire.Upload, seconds: float | None) -> AsyncIterator[values.UpsertResult]:
        worker = self._encoder()
        call = worker.start("Upsert", aiter(upload), seconds)
        with wire.ending(call, worker.address, upload):
            async for message in call:
                for result in message.results:
                    yield wire.unpack(values.UpsertResult, result)

    async def delete(self, passage_ids: Iterable[str], *, collection: str, timeout: float | None = None) -> int:
        """Deletes passages; returns how many there were. Many ids go in several calls, each with this `timeout`."""
        worker, num_deleted, ids = self._encoder(), 0, Argument("passage_ids", passage_ids).texts()
        for start in range(0, max(len(ids), 1), wire.IDS_PER_DELETE):
            some = ids[start : start + wire.IDS_PER_DELETE]
            request = wire.pack(encoder_pb2.DeleteRequest, "collection", collection=collection, passage_ids=some)
            num_deleted += (await _call(worker, "Delete", request, timeout)).num_deleted
        return num_deleted

    async def stats(self, collection: str = "", *, timeout: float | None = None) -> tuple[values.CollectionInfo, ...]:
        """Counts of one collection of the worker's store, or of all of them."""
        request = wire.pack(encoder_pb2.GetStatsRequest, collection=collection)
        response = await _call(self._encoder(), "GetStats", request, timeout)
        return tuple(wire.unpack(values.CollectionInfo, collection) for collection in response.collections)

    async def describe(self, *, timeout: float | None = None) -> values.EncoderInfo:
        """The worker's encoder, and how it stores by default."""
        response = await _call(self._encoder(), "Describe", encoder_pb2.DescribeRequest(), timeout)
        return wire.unpack(values.EncoderInfo, response)


class AsyncRerankingStream:
    """Results as they are scored; `summary` is set after the last one. `cancel` ends the stream early."""

    def __init__(self, call: Any, address: str) -> None:
        self._call, self._address = call, address
        self.summary: values.Summary | None = None

    async def __aiter__(self) -> AsyncIterator[values.Result]:
        with wire.ending(self._call, self._address):
            async for event in self._call:
                if event.HasField("summary"):
                    self.summary = wire.unpack(values.Summary, event.summary)
                for result in wire.unpack_results(event.batch.results):
                    yield result

    def cancel(self) -> None:
        self._call.cancel()
