"""What every dialect asks in the end, and what it hears: a Question, an Answer.

Reads the fields that mean the same everywhere, ours among them; a dialect adds its own. Knows no paths.

Text Embeddings Inference: `texts` in, a flat list out, best first.

NVIDIA NIM: query and passages are objects with `text`; logits come back.

Voyage: `top_k`, `truncation`, and documents as plain strings.

mixedbread: `input` in, `data` out.

Scores of pairs, in their order: `text_1` and `text_2` as vLLM has them, or `pairs`.

Cohere, Jina, vLLM, llama.cpp, infinity and the 4D AI Kit in one answer: each reads its part and ignores the rest.

`object` is never "list": one client rejects that. No field is an empty string: one SDK raises on those.

Which dialect a body is in. The only place that decides.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from decoder_server.edge.floor import texts_alone
from decoder_server.edge.http.body import Json
from decoder_server.edge.http.fields import HALF_A_PAIR, Fields, as_text, is_utf8
from preread.errors import FailedPrecondition, InvalidRequest
from preread.types import Candidate, OnMiss, RerankRequest, Result, Stage, Summary, format_stages, parse_stages

# Whose values are read one by one; other fields are only looked at where a dialect knows them.
LISTS = ("documents", "texts", "passages", "input", "pairs", "text_1", "text_2", "passage_ids", "stages")
MAX_POSITIONS_SHOWN = 500
_CANDIDATE = re.compile(r"^candidates\b(?:\[(\d+)\])?")

ON_MISS = get_args(OnMiss)


@dataclass(frozen=True, slots=True)
class Question:
    """A request for the engine, and what the edge itself has to do about it."""

    request: RerankRequest
    candidates_field: str = "documents"  # what this dialect calls the candidates
    max_tokens_per_doc: int | None = None  # inline texts are cut there
    keep_end: bool = False  # inline texts over the model's limit lose their beginning
    refuse_truncated: bool = False  # rather an error than a score of part of a text
    return_margins: bool = False
    positions: tuple[int, ...] = ()  # of the candidates among the caller's; empty: as they are here

    @property
    def texts_alone(self) -> bool:
        """No candidate has an id: each gets a score, or the request fails."""
        return texts_alone(self.request.candidates)

    def position(self, index: int) -> int:
        """Where the caller put a candidate."""
        return self.positions[index] if self.positions else index

    def where(self, index: int) -> str:
        """The caller's name of a candidate."""
        return f"{self.candidates_field}[{self.position(index)}]"

    def renamed(self, error: InvalidRequest | FailedPrecondition) -> InvalidRequest | FailedPrecondition:
        """The engine speaks of candidates; a dialect has its own word."""

        def own(text: str) -> str:
            return _CANDIDATE.sub(lambda m: self.where(int(m[1])) if m[1] else self.candidates_field, text, count=1)

        if isinstance(error, FailedPrecondition):
            return FailedPrecondition(error.reason, own(error.subject), own(str(error)))
        return InvalidRequest(own(error.field), error.value, error.expected)

    def replace(self, **changes: Any) -> Question:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Answer:
    """The engine's answer: scored outcomes best first, at most top_n; the others in request order."""

    question: Question
    scored: list[Result]
    unscored: list[Result]
    summary: Summary
    request_id: str
    cut: tuple[int, ...] = ()  # indexes of the candidates that were read in part, those beyond top_n too
    empty: tuple[int, ...] = ()  # of those that have the floor of all scores

    @property
    def num_tokens(self) -> int:
        """What was read for it: the query once per candidate, and passages in whole states."""
        return self.summary.num_scored * self.summary.num_query_tokens + self.summary.num_passage_tokens

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}

    def warnings(self) -> list[str]:
        """One line per candidate that is not in the ranking, is there without being read, or was read in part."""
        where = self.question.where
        lines = [f"{where(o.index)} was not scored ({o.status}): {o.message}" for o in self.unscored]
        lines += [f"{where(index)} is empty: it has the lowest score of all and was not read" for index in self.empty]
        lines += [f"{where(index)} was cut: its score is that of a part" for index in self.cut]
        if self.summary.stopped_early:
            lines = ["the deadline came before the last stage was through", *lines]
        if self.summary.degraded is not None:
            lines = [f"read at {self.read} in place of {self.asked} ({self.summary.degraded.reason})", *lines]
        return ["the query was truncated", *lines] if self.summary.query_truncated else lines

    @property
    def read(self) -> str:
        """The ratio that was read, or the stages; "" for a model that reads text."""
        return _read(self.summary.compression_ratio, self.summary.stages)

    @property
    def asked(self) -> str:
        """What would have been read, had the server not been under pressure."""
        degraded = self.summary.degraded
        return self.read if degraded is None else _read(degraded.compression_ratio, degraded.stages)

    def headers(self) -> dict[str, str]:
        """What dialects have no field for."""
        headers = {"x-preread-read": self.read} if self.read else {}
        if self.summary.degraded is not None:
            headers |= {"x-preread-degraded": self.summary.degraded.reason, "x-preread-asked": self.asked}
        return headers | ({"x-preread-stopped-early": "true"} if self.summary.stopped_early else {})

    def results(self, score_name: str) -> list[dict[str, Any]]:
        """`index` and the score under its name; `id` where there is one, `margin` and more where it was asked for."""
        results: list[dict[str, Any]] = []
        for outcome in self.scored:
            result: dict[str, Any] = {"index": outcome.index, score_name: outcome.score}
            if outcome.passage_id:
                result["id"] = outcome.passage_id
            if self.question.return_margins:
                result |= _details(outcome, cut=outcome.index in self.cut)
            results.append(result)
        return results


