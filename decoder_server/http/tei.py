"""Text Embeddings Inference: `texts` in, a flat list out, best first."""

from __future__ import annotations

from decoder_server.http.body import Json
from decoder_server.http.fields import Fields
from decoder_server.http.question import Ask, question

DIRECTIONS = ("right", "left")


async def answer(body: Fields, ask: Ask) -> Json:
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
