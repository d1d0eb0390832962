"""The HTTP application, from the outside in: the envelope of every response, keys, routes, and reranking behind them.

POST of every reranking path: body -> dialect -> engine -> the dialect's answer.
Logs the request's id and an exception's type and place, never a request's text.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decoder_server.edge.engines import every_scored, unscored
from decoder_server.edge.http import collections, dialects, info, names
from decoder_server.edge.http.dialect_request import DialectRequest, DialectResponse, no_step
from decoder_server.edge.http.json_values import read
from decoder_server.edge.http.openapi import JSON, Operation, document
from decoder_server.edge.http.pairs import MAX_PAIRS
from decoder_server.edge.http.request import (
    EXPECTED,
    Context,
    HttpRequest,
    Problem,
    inflated_beginning,
    is_gzip,
    respond,
)
from decoder_server.engine.engine import Engine
from preread.errors import DeadlineExceeded, InvalidRequest, PrereadError, Unauthenticated
from preread.values import RerankRequest
from preread_edge import access, logs
from preread_edge.steps import SMALL_BYTES, Step, stepped

log = logging.getLogger(__name__)

OnAnswer = Callable[[int, float], None]  # status, seconds

# Probes carry no keys; what describes the interface, or is a page to type a key into, needs none.
_HEALTH = (*info.LIVE, *info.READY)
_OPEN = (*info.PAGE_PATHS, *_HEALTH, "/openapi.json")
_PREFIXED = (*_HEALTH, *info.DESCRIPTIONS)  # also there behind a dialect's prefix
_METRICS, _NAMED = "/metrics", re.compile(r"/v1/(collections|aliases)/(?P<name>[^/]+)")
_PROBES = (*_HEALTH, _METRICS)  # a full server is alive, and says why
_NO_DIALECT = ("/v1/collections/", "/v1/explain")
# Of a body that is not read as a whole: enough to tell the dialect of its error.
_SEEN_BYTES = 64 << 10
_PEEK_SECONDS = 1.0
MAX_PATH_SHOWN = 200
_RETRIEVAL = re.compile(r"/v1/retrieval/(?P<model>.+)/reranking")  # NIM's path names the model
MAX_REQUESTS_AT_ONCE = 8  # of one body: it should not fill the queue alone


class _Base(StringConvertor):
    """What may stand before the last part of a path: anything but our own resources, which other keys may use."""

    regex = r"(?:(?!(?:.*/)?v1/(?:collections|aliases)/).{1,200}/)?"


class _RerankingWord(StringConvertor):
    """The last part of a path to which clients send what is to be ranked."""

    regex = r"rerank(?:s|er|ing|ings)?|ranks?|rankings?|scores?"


register_url_convertor("base", _Base())
register_url_convertor("reranking_word", _RerankingWord())


def build(context: Context, keys: access.ApiKeys, guard: access.Guard, on_answer: OnAnswer) -> ASGIApp:
    """The application; `guard` knows the names and web pages it answers to."""
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = operation
    paths = [*by_path]
    by_path["/{base:base}{word:reranking_word}"] = {"POST": OPERATIONS[0]}
    by_path |= {prefix + path: by_path[path] for prefix in dialects.PREFIXES for path in _PREFIXED}

    def by_method(operations: Mapping[str, Operation]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            operation = operations["GET" if request.method == "HEAD" else request.method]
            if operation.query is not None:
                names.check_query(request.query_params, operation.query)
            return await operation.endpoint(HttpRequest(request.scope, request.receive))

        return endpoint

    async def failed(request: Request, exc: Exception) -> Response:
        if isinstance(exc, HTTPException):  # of the router
            exc = _unrouted(request, exc, paths)
        return await _respond(request.scope, request.receive, Problem.of(exc), context.config.dialect)

    routes = [Route(path, by_method(operations), methods=list(operations)) for path, operations in by_path.items()]
    handlers: Any = dict.fromkeys((HTTPException, *EXPECTED, Exception), failed)
    app = Starlette(routes=[*routes, *info.PAGE], exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirected POST loses its body with many clients
    app.state.context = context
    app.state.openapi = document(OPERATIONS, dialects.PREFIXES)
    return Envelope(app, keys, guard, on_answer, context.config.dialect)


def _unrouted(request: Request, exc: HTTPException, paths: Sequence[str]) -> Problem:
    """An unknown path, with the nearest of those that there are; or a method that the path does not have."""
    path = request.scope["path"]
    what = f"{request.method} {path[:MAX_PATH_SHOWN]}"
    if exc.status_code == 405:
        allowed = sorted(Headers(exc.headers).get("allow", "").split(", "))
        message = f"{what}: no such method here; expected {' or '.join(allowed)}"
        return Problem(405, message, headers={"allow": ", ".join(allowed)})
    bare = dialects.without_prefix(path)
    near = names.nearest_path(bare, paths) if len(path) <= MAX_PATH_SHOWN else ""
    if near in (*dialects.PATHS, *_PREFIXED):
        near = path.removesuffix(bare) + near
    hint = f"did you mean {near}?" if near else "/openapi.json lists all paths"
    return Problem(exc.status_code, f"{what}: no such path; {hint}")


def _scopes_of(method: str, path: str) -> tuple[access.Scope, ...]:
    """Scopes of which a key needs one; none: no key is needed."""
    path = dialects.without_prefix(path)
    if method in ("GET", "HEAD"):
        if re.fullmatch("/v1/collections/[^/]+/passages", path):  # ids, as over gRPC; an index key reads counts
            return (access.Scope.RERANK,)
        return () if path in _OPEN else (access.Scope.RERANK, access.Scope.INDEX)
    if method == "POST" and re.fullmatch("/v1/collections/[^/]+/search", path):
        return (access.Scope.RERANK,)
    if method == "POST" and path.startswith("/v1/collections/"):
        return (access.Scope.INDEX,)
    if method == "DELETE" and re.fullmatch("/v1/collections/[^/]+", path):
        return (access.Scope.INDEX,)  # a throw-away one, which such a key can make
    return (access.Scope.RERANK,) if method == "POST" else (access.Scope.ADMIN,)


class Envelope:
    """Around every response: its id (the caller's where it is fit for a header and a log), CORS, errors, counting."""

    def __init__(
        self, app: ASGIApp, keys: access.ApiKeys, guard: access.Guard, on_answer: OnAnswer, dialect: str = "auto"
    ) -> None:
        self._app, self._keys, self._guard, self._on_answer, self._dialect = app, keys, guard, on_answer, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        foreign = self._guard.problem(scope)
        if not scope["path"].startswith("/v1/collections/"):  # passage ids stay as they are
            # Without empty parts: a base URL that ends in / gives `/v1//rerank`.
            scope["path"] = "/" + "/".join(part for part in scope["path"].split("/") if part)
        headers = Headers(scope=scope)
        request_id = logs.begin(headers.get("x-request-id", ""), headers.get("traceparent", "")).request_id
        messages = _Messages(receive, send, {"x-request-id": request_id} | self._guard.cors(scope), self._on_answer)
        scope.setdefault("state", {}).update(request_id=request_id, seen=messages.seen)
        try:
            try:
                app = self._admit(scope, headers, foreign)
            except Problem as problem:
                app = await _respond(scope, messages.receive, problem, self._dialect)
            await app(scope, messages.receive, messages.send)
        except Exception as exc:
            log.error("request %s failed: %s", request_id, type(exc).__name__, exc_info=exc)
            if messages.finished:  # the framework has answered, and raises for the log
                return
            if messages.status:
                raise  # the connection has to break: half a response must not look like a whole one
            response = await _respond(scope, messages.receive, Problem.of(exc), self._dialect)
            await response(scope, messages.receive, messages.send)
        finally:
            messages.count()  # a response that broke off

    def _admit(self, scope: Scope, headers: Headers, foreign: tuple[str, str] | None) -> ASGIApp:
        """The application, or the response to a preflight; raises Problem where the request may not go on."""
        method, path = scope["method"], scope["path"]
        if scope["state"].get("crowded") and dialects.without_prefix(path) not in _PROBES:
            message = "too many connections; try again, or use fewer connections for more requests each"
            raise Problem(429, message, code="too_many_connections", headers={"connection": "close"})
        if foreign is not None:
            raise Problem(403, foreign[1], code=foreign[0])
        if (preflight := self._guard.preflight(scope)) is not None:
            return Response(status_code=204, headers=preflight)
        # api-key: what a few clients send in place of a bearer token
        presented = (headers.get(name, "") for name in ("authorization", "api-key", "x-api-key"))
        try:
            self._keys.check(next(presented), _scopes_of(method, path), f"{method} {path}", *presented)
            if path == _METRICS:
                access.require_every(path)
            elif named := _NAMED.match(path):
                access.require(named["name"])
        except PrereadError as exc:
            raise Problem(401 if isinstance(exc, Unauthenticated) else 403, str(exc)) from exc
        return self._app


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


async def _respond(scope: Scope, receive: Receive, problem: Problem, fixed: str) -> Response:
    """The error in the shape of the caller's dialect, or of `fixed`: told by the body's beginning, which is read."""
    seen, headers, path = scope["state"]["seen"], Headers(scope=scope), scope["path"]
    dialect = scope["state"].get("dialect")
    if dialect is None and scope["method"] == "POST" and not path.startswith(_NO_DIALECT):
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if not seen and has_body and "expect" not in headers:
            # A rejected client has sent this already. The rest is not read.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PEEK_SECONDS):
                    while len(seen) < _SEEN_BYTES:
                        message = await receive()
                        if message["type"] != "http.request" or not message.get("more_body"):
                            break
        beginning = inflated_beginning(bytes(seen)) if is_gzip(headers) else bytes(seen)
        dialect = dialects.pick(dialects.fields_seen(beginning), path, headers, fixed)
    elif dialect is None:
        dialect = dialects.pick({}, path)
    return problem.response(as_text=dialect in dialects.AS_TEXT)


async def _rerank(request: HttpRequest) -> Response:
    engines, until = request.context.engines, request.deadline()
    body = read(dict[str, Any], await request.read_json(until))
    path = request.url.path
    dialect = dialects.pick(body, path, request.headers, request.context.config.dialect)
    request.state.dialect = dialect
    dialects.check_names(body, dialect)
    if body.get("model") is None and (named := _RETRIEVAL.search(path)):
        body["model"] = named["model"]
    most = max([MAX_PAIRS, *(engine.limits.max_candidates for engine in engines.values())])
    for name in dialects.LISTS:  # before any of them is read
        given = body.get(name)
        if isinstance(given, list) and len(given) > most:
            raise InvalidRequest(name, f"{len(given)} of them", f"1..{most}")
    room = asyncio.Semaphore(MAX_REQUESTS_AT_ONCE)

    async def score(one: DialectRequest) -> DialectResponse:
        async with room:
            return await _score(request.context, one, until, request.state.request_id)

    def made(step: Step) -> list[DialectRequest]:
        return read(dialect, body, lax=True).requests(step)

    async def answered() -> list[DialectResponse]:
        try:
            async with asyncio.timeout_at(until):
                requests = await stepped(made) if request.state.is_large else made(no_step)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the documents had been read") from None
        tasks = [asyncio.ensure_future(score(one)) for one in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:  # when one fails, the others are cancelled
            for task in tasks:
                task.cancel()

    responses = await request.while_connected(answered())
    num_characters = sum(len(one.text or "") + len(one.passage_id) for it in responses for one in it.scored)
    returns_body = request.state.is_large and any(one.parsed.documents for one in responses)
    headers, is_large = DialectResponse.headers(responses), returns_body or num_characters > SMALL_BYTES
    return await respond(dialect.pack(responses), headers, is_large=is_large)


async def _score(here: Context, parsed: DialectRequest, until: float, request_id: str) -> DialectResponse:
    engine = here.engine(parsed.request.model)
    request, cut = parsed.request, frozenset[int]()
    if parsed.max_tokens_per_doc is not None or parsed.keep_end:
        request, cut = await asyncio.get_running_loop().run_in_executor(here.threads, _cut, engine, parsed)
    with parsed.naming():
        results, summary = await engine.rerank(request, deadline=until)
    if parsed.reject_truncated and (summary.query_truncated or summary.truncated):
        settings = engine.backend.settings
        path = "query" if summary.query_truncated else parsed.path_of(summary.truncated[0])
        most = settings.max_query_tokens if summary.query_truncated else settings.max_passage_tokens
        raise InvalidRequest(path, "too long", f"at most {most} tokens, or truncation")
    scored = [result for result in results if result.margin is not None]
    others, empty = [result for result in results if result.margin is None], tuple[int, ...]()
    if parsed.texts_alone:
        scored = every_scored(engine, results, summary, parsed.path_of)
        empty, others = tuple(result.index for result in others), []
    elif not scored and request.on_miss != "skip":  # an empty ranking would look like an answer
        raise unscored(engine, others[0], summary, parsed.path_of(others[0].index))
    scored, places = scored[: request.top_n or None], tuple(sorted(cut.union(summary.truncated)))
    return DialectResponse(parsed, scored, others, summary, request_id, places, empty)


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


OPERATIONS = (
    *(
        Operation(
            "POST", path, _rerank, "Rank passages", "rerank" + re.sub(":path|[{}]", "", path).replace("/", "_"),
            "rerank", answers=dialects.ANSWERS, bodies={JSON: dialects.REQUESTS},
        )
        for path in dialects.PATHS
    ),
    *info.OPERATIONS,
    *collections.OPERATIONS,
)  # fmt: skip
