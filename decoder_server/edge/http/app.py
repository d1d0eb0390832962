"""The HTTP application, from the outside in: the envelope of every response, keys, routes, and reranking behind them.

POST of every reranking path: body -> dialect -> engine -> the dialect's answer.
Logs the request's id and an exception's type and place, never a request's text.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache.errors import CacheError
from decoder_server.edge.engines import every_scored, unscored
from decoder_server.edge.http import collections, dialects, errors, info
from decoder_server.edge.http.dialect_request import DialectRequest, DialectResponse, headers_of
from decoder_server.edge.http.errors import HttpError, Problem
from decoder_server.edge.http.openapi import JSON, Operation, document
from decoder_server.edge.http.request import Context, Endpoint, HttpRequest, read, respond
from decoder_server.engine.engine import Engine
from preread.errors import InvalidRequest, PrereadError
from preread.values import RerankRequest, Summary
from preread_edge import access, logs
from preread_edge.steps import SMALL_BYTES

log = logging.getLogger(__name__)

OnAnswer = Callable[[int, float], None]  # status, seconds

# Probes carry no keys; what describes the interface, or is a page to type a key into, needs none.
_OPEN = ("/", "/page/page.js", "/page/page.css", "/page/icon.svg", "/health", "/health/ready", "/openapi.json")
_PREFIXED = (*dialects.PATHS, "/v1/models", "/models", "/info", "/health")  # also there behind a dialect's prefix
_PROBES = ("/health", "/health/ready", "/metrics")  # a full server is alive, and says why
_NO_DIALECT = ("/v1/collections/", "/v1/explain")
_CLOSE = {"connection": "close"}
# Of a body that is not read as a whole: enough to tell the dialect of its error.
_SEEN_BYTES = 64 << 10
_PEEK_SECONDS = 1.0
MAX_REQUESTS_AT_ONCE = 8  # of one body: it should not fill the queue alone


def build(context: Context, keys: access.ApiKeys, guard: access.Guard, on_answer: OnAnswer) -> ASGIApp:
    """The application; `guard` knows the names and web pages it answers to."""
    app = Starlette(routes=[*_routes(), *info.PAGE], exception_handlers=_handlers())
    app.router.redirect_slashes = False  # a redirected POST loses its body with many clients
    app.state.context = context
    published = dialects.SCHEMAS | info.SCHEMAS | collections.SCHEMAS | errors.SCHEMAS
    app.state.openapi = document(OPERATIONS, dialects.PREFIXES, published)
    return Envelope(access.AccessMiddleware(app, keys, _scopes_of, _reject), guard, on_answer)


def _scopes_of(method: str, path: str) -> tuple[access.Scope, ...]:
    """Scopes of which a key needs one; none: no key is needed."""
    for prefix in dialects.PREFIXES:
        path = path.removeprefix(prefix)
    if method in ("GET", "HEAD"):
        return () if path in _OPEN else (access.Scope.RERANK, access.Scope.INDEX)
    if method == "POST" and path.startswith("/v1/collections/"):
        return (access.Scope.INDEX,)
    return (access.Scope.RERANK,) if method == "POST" else (access.Scope.ADMIN,)


class Envelope:
    """Around every response: its id (the caller's where it is fit for a header and a log), CORS, errors, counting."""

    def __init__(self, app: ASGIApp, guard: access.Guard, on_answer: OnAnswer) -> None:
        self._app = app
        self._guard = guard
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        foreign = self._guard.problem(scope)
        scope["path"] = _tidy(scope["path"])
        headers = Headers(scope=scope)
        request_id = logs.begin(headers.get("x-request-id", ""), headers.get("traceparent", "")).request_id
        messages = _Messages(receive, send, {"x-request-id": request_id} | self._guard.cors(scope), self._on_answer)
        scope.setdefault("state", {}).update(request_id=request_id, seen=messages.seen)
        try:
            if scope["state"].get("crowded") and scope["path"] not in _PROBES:
                response = await _respond(scope, messages.receive, errors.CROWDED, _CLOSE)
            elif foreign is not None:
                response = await _respond(scope, messages.receive, Problem(403, "permission_error", *foreign))
            elif (preflight := self._guard.preflight(scope)) is not None:
                response = Response(status_code=204, headers=preflight)
            else:
                await self._app(scope, messages.receive, messages.send)
                return
            await response(scope, messages.receive, messages.send)
        except Exception as exc:
            log.error("request %s failed: %s", request_id, type(exc).__name__, exc_info=exc)
            if messages.finished:  # the framework has answered, and raises for the log
                return
            if messages.status:
                raise  # the connection has to break: half a response must not look like a whole one
            response = await _respond(scope, messages.receive, errors.INTERNAL)
            await response(scope, messages.receive, messages.send)
        finally:
            messages.count()  # a response that broke off


@dataclasses.dataclass(eq=False, slots=True)
class _Messages:
    """ASGI messages of one request: keeps the beginning of its body, adds headers to its response, and counts that.

    It is counted before its last byte goes: a client that has the whole response finds it counted.
    """

    _receive: Receive
    _send: Send
    _headers: Mapping[str, str]
    _on_answer: OnAnswer
    _start: float = dataclasses.field(default_factory=time.monotonic)
    _counted: bool = False
    seen: bytearray = dataclasses.field(default_factory=bytearray)
    status: int = 0
    finished: bool = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and len(self.seen) < _SEEN_BYTES:
            self.seen.extend(message["body"][: _SEEN_BYTES - len(self.seen)])
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._headers["x-request-id"]
            for name, value in self._headers.items():
                headers.setdefault(name, value)
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        if is_last:
            self.count()
        await self._send(message)
        self.finished = is_last

    def count(self) -> None:
        if self.status and not self._counted:
            self._counted = True
            self._on_answer(self.status, time.monotonic() - self._start)


def _tidy(path: str) -> str:
    """Without empty parts: a base URL that ends in / gives `/v1//rerank`. Passage ids stay as they are."""
    if path.startswith("/v1/collections/"):
        return path
    return "/" + "/".join(part for part in path.split("/") if part)


async def _respond(
    scope: Scope, receive: Receive, problem: Problem, headers: Mapping[str, str] | None = None
) -> Response:
    """The error in the shape of the caller's dialect: by the path, the body, or its beginning, which is read."""
    tei = scope["path"].startswith("/tei/") or scope["state"].get("dialect") is dialects.TEI
    if not tei and scope["method"] == "POST" and not scope["path"].startswith(_NO_DIALECT):
        await _peek(scope, receive)
        tei = dialects.guess(bytes(scope["state"]["seen"])) is dialects.TEI
    return problem.response(tei=tei, headers=headers)


async def _peek(scope: Scope, receive: Receive) -> None:
    """Reads what a rejected client has sent already, if nothing was read. The rest is not read."""
    headers = Headers(scope=scope)
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if scope["state"]["seen"] or not has_body or "expect" in headers:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PEEK_SECONDS):
            while len(scope["state"]["seen"]) < _SEEN_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return


