"""The dialects of other rerankers: how each is told, and the shapes of those that several clients share.

A body's struct makes requests for the engine, and packs the responses. The paths of all dialects are here too.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, field

from decoder_server.edge.http import dialect_request as rerank
from decoder_server.edge.http import names, pairs, vendors
from decoder_server.edge.http.json_values import Switch, Text, Word
from preread_edge.steps import Step

# The usual ones. Clients disagree on the path, so every other that ends in a word of these is served too.
PATHS = (
    "/rerank", "/v1/rerank", "/v2/rerank", "/v1/v2/rerank", "/reranking", "/v1/reranking", "/rerankings",
    "/v1/rerankings", "/v1/ranking", "/v1/retrieval/{model:path}/reranking", "/score", "/v1/score",
)  # fmt: skip

DOCUMENTS_PER_SEARCH_UNIT = 100  # Cohere bills so; its clients read the number
# Lists that are counted before any value is read; other fields count only where a dialect knows them.
LISTS = (
    "documents", "texts", "passages", "input", "pairs", "text_1", "text_2", "data_1", "data_2", "queries", "items",
    "passage_ids", "stages", "rank_fields",
)  # fmt: skip

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
    instruct: Annotated[Text | None, Meta(description="What instruction is elsewhere")] = None
    raw_scores: Annotated[rerank.Flag, Meta(description="Behind /infinity: margins in place of scores")] = None

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        if self.instruction is None:
            self.instruction = self.instruct
        return super().requests(step)

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
    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        return [self.request(raw_scores=bool(self.raw_scores), step=step)]


# LiteLLM sends one body for most of its providers, and reads `results` for some and `data` for the others.
class _LitellmAnswer(_RerankAnswer, kw_only=True, tag_field="object", tag="rerank"):
    data: Annotated[list[_RerankRank], Meta(description="The results again")]


class _LitellmRequest(_RerankRequest, kw_only=True):
    top_k: rerank.Top = None

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        return [self.request(top_k=self.top_k, step=step)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> _RerankAnswer:
        answer = super().pack(responses)
        fields = {name: getattr(answer, name) for name in answer.__struct_fields__}
        return _LitellmAnswer(data=answer.results, **fields)


# Its infinity reads `document` as a string, its vLLM as an object, and with a key both send the same: neither gets one.
class _LitellmPlainRequest(_RerankRequest, kw_only=True):
    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        self.return_documents = None
        return [self.request(step=step)]


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

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        keep_end, reject = self.truncation_direction == "left", self.truncate == Switch(False)
        settings: dict[str, Any] = {"raw_scores": bool(self.raw_scores), "reject_truncated": reject}
        return [self.request("texts", keep_end=keep_end, step=step, **settings)]

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
    top_k: rerank.Top = None  # as LiteLLM sends it

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        reject = self.truncate == "none"
        return [self.request("passages", top_k=self.top_k, raw_scores=True, reject_truncated=reject, step=step)]

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

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        return [self.request(top_k=self.top_k, reject_truncated=self.truncation == Switch(False), step=step)]

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

    def requests(self, step: Step) -> list[rerank.DialectRequest]:
        return [self.request("input", top_k=self.top_k, step=step)]

    @classmethod
    def pack(cls, responses: Sequence[rerank.DialectResponse]) -> _MixedbreadAnswer:
        (response,) = responses
        ranks = response.ranks(_MixedbreadRank, "score", "input")
        return _MixedbreadAnswer(data=ranks, model=response.summary.model, usage=response.usage)


# For /openapi.json.
REQUESTS = (
    _RerankRequest, _LitellmRequest, _TeiRequest, _NimRequest, _VoyageRequest, _MixedbreadRequest,
    vendors.PineconeRequest, vendors.SglangRequest, vendors.IsaacusRequest, vendors.WeaviateRequest,
    ("ScoreRequest", pairs.TextsRequest, pairs.DataRequest, pairs.QueriesRequest, pairs.PairsRequest),
)  # fmt: skip
ANSWERS = (
    _RerankAnswer, _LitellmAnswer, ("TeiAnswer", list[_TeiRank]), _NimAnswer, _VoyageAnswer, _MixedbreadAnswer,
    vendors.PineconeAnswer, ("SglangAnswer", list[vendors.SglangRank]), vendors.IsaacusAnswer, vendors.WeaviateAnswer,
    pairs.ScoreAnswer,
)  # fmt: skip

Score = pairs.TextsRequest | pairs.DataRequest | pairs.QueriesRequest | pairs.PairsRequest
Dialect = rerank.RerankBody | Score  # makes `requests`; its class packs the responses
AS_TEXT: tuple[type[Dialect], ...] = (_TeiRequest, vendors.WeaviateRequest)  # whose clients read `error` as a string

# What --dialect may be, next to auto, and what stands in front of a path: /tei/rerank.
DIALECTS: dict[str, type[Dialect]] = {
    "cohere": _RerankRequest, "jina": _RerankRequest, "vllm": _RerankRequest, "tei": _TeiRequest, "nim": _NimRequest,
    "voyage": _VoyageRequest, "mixedbread": _MixedbreadRequest, "infinity": _InfinityRequest,
    "pinecone": vendors.PineconeRequest, "sglang": vendors.SglangRequest, "isaacus": vendors.IsaacusRequest,
    "weaviate": vendors.WeaviateRequest,
}  # fmt: skip
PREFIXES: dict[str, type[Dialect]] = {f"/{name}": dialect for name, dialect in DIALECTS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sign:
    """What shows a dialect; everything that is given must hold."""

    dialect: type[Dialect]
    path: str = ""  # a pattern of its end
    headers: tuple[str, ...] = ()  # `name: how its value begins`, of each
    fields: tuple[str, ...] = ()  # of the body: one of them is not null
    without: tuple[str, ...] = ()  # these are


_LITELLM = "user-agent: litellm/"
_NO_KEY, _NO_VLLM_KEY = "authorization: bearer none", "authorization: bearer fake-api-key"  # what it sends for none
_PLAIN = "(?<!v[12])/rerank"  # without a version: infinity or vLLM

# Where neither a prefix nor --dialect says it, the first sign that holds. Where none does it is Cohere's dialect, which
# is Jina's, vLLM's, llama.cpp's and infinity's too.
_SIGNS = (
    # The path, of clients that have it to themselves.
    _Sign(dialect=vendors.IsaacusRequest, path="/rerankings", fields=("texts",)),
    _Sign(dialect=_RerankRequest, path="/reranks", fields=("instruct",)),  # DashScope, which has it as SGLang does
    # Headers, of clients that send a body like others'.
    _Sign(dialect=vendors.PineconeRequest, headers=("x-pinecone-api-version: ",)),
    _Sign(dialect=_VoyageRequest, headers=("x-fern-sdk-name: voyageai",)),
    _Sign(dialect=vendors.IsaacusRequest, headers=("user-agent: isaacus/",)),
    _Sign(dialect=_InfinityRequest, headers=(_LITELLM, _NO_KEY), path=_PLAIN, fields=("documents",)),
    _Sign(dialect=_RerankRequest, headers=(_LITELLM, _NO_VLLM_KEY), path=_PLAIN, fields=("documents",)),
    _Sign(dialect=_LitellmPlainRequest, headers=(_LITELLM,), path=_PLAIN, fields=("documents",)),
    _Sign(dialect=_LitellmRequest, headers=(_LITELLM,), fields=("documents",)),
    # The body.
    _Sign(dialect=vendors.IsaacusRequest, fields=("is_iql", "scoring_method", "chunking_options")),
    _Sign(dialect=_TeiRequest, fields=("texts",)),
    _Sign(dialect=_NimRequest, fields=("passages",)),
    _Sign(dialect=_MixedbreadRequest, fields=("input",)),  # it shares top_k with Voyage
    _Sign(dialect=pairs.PairsRequest, fields=("pairs",)),
    _Sign(dialect=pairs.TextsRequest, fields=("text_1",)),
    _Sign(dialect=pairs.DataRequest, fields=("data_1",)),
    _Sign(dialect=pairs.QueriesRequest, fields=("queries",), without=("query",)),
    _Sign(dialect=vendors.SglangRequest, fields=("instruct",)),
    _Sign(dialect=vendors.WeaviateRequest, fields=("property",)),
    _Sign(dialect=_VoyageRequest, fields=("truncation",)),
    _Sign(dialect=_VoyageRequest, fields=("top_k",), without=("top_n",)),
)


def without_prefix(path: str) -> str:
    """The path behind a dialect's prefix, or as it is."""
    first, slash, rest = path[1:].partition("/")
    return f"/{rest}" if slash and first in DIALECTS else path


