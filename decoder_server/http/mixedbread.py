"""mixedbread: `input` in, `data` out."""

from __future__ import annotations

from decoder_server.http.body import Json
from decoder_server.http.fields import Fields
from decoder_server.http.question import Ask, question


async def answer(body: Fields, ask: Ask) -> Json:
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
