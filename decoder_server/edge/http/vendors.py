"""Dialects that one service alone speaks: Pinecone, SGLang, isaacus and Weaviate's reranker module.

Their answers share nothing with each other: what a client of one reads, no other client knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from decoder_server.edge.http import dialect_request as rerank
from decoder_server.edge.http.json_values import RawText, Switch, Text
from preread.errors import InvalidRequest
from preread_edge.steps import Step

DOCUMENTS_PER_UNIT = 100  # that Pinecone bills


# Pinecone: documents are objects, and come back as they were sent. An `id` of theirs is no passage of a collection.
class _PineconeRank(rerank.Rank, kw_only=True):
    score: rerank.Score
    document: Annotated[dict[str, Any] | UnsetType, Meta(description="As it was sent")] = UNSET


class _PineconeUsage(Struct):
    rerank_units: int


class PineconeAnswer(Struct, kw_only=True):
    model: str
    data: list[_PineconeRank]
    usage: _PineconeUsage


class PineconeRequest(rerank.RerankBody, kw_only=True):
    owns_ids: ClassVar[bool] = False

    return_documents: Annotated[rerank.Flag, Meta(description="Absent: true")] = None
    parameters: Annotated[Any, Meta(description='{"truncate": "NONE"}: reject a text that is too long')] = None

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        more: dict[str, Any] = {}
        if self.documents and self.return_documents != Switch(False):
            for i, document in enumerate(self.documents):  # all of it is in the response
                if isinstance(document, dict) and not RawText.is_utf8(rerank.flat(document, ("documents", i), step)):
                    raise InvalidRequest(("documents", i), *RawText.HALF_A_PAIR)
            more["documents"] = [one if isinstance(one, dict) else {"text": one} for one in self.documents]
        given = self.parameters.get("truncate") if isinstance(self.parameters, dict) else None
        return [self.request(reject_truncated=str(given).lower() == "none" and given is not None, step=step, **more)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> Any:
        (response,) = responses
        num_units = math.ceil(len(response.parsed.request.candidates) / DOCUMENTS_PER_UNIT)
        ranks = response.ranks(_PineconeRank, "score")
        answer = PineconeAnswer(model=response.summary.model, data=ranks, usage=_PineconeUsage(num_units))
        packed = msgspec.to_builtins(answer)
        if documents := response.parsed.documents:
            for rank in packed["data"]:
                rank["document"] = documents[rank["index"]]
        return packed


# SGLang: a flat list, best first, with the documents unless they are declined.
class SglangRank(rerank.Rank, kw_only=True):
    score: rerank.Score
    document: str | UnsetType = UNSET
    meta_info: dict[str, str]


class SglangRequest(rerank.RerankBody, kw_only=True):
    instruct: Annotated[Text | None, Meta(description="What instruction is elsewhere")] = None
    return_documents: Annotated[rerank.Flag, Meta(description="Absent: true")] = None

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        if self.instruction is None:
            self.instruction = self.instruct
        if self.return_documents is None:
            self.return_documents = Switch(True)
        return [self.request(step=step)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> list[SglangRank]:
        (response,) = responses
        return response.ranks(SglangRank, "score", "document", meta_info={"id": response.request_id})


# isaacus: `texts` as TEI has them, but an object that holds the results.
class _IsaacusRank(rerank.Rank, kw_only=True):
    score: rerank.Score


class _IsaacusUsage(Struct):
    input_tokens: rerank.Size


class IsaacusAnswer(Struct, kw_only=True):
    results: list[_IsaacusRank]
    usage: _IsaacusUsage


class IsaacusRequest(rerank.RerankBody, kw_only=True):
    documents: rerank.Documents = field(name="texts", default=None)
    is_iql: Annotated[rerank.Flag, Meta(description="Not taken: a query is read as text")] = None
    scoring_method: Annotated[Any, Meta(description="Ignored: a text is scored whole")] = None
    chunking_options: Annotated[Any, Meta(description="Ignored: a text is scored whole")] = None

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        if self.is_iql:
            raise InvalidRequest("is_iql", "true", "false: a query is read as text")
        return [self.request("texts", step=step)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> IsaacusAnswer:
        (response,) = responses
        return IsaacusAnswer(
            results=response.ranks(_IsaacusRank, "score"), usage=_IsaacusUsage(input_tokens=response.num_tokens)
        )


# Weaviate's transformers reranker: a score per document in the order of the request, by which its client pairs them.
class _WeaviateScore(rerank.Rank, kw_only=True):
    document: str | UnsetType = UNSET
    score: rerank.Score


class WeaviateAnswer(Struct, kw_only=True):
    query: str
    scores: list[_WeaviateScore]


class WeaviateRequest(rerank.RerankBody, kw_only=True):
    property: Annotated[Any, Meta(description="Ignored: the client sends it empty")] = None

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        self.return_documents, self.top_n = Switch(True), None
        return [self.request(step=step)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> WeaviateAnswer:
        (response,) = responses
        scores = sorted(response.ranks(_WeaviateScore, "score", "document"), key=lambda score: score.index)
        return WeaviateAnswer(query=response.parsed.request.query, scores=scores)
