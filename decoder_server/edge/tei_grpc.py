"""TEI's gRPC contract on our engines: Rerank, RerankStream and Info of tei.v1, for clients that speak it already.

`truncate` false, which proto3 cannot tell from absent, does not refuse: TEI's own servers truncate by default.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import grpc

from decoder_server.edge.floor import every_scored
from decoder_server.edge.grpc import deadline_of
from decoder_server.engine.engine import Engine
from preread.errors import InvalidRequest, PrereadError, Unavailable
from preread.tei.v1 import tei_pb2, tei_pb2_grpc
from preread.types import Candidate, RerankRequest
from preread_edge import rpc
from preread_edge.messages import joined
from preread_edge.steps import Pace

SERVICES = tuple(service.full_name for service in tei_pb2.DESCRIPTOR.services_by_name.values())

Engines = Callable[[], dict[str, Engine]]
_Context = grpc.aio.ServicerContext[Any, Any]


def add_services(server: grpc.aio.Server, engines: Engines) -> None:
    """Puts both services on a server. `engines`: by name, empty until they have loaded; the first is asked."""
    tei_pb2_grpc.add_RerankServicer_to_server(_Rerank(engines), server)
    tei_pb2_grpc.add_InfoServicer_to_server(_Info(engines), server)


class _Rerank(tei_pb2_grpc.RerankServicer):
    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    async def Rerank(self, request: tei_pb2.RerankRequest, context: _Context) -> tei_pb2.RerankResponse:  # noqa: N802
        return await self._answer(request.texts, request, context)

    async def RerankStream(  # noqa: N802
        self, request_iterator: AsyncIterator[tei_pb2.RerankStreamRequest], context: _Context
    ) -> tei_pb2.RerankResponse:
        first: tei_pb2.RerankStreamRequest | None = None
        texts: list[str] = []
        async for message in request_iterator:
            first = first or message
            texts.append(message.text)
            engines = self._engines()
            if engines and len(texts) > _first(engines).limits.max_candidates:
                break  # the engine refuses that many, so the rest need not come
        return await self._answer(texts, first or tei_pb2.RerankStreamRequest(), context)

    async def _answer(
        self, texts: Sequence[str], flags: tei_pb2.RerankRequest | tei_pb2.RerankStreamRequest, context: _Context
    ) -> tei_pb2.RerankResponse:
        try:
            engine = _first(self._engines())
            if not 1 <= len(texts) <= engine.limits.max_candidates:
                raise InvalidRequest("texts", f"{len(texts)} of them", f"1..{engine.limits.max_candidates}")
            candidates = []
            pace = Pace()
            for text in texts:
                candidates.append(Candidate(text=text))
                await pace.worked()
            wanted = RerankRequest(
                query=flags.query,
                candidates=tuple(candidates),
                return_text=flags.return_text,
            )
            outcomes, summary = await engine.rerank(wanted, deadline=deadline_of(context))
            encodes = engine.encodes_on_demand or engine.reads_text
            scored = every_scored(outcomes, summary, lambda index: f"texts[{index}]", encodes_on_demand=encodes)
        except PrereadError as exc:
            await rpc.abort_with(context, exc)
        ranks = (
            tei_pb2.Rank(index=o.index, text=o.text, score=o.margin if flags.raw_scores else o.score) for o in scored
        )
        timings = summary.timings
        response = tei_pb2.RerankResponse(
            metadata=tei_pb2.Metadata(
                compute_chars=sum(len(candidate.text or "") for candidate in candidates),
                compute_tokens=summary.num_scored * summary.num_query_tokens + summary.num_passage_tokens,
                total_time_ns=int(timings.total_seconds * 1e9),
                queue_time_ns=int(timings.queue_seconds * 1e9),
                inference_time_ns=int((timings.encode_seconds + timings.compute_seconds) * 1e9),
            ),
        )
        parts = (tei_pb2.RerankResponse(ranks=[rank]) for rank in ranks)
        return await joined(chain([response], parts))  # type: ignore[return-value]  # bytes: edge/handlers


class _Info(tei_pb2_grpc.InfoServicer):
    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    async def Info(self, request: tei_pb2.InfoRequest, context: _Context) -> tei_pb2.InfoResponse:  # noqa: N802
        try:
            engine = _first(self._engines())
        except PrereadError as exc:
            await rpc.abort_with(context, exc)
        return tei_pb2.InfoResponse(
            version=_version(),
            model_id=engine.name,
            model_dtype=engine.backend.dtype_name,
            model_type=tei_pb2.MODEL_TYPE_RERANKER,
            max_concurrent_requests=engine.limits.max_queue_requests,
            max_input_length=engine.backend.settings.max_passage_tokens,
            max_batch_tokens=engine.limits.max_queue_tokens,
            max_client_batch_size=engine.limits.max_candidates,
            tokenization_workers=1,
        )


def _first(engines: dict[str, Engine]) -> Engine:
    if not engines:
        raise Unavailable("this server is still loading its model")
    return next(iter(engines.values()))


def _version() -> str:
    try:
        return version("preread")
    except PackageNotFoundError:
        return "0+unknown"
