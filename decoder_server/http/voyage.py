"""Voyage: `top_k`, `truncation`, and documents as plain strings."""

from __future__ import annotations

from decoder_server.http.body import Json
from decoder_server.http.fields import Fields
from decoder_server.http.question import Ask, question


async def answer(body: Fields, ask: Ask) -> Json:
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
