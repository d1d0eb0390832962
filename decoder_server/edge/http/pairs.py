"""Scores of pairs of texts, in their order: /score as vLLM has it, in each of its forms, and `pairs`.

One request to the engine per distinct query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from msgspec import Meta, Struct

from decoder_server.edge.http import dialect_request as rerank
from decoder_server.edge.http.json_values import Count, Query, Schema, Text, read
from preread.errors import InvalidRequest
from preread_edge.steps import Step

MAX_PAIRS = 1000  # as many as one query may have passages


class _PairScore(rerank.Rank, kw_only=True, tag_field="object", tag="score"):
    score: rerank.Score


class ScoreAnswer(Struct, kw_only=True, tag_field="object", tag="list"):
    id: str
    data: list[_PairScore]
    model: str
    usage: rerank.Usage


class _ScoreRequest(Struct, kw_only=True):
    model: Text | None = None
    instruction: Text | None = None
    compression_ratio: Count | None = None
    return_margins: rerank.Flag = None
    stages: Annotated[Any, Meta(description="Not taken: scores of different stages do not compare")] = None

    def _of_pairs(self, name: str, pairs: Sequence[tuple[str, str]], step: Step) -> list[rerank.DialectRequest]:
        if self.stages is not None:
            raise InvalidRequest("stages", "given", "none here: scores of different stages do not compare")
        if len(pairs) > MAX_PAIRS:
            raise InvalidRequest(name, f"{len(pairs)} of them", f"at most {MAX_PAIRS}")
        positions: dict[str, list[int]] = {}
        for position, (query, _) in enumerate(pairs):
            positions.setdefault(query, []).append(position)
        shared: dict[str, Any] = {one: getattr(self, one) for one in _ScoreRequest.__struct_fields__}
        requests = []
        for query, own in positions.items():
            documents: rerank.Documents = [pairs[position][1] for position in own]
            body = rerank.RerankBody(query=Query(query), documents=documents, **shared)
            requests.append(body.request(name, one_ratio=True, positions=tuple(own), step=step))
        return requests

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> ScoreAnswer:
        scores = [score for response in responses for score in response.ranks(_PairScore, "score")]
        return ScoreAnswer(
            id=responses[0].request_id,
            data=sorted(scores, key=lambda score: score.index),
            model=responses[0].summary.model,
            usage=rerank.Usage.of(sum(response.num_tokens for response in responses)),
        )


class _Texts(list[str]):
    """A list of strings, or one string that stands for a list of it."""

    schema: ClassVar[Schema] = {"anyOf": [Text.schema, {"type": "array", "items": Text.schema}]}
    is_one = False

    @classmethod
    def read(cls, value: object) -> Self:
        texts = cls(read(list[Text], value) if isinstance(value, list) else [Text.read(value)])
        texts.is_one = not isinstance(value, list)
        return texts


class _TwoLists(_ScoreRequest, kw_only=True):
    """As many texts as queries, or one query for all of them."""

    def _of_lists(self, first: str, second: str, step: Step) -> list[rerank.DialectRequest]:
        given, passages = getattr(self, first), getattr(self, second)
        for name, texts in ((first, given), (second, passages)):
            if not texts:
                raise InvalidRequest(name, "empty", "at least one")
        queries = list(given) * (len(passages) if len(given) == 1 else 1)
        if len(queries) != len(passages):
            expected = f"{len(queries)}, as many as {first}, or one {first}"
            raise InvalidRequest(second, f"{len(passages)} texts", expected)
        if "" in queries:
            at = () if given.is_one else (queries.index(""),)
            raise InvalidRequest((first, *at), "", "a query that is not empty")
        return self._of_pairs(second, list(zip(queries, passages, strict=True)), step)


class TextsRequest(_TwoLists, kw_only=True):
    text_1: _Texts
    text_2: _Texts

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        return self._of_lists("text_1", "text_2", step)


class DataRequest(_TwoLists, kw_only=True):
    data_1: _Texts
    data_2: _Texts

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        return self._of_lists("data_1", "data_2", step)


class QueriesRequest(_TwoLists, kw_only=True):
    queries: _Texts
    documents: _Texts | None = None
    items: Annotated[_Texts | None, Meta(description="In place of documents")] = None

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        if (self.documents is None) == (self.items is None):
            given = "absent" if self.items is None else "given next to items"
            raise InvalidRequest("documents", given, "a list of texts, in documents or in items")
        return self._of_lists("queries", "items" if self.documents is None else "documents", step)


class PairsRequest(_ScoreRequest, kw_only=True):
    pairs: list[tuple[Text, Text]]

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        if not self.pairs:
            raise InvalidRequest("pairs", "empty", "at least one")
        for i, (query, _) in enumerate(self.pairs):
            if not query:
                raise InvalidRequest(("pairs", i, 0), "", "a query that is not empty")
        return self._of_pairs("pairs", self.pairs, step)
