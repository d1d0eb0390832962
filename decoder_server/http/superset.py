"""Cohere, Jina, vLLM, llama.cpp, infinity and the 4D AI Kit in one answer: each reads its part and ignores the rest.

`object` is never "list": one client rejects that. No field is an empty string: one SDK raises on those.
"""

from __future__ import annotations

import math
import time
from typing import Any

from decoder_server.http.body import Json
from decoder_server.http.fields import Fields
from decoder_server.http.question import Answer, Ask, question

DOCUMENTS_PER_SEARCH_UNIT = 100  # Cohere bills so; clients of it read the number


async def answer(body: Fields, ask: Ask) -> Json:
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


def pack(answer: Answer) -> dict[str, Any]:
    results = answer.results("relevance_score")
    for result, outcome in zip(results, answer.scored, strict=True):
        if answer.question.request.return_text and outcome.text:
            result["document"] = {"text": outcome.text}
    num_documents = len(answer.question.request.candidates)
    meta: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": math.ceil(num_documents / DOCUMENTS_PER_SEARCH_UNIT)},
        "tokens": {"input_tokens": answer.num_tokens, "output_tokens": 0},
    }
    if warnings := answer.warnings():
        meta["warnings"] = warnings
    return {
        "id": answer.request_id,
        "object": "rerank",
        "created": int(time.time()),
        "model": answer.summary.model,
        "results": results,
        "usage": answer.usage,
        "meta": meta,
    }
