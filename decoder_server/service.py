"""RerankService on grpc.aio: unpack, call an engine, pack. Errors leave with google.rpc details.

Does not know models, stores or batching.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import Message

from cache.errors import CacheError
from cache.store import Store
from decoder_server import messages
from decoder_server.catalogue import describe
from decoder_server.engine import Engine
from decoder_server.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Refused,
    RerankError,
    Unavailable,
)
from decoder_server.request import Outcome
from decoder_server.warming import warm
from preread import rpc
from preread.v1 import rerank_pb2, rerank_pb2_grpc

_CODES = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Refused: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}

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
            wanted = await messages.unpack_request(request, engine.limits.max_candidates)
            outcomes, summary = await engine.rerank(wanted, deadline=deadline_of(context))
        except RerankError as exc:
            await abort(context, exc)
        return await messages.pack_response(outcomes, summary)  # type: ignore[return-value]  # or its bytes: edge/handlers

    async def RerankStream(  # type: ignore[override]  # noqa: N802  # the stubs know generators only; grpc.aio takes writers too
        self, request: rerank_pb2.RerankStreamRequest, context: Context
    ) -> None:
        async def emit(outcomes: list[Outcome]) -> None:
            await context.write(await messages.pack_batch(outcomes))

        try:
            engine = self._engine(request.request.model)
            wanted = await messages.unpack_request(request.request, engine.limits.max_candidates)
            _, summary = await engine.rerank(wanted, deadline=deadline_of(context), emit=emit)
        except RerankError as exc:
            await abort(context, exc)
        await context.write(messages.pack_summary(summary))

    async def ListModels(  # noqa: N802
        self, request: rerank_pb2.ListModelsRequest, context: Context
    ) -> rerank_pb2.ListModelsResponse:
        return rerank_pb2.ListModelsResponse(models=[messages.pack_model(engine) for engine in self.engines.values()])

    async def ListCollections(  # noqa: N802
        self, request: rerank_pb2.ListCollectionsRequest, context: Context
    ) -> rerank_pb2.ListCollectionsResponse:
        try:
            # Not on the threads of requests: counting takes as long as the store does.
            described = await asyncio.to_thread(describe, self._store)
        except CacheError as exc:
            await abort(context, Unavailable(str(exc)))
        return rerank_pb2.ListCollectionsResponse(collections=map(messages.pack_collection, described))

    async def Warm(  # noqa: N802
        self, request: rerank_pb2.WarmRequest, context: Context
    ) -> rerank_pb2.WarmResponse:
        try:
            engine = self._engine(request.model)
            wanted = messages.unpack_warm(request, engine.limits.max_candidates)
            return messages.pack_warmed(engine.name, await warm(engine, wanted))
        except RerankError as exc:
            await abort(context, exc)

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


async def abort(context: Context, error: RerankError) -> NoReturn:
    """Ends a call with what the engine raised."""
    await rpc.abort(context, _CODES[type(error)], str(error), *_details(error))


def _details(error: RerankError) -> list[Message]:
    match error:
        case InvalidRequest():
            return [rpc.field_violation(error.field, str(error))]
        case NotFound():
            return [rpc.resource_info(error.kind, error.name, str(error))]
        case Refused():
            return [
                rpc.error_info(error.reason, subject=error.subject),
                rpc.precondition(error.reason, error.subject, str(error)),
            ]
        case Overloaded():
            return [rpc.retry_after(error.retry_after_seconds)]
        case _:
            return []