def shown(positions: Iterable[int]) -> str:
    """A header's list of positions; the first of very many, since a header has to fit."""
    every = sorted(positions)
    return ",".join([*map(str, every[:MAX_POSITIONS_SHOWN]), *(["..."] if len(every) > MAX_POSITIONS_SHOWN else [])])


def _details(outcome: Result, *, cut: bool) -> dict[str, Any]:
    """With return_margins: the margin, and what was read for it."""
    details: dict[str, Any] = {"margin": outcome.margin}
    if cut:
        details["truncated"] = True
    if outcome.compression_ratio:
        details["compression_ratio"] = outcome.compression_ratio
    if outcome.stages:
        details["stages"] = [dataclasses.asdict(stage) for stage in outcome.stages]
    return details


def _read(ratio: int, stages: Sequence[Stage]) -> str:
    return format_stages(stages) if stages else str(ratio or "")


Ask = Callable[[Question], Awaitable[Answer]]


def question(
    body: Fields, candidates_field: str, *, top: str = "top_n", return_text: str = "return_documents"
) -> Question:
    """The fields all dialects share.

    Args:
        top, return_text: what this dialect calls them.

    Raises:
        InvalidRequest: the first field that cannot be read.
    """
    on_miss = body.word("on_miss", ON_MISS)
    request = RerankRequest(
        query=body.needed_text("query"),
        candidates=candidates(body, candidates_field),
        instruction=body.text("instruction"),
        collection=body.text("collection") or None,
        top_n=body.count(top) or 0,
        compression_ratio=body.count("compression_ratio") or None,
        on_miss=cast(OnMiss | None, on_miss),
        return_text=body.flag(return_text) or False,
        model=body.text("model") or "",
        stages=_stages(body),
    )
    return Question(
        request,
        candidates_field,
        max_tokens_per_doc=body.count("max_tokens_per_doc") or None,
        return_margins=body.flag("return_margins") or False,
    )


def check_counts(body: Fields, limit: int) -> None:
    """Before any of them is read.

    Raises:
        InvalidRequest: a list longer than any request's.
    """
    for name in LISTS:
        value = body.get(name)
        if isinstance(value, list) and len(value) > limit:
            raise InvalidRequest(name, f"{len(value)} of them", f"1..{limit}")