def _begins(headers: Mapping[str, str], name: str, begin: str) -> bool:
    return name in headers and headers[name].lower().startswith(begin)


def pick(
    fields: Mapping[str, object], path: str = "", headers: Mapping[str, str] | None = None, fixed: str = "auto"
) -> type[Dialect]:
    """The dialect of a body: by the path's prefix, else `fixed`, --dialect's name, else by its signs.

    Pairs for /score are no dialect's: --dialect does not change them, nor do the prefixes of servers that score pairs.
    """
    has = {name for name, value in fields.items() if value is not None}
    prefix = path[1:].partition("/")[0] if without_prefix(path) != path else ""

    def holds(sign: _Sign) -> bool:
        return (
            (not sign.path or re.search(f"{sign.path}$", path) is not None)
            and all(_begins(headers or {}, *header.split(": ")) for header in sign.headers)
            and (not sign.fields or not has.isdisjoint(sign.fields))
            and has.isdisjoint(sign.without)
        )

    told = next((sign.dialect for sign in _SIGNS if holds(sign)), _RerankRequest)
    if issubclass(told, Score) and DIALECTS.get(prefix, _RerankRequest) is _RerankRequest:
        return told
    return DIALECTS.get(prefix) or DIALECTS.get(fixed) or told  # "auto" is none of them


_BODIES: tuple[type[Dialect], ...] = (*dict.fromkeys(sign.dialect for sign in _SIGNS), _RerankRequest)
# A field of one dialect is no misspelling in another, which ignores it.
_FIELDS = dict.fromkeys(name for dialect in _BODIES for name in names.fields_of(dialect)).keys()


def check_names(body: Mapping[str, Any], dialect: type[Dialect]) -> None:
    """Raises InvalidRequest for a near miss of a field of any dialect: a sign, misspelled, shows another dialect."""
    if not body.keys() <= _FIELDS:
        names.check(body, _FIELDS, (*names.fields_of(dialect), *_FIELDS))


# A string may be cut off. Were its end required, a search for one of escaped quotes would start again at each of them.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}:,]', re.DOTALL)


def fields_seen(data: bytes) -> dict[str, object]:
    """Names of a body's fields by its beginning, or by all of it where it is no JSON: as far as they can be seen."""
    depth, last = 0, b""
    found: dict[str, object] = {}
    for match in _TOKEN.finditer(data):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif token == b":" and depth == 1:
            found[last[1:-1].decode(errors="replace")] = True
        last = token
    return found
