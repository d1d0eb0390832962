"""Around every answer: `x-request-id`, JSON in place of an exception nobody foresaw, a word to one connection too many.

Plain ASGI, the outermost layer. Logs the id and the exception's type and place, never a request's text.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decoder_server.http import errors
from preread.edge import calls

log = logging.getLogger(__name__)

PROBES = ("/health", "/health/ready", "/metrics")  # a full server is alive, and someone should be able to see why
CLOSE = {"connection": "close"}


class Envelope:
    """Takes the caller's request id where it is fit for a header and a log, else makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = tidy(scope["path"])
        headers = Headers(scope=scope)
        request_id = calls.begin(headers.get("x-request-id", ""), headers.get("traceparent", "")).request_id
        scope.setdefault("state", {})["request_id"] = request_id
        started = finished = False

        async def send_named(message: Message) -> None:
            nonlocal started, finished
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)
            finished = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            if scope["state"].get("crowded") and scope["path"] not in PROBES:
                await errors.respond(errors.crowded(), tei=wants_tei(scope), headers=CLOSE)(scope, receive, send_named)
                return
            await self._app(scope, receive, send_named)
        except Exception as exc:
            log.error("request %s failed: %s", request_id, type(exc).__name__, exc_info=exc)
            if finished:  # the framework has answered, and raised to let us know
                return
            if started:
                raise  # the connection has to break: half an answer must not look like a whole one
            await errors.respond(errors.internal(), tei=wants_tei(scope))(scope, receive, send_named)


def tidy(path: str) -> str:
    """Without empty parts: a base URL that ends in / gives `/v1//rerank`. Passage ids are left alone."""
    if path.startswith("/v1/collections/"):
        return path
    return "/" + "/".join(part for part in path.split("/") if part)


def wants_tei(scope: Scope) -> bool:
    """Whether the caller is known to read TEI's errors: by the path, or because its body said so."""
    path: str = scope["path"]
    return path.startswith("/tei/") or scope.get("state", {}).get("dialect") == "tei"
