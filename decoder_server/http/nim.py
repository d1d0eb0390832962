"""NVIDIA NIM: query and passages are objects with `text`; logits come back."""

from __future__ import annotations

from decoder_server.http.body import Json
from decoder_server.http.fields import Fields
from decoder_server.http.question import Ask, question


async def answer(body: Fields, ask: Ask) -> Json:
    """`truncate` NONE refuses what is too long; END, its default here, cuts."""
    asked = question(body, "passages").replace(refuse_truncated=body.word("truncate", ("none", "end")) == "none")
    reply = await ask(asked)
    rankings = reply.results("logit")
    for ranking, outcome in zip(rankings, reply.scored, strict=True):
        ranking["logit"] = outcome.margin
    return {"rankings": rankings}
