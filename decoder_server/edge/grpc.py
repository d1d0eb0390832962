"""Protobuf to plain values and back; the only file here that builds or reads message bodies.

RerankService on grpc.aio: unpack, call an engine, pack. Errors leave with google.rpc details.

Does not know models, stores or batching.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence, Sized
from itertools import chain
from typing import Any, TypeAlias, get_args

import grpc

from cache.errors import CacheError
from cache.manifest import Manifest
from cache.store import Store
from checkpoint import EncoderIdentity
from decoder_server.engine.collections import Described, describe
from decoder_server.engine.engine import Engine
from decoder_server.engine.warming import ANY_QUERY, Warmed, warm
from preread.errors import (
    InvalidRequest,
    NotFound,
    PrereadError,
    Unavailable,
)
from preread.types import Candidate, Degraded, OnMiss, RerankRequest, Result, Stage, Status, Summary, Timings
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc
from preread_edge import rpc
from preread_edge.messages import joined
from preread_edge.steps import SMALL_BYTES, Pace

_ON_MISS: dict[int, OnMiss | None] = {
    common_pb2.ON_MISS_UNSPECIFIED: None,
    common_pb2.ON_MISS_ENCODE: "encode",
    common_pb2.ON_MISS_SKIP: "skip",
    common_pb2.ON_MISS_FAIL: "fail",
}
_STATUS = {status: f"CANDIDATE_STATUS_{status.upper()}" for status in get_args(Status)}


async def unpack_request(message: rerank_pb2.RerankRequest, max_candidates: int) -> RerankRequest:
    """Proto3's empty values become None where they mean the default.

    Raises:
        InvalidRequest: more candidates than a request may have.
    """
    _check_count("candidates", message.candidates, max_candidates)
    _check_count("stages", message.stages, max_candidates)
    candidates = []
    pace = Pace()
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


def _check_count(field: str, values: Sized, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(field, f"{len(values)} of them", f"1..{limit}")


def unpack_warm(message: rerank_pb2.WarmRequest, max_candidates: int) -> RerankRequest:
    """A request for the same passages; its query stands for those to come.

    Raises:
        InvalidRequest: no ids, or more of them than a request may have candidates.
    """
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


def pack_warmed(model: str, warmed: Warmed) -> rerank_pb2.WarmResponse:
    return rerank_pb2.WarmResponse(
        model=model,
        num_passages=warmed.num_passages,
        num_windows=warmed.num_windows,
        missing_ids=warmed.missing_ids,
        tiers=[
            rerank_pb2.TierUse(
                name=tier.name, num_kept=tier.num_kept, num_bytes=tier.num_bytes, max_bytes=tier.max_bytes
            )
            for tier in warmed.tiers
        ],
    )


async def pack_response(outcomes: Sequence[Result], summary: Summary) -> rerank_pb2.RerankResponse | bytes:
    """The message, or its bytes where it holds long texts."""
    if not _is_long(outcomes):
        return _pack_response(outcomes, summary)
    parts = (rerank_pb2.RerankResponse(results=[_pack_outcome(outcome)]) for outcome in outcomes)
    return await joined(chain([_pack_response((), summary)], parts))


def _is_long(outcomes: Sequence[Result]) -> bool:
    return sum(len(outcome.text or "") for outcome in outcomes) > SMALL_BYTES


def _pack_response(outcomes: Sequence[Result], summary: Summary) -> rerank_pb2.RerankResponse:
    return rerank_pb2.RerankResponse(
        results=[_pack_outcome(outcome) for outcome in outcomes],
        model=summary.model,
        timings=_pack_timings(summary.timings),
        num_scored=summary.num_scored,
        num_query_tokens=summary.num_query_tokens,
        query_truncated=summary.query_truncated,
        compression_ratio=summary.compression_ratio,
        stages=_pack_stages(summary.stages),
        stopped_early=summary.stopped_early,
        degraded=_pack_degraded(summary.degraded),
    )


async def pack_batch(outcomes: Sequence[Result]) -> rerank_pb2.RerankStreamResponse | bytes:
    """The message, or its bytes where it holds long texts."""
    if not _is_long(outcomes):
        return _pack_batch(outcomes)
    return await joined(_pack_batch([outcome]) for outcome in outcomes)


def _pack_batch(outcomes: Sequence[Result]) -> rerank_pb2.RerankStreamResponse:
    results = [_pack_outcome(outcome) for outcome in outcomes]
    return rerank_pb2.RerankStreamResponse(batch=rerank_pb2.RerankStreamResponse.Batch(results=results))


def pack_summary(summary: Summary) -> rerank_pb2.RerankStreamResponse:
    return rerank_pb2.RerankStreamResponse(
        summary=rerank_pb2.RerankStreamResponse.Summary(
            model=summary.model,
            timings=_pack_timings(summary.timings),
            num_scored=summary.num_scored,
            num_query_tokens=summary.num_query_tokens,
            query_truncated=summary.query_truncated,
            compression_ratio=summary.compression_ratio,
            stages=_pack_stages(summary.stages),
            stopped_early=summary.stopped_early,
            degraded=_pack_degraded(summary.degraded),
        )
    )


def pack_model(engine: Engine) -> rerank_pb2.ModelInfo:
    backend = engine.backend
    identity = backend.identity()
    return rerank_pb2.ModelInfo(
        name=engine.name,
        backend=backend.name,
        checkpoint=backend.checkpoint_name,
        encoder=_pack_identity(identity) if identity is not None else None,
        default_instruction=backend.settings.default_instruction,
        default_compression_ratio=backend.settings.default_compression_ratio,
        max_query_tokens=backend.settings.max_query_tokens,
        max_candidates=engine.limits.max_candidates,
        max_message_bytes=engine.limits.max_message_bytes,
        dtype=backend.dtype_name,
        device=backend.device_name,
        encodes_on_demand=engine.encodes_on_demand,
        max_passage_tokens=backend.settings.max_passage_tokens,
        notice=backend.notice,
    )


def pack_collection(described: Described) -> common_pb2.CollectionInfo:
    manifest, stats = described.manifest, described.stats
    return common_pb2.CollectionInfo(
        name=manifest.collection,
        aliases=described.aliases,
        encoder=_pack_identity(manifest),
        compression_ratio=manifest.compression_ratio,
        codec=manifest.codec,
        num_passages=stats.num_passages,
        num_states=stats.num_states,
        num_tokens=stats.num_tokens,
        num_truncated=stats.num_truncated,
        size_bytes=stats.size_bytes,
        stores_text=manifest.stores_text,
        num_clipped=stats.num_clipped,
    )


def _pack_outcome(outcome: Result) -> rerank_pb2.Result:
    return rerank_pb2.Result(
        index=outcome.index,
        passage_id=outcome.passage_id,
        status=_STATUS[outcome.status],
        score=outcome.score,
        margin=outcome.margin,
        text=outcome.text,
        message=outcome.message,
        num_states=outcome.num_states,
        compression_ratio=outcome.compression_ratio,
        truncated=outcome.truncated,
        stages=[
            rerank_pb2.StageScore(
                compression_ratio=stage.compression_ratio,
                score=stage.score,
                margin=stage.margin,
                num_states=stage.num_states,
            )
            for stage in outcome.stages
        ],
    )


def _pack_stages(stages: Sequence[Stage]) -> list[rerank_pb2.Stage]:
    return [rerank_pb2.Stage(compression_ratio=stage.compression_ratio, keep=stage.keep) for stage in stages]


def _pack_degraded(degraded: Degraded | None) -> rerank_pb2.Degraded | None:
    if degraded is None:
        return None
    return rerank_pb2.Degraded(
        reason=degraded.reason,
        compression_ratio=degraded.compression_ratio,
        stages=_pack_stages(degraded.stages),
    )


def _pack_timings(timings: Timings) -> rerank_pb2.Timings:
    return rerank_pb2.Timings(
        fetch_seconds=timings.fetch_seconds,
        encode_seconds=timings.encode_seconds,
        queue_seconds=timings.queue_seconds,
        compute_seconds=timings.compute_seconds,
        total_seconds=timings.total_seconds,
    )


def _pack_identity(identity: EncoderIdentity | Manifest) -> common_pb2.EncoderIdentity:
    return common_pb2.EncoderIdentity(
        fingerprint=identity.fingerprint,
        checkpoint=identity.checkpoint,
        dim=identity.dim,
        max_passage_tokens=identity.max_passage_tokens,
        passage_template=identity.passage_template,
        pooling_version=identity.pooling_version,
    )


Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RerankService(rerank_pb2_grpc.RerankServiceServicer):
    """The edge. `engines` fills when the models have loaded; until then every call is UNAVAILABLE."""

    def __init__(self, store: Store) -> None:
        self.engines: dict[str, Engine] = {}  # by served name; the first is the default
        self._store = store

    async def Rerank(  # noqa: N802
        self, request: rerank_pb2.RerankRequest, context: Context
    ) -> rerank_pb2.RerankResponse:
        try:
            engine = self._engine(request.model)
            wanted = await unpack_request(request, engine.limits.max_candidates)
            outcomes, summary = await engine.rerank(wanted, deadline=deadline_of(context))
        except PrereadError as exc:
            await rpc.abort_with(context, exc)
        return await pack_response(outcomes, summary)  # type: ignore[return-value]  # or its bytes: edge/handlers

    async def RerankStream(  # type: ignore[override]  # noqa: N802  # the stubs know generators only; grpc.aio takes writers too
        self, request: rerank_pb2.RerankStreamRequest, context: Context
    ) -> None:
        async def emit(outcomes: list[Result]) -> None:
            await context.write(await pack_batch(outcomes))

        try:
            engine = self._engine(request.request.model)
            wanted = await unpack_request(request.request, engine.limits.max_candidates)
            _, summary = await engine.rerank(wanted, deadline=deadline_of(context), emit=emit)
        except PrereadError as exc:
            await rpc.abort_with(context, exc)
        await context.write(pack_summary(summary))

    async def ListModels(  # noqa: N802
        self, request: rerank_pb2.ListModelsRequest, context: Context
    ) -> rerank_pb2.ListModelsResponse:
        return rerank_pb2.ListModelsResponse(models=[pack_model(engine) for engine in self.engines.values()])

    async def ListCollections(  # noqa: N802
        self, request: rerank_pb2.ListCollectionsRequest, context: Context
    ) -> rerank_pb2.ListCollectionsResponse:
        try:
            # Not on the threads of requests: counting takes as long as the store does.
            described = await asyncio.to_thread(describe, self._store)
        except CacheError as exc:
            await rpc.abort_with(context, Unavailable(str(exc)))
        return rerank_pb2.ListCollectionsResponse(collections=map(pack_collection, described))

    async def Warm(  # noqa: N802
        self, request: rerank_pb2.WarmRequest, context: Context
    ) -> rerank_pb2.WarmResponse:
        try:
            engine = self._engine(request.model)
            wanted = unpack_warm(request, engine.limits.max_candidates)
            return pack_warmed(engine.name, await warm(engine, wanted))
        except PrereadError as exc:
            await rpc.abort_with(context, exc)

    def _engine(self, name: str) -> Engine:
        if not self.engines:
            raise Unavailable("this server is still loading its model")
        name = name or next(iter(self.engines))
        if name not in self.engines:
            raise NotFound("model", name, f"model is {name[:100]!r}; served here: {', '.join(self.engines)}")
        return self.engines[name]


def deadline_of(context: Context) -> float | None:
    """When the caller's time is up, on time.monotonic's clock."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
