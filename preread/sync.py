"""The sync client. Written by scripts/generate-client from preread/aio.py: edit that file."""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from preread import values, wire
from preread.arguments import Argument
from preread.service import Attempts, BaseClient, Service
from preread.v1 import encoder_pb2, rerank_pb2
from preread.values import Listed, Reranking, RerankOptions

_T = TypeVar("_T")


def _call(attempts: Attempts) -> Any:
    """The response, after retries as the client's options allow them."""
    while True:
        try:
            response = attempts.start()
        except wire.FAILED as exc:
            time.sleep(attempts.wait_seconds(exc))
        else:
            attempts.succeeded()
            return response


def _rankings(attempts: Attempts) -> list[Reranking]:
    """One for each message of a stream, which is retried as a call is: nothing was given out before its end."""
    while True:
        try:
            with wire.ending(call := attempts.start()):
                rankings = [wire.unpack_reranking(one.response, attempts.request_id) for one in call]
        except wire.FAILED as exc:
            time.sleep(attempts.wait_seconds(exc))
        else:
            attempts.succeeded()
            return rankings


def _messages(attempts: Attempts, call: Any, upload: wire.Upload | None = None) -> Iterator[Any]:
    """The messages of a stream, which is retried until the first one: what was given out cannot be taken back."""
    num_messages = 0
    while True:
        try:
            with wire.ending(call, upload):
                for message in call:
                    num_messages += 1
                    yield message
        except wire.FAILED as exc:
            may_repeat = not num_messages and (upload is None or upload.can_repeat)
            time.sleep(attempts.wait_seconds(exc, may_repeat=may_repeat))
            call = attempts.start()
        else:
            attempts.succeeded()
            return


