"""The one endpoint behind every reranking path: read -> tell the dialect -> ask the engine -> answer.

Does not know how a dialect looks.
"""

from __future__ import annotations

import dataclasses
import time

from starlette.requests import Request
from starlette.responses import Response

from decoder_server.engine import Engine
from decoder_server.errors import InvalidRequest, Unavailable
from decoder_server.http import body
from decoder_server.http.context import Context, context, read_json, renamed, while_connected
from decoder_server.http.dialects import FORCED, Dialect, pick
from decoder_server.http.fields import Fields
from decoder_server.http.question import Answer, Question
from decoder_server.request import Candidate, OnMiss, Outcome, RerankRequest, Status


async def rerank(request: Request) -> Response:
    """POST of any dialect."""
    here = context(request)
    deadline = time.monotonic() + body.seconds_left(request, here.config.timeout_seconds)
    fields = Fields(await read_json(request, deadline))
    dialect = _dialect(request, fields)
    request.state.dialect = dialect.name
    if model := request.path_params.get("model"):  # NIM's path has it; a body that names one wins
        fields = fields.or_else("model", model)

    headers: dict[str, str] = {}

    async def ask(question: Question) -> Answer:
        reply = await _ask(here, question, deadline, request.state.request_id)
        # Of several questions in one body, one that was read less than asked is the one to tell.
        if reply.summary.degraded is not None or "x-preread-degraded" not in headers:
            headers.update(reply.headers())
        return reply

    answer = await while_connected(request, dialect.answer(fields, ask))
    return Response(body.render(answer), headers=headers, media_type="application/json")


def _dialect(request: Request, fields: Fields) -> Dialect:
    return FORCED.get(request.url.path.split("/")[1]) or pick(fields)


async def _ask(here: Context, question: Question, deadline: float, request_id: str) -> Answer:
    engine = here.engine(question.request.model)
    wanted = question.request
    if question.max_tokens_per_doc is not None or question.keep_end:
        wanted = await here.call(_cut, engine, question)
    if question.refuse_truncated:  # those that a cut ranking leaves out count too
        wanted = dataclasses.replace(wanted, top_n=0)
    try:
        outcomes, summary = await engine.rerank(wanted, deadline=deadline)
    except InvalidRequest as exc:
        raise renamed(exc, question.candidates_field) from exc
    scored = [outcome for outcome in outcomes if outcome.margin is not None]
    unscored = [outcome for outcome in outcomes if outcome.margin is None]
    if question.refuse_truncated:
        _check_whole(engine, question, scored, summary.query_truncated)
    if not scored and question.request.on_miss is not OnMiss.SKIP:
        _nothing_scored(engine, question, unscored)
    top_n = question.request.top_n or len(scored)
    return Answer(question, scored[:top_n], unscored, summary, request_id)


def _cut(engine: Engine, question: Question) -> RerankRequest:
    """The request with its texts cut. Tokenizes: off the event loop."""

    def cut(candidate: Candidate) -> Candidate:
        text = candidate.text
        if text and question.max_tokens_per_doc is not None:
            text = engine.backend.cut(text, question.max_tokens_per_doc)
        if text and question.keep_end:
            text = engine.backend.cut(text, None, keep_end=True)
        return dataclasses.replace(candidate, text=text)

    return dataclasses.replace(question.request, candidates=tuple(map(cut, question.request.candidates)))


def _check_whole(engine: Engine, question: Question, scored: list[Outcome], query_truncated: bool) -> None:
    settings = engine.backend.settings
    if query_truncated:
        raise InvalidRequest("query", "too long", f"at most {settings.max_query_tokens} tokens, or truncation")
    cut = min((outcome.index for outcome in scored if outcome.truncated), default=None)
    if cut is not None:
        expected = f"at most {settings.max_passage_tokens} tokens, or truncation"
        raise InvalidRequest(f"{question.candidates_field}[{cut}]", "too long", expected)


def _nothing_scored(engine: Engine, question: Question, unscored: list[Outcome]) -> None:
    """An empty ranking would look like an answer. The first reason stands for all."""
    first = unscored[0]
    field = f"{question.candidates_field}[{first.index}]"
    if first.status is Status.TOO_LONG or not (first.passage_id or question.request.candidates[first.index].text):
        raise InvalidRequest(field, first.status.value, f"a text that can be scored ({first.message})")
    if first.status is Status.MISSING and not engine.encodes_on_demand:
        raise Unavailable(
            f"{field}: {first.message}, and no encoder worker is configured to encode texts; "
            "start the server with --encoder-address, or without --no-encoder"
        )
    if first.status is Status.MISSING:
        raise InvalidRequest(field, first.status.value, f"an id that is stored, or a text ({first.message})")
    raise Unavailable(f"no candidate could be scored; {field}: {first.message}")
