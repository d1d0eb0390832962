"""TEI's gRPC contract on our engines: Rerank, RerankStream and Info of tei.v1, for clients that speak it already.

`truncate` false, which proto3 cannot tell from absent, does not reject: TEI's own servers truncate by default.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import chain
from typing import Any

import grpc

from decoder_server.edge.engines import VERSION, every_scored
from decoder_server.edge.grpc import Context, deadline_of
from decoder_server.engine.engine import Engine, choose
from preread.errors import InvalidRequest
from preread.tei.v1 import tei_pb2, tei_pb2_grpc
from preread.values import Candidate, RerankRequest
from preread_edge.grpc_server import joined
from preread_edge.steps import Pauses

SERVICES = tuple(service.full_name for service in tei_pb2.DESCRIPTOR.services_by_name.values())


class TeiService(tei_pb2_grpc.RerankServicer, tei_pb2_grpc.InfoServicer):
    """Both services. `engines` is empty until the models have loaded; the first one answers."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def add_to(self, server: grpc.aio.Server) -> None:
        tei_pb2_grpc.add_RerankServicer_to_server(self, server)
        tei_pb2_grpc.add_InfoServicer_to_server(self, server)

    async def Rerank(self, request: tei_pb2.RerankRequest, context: Context) -> Any:  # noqa: N802
        return await self._rerank(request.texts, request, context)

    async def RerankStream(  # noqa: N802
        self, request_iterator: AsyncIterator[tei_pb2.RerankStreamRequest], context: Context
    ) -> Any:
        first: tei_pb2.RerankStreamRequest | None = None
        texts: list[str] = []
        async for message in request_iterator:
            first = first or message
            texts.append(message.text)
            if self._engines and len(texts) > choose(self._engines).limits.max_candidates:
                break  # more than a request may have, so the rest need not come
        return await self._rerank(texts, first or tei_pb2.RerankStreamRequest(), context)

    async def _rerank(
        self, texts: Sequence[str], flags: tei_pb2.RerankRequest | tei_pb2.RerankStreamRequest, context: Context
    ) -> bytes:
        engine = choose(self._engines)
        if not 1 <= len(texts) <= engine.limits.max_candidates:
            raise InvalidRequest("texts", f"{len(texts)} of them", f"1..{engine.limits.max_candidates}")
        candidates = []
        pace = Pauses()
        for text in texts:
            candidates.append(Candidate(text=text))
            await pace.worked()
        request = RerankRequest(query=flags.query, candidates=tuple(candidates), return_text=flags.return_text)
        results, summary = await engine.rerank(request, deadline=deadline_of(context))
        scored = every_scored(engine, results, summary, lambda index: ("texts", index))
        timings = summary.timings
        metadata = tei_pb2.Metadata(
            compute_chars=sum(map(len, texts)),
            compute_tokens=summary.num_scored * summary.num_query_tokens + summary.num_passage_tokens,
            total_time_ns=int(timings.total_seconds * 1e9),
            queue_time_ns=int(timings.queue_seconds * 1e9),
            inference_time_ns=int((timings.encode_seconds + timings.compute_seconds) * 1e9),
        )
        ranks = (
            tei_pb2.Rank(index=one.index, text=one.text, score=one.margin if flags.raw_scores else one.score)
            for one in scored
        )
        parts = (tei_pb2.RerankResponse(ranks=[rank]) for rank in ranks)
        return await joined(chain([tei_pb2.RerankResponse(metadata=metadata)], parts))

    async def Info(self, request: tei_pb2.InfoRequest, context: Context) -> Any:  # noqa: N802
        engine = choose(self._engines)
        return tei_pb2.InfoResponse(
            version=VERSION,
            model_id=engine.name,
            model_dtype=engine.backend.dtype_name,
            model_type=tei_pb2.MODEL_TYPE_RERANKER,
            max_concurrent_requests=engine.limits.max_queue_requests,
            max_input_length=engine.backend.settings.max_passage_tokens,
            max_batch_tokens=engine.limits.max_queue_tokens,
            max_client_batch_size=engine.limits.max_candidates,
            tokenization_workers=1,
        )
