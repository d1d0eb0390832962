"""POST of every reranking path: read the body -> dialect -> engine -> dialect's answer; and /v1/explain."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from starlette.responses import Response

from decoder_server.edge.engines import every_scored, unscored
from decoder_server.edge.http import dialects
from decoder_server.edge.http.dialect_request import DialectRequest, DialectResponse, RerankBody, headers_of
from decoder_server.edge.http.openapi import JSON, Operation
from decoder_server.edge.http.request import Context, Count, HttpRequest, Text, read, respond
from decoder_server.engine.engine import Engine
from decoder_server.engine.explain import MAX_CANDIDATES, explain, first_ids
from preread.errors import InvalidRequest
from preread.types import RerankRequest, Summary
from preread_edge.steps import SMALL_BYTES

MAX_REQUESTS_AT_ONCE = 8  # of one body: it should not fill the queue alone


async def _rerank(request: HttpRequest) -> Response:
    here, until = request.context, request.deadline()
    body = read(dict[str, Any], await request.read_json(until))
    dialect = dialects.pick(body, request.url.path)
    request.state.dialect = dialect
    if body.get("model") is None and "model" in request.path_params:  # NIM's path names it
        body["model"] = request.path_params["model"]
    most = max((engine.limits.max_candidates for engine in here.engines.values()), default=0)
    requests = dialects.parse(dialect, body, max(most, dialects.MAX_PAIRS))
    work = _respond_to(here, requests, until, request.state.request_id)
    responses = await request.while_connected(work)
    num_characters = sum(len(one.text or "") + len(one.passage_id) for it in responses for one in it.scored)
    return await respond(dialect.pack(responses), headers_of(responses), is_large=num_characters > SMALL_BYTES)


async def _respond_to(
    here: Context, requests: Sequence[DialectRequest], until: float, request_id: str
) -> list[DialectResponse]:
    """The responses to all requests of one body; when one fails, the others are cancelled."""
    room = asyncio.Semaphore(MAX_REQUESTS_AT_ONCE)

    async def one(parsed: DialectRequest) -> DialectResponse:
        async with room:
            return await _score(here, parsed, until, request_id)

    tasks = [asyncio.ensure_future(one(parsed)) for parsed in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _score(here: Context, parsed: DialectRequest, until: float, request_id: str) -> DialectResponse:
    engine = here.engine(parsed.request.model)
    request, cut = parsed.request, frozenset[int]()
    if parsed.max_tokens_per_doc is not None or parsed.keep_end:
        request, cut = await here.call(_cut, engine, parsed)
    with parsed.naming():
        results, summary = await engine.rerank(request, deadline=until)
    if parsed.reject_truncated:
        _check_whole(engine, parsed, summary)
    others = [result for result in results if result.margin is None]
    empty: tuple[int, ...] = ()
    if parsed.texts_alone:
        scored = every_scored(engine, results, summary, parsed.path_of)
        empty, others = tuple(result.index for result in others), []
    else:
        scored = [result for result in results if result.margin is not None]
        if not scored and request.on_miss != "skip":  # an empty ranking would look like an answer
            raise unscored(engine, others[0], summary, parsed.path_of(others[0].index))
    top_n = request.top_n or len(scored)
    cut |= frozenset(summary.truncated)
    return DialectResponse(parsed, scored[:top_n], others, summary, request_id, tuple(sorted(cut)), empty)


def _cut(engine: Engine, parsed: DialectRequest) -> tuple[RerankRequest, frozenset[int]]:
    """The request with its texts cut, and the indexes of those that were. Tokenizes: off the event loop."""
    candidates, cut = list(parsed.request.candidates), set[int]()
    for i, candidate in enumerate(candidates):
        text = candidate.text
        if text and parsed.max_tokens_per_doc is not None:
            text = engine.backend.cut(text, parsed.max_tokens_per_doc)
        if text and parsed.keep_end and not parsed.reject_truncated:
            text = engine.backend.cut(text, None, keep_end=True)
        if text != candidate.text:
            cut.add(i)
            candidates[i] = dataclasses.replace(candidate, text=text)
    return dataclasses.replace(parsed.request, candidates=tuple(candidates)), frozenset(cut)


def _check_whole(engine: Engine, parsed: DialectRequest, summary: Summary) -> None:
    settings = engine.backend.settings
    if summary.query_truncated:
        raise InvalidRequest("query", "too long", f"at most {settings.max_query_tokens} tokens, or truncation")
    if summary.truncated:
        expected = f"at most {settings.max_passage_tokens} tokens, or truncation"
        raise InvalidRequest(parsed.path_of(summary.truncated[0]), "too long", expected)


class _ExplainRequest(RerankBody, kw_only=True):
    first: Count | None = None  # passages of the collection, in place of passage_ids


class _Explanation(Struct, kw_only=True, tag_field="object", tag="explanation"):
    model: str
    seconds: float
    results: list[dict[str, Any]]


async def _explain(request: HttpRequest) -> Response:
    here, until = request.context, request.deadline()
    body = read(_ExplainRequest, await request.read_json(until))
    engine = here.engine(body.model or "")
    if body.collection and body.first and body.passage_ids is None:
        if body.first > MAX_CANDIDATES:
            raise InvalidRequest("first", body.first, f"1..{MAX_CANDIDATES}")
        body.passage_ids = [Text(one) for one in await first_ids(engine, body.collection, body.first)]
    parsed = body.request()
    start = time.monotonic()
    with parsed.naming():
        explained = await request.while_connected(explain(engine, parsed.request, until))
    results = [dataclasses.asdict(one) for one in explained]
    seconds = time.monotonic() - start
    return await respond(_Explanation(model=engine.name, seconds=seconds, results=results), is_large=True)


def _operation(path: str) -> Operation:
    plain = path.replace(":path", "").replace("{", "").replace("}", "")
    return Operation(
        "POST", path, _rerank, f"rerank{plain.replace('/', '_')}", "Rank passages", "rerank",
        answers=dialects.ANSWERS, bodies={JSON: dialects.REQUESTS},
    )  # fmt: skip


SCHEMAS = {**dialects.SCHEMAS, "ExplainRequest": _ExplainRequest, "Explanation": _Explanation}
RERANK = tuple(_operation(path) for path in dialects.PATHS)
EXPLAIN = Operation(
    "POST", "/v1/explain", _explain, "explain", "A few candidates at every ratio, and what was attended to", "rerank",
    answers=("Explanation",), bodies={JSON: ("ExplainRequest",)},
)  # fmt: skip