def _stages(body: Fields) -> tuple[Stage, ...]:
    """`"32:100, 4:20, 1"`, or a list of objects; what does not fit together the engine refuses."""
    value = body.get("stages")
    if isinstance(value, str):
        try:
            return parse_stages(value) if value else ()
        except ValueError as exc:
            raise InvalidRequest("stages", value[:100], f"RATIO:KEEP, RATIO:KEEP, RATIO ({exc})") from None
    parts = [Fields(item, f"stages[{i}].", f"stages[{i}]") for i, item in enumerate(body.items("stages") or ())]
    return tuple(Stage(part.count("compression_ratio") or 0, part.count("keep") or 0) for part in parts)


def candidates(body: Fields, field: str) -> tuple[Candidate, ...]:
    """Texts, or objects with `text`, `id` or both; `passage_ids` beside them, or alone."""
    items, ids = body.items(field), body.texts("passage_ids")
    if items is None and ids is None:
        raise InvalidRequest(field, "absent", "a list of texts, or passage_ids and a collection")
    if items is None:
        items = [None] * len(ids or ())
    if not items:
        raise InvalidRequest(field, "empty", "at least one")
    if ids is not None and len(ids) != len(items):
        raise InvalidRequest("passage_ids", f"{len(ids)} of them", f"{len(items)}, one for each of {field}")
    found = tuple(_candidate(item, f"{field}[{i}]", ids[i] if ids else "") for i, item in enumerate(items))
    bad = next((i for i, candidate in enumerate(found) if candidate.problem), None)
    if bad is not None and texts_alone(found):  # there is no status to say it in
        raise InvalidRequest(f"{field}[{bad}]", *HALF_A_PAIR)
    return found


def _candidate(item: object, where: str, passage_id: str) -> Candidate:
    """The candidate; one whose text UTF-8 cannot hold has a problem, and no text."""
    if item is None and passage_id:
        return Candidate(passage_id)
    if isinstance(item, str):
        text: str | None = item
    else:
        fields = Fields(item, f"{where}.", where)
        text, passage_id = fields.raw_text("text"), passage_id or fields.text("id") or ""
        if text is None and not passage_id:
            raise InvalidRequest(where, "an object without text", "a string, or an object with text, id or both")
    if text is not None and not is_utf8(text):
        value, expected = HALF_A_PAIR
        return Candidate(passage_id or None, problem=f"the text is {value}; expected {expected}")
    return Candidate(passage_id or None, text)


DIRECTIONS = ("right", "left")


async def answer_tei(body: Fields, ask: Ask) -> Json:
    """`truncate: false` refuses what is too long; absent, it is cut, as TEI does by default."""
    asked = question(body, "texts", return_text="return_text").replace(
        refuse_truncated=body.flag("truncate") is False,
        keep_end=body.word("truncation_direction", DIRECTIONS) == "left",
    )
    reply = await ask(asked)
    ranks = reply.results("score")
    for rank, outcome in zip(ranks, reply.scored, strict=True):
        if body.flag("raw_scores"):
            rank["score"] = outcome.margin
        if asked.request.return_text and outcome.text:
            rank["text"] = outcome.text
    return ranks


async def answer_nim(body: Fields, ask: Ask) -> Json:
    """`truncate` NONE refuses what is too long; END, its default here, cuts."""
    asked = question(body, "passages").replace(refuse_truncated=body.word("truncate", ("none", "end")) == "none")
    reply = await ask(asked)
    rankings = reply.results("logit")
    for ranking, outcome in zip(rankings, reply.scored, strict=True):
        ranking["logit"] = outcome.margin
    return {"rankings": rankings}


