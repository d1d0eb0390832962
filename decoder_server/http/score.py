"""Scores of pairs, in their order: `text_1` and `text_2` as vLLM has them, or `pairs`."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from decoder_server.errors import InvalidRequest
from decoder_server.http.body import Json
from decoder_server.http.fields import Fields, as_text
from decoder_server.http.question import Answer, Ask, question

MAX_PAIRS = 1000  # as many as one query may have passages
MAX_QUERIES_AT_ONCE = 8  # of one call; a call should not fill the queue by itself


async def answer(body: Fields, ask: Ask) -> Json:
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
