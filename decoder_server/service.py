"""RerankService on grpc.aio: unpack, call an engine, pack. Errors leave with google.rpc details.

Does not know models, stores or batching.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from typing import NoReturn

import grpc
from cache.store import Store
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from preread.rpc import abort

from cache.errors import CacheError
from decoder_server import messages
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
from decoder_server.request import Outcome, RerankRequest
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc

DOMAIN = "preread"
_CODES = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Refused: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}

Context = grpc.aio.ServicerContext  # of any request and response


class RerankService(rerank_pb2_grpc.RerankServiceServicer):
    """The edge. `engines` fills when the models have loaded; until then every call is UNAVAILABLE."""

    def __init__(self, store: Store, executor: Executor) -> None:
        self.engines: dict[str, Engine] = {}  # by served name; the first is the default
        self._store = store
        self._executor = executor

    async def Rerank(  # noqa: N802
        self, request: rerank_pb2.RerankRequest, context: Context
    ) -> rerank_pb2.RerankResponse:
        try:
            wanted = messages.unpack_request(request)
            outcomes, summary = await self._engine(wanted).rerank(wanted, deadline=_deadline(context))
        except RerankError as exc:
            await _abort(context, exc)
        return messages.pack_response(outcomes, summary)

    async def RerankStream(  # type: ignore[override]  # noqa: N802  # the stubs know generators only; grpc.aio takes writers too
        self, request: rerank_pb2.RerankStreamRequest, context: Context
    ) -> None:
        async def emit(outcomes: list[Outcome]) -> None:
            await context.write(messages.pack_batch(outcomes))

        try:
            wanted = messages.unpack_request(request.request)
            _, summary = await self._engine(wanted).rerank(wanted, deadline=_deadline(context), emit=emit)
        except RerankError as exc:
            await _abort(context, exc)
        await context.write(messages.pack_summary(summary))

    async def ListModels(  # noqa: N802
        self, request: rerank_pb2.ListModelsRequest, context: Context
    ) -> rerank_pb2.ListModelsResponse:
        return rerank_pb2.ListModelsResponse(models=[messages.pack_model(engine) for engine in self.engines.values()])

    async def ListCollections(  # noqa: N802
        self, request: rerank_pb2.ListCollectionsRequest, context: Context
    ) -> rerank_pb2.ListCollectionsResponse:
        loop = asyncio.get_running_loop()
        try:
            collections = await loop.run_in_executor(self._executor, _list_collections, self._store)
        except CacheError as exc:
            await _abort(context, Unavailable(str(exc)))
        return rerank_pb2.ListCollectionsResponse(collections=collections)

    def _engine(self, request: RerankRequest) -> Engine:
        if not self.engines:
            raise Unavailable("this server is still loading its model")
        name = request.model or next(iter(self.engines))
        if name not in self.engines:
            raise NotFound("model", name, f"model is {name!r}; served here: {', '.join(self.engines)}")
        return self.engines[name]


def _list_collections(store: Store) -> list[common_pb2.CollectionInfo]:
    aliases: dict[str, list[str]] = {}
    for alias, name in sorted(store.aliases().items()):
        aliases.setdefault(name, []).append(alias)
    described = []
    for name in sorted(store.list_collections()):
        manifest = store.read_manifest(name)
        if manifest is not None:  # dropped a moment ago
            described.append(messages.pack_collection(manifest, store.stats(name), aliases.get(name, [])))
    return described


def _deadline(context: Context) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def _abort(context: Context, error: RerankError) -> NoReturn:
    await abort(context, _CODES[type(error)], str(error), *_details(error))
    raise AssertionError("abort returned")


def _details(error: RerankError) -> list[Message]:
    match error:
        case InvalidRequest():
            violation = details.BadRequest.FieldViolation(field=error.field, description=str(error))
            return [details.BadRequest(field_violations=[violation])]
        case NotFound():
            return [details.ResourceInfo(resource_type=error.kind, resource_name=error.name, description=str(error))]
        case Refused():
            info = details.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"subject": error.subject})
            violation = details.PreconditionFailure.Violation(
                type=error.reason, subject=error.subject, description=str(error)
            )
            return [info, details.PreconditionFailure(violations=[violation])]
        case Overloaded():
            delay = Duration()
            delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
            return [details.RetryInfo(retry_delay=delay)]
        case _:
            return []