async def answer_voyage(body: Fields, ask: Ask) -> Json:
    """`truncation: false` refuses what is too long."""
    top = "top_k" if "top_k" in body else "top_n"
    asked = question(body, "documents", top=top).replace(refuse_truncated=body.flag("truncation") is False)
    reply = await ask(asked)
    data = reply.results("relevance_score")
    for item, outcome in zip(data, reply.scored, strict=True):
        if asked.request.return_text and outcome.text:
            item["document"] = outcome.text
    return {
        "object": "list",
        "data": data,
        "model": reply.summary.model,
        "usage": {"total_tokens": reply.num_tokens},
    }


async def answer_mixedbread(body: Fields, ask: Ask) -> Json:
    top = "top_k" if "top_k" in body else "top_n"
    asked = question(body, "input", top=top, return_text="return_input")
    reply = await ask(asked)
    data = reply.results("score")
    for item, outcome in zip(data, reply.scored, strict=True):
        if asked.request.return_text and outcome.text:
            item["input"] = outcome.text
    return {
        "object": "list",
        "data": data,
        "model": reply.summary.model,
        "usage": reply.usage,
    }


MAX_PAIRS = 1000  # as many as one query may have passages
MAX_QUERIES_AT_ONCE = 8  # of one call; a call should not fill the queue by itself


