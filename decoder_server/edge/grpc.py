"""The services on grpc.aio, ours and TEI's: unpack, call an engine, pack. Protobuf goes no further than here.

Methods raise; preread_edge.grpc_server ends the call with the status and details of the error. TEI's clients have
`truncate` false, which proto3 cannot tell from absent, cut texts all the same: TEI's own servers truncate by default.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence, Sized
from contextlib import aclosing
from itertools import chain
from typing import Any, TypeAlias, TypeVar, get_args

import grpc

from cache.errors import CacheError
from cache.store import Store
from decoder_server.edge.engines import collection_infos, every_scored, model_info, tei_info
from decoder_server.engine.collections import list_ids
from decoder_server.engine.engine import ANY_QUERY, Engine, choose
from preread.errors import InvalidRequest, Unavailable
from preread.tei.v1 import tei_pb2, tei_pb2_grpc
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc
from preread.values import Candidate, OnMiss, RerankRequest, Result, Stage, Status, Summary
from preread_edge.access import require
from preread_edge.grpc_server import joined
from preread_edge.steps import SMALL_BYTES, Pauses

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

SERVICE = rerank_pb2.DESCRIPTOR.services_by_name["RerankService"].full_name
TEI_SERVICES = tuple(service.full_name for service in tei_pb2.DESCRIPTOR.services_by_name.values())
_ON_MISS: dict[int, OnMiss] = {common_pb2.OnMiss.Value(f"ON_MISS_{one.upper()}"): one for one in get_args(OnMiss)}
_STATUS: dict[str, Any] = {
    one: common_pb2.CandidateStatus.Value(f"CANDIDATE_STATUS_{one.upper()}") for one in get_args(Status)
}


class RerankService(rerank_pb2_grpc.RerankServiceServicer):
    """Every call is UNAVAILABLE until `engines` fills, when the models have loaded."""

    def __init__(self, store: Store) -> None:
        self.engines: dict[str, Engine] = {}  # by served name; the first is the default
        self._store = store

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds SERVICE, and TEI_SERVICES on the same engines."""
        rerank_pb2_grpc.add_RerankServiceServicer_to_server(self, server)
        tei = _TeiService(self.engines)
        tei_pb2_grpc.add_RerankServicer_to_server(tei, server)
        tei_pb2_grpc.add_InfoServicer_to_server(tei, server)

    async def Rerank(self, request: rerank_pb2.RerankRequest, context: Context) -> Any:  # noqa: N802
        engine = choose(self.engines, request.model)
        unpacked = await unpack_request(request, engine.limits.max_candidates)
        results, summary = await engine.rerank(unpacked, deadline=_deadline(context))
        fields = _fields(summary, rerank_pb2.RerankResponse)
        if not _is_long(results):
            return rerank_pb2.RerankResponse(results=map(_pack_result, results), **fields)
        parts = (rerank_pb2.RerankResponse(results=[_pack_result(result)]) for result in results)
        return await joined(chain([rerank_pb2.RerankResponse(**fields)], parts))

    async def RerankStream(self, request: rerank_pb2.RerankStreamRequest, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        engine = choose(self.engines, request.request.model)
        unpacked = await unpack_request(request.request, engine.limits.max_candidates)
        async with aclosing(engine.stream(unpacked, deadline=_deadline(context))) as events:
            async for event in events:
                if isinstance(event, Summary):
                    summary = _pack(event, rerank_pb2.RerankStreamResponse.Summary)
                    yield rerank_pb2.RerankStreamResponse(summary=summary)
                elif _is_long(event):
                    yield await joined(_pack_batch([result]) for result in event)
                else:
                    yield _pack_batch(event)

    async def RerankMany(self, request: rerank_pb2.RerankManyRequest, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        engine = choose(self.engines, request.request.model)
        unpacked = await unpack_request(request.request, engine.limits.max_candidates)
        answers = engine.rerank_many(unpacked, tuple(request.queries), deadline=_deadline(context))
        async with aclosing(answers):
            index = 0
            async for results, summary in answers:
                fields = _fields(summary, rerank_pb2.RerankResponse)
                batches = [[one] for one in results] if _is_long(results) else [results]
                responses = (rerank_pb2.RerankResponse(results=map(_pack_result, batch)) for batch in batches)
                first = rerank_pb2.RerankManyResponse(index=index, response=fields)
                yield await joined(chain([first], (rerank_pb2.RerankManyResponse(response=one) for one in responses)))
                index += 1

    async def ListModels(self, request: rerank_pb2.ListModelsRequest, context: Context) -> Any:  # noqa: N802
        models = [_pack(model_info(engine), rerank_pb2.ModelInfo) for engine in self.engines.values()]
        return rerank_pb2.ListModelsResponse(models=models)

    async def ListCollections(self, request: rerank_pb2.ListCollectionsRequest, context: Context) -> Any:  # noqa: N802
        try:  # on a separate thread: counting takes as long as the store does
            infos = await asyncio.to_thread(collection_infos, self._store)
        except CacheError as exc:
            raise Unavailable(str(exc)) from exc
        collections = [_pack(info, common_pb2.CollectionInfo) for info in infos]
        return rerank_pb2.ListCollectionsResponse(collections=collections)

    async def ListPassages(self, request: rerank_pb2.ListPassagesRequest, context: Context) -> Any:  # noqa: N802
        require(request.collection)
        where = self._store, request.collection, request.page_size, request.page_token
        ids, next_page_token = await asyncio.to_thread(list_ids, *where)
        return rerank_pb2.ListPassagesResponse(passage_ids=ids, next_page_token=next_page_token)

    async def Warm(self, request: rerank_pb2.WarmRequest, context: Context) -> Any:  # noqa: N802
        engine = choose(self.engines, request.model)
        limit = engine.limits.max_candidates
        if not request.passage_ids:
            raise InvalidRequest("passage_ids", "empty", f"1..{limit} ids")
        _check_count("passage_ids", request.passage_ids, limit)
        same_passages = RerankRequest(
            query=ANY_QUERY,  # stands for those to come
            candidates=tuple(Candidate(passage_id) for passage_id in request.passage_ids),
            instruction=request.instruction if request.HasField("instruction") else None,
            collection=request.collection or None,
            compression_ratio=request.compression_ratio or None,
            model=request.model,
        )
        return _pack(await engine.warm(same_passages), rerank_pb2.WarmResponse)


class _TeiService(tei_pb2_grpc.RerankServicer, tei_pb2_grpc.InfoServicer):
    """Both services of tei.v1 on our engines, which are none until the models have loaded; the first one answers."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    async def Rerank(self, request: tei_pb2.RerankRequest, context: Context) -> Any:  # noqa: N802
        return await self._rerank(request.texts, request, context)

    async def RerankStream(  # noqa: N802
        self, request_iterator: AsyncIterator[tei_pb2.RerankStreamRequest], context: Context
    ) -> Any:
        first, texts = tei_pb2.RerankStreamRequest(), list[str]()
        async for message in request_iterator:
            first = first if texts else message
            texts.append(message.text)
            if self._engines and len(texts) > choose(self._engines).limits.max_candidates:
                break  # more than a request may have, so the rest need not come
        return await self._rerank(texts, first, context)

    async def _rerank(
        self, texts: Sequence[str], flags: tei_pb2.RerankRequest | tei_pb2.RerankStreamRequest, context: Context
    ) -> bytes:
        engine = choose(self._engines)
        _check_count("texts", texts, engine.limits.max_candidates, at_least=1)
        candidates = await _paced(Candidate(text=text) for text in texts)
        request = RerankRequest(query=flags.query, candidates=candidates, return_text=flags.return_text)
        results, summary = await engine.rerank(request, deadline=_deadline(context))
        scored = every_scored(engine, results, summary, lambda index: ("texts", index))
        timings = summary.timings
        metadata = tei_pb2.Metadata(
            compute_chars=sum(map(len, texts)),
            compute_tokens=summary.num_scored * summary.num_query_tokens + summary.num_passage_tokens,
            total_time_ns=int(timings.total_seconds * 1e9),
            queue_time_ns=int(timings.queue_seconds * 1e9),
            inference_time_ns=int((timings.encode_seconds + timings.compute_seconds) * 1e9),
        )
        raw = flags.raw_scores
        ranks = (tei_pb2.Rank(index=o.index, text=o.text, score=o.margin if raw else o.score) for o in scored)
        parts = (tei_pb2.RerankResponse(ranks=[rank]) for rank in ranks)
        return await joined(chain([tei_pb2.RerankResponse(metadata=metadata)], parts))

    async def Info(self, request: tei_pb2.InfoRequest, context: Context) -> Any:  # noqa: N802
        return tei_pb2.InfoResponse(model_type=tei_pb2.MODEL_TYPE_RERANKER, **tei_info(choose(self._engines)))


def _deadline(context: Context) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def unpack_request(message: rerank_pb2.RerankRequest, max_candidates: int) -> RerankRequest:
    """The request; proto3's empty values are None where they mean the default."""
    _check_count("candidates", message.candidates, max_candidates)
    _check_count("stages", message.stages, max_candidates)
    return RerankRequest(
        query=message.query,
        candidates=await _paced(
            Candidate(one.passage_id or None, one.text if one.HasField("text") else None) for one in message.candidates
        ),
        instruction=message.instruction if message.HasField("instruction") else None,
        collection=message.collection or None,
        top_n=message.top_n,
        compression_ratio=message.compression_ratio or None,
        on_miss=_ON_MISS.get(message.on_miss),  # a value from a newer client means the default
        return_text=message.return_text,
        model=message.model,
        stages=tuple(Stage(stage.compression_ratio, stage.keep) for stage in message.stages),
    )


async def _paced(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    made, pace = list[Candidate](), Pauses()
    for candidate in candidates:
        made.append(candidate)
        await pace.worked()
    return tuple(made)


def _check_count(field: str, values: Sized, limit: int, *, at_least: int = 0) -> None:
    if not at_least <= len(values) <= limit:
        raise InvalidRequest(field, f"{len(values)} of them", f"1..{limit}")


def _is_long(results: Sequence[Result]) -> bool:
    """A message of so many texts is made in steps, as bytes."""
    return sum(len(result.text or "") for result in results) > SMALL_BYTES


def _pack_batch(results: Sequence[Result]) -> rerank_pb2.RerankStreamResponse:
    batch = rerank_pb2.RerankStreamResponse.Batch(results=map(_pack_result, results))
    return rerank_pb2.RerankStreamResponse(batch=batch)


def _pack_result(result: Result) -> rerank_pb2.Result:
    """There may be thousands: written out, they take a fifth of the time of `_pack`."""
    return rerank_pb2.Result(
        index=result.index,
        passage_id=result.passage_id,
        status=_STATUS[result.status],
        score=result.score,
        margin=result.margin,
        text=result.text,
        message=result.message,
        num_states=result.num_states,
        compression_ratio=result.compression_ratio,
        truncated=result.truncated,
        stages=[_pack(stage, rerank_pb2.StageScore) for stage in result.stages],
        found_in=result.found_in,
        found_id=result.found_id,
    )


def _pack(value: Any, kind: type[T]) -> T:
    return kind(**_fields(value, kind))


def _fields(value: Any, kind: Any) -> dict[str, Any]:
    return {name: _plain(getattr(value, name)) for name in kind.DESCRIPTOR.fields_by_name if hasattr(value, name)}


def _plain(value: Any) -> Any:
    """As protobuf takes it: dicts for messages, no enum of ours."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
