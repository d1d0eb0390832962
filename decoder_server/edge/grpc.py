"""RerankService on grpc.aio: unpack, call an engine, pack. Protobuf goes no further than here.

Methods raise; preread_edge.grpc_server ends the call with the status and details of the error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence, Sized
from contextlib import aclosing
from itertools import chain
from typing import Any, TypeAlias, TypeVar, get_args

import grpc

from cache.errors import CacheError
from cache.store import Store
from decoder_server.edge.engines import collection_infos, model_info
from decoder_server.engine.engine import Engine, choose
from decoder_server.engine.warming import ANY_QUERY, warm
from preread.errors import InvalidRequest, Unavailable
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc
from preread.values import Candidate, OnMiss, RerankRequest, Result, Stage, Status, Summary
from preread_edge.grpc_server import joined
from preread_edge.steps import SMALL_BYTES, Pauses

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_ON_MISS: dict[int, OnMiss] = {common_pb2.OnMiss.Value(f"ON_MISS_{one.upper()}"): one for one in get_args(OnMiss)}
_STATUS = {status: f"CANDIDATE_STATUS_{status.upper()}" for status in get_args(Status)}


def deadline_of(context: Context) -> float | None:
    """The caller's deadline, on time.monotonic's clock."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


class RerankService(rerank_pb2_grpc.RerankServiceServicer):
    """Every call is UNAVAILABLE until `engines` fills, when the models have loaded."""

    def __init__(self, store: Store) -> None:
        self.engines: dict[str, Engine] = {}  # by served name; the first is the default
        self._store = store

    async def Rerank(self, request: rerank_pb2.RerankRequest, context: Context) -> Any:  # noqa: N802
        engine = choose(self.engines, request.model)
        unpacked = await unpack_request(request, engine.limits.max_candidates)
        return await _pack_response(*await engine.rerank(unpacked, deadline=deadline_of(context)))

    async def RerankStream(self, request: rerank_pb2.RerankStreamRequest, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        engine = choose(self.engines, request.request.model)
        unpacked = await unpack_request(request.request, engine.limits.max_candidates)
        async with aclosing(engine.stream(unpacked, deadline=deadline_of(context))) as events:
            async for event in events:
                yield await _pack_event(event)

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

    async def Warm(self, request: rerank_pb2.WarmRequest, context: Context) -> Any:  # noqa: N802
        engine = choose(self.engines, request.model)
        warmed = await warm(engine, unpack_warm(request, engine.limits.max_candidates))
        return _pack(warmed, rerank_pb2.WarmResponse)


async def unpack_request(message: rerank_pb2.RerankRequest, max_candidates: int) -> RerankRequest:
    """The request; proto3's empty values are None where they mean the default."""
    _check_count("candidates", message.candidates, max_candidates)
    _check_count("stages", message.stages, max_candidates)
    candidates = []
    pace = Pauses()
    for candidate in message.candidates:
        text = candidate.text if candidate.HasField("text") else None
        candidates.append(Candidate(candidate.passage_id or None, text))
        await pace.worked()
    return RerankRequest(
        query=message.query,
        candidates=tuple(candidates),
        instruction=message.instruction if message.HasField("instruction") else None,
        collection=message.collection or None,
        top_n=message.top_n,
        compression_ratio=message.compression_ratio or None,
        on_miss=_ON_MISS.get(message.on_miss),  # a value from a newer client means the default
        return_text=message.return_text,
        model=message.model,
        stages=tuple(Stage(stage.compression_ratio, stage.keep) for stage in message.stages),
    )


def unpack_warm(message: rerank_pb2.WarmRequest, max_candidates: int) -> RerankRequest:
    """A request for the same passages; its query stands for those to come."""
    if not message.passage_ids:
        raise InvalidRequest("passage_ids", "empty", f"1..{max_candidates} ids")
    _check_count("passage_ids", message.passage_ids, max_candidates)
    return RerankRequest(
        query=ANY_QUERY,
        candidates=tuple(Candidate(passage_id) for passage_id in message.passage_ids),
        instruction=message.instruction if message.HasField("instruction") else None,
        collection=message.collection or None,
        compression_ratio=message.compression_ratio or None,
        model=message.model,
    )


def _check_count(field: str, values: Sized, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(field, f"{len(values)} of them", f"1..{limit}")


async def _pack_response(results: Sequence[Result], summary: Summary) -> rerank_pb2.RerankResponse | bytes:
    """The message, or its bytes where it holds long texts."""
    fields = _fields(summary, rerank_pb2.RerankResponse)
    if not _is_long(results):
        return rerank_pb2.RerankResponse(results=map(_pack_result, results), **fields)
    parts = (rerank_pb2.RerankResponse(results=[_pack_result(result)]) for result in results)
    return await joined(chain([rerank_pb2.RerankResponse(**fields)], parts))


async def _pack_event(results: Sequence[Result] | Summary) -> rerank_pb2.RerankStreamResponse | bytes:
    """The message, or its bytes where it holds long texts."""
    if isinstance(results, Summary):
        message = _pack(results, rerank_pb2.RerankStreamResponse.Summary)
        return rerank_pb2.RerankStreamResponse(summary=message)

    def pack(some: Sequence[Result]) -> rerank_pb2.RerankStreamResponse:
        batch = rerank_pb2.RerankStreamResponse.Batch(results=map(_pack_result, some))
        return rerank_pb2.RerankStreamResponse(batch=batch)

    return await joined(pack([result]) for result in results) if _is_long(results) else pack(results)


def _is_long(results: Sequence[Result]) -> bool:
    return sum(len(result.text or "") for result in results) > SMALL_BYTES


def _pack_result(result: Result) -> rerank_pb2.Result:
    return rerank_pb2.Result(**_fields(result, rerank_pb2.Result) | {"status": _STATUS[result.status]})


def _pack(value: Any, kind: type[T]) -> T:
    """A message of the fields that it has in common with a value."""
    return kind(**_fields(value, kind))


def _fields(value: Any, kind: Any) -> dict[str, Any]:
    return {name: _plain(getattr(value, name)) for name in kind.DESCRIPTOR.fields_by_name if hasattr(value, name)}


def _plain(value: Any) -> Any:
    """As protobuf takes it: dicts for messages, no enum of ours."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