async def answer_score(body: Fields, ask: Ask) -> Json:
    """One question per distinct query."""
    field, pairs = _pairs(body)
    if "stages" in body:
        raise InvalidRequest("stages", "given", "none here: scores of different stages do not compare")
    if len(pairs) > MAX_PAIRS:
        raise InvalidRequest(field, f"{len(pairs)} of them", f"at most {MAX_PAIRS}")
    by_query: dict[str, list[int]] = {}
    for position, (query, _) in enumerate(pairs):
        if not query:
            where = "text_1" if isinstance(body.get("text_1"), str) else f"text_1[{position}]"
            raise InvalidRequest(
                f"pairs[{position}][0]" if field == "pairs" else where, "", "a query that is not empty"
            )
        by_query.setdefault(query, []).append(position)
    places = asyncio.Semaphore(MAX_QUERIES_AT_ONCE)

    async def ask_one(query: str, positions: list[int]) -> Answer:
        texts = [pairs[position][1] for position in positions]
        shared = {name: body.get(name) for name in ("model", "instruction", "compression_ratio", "return_margins")}
        asked = question(Fields({**shared, "query": query, "documents": texts}), "documents")
        request = dataclasses.replace(asked.request, one_ratio=True)
        async with places:
            return await ask(asked.replace(request=request, candidates_field=field, positions=tuple(positions)))

    tasks = [asyncio.ensure_future(ask_one(query, positions)) for query, positions in by_query.items()]
    try:
        replies = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    scores: dict[int, dict[str, Any]] = {}
    for reply, positions in zip(replies, by_query.values(), strict=True):
        for outcome in reply.scored:
            score: dict[str, Any] = {"index": positions[outcome.index], "object": "score", "score": outcome.score}
            if reply.question.return_margins:
                score |= {"margin": outcome.margin, "compression_ratio": outcome.compression_ratio}
                score |= {"truncated": True} if outcome.index in reply.cut else {}
            scores[positions[outcome.index]] = score
    num_tokens = sum(reply.num_tokens for reply in replies)
    return {
        "id": replies[0].request_id,
        "object": "list",
        "data": [scores[position] for position in range(len(pairs))],
        "model": replies[0].summary.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _pairs(body: Fields) -> tuple[str, list[tuple[str, str]]]:
    """The field that holds the passages, and (query, passage) pairs."""
    if "pairs" in body:
        return "pairs", [_pair(item, f"pairs[{i}]") for i, item in _some(body.items("pairs"), "pairs")]
    queries, passages = _one_or_more(body, "text_1"), _one_or_more(body, "text_2")
    if len(queries) == 1:
        queries = queries * len(passages)
    if len(queries) != len(passages):
        raise InvalidRequest("text_2", f"{len(passages)} texts", f"{len(queries)}, as many as text_1, or one text_1")
    return "text_2", list(zip(queries, passages, strict=True))


def _pair(item: object, where: str) -> tuple[str, str]:
    if not isinstance(item, list) or len(item) != 2:
        raise InvalidRequest(where, "not that", "a list of two strings, query and passage")
    return as_text(item[0], f"{where}[0]"), as_text(item[1], f"{where}[1]")


def _one_or_more(body: Fields, name: str) -> list[str]:
    if isinstance(body.get(name), list):
        return [as_text(item, f"{name}[{i}]") for i, item in _some(body.items(name), name)]
    return [body.needed_text(name)]


def _some(items: list[Any] | None, name: str) -> list[tuple[int, Any]]:
    if not items:
        raise InvalidRequest(name, "empty", "at least one")
    return list(enumerate(items))


DOCUMENTS_PER_SEARCH_UNIT = 100  # Cohere bills so; clients of it read the number


async def answer_superset(body: Fields, ask: Ask) -> Json:
    return pack(await ask(question(body, "documents")))


async def answer_infinity(body: Fields, ask: Ask) -> Json:
    """infinity's shape of it: a document is a string, and raw_scores gives margins."""
    reply = await ask(question(body, "documents"))
    packed = pack(reply)
    for result, outcome in zip(packed["results"], reply.scored, strict=True):
        if "document" in result:
            result["document"] = outcome.text
        if body.flag("raw_scores"):
            result["relevance_score"] = outcome.margin
    return packed


def pack(answer_superset: Answer) -> dict[str, Any]:
    results = answer_superset.results("relevance_score")
    for result, outcome in zip(results, answer_superset.scored, strict=True):
        if answer_superset.question.request.return_text and outcome.text:
            result["document"] = {"text": outcome.text}
    num_documents = len(answer_superset.question.request.candidates)
    meta: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": math.ceil(num_documents / DOCUMENTS_PER_SEARCH_UNIT)},
        "tokens": {"input_tokens": answer_superset.num_tokens, "output_tokens": 0},
    }
    if warnings := answer_superset.warnings():
        meta["warnings"] = warnings
    return {
        "id": answer_superset.request_id,
        "object": "rerank",
        "created": int(time.time()),
        "model": answer_superset.summary.model,
        "results": results,
        "usage": answer_superset.usage,
        "meta": meta,
    }


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of clients is answered."""

    name: str
    answer: Callable[[Fields, Ask], Awaitable[Json]]


TEI = Dialect("tei", answer_tei)
NIM = Dialect("nim", answer_nim)
VOYAGE = Dialect("voyage", answer_voyage)
MIXEDBREAD = Dialect("mixedbread", answer_mixedbread)
SCORE = Dialect("score", answer_score)
INFINITY = Dialect("infinity", answer_infinity)
SUPERSET = Dialect("superset", answer_superset)

FORCED = {"tei": TEI, "voyage": VOYAGE, "infinity": INFINITY}  # by the first part of the path


# A string may be cut off. Were its end required, one of escaped quotes would be looked for from each of them again.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}:,]', re.DOTALL)


def guess(data: bytes) -> Dialect:
    """The dialect of a body by its beginning, or by all of it where it is no JSON: as far as its fields can be told."""
    depth, last = 0, b""
    names: dict[str, object] = {}
    for match in _TOKEN.finditer(data):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif token == b":" and depth == 1:
            names[last[1:-1].decode(errors="replace")] = True
        last = token
    return pick(Fields(names))


def pick(body: Fields) -> Dialect:
    """By what the body has, as wire.md's table says; first match counts."""
    if "texts" in body:
        return TEI
    if "passages" in body:
        return NIM
    if "input" in body:  # before Voyage, with which it shares top_k
        return MIXEDBREAD
    if "text_1" in body or "pairs" in body:
        return SCORE
    if "truncation" in body or ("top_k" in body and "top_n" not in body):
        return VOYAGE
    return SUPERSET