def _routes() -> list[Route]:
    by_path: dict[str, dict[str, Endpoint]] = {}
    for operation in OPERATIONS:
        prefixes = ("", *dialects.PREFIXES) if operation.path in _PREFIXED else ("",)
        for prefix in prefixes:
            by_path.setdefault(prefix + operation.path, {})[operation.method] = operation.endpoint
    return [Route(path, _by_method(endpoints), methods=list(endpoints)) for path, endpoints in by_path.items()]


def _by_method(endpoints: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        call = endpoints["GET" if request.method == "HEAD" else request.method]
        return await call(HttpRequest(request.scope, request.receive))

    return endpoint


def _reject(status: int, message: str) -> access.App:
    async def reject(scope: Any, receive: Any, send: Any) -> None:
        response = await _respond(scope, receive, Problem.of_status(status, message))
        await response(scope, receive, send)

    return reject


def _handlers() -> dict[Any, Any]:  # Starlette's type admits no handler of a narrower exception
    async def failed(request: Request, exc: Exception) -> Response:
        return await _respond(request.scope, request.receive, Problem.of(exc) or errors.INTERNAL)

    async def routed(request: Request, exc: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {exc.detail}"
        problem = Problem.of_status(exc.status_code, message)
        return await _respond(request.scope, request.receive, problem, exc.headers)

    async def left(request: Request, exc: ClientDisconnect) -> Response:
        return errors.LEFT.response()  # for no reader; the request ends all the same

    kinds = (HttpError, PrereadError, CacheError, Exception)
    return {HTTPException: routed, ClientDisconnect: left, **dict.fromkeys(kinds, failed)}


async def _rerank(request: HttpRequest) -> Response:
    engines, until = request.context.engines, request.deadline()
    body = read(dict[str, Any], await request.read_json(until))
    dialect = dialects.pick(body, request.url.path)
    request.state.dialect = dialect
    if body.get("model") is None and "model" in request.path_params:  # NIM's path names it
        body["model"] = request.path_params["model"]
    most = max((engine.limits.max_candidates for engine in engines.values()), default=0)
    requests = dialects.parse(dialect, body, max(most, dialects.MAX_PAIRS))
    responses = await request.while_connected(_respond_to(request, requests, until))
    num_characters = sum(len(one.text or "") + len(one.passage_id) for it in responses for one in it.scored)
    return await respond(dialect.pack(responses), headers_of(responses), is_large=num_characters > SMALL_BYTES)


async def _respond_to(request: HttpRequest, parsed: Sequence[DialectRequest], until: float) -> list[DialectResponse]:
    """The responses to all requests of one body; when one fails, the others are cancelled."""
    room = asyncio.Semaphore(MAX_REQUESTS_AT_ONCE)

    async def score(one: DialectRequest) -> DialectResponse:
        async with room:
            return await _score(request.context, one, until, request.state.request_id)

    tasks = [asyncio.ensure_future(score(one)) for one in parsed]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _score(here: Context, parsed: DialectRequest, until: float, request_id: str) -> DialectResponse:
    engine = here.engine(parsed.request.model)
    request, cut = parsed.request, frozenset[int]()
    if parsed.max_tokens_per_doc is not None or parsed.keep_end:
        request, cut = await asyncio.get_running_loop().run_in_executor(here.threads, _cut, engine, parsed)
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


def _operation(path: str) -> Operation:
    name = "rerank" + path.replace(":path", "").replace("{", "").replace("}", "").replace("/", "_")
    bodies = {JSON: dialects.REQUESTS}
    return Operation("POST", path, _rerank, "Rank passages", name, "rerank", answers=dialects.ANSWERS, bodies=bodies)


OPERATIONS = (*map(_operation, dialects.PATHS), *info.OPERATIONS, *collections.OPERATIONS)
