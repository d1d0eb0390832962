"""The one endpoint behind every reranking path: read -> tell the dialect -> ask the engine -> answer.

Does not know how a dialect looks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from decoder_server.edge.floor import every_scored, fail
from decoder_server.edge.http import body
from decoder_server.edge.http.context import Context, context, read_json, while_connected
from decoder_server.edge.http.dialects import FORCED, MAX_PAIRS, Answer, Dialect, Question, check_counts, pick, shown
from decoder_server.edge.http.fields import Fields
from decoder_server.engine.engine import Engine
from preread.errors import FailedPrecondition, InvalidRequest
from preread.types import RerankRequest, Summary
from preread_edge.steps import SMALL_BYTES


async def rerank(request: Request) -> Response:
    """POST of any dialect."""
    here = context(request)
    deadline = time.monotonic() + body.seconds_left(request, here.config.timeout_seconds)
    fields = Fields(await read_json(request, deadline))
    dialect = _dialect(request, fields)
    request.state.dialect = dialect.name
    if model := request.path_params.get("model"):  # NIM's path has it; a body that names one wins
        fields = fields.or_else("model", model)

    most = max((engine.limits.max_candidates for engine in here.engines.values()), default=0)
    check_counts(fields, max(most, MAX_PAIRS))
    replies: list[Answer] = []

    async def ask(question: Question) -> Answer:
        replies.append(await _ask(here, question, deadline, request.state.request_id))
        return replies[-1]

    answer = await while_connected(request, dialect.answer(fields, ask))
    num_characters = sum(len(one.text or "") + len(one.passage_id) for reply in replies for one in reply.scored)
    return await body.respond(answer, headers_of(replies), is_large=num_characters > SMALL_BYTES)


def _dialect(request: Request, fields: Fields) -> Dialect:
    return FORCED.get(request.url.path.split("/")[1]) or pick(fields)


async def _ask(here: Context, question: Question, deadline: float, request_id: str) -> Answer:
    engine = here.engine(question.request.model)
    wanted, cut = question.request, frozenset[int]()
    if question.max_tokens_per_doc is not None or question.keep_end:
        wanted, cut = await here.call(_cut, engine, question)
    try:
        outcomes, summary = await engine.rerank(wanted, deadline=deadline)
    except (InvalidRequest, FailedPrecondition) as exc:
        raise question.renamed(exc) from exc
    if question.refuse_truncated:
        _check_whole(engine, question, summary)
    encodes = engine.encodes_on_demand or engine.reads_text
    unscored = [outcome for outcome in outcomes if outcome.margin is None]
    if question.texts_alone:
        scored = every_scored(outcomes, summary, question.where, encodes_on_demand=encodes)
        empty, unscored = tuple(outcome.index for outcome in unscored), []
    else:
        scored, empty = [outcome for outcome in outcomes if outcome.margin is not None], ()
        if not scored and question.request.on_miss != "skip":
            # An empty ranking would look like an answer. The first reason stands for all.
            fail(unscored[0], summary, question.where(unscored[0].index), encodes_on_demand=encodes)
    top_n = question.request.top_n or len(scored)
    cut |= frozenset(summary.truncated)
    return Answer(question, scored[:top_n], unscored, summary, request_id, tuple(sorted(cut)), empty)


def headers_of(replies: Sequence[Answer]) -> dict[str, str]:
    """Of all questions in one body. One that was read less than asked is the one to tell."""
    told = next((reply for reply in replies if reply.summary.degraded is not None), replies[-1])
    headers = told.headers()
    if any(reply.summary.query_truncated for reply in replies):
        headers["x-preread-query-truncated"] = "true"
    cut = [reply.question.position(index) for reply in replies for index in reply.cut]
    empty = [reply.question.position(index) for reply in replies for index in reply.empty]
    for name, positions in (("x-preread-truncated", cut), ("x-preread-empty", empty)):
        if positions:
            headers[name] = shown(positions)
    return headers


def _cut(engine: Engine, question: Question) -> tuple[RerankRequest, frozenset[int]]:
    """The request with its texts cut, and the indexes of those that were. Tokenizes: off the event loop."""
    candidates = question.request.candidates

    def cut(text: str | None) -> str | None:
        if text and question.max_tokens_per_doc is not None:
            text = engine.backend.cut(text, question.max_tokens_per_doc)
        if text and question.keep_end and not question.refuse_truncated:
            text = engine.backend.cut(text, None, keep_end=True)
        return text

    texts = [cut(candidate.text) for candidate in candidates]
    pairs = list(zip(candidates, texts, strict=True))
    changed = tuple(dataclasses.replace(candidate, text=text) for candidate, text in pairs)
    request = dataclasses.replace(question.request, candidates=changed)
    return request, frozenset(i for i, (candidate, text) in enumerate(pairs) if text != candidate.text)


def _check_whole(engine: Engine, question: Question, summary: Summary) -> None:
    settings = engine.backend.settings
    if summary.query_truncated:
        raise InvalidRequest("query", "too long", f"at most {settings.max_query_tokens} tokens, or truncation")
    if summary.truncated:
        expected = f"at most {settings.max_passage_tokens} tokens, or truncation"
        raise InvalidRequest(question.where(summary.truncated[0]), "too long", expected)