class Client(BaseClient):
    """Calls a reranking server and an encoder worker; preread.service.BaseClient says how one is made."""

    _grpc = grpc

    def close(self) -> None:
        for service in filter(None, (self._server, self._worker)):
            service.is_closed = True
            for channel in service.channels:
                channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rerank(self, query: str, candidates: values.Candidates, **options: Unpack[RerankOptions]) -> Reranking:
        """Scores candidates and returns the best first; `options` as in preread.values.RerankOptions.

        Plain strings are passage ids where `collection` is given, else texts; a Candidate, or a mapping {"id": ...,
        "text": ...} with one or both, says which.
        """
        request = wire.pack_request(query, candidates, options)
        attempts = Attempts(self._server, "Rerank", request, self._server.seconds(options.get("timeout")))
        return wire.unpack_reranking(_call(attempts), attempts.request_id)

    def rerank_many(
        self, queries: Iterable[str], candidates: values.Candidates, **options: Unpack[RerankOptions]
    ) -> list[Reranking]:
        """Reranks the same candidates for each of 1 to 64 queries, in one call; the rankings in the queries' order.

        The server fetches a passage once, and computes once what depends on no query. Timings are the call's.
        """
        request = wire.pack_many(queries, candidates, options)
        attempts = Attempts(self._server, "RerankMany", request, self._server.seconds(options.get("timeout")))
        return _rankings(attempts)

    def rerank_stream(
        self, query: str, candidates: values.Candidates, **options: Unpack[RerankOptions]
    ) -> "RerankingStream":
        """Like rerank, but gives results as they are scored, in no particular order; not retried after the first."""
        request = rerank_pb2.RerankStreamRequest(request=wire.pack_request(query, candidates, options))
        seconds = self._server.seconds(options.get("timeout"))
        attempts = Attempts(self._server, "RerankStream", request, seconds)
        return RerankingStream(attempts)

    def warm(
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
        attempts = Attempts(self._server, "Warm", request, self._server.seconds(timeout))
        return wire.unpack(values.Warmed, _call(attempts), request_id=attempts.request_id)

    def list_models(self, *, timeout: float | None = None) -> Listed[values.ModelInfo]:
        """The served models, the default one first."""
        request = rerank_pb2.ListModelsRequest()
        attempts = Attempts(self._server, "ListModels", request, self._server.seconds(timeout))
        models = (_call(attempts)).models
        return Listed((wire.unpack(values.ModelInfo, model) for model in models), attempts.request_id)

    def list_collections(self, *, timeout: float | None = None) -> Listed[values.CollectionInfo]:
        """The collections of the reranking server's store."""
        return self._list(self._server, "ListCollections", rerank_pb2.ListCollectionsRequest(), timeout)

    def _list(
        self, service: Service, method: str, request: object, timeout: float | None
    ) -> Listed[values.CollectionInfo]:
        attempts = Attempts(service, method, request, service.seconds(timeout))
        collections = (_call(attempts)).collections
        return Listed((wire.unpack(values.CollectionInfo, one) for one in collections), attempts.request_id)

    def list_passages(self, collection: str, *, page_size: int = 0, timeout: float | None = None) -> "Stream[str]":
        """The ids of a collection's passages, in the store's order, fetched in pages of about `page_size` (0: 1,000).

        Passages written or deleted meanwhile may or may not be among them; from Redis an id may come twice. `timeout`
        is of each page. InvalidRequest where the collection was replaced, or Redis restarted: list it again.
        """
        request = wire.pack(rerank_pb2.ListPassagesRequest, "collection", collection=collection, page_size=page_size)
        attempts = Attempts(self._server, "ListPassages", request, self._server.seconds(timeout))
        return Stream(self._list_passages(request, attempts), attempts)

    def _list_passages(self, request: rerank_pb2.ListPassagesRequest, attempts: Attempts) -> Iterator[str]:
        while True:
            attempts.begin()
            response = _call(attempts)
            yield from response.passage_ids
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def upsert(
        self,
        passages: values.Passages,
        *,
        collection: str,
        compression_ratio: int = 0,
        codec: str = "",
        store_text: bool = True,
        timeout: float | None = None,
    ) -> "Stream[values.UpsertResult]":
        """Encodes and stores passages; gives each acknowledgement after the store has that passage.

        Passages are Passage values, or mappings as `preread index` reads them ("id" or "_id", "text", perhaps "title");
        anything else is a TypeError, named by its index: what was acknowledged before stays. Of several with one id the
        first is stored, the others refused. Ratio, codec and store_text count where this call creates the collection.
        Nothing is sent before the first acknowledgement is requested; then `passages` is read as fast as the worker
        takes them. No timeout unless one is given. Retried only while no worker took the first passages: after that
        repeat the call, what is stored is "unchanged".
        """
        settings = {"compression_ratio": compression_ratio, "codec": codec, "store_text": store_text}
        upload = wire.Upload(passages, collection=collection, **settings)
        attempts = Attempts(self._encoder(), "Upsert", None, Argument("timeout", timeout).seconds())
        return Stream(self._upsert(upload, attempts), attempts)

    def _upsert(self, upload: wire.Upload, attempts: Attempts) -> Iterator[values.UpsertResult]:
        attempts.begin()
        messages = iter(upload)
        first = [message] if (message := next(messages, None)) is not None else []
        attempts.request = partial(_from_first, first, messages, upload)
        for answer in _messages(attempts, attempts.start(), upload):
            for result in answer.results:
                yield wire.unpack(values.UpsertResult, result)

    def delete(self, passage_ids: Iterable[str], *, collection: str, timeout: float | None = None) -> int:
        """Deletes passages; returns how many there were. Many ids go in several calls, each with this `timeout`."""
        worker, num_deleted, ids = self._encoder(), 0, Argument("passage_ids", passage_ids).texts()
        seconds = worker.seconds(timeout)
        for start in range(0, max(len(ids), 1), wire.IDS_PER_DELETE):
            some = ids[start : start + wire.IDS_PER_DELETE]
            request = wire.pack(encoder_pb2.DeleteRequest, "collection", collection=collection, passage_ids=some)
            num_deleted += (_call(Attempts(worker, "Delete", request, seconds))).num_deleted
        return num_deleted

    def stats(self, collection: str = "", *, timeout: float | None = None) -> Listed[values.CollectionInfo]:
        """Counts of one collection of the worker's store, or of all of them."""
        request = wire.pack(encoder_pb2.GetStatsRequest, collection=collection)
        return self._list(self._encoder(), "GetStats", request, timeout)

    def describe(self, *, timeout: float | None = None) -> values.EncoderInfo:
        """The worker's encoder, and how it stores by default."""
        worker, request = self._encoder(), encoder_pb2.DescribeRequest()
        response = _call(Attempts(worker, "Describe", request, worker.seconds(timeout)))
        return wire.unpack(values.EncoderInfo, response)


def _from_first(first: list[Any], rest: Iterator[Any], upload: wire.Upload) -> Iterator[Any]:
    """The messages of an attempt: the first one, which every attempt can send, then the rest, which one can."""
    for message in first:
        yield message
    upload.can_repeat = False
    for message in rest:
        yield message


class Stream(Generic[_T]):
    """Values as they arrive, to be iterated over once. `close`, `cancel` and leaving its `with` block end the call."""

    def __init__(self, items: Iterator[_T], attempts: Attempts) -> None:
        self._items, self._attempts = items, attempts

    @property
    def request_id(self) -> str:
        """The server's log has the request under it."""
        return self._attempts.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _T:
        return next(self._items)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Ends the call; a reader of the stream gets Cancelled."""
        self._attempts.cancel()

    def close(self) -> None:
        """Ends the call; to be called by the reader."""
        self._attempts.cancel()
        self._items.close()  # type: ignore[attr-defined]  # a generator


class RerankingStream(Stream[values.Result]):
    """Results as they are scored; `summary` is set after the last one."""

    def __init__(self, attempts: Attempts) -> None:
        self._summaries: list[values.Summary] = []
        super().__init__(_results(attempts, attempts.start(), self._summaries), attempts)

    @property
    def summary(self) -> values.Summary | None:
        return self._summaries[-1] if self._summaries else None


def _results(attempts: Attempts, call: Any, summaries: list[values.Summary]) -> Iterator[values.Result]:
    for event in _messages(attempts, call):
        if event.HasField("summary"):
            summaries.append(wire.unpack(values.Summary, event.summary))
        yield from wire.unpack_results(event.batch.results)
