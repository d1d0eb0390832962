"""Tells of every HTTP answer, whoever gave it. Plain ASGI; knows neither paths (there are too many) nor metrics.

Around every answer: the guard at the door, `x-request-id`, CORS, and errors in the caller's dialect.

Plain ASGI, the outermost layer. Logs the id and the exception's type and place, never a request's text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decoder_server.edge.http import dialects, errors
from decoder_server.edge.http.errors import Problem
from preread_edge import logs as calls
from preread_edge.hosts import Guard

# status, seconds
OnAnswer = Callable[[int, float], None]


class Counted:
    """The outermost layer, so that refusals count too. A request that got no answer does not.

    An answer is told of before its last byte goes: a caller who has it whole finds it counted.
    """

    def __init__(self, app: ASGIApp, on_answer: OnAnswer) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status = 0

        def tell() -> None:
            nonlocal status
            if status:
                self._on_answer(status, time.monotonic() - start)
                status = 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                tell()
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            tell()  # an answer that broke off


log = logging.getLogger(__name__)

PROBES = ("/health", "/health/ready", "/metrics")  # a full server is alive, and someone should be able to see why
NO_DIALECT = ("/v1/collections/", "/v1/explain")
CLOSE = {"connection": "close"}
# Of a body that is not read as a whole: enough to tell the dialect its error is to be in.
SEEN_BYTES = 64 << 10
PEEK_SECONDS = 1.0


class Envelope:
    """Takes the caller's request id where it is fit for a header and a log, else makes one."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._guard.problem(scope)
        scope["path"] = tidy(scope["path"])
        headers = Headers(scope=scope)
        request_id = calls.begin(headers.get("x-request-id", ""), headers.get("traceparent", "")).request_id
        seen = bytearray()
        scope.setdefault("state", {}).update(request_id=request_id, seen=seen)
        cors = self._guard.cors(scope)
        started = finished = False

        async def receive_seen() -> Message:
            message = await receive()
            if message["type"] == "http.request" and len(seen) < SEEN_BYTES:
                seen.extend(message["body"][: SEEN_BYTES - len(seen)])
            return message

        async def send_named(message: Message) -> None:
            nonlocal started, finished
            if message["type"] == "http.response.start":
                started = True
                named = MutableHeaders(scope=message)
                named["x-request-id"] = request_id
                for name, value in cors.items():
                    named.setdefault(name, value)
            await send(message)
            finished = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            if scope["state"].get("crowded") and scope["path"] not in PROBES:
                response = await respond(scope, receive_seen, errors.crowded(), CLOSE)
            elif refused is not None:
                response = await respond(scope, receive_seen, errors.stranger(*refused))
            elif (preflight := self._guard.preflight(scope)) is not None:
                response = Response(status_code=204, headers=preflight)
            else:
                await self._app(scope, receive_seen, send_named)
                return
            await response(scope, receive_seen, send_named)
        except Exception as exc:
            log.error("request %s failed: %s", request_id, type(exc).__name__, exc_info=exc)
            if finished:  # the framework has answered, and raised to let us know
                return
            if started:
                raise  # the connection has to break: half an answer must not look like a whole one
            response = await respond(scope, receive_seen, errors.internal())
            await response(scope, receive_seen, send_named)


def tidy(path: str) -> str:
    """Without empty parts: a base URL that ends in / gives `/v1//rerank`. Passage ids are left alone."""
    if path.startswith("/v1/collections/"):
        return path
    return "/" + "/".join(part for part in path.split("/") if part)


async def respond(
    scope: Scope, receive: Receive, problem: Problem, headers: Mapping[str, str] | None = None
) -> Response:
    """The error in the shape of the caller's dialect, which the path tells, or the body: its beginning is read."""
    tei = scope["path"].startswith("/tei/") or scope["state"].get("dialect") == dialects.TEI.name
    if not tei and scope["method"] == "POST" and not scope["path"].startswith(NO_DIALECT):
        await _peek(scope, receive)
        tei = dialects.guess(bytes(scope["state"]["seen"])) is dialects.TEI
    return errors.respond(problem, tei=tei, headers=dict(headers or {}))


async def _peek(scope: Scope, receive: Receive) -> None:
    """Reads what a client that is refused has sent already, if nothing was read. The rest is not read."""
    headers = Headers(scope=scope)
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if scope["state"]["seen"] or not has_body or "expect" in headers:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PEEK_SECONDS):
            while len(scope["state"]["seen"]) < SEEN_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
