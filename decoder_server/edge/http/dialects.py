"""The dialects of other rerankers: a body's struct makes requests for the engine, and packs the responses.

Everything but /score requests once per body. The paths of all dialects are here too.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from msgspec import UNSET, Meta, Struct, UnsetType, field

from decoder_server.edge.http import dialect_request as rerank
from decoder_server.edge.http import names
from decoder_server.edge.http.request import Count, Query, Schema, Switch, Text, Word, read
from preread.errors import InvalidRequest

# Clients disagree on the path, so each takes every dialect, which the fields of the body show.
PATHS = (
    "/rerank", "/v1/rerank", "/v2/rerank", "/v1/v2/rerank", "/reranking", "/v1/reranking", "/rerankings",
    "/v1/rerankings", "/v1/ranking", "/v1/retrieval/{model:path}/reranking", "/score", "/v1/score",
)  # fmt: skip

DOCUMENTS_PER_SEARCH_UNIT = 100  # Cohere bills so; its clients read the number
MAX_PAIRS = 1000  # as many as one query may have passages
# Lists that are counted before any value is read; other fields count only where a dialect knows them.
LISTS = ("documents", "texts", "passages", "input", "pairs", "text_1", "text_2", "passage_ids", "stages")

RefuseLong = Annotated[rerank.Flag, Meta(description="false: reject a text that is too long")]


# Cohere, Jina, vLLM, llama.cpp, infinity and the 4D AI Kit share one answer: each reads its part of it.
class _DocumentText(Struct):
    text: str


class _RerankRank(rerank.Rank, kw_only=True):
    relevance_score: Annotated[float, Meta(description="In [0, 1]; a margin with infinity's raw_scores")]
    document: Annotated[
        _DocumentText | str | UnsetType, Meta(description="With return_documents; a string for infinity")
    ] = UNSET


class _RerankMeta(Struct, kw_only=True):
    api_version: dict[str, str]
    billed_units: dict[str, int]
    tokens: dict[str, int]
    warnings: Annotated[list[str] | UnsetType, Meta(description="Candidates that were not scored, and why")] = UNSET


class _RerankAnswer(Struct, kw_only=True, tag_field="object", tag="rerank"):
    """`object` is never "list", which one client rejects; no field is an empty string, on which one SDK raises."""

    id: str
    created: int
    model: str
    results: list[_RerankRank]
    usage: rerank.Usage
    meta: _RerankMeta


class _RerankRequest(rerank.RerankBody, kw_only=True):
    raw_scores: Annotated[rerank.Flag, Meta(description="Behind /infinity: margins in place of scores")] = None

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> _RerankAnswer:
        (response,) = responses
        num_units = math.ceil(len(response.parsed.request.candidates) / DOCUMENTS_PER_SEARCH_UNIT)
        results = response.ranks(_RerankRank, "relevance_score", "document")
        for rank in results:
            if isinstance(rank.document, str) and cls is not _InfinityRequest:
                rank.document = _DocumentText(rank.document)
        return _RerankAnswer(
            id=response.request_id,
            created=int(time.time()),
            model=response.summary.model,
            results=results,
            usage=response.usage,
            meta=_RerankMeta(
                api_version={"version": "2"},
                billed_units={"search_units": num_units},
                tokens={"input_tokens": response.num_tokens, "output_tokens": 0},
                warnings=response.warnings() or UNSET,
            ),
        )


class _InfinityRequest(_RerankRequest, kw_only=True):
    def requests(self) -> list[rerank.DialectRequest]:
        return [self.request(raw_scores=bool(self.raw_scores))]


# Text Embeddings Inference: `texts` in, a flat list out, best first.
class _Direction(Word):
    words = ("right", "left")


class _TeiRank(rerank.Rank, kw_only=True):
    score: float
    text: str | UnsetType = UNSET


class _TeiRequest(rerank.RerankBody, kw_only=True):
    documents: rerank.Documents = field(name="texts", default=None)
    return_documents: rerank.Flag = field(name="return_text", default=None)
    raw_scores: Annotated[rerank.Flag, Meta(description="Margins in place of scores")] = None
    truncate: RefuseLong = None  # absent: cuts what is too long, as TEI does by default
    truncation_direction: _Direction | None = None

    def requests(self) -> list[rerank.DialectRequest]:
        keep_end, reject = self.truncation_direction == "left", self.truncate == Switch(False)
        raw_scores = bool(self.raw_scores)
        return [self.request("texts", raw_scores=raw_scores, reject_truncated=reject, keep_end=keep_end)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> list[_TeiRank]:
        return responses[0].ranks(_TeiRank, "score", "text")


# NVIDIA NIM: query and passages are objects with `text`, and logits come back.
class _Truncate(Word):
    words = ("none", "end")


class _NimRank(rerank.Rank, kw_only=True):
    logit: float


class _NimAnswer(Struct):
    rankings: list[_NimRank]


class _NimRequest(rerank.RerankBody, kw_only=True):
    documents: rerank.Documents = field(name="passages", default=None)
    truncate: _Truncate | None = None

    def requests(self) -> list[rerank.DialectRequest]:
        return [self.request("passages", raw_scores=True, reject_truncated=self.truncate == "none")]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> _NimAnswer:
        return _NimAnswer(responses[0].ranks(_NimRank, "logit"))


# Voyage: `top_k`, `truncation`, and documents as plain strings.
class _VoyageRank(rerank.Rank, kw_only=True):
    relevance_score: rerank.Score
    document: str | UnsetType = UNSET


class _VoyageAnswer(Struct, kw_only=True, tag_field="object", tag="list"):
    data: list[_VoyageRank]
    model: str
    usage: rerank.Usage


class _VoyageRequest(rerank.RerankBody, kw_only=True):
    top_k: rerank.Top = None
    truncation: RefuseLong = None

    def requests(self) -> list[rerank.DialectRequest]:
        return [self.request(top_k=self.top_k, reject_truncated=self.truncation == Switch(False))]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> _VoyageAnswer:
        (response,) = responses
        ranks, num_tokens = response.ranks(_VoyageRank, "relevance_score", "document"), response.num_tokens
        return _VoyageAnswer(data=ranks, model=response.summary.model, usage=rerank.Usage(total_tokens=num_tokens))


# mixedbread: `input` in, `data` out.
class _MixedbreadRank(rerank.Rank, kw_only=True):
    score: rerank.Score
    input: str | UnsetType = UNSET


class _MixedbreadAnswer(Struct, kw_only=True, tag_field="object", tag="list"):
    data: list[_MixedbreadRank]
    model: str
    usage: rerank.Usage


class _MixedbreadRequest(rerank.RerankBody, kw_only=True):
    documents: rerank.Documents = field(name="input", default=None)
    top_k: rerank.Top = None
    return_documents: rerank.Flag = field(name="return_input", default=None)

    def requests(self) -> list[rerank.DialectRequest]:
        return [self.request("input", top_k=self.top_k)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> _MixedbreadAnswer:
        (response,) = responses
        ranks = response.ranks(_MixedbreadRank, "score", "input")
        return _MixedbreadAnswer(data=ranks, model=response.summary.model, usage=response.usage)


# Scores of pairs, in their order: `text_1` and `text_2` as vLLM has them, or `pairs`. One request per distinct query.
class _PairScore(rerank.Rank, kw_only=True, tag_field="object", tag="score"):
    score: rerank.Score


class _ScoreAnswer(Struct, kw_only=True, tag_field="object", tag="list"):
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

    def _of_pairs(self, name: str, pairs: Sequence[tuple[str, str]]) -> list[rerank.DialectRequest]:
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
            requests.append(body.request(name, one_ratio=True, positions=tuple(own)))
        return requests

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> _ScoreAnswer:
        scores = [score for response in responses for score in response.ranks(_PairScore, "score")]
        num_tokens = sum(response.num_tokens for response in responses)
        return _ScoreAnswer(
            id=responses[0].request_id,
            data=sorted(scores, key=lambda score: score.index),
            model=responses[0].summary.model,
            usage=rerank.Usage(prompt_tokens=num_tokens, total_tokens=num_tokens),
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


class _TextsRequest(_ScoreRequest, kw_only=True):
    text_1: _Texts
    text_2: _Texts

    def requests(self) -> list[rerank.DialectRequest]:
        for name, texts in (("text_1", self.text_1), ("text_2", self.text_2)):
            if not texts:
                raise InvalidRequest(name, "empty", "at least one")
        queries, passages = list(self.text_1), self.text_2
        if len(queries) == 1:
            queries *= len(passages)
        if len(queries) != len(passages):
            expected = f"{len(queries)}, as many as text_1, or one text_1"
            raise InvalidRequest("text_2", f"{len(passages)} texts", expected)
        if "" in queries:
            at = () if self.text_1.is_one else (queries.index(""),)
            raise InvalidRequest(("text_1", *at), "", "a query that is not empty")
        return self._of_pairs("text_2", list(zip(queries, passages, strict=True)))


class _PairsRequest(_ScoreRequest, kw_only=True):
    pairs: list[tuple[Text, Text]]

    def requests(self) -> list[rerank.DialectRequest]:
        if not self.pairs:
            raise InvalidRequest("pairs", "empty", "at least one")
        for i, (query, _) in enumerate(self.pairs):
            if not query:
                raise InvalidRequest(("pairs", i, 0), "", "a query that is not empty")
        return self._of_pairs("pairs", self.pairs)


# For /openapi.json.
REQUESTS = (
    _RerankRequest, _TeiRequest, _NimRequest, _VoyageRequest, _MixedbreadRequest,
    ("ScoreRequest", _TextsRequest, _PairsRequest),
)  # fmt: skip
ANSWERS = (
    _RerankAnswer, ("TeiAnswer", list[_TeiRank]), _NimAnswer, _VoyageAnswer, _MixedbreadAnswer, _ScoreAnswer,
)  # fmt: skip

Dialect = rerank.RerankBody | _TextsRequest | _PairsRequest  # makes `requests`; its class packs the responses
TEI: type[Dialect] = _TeiRequest
# In front of any path: these clients get their dialect whatever the body looks like.
PREFIXES: dict[str, type[Dialect]] = {"/tei": TEI, "/voyage": _VoyageRequest, "/infinity": _InfinityRequest}
# Fields that show the dialect, the first match first: mixedbread shares top_k with Voyage.
_MARKS: dict[str, type[Dialect]] = {
    "texts": TEI, "passages": _NimRequest, "input": _MixedbreadRequest, "pairs": _PairsRequest,
    "text_1": _TextsRequest, "truncation": _VoyageRequest,
}  # fmt: skip


def pick(fields: Mapping[str, object], path: str = "") -> type[Dialect]:
    """The dialect of a body: by the path's prefix, else by the body's fields."""
    has = {name for name, value in fields.items() if value is not None}
    found = [dialect for prefix, dialect in PREFIXES.items() if path.startswith(prefix + "/")]
    found += [dialect for mark, dialect in _MARKS.items() if mark in has]
    return next(iter(found), _VoyageRequest if "top_k" in has and "top_n" not in has else _RerankRequest)


_BODIES: tuple[type[Dialect], ...] = (*_MARKS.values(), _RerankRequest)
# A field of one dialect is no misspelling in another, which ignores it.
_FIELDS = dict.fromkeys(name for dialect in _BODIES for name in names.fields_of(dialect)).keys()


def check_names(body: Mapping[str, Any], dialect: type[Dialect]) -> None:
    """Raises InvalidRequest for a near miss of a field of any dialect: a mark, misspelled, shows another dialect."""
    if not body.keys() <= _FIELDS:
        names.check(body, _FIELDS, (*names.fields_of(dialect), *_FIELDS))


# A string may be cut off. Were its end required, a search for one of escaped quotes would start again at each of them.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}:,]', re.DOTALL)


def guess(data: bytes) -> type[Dialect]:
    """The dialect of a body by its beginning, or by all of it where it is no JSON: as far as its fields can be seen."""
    depth, last = 0, b""
    marks: dict[str, object] = {}
    for match in _TOKEN.finditer(data):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif token == b":" and depth == 1:
            marks[last[1:-1].decode(errors="replace")] = True
        last = token
    return pick(marks)
