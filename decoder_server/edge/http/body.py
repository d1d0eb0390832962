"""Bytes to JSON and back, with limits: large documents in steps, beside the event loop. Knows no fields."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from decoder_server.edge.http import parsing
from preread.errors import InvalidRequest
from preread_edge.steps import SMALL_BYTES, Pace, stepped

Json = Any


class TooLarge(Exception):  # noqa: N818 - says what happened
    """A body over its limit; `limit` in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is larger than {limit} bytes")
        self.limit = limit


async def read(request: Request, max_bytes: int) -> bytearray:
    """The whole body.

    Raises:
        TooLarge: at the declared length, or as soon as more has come.
        ClientDisconnect: the client left.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise TooLarge(max_bytes)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise TooLarge(max_bytes)
    return data


async def parse(data: bytes | bytearray, what: str = "body") -> Json:
    """A JSON document.

    Raises:
        InvalidRequest: anything else, NaN and infinity included; a large one of too many values, or too deep.
    """
    if len(data) > SMALL_BYTES:
        return await stepped(parsing.parse, data, what)
    try:
        return parsing.loads(data.decode(json.detect_encoding(data), "surrogatepass"))
    except RecursionError:
        raise InvalidRequest(what, "too deeply nested", "JSON") from None
    except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError are both
        raise InvalidRequest(what, f"not JSON ({parsing.reason(exc)})" if data else "empty", "JSON") from None


def render(document: Json) -> bytes:
    """UTF-8; a NaN would be a bug and raises."""
    return parsing.dumps(document).encode()


async def respond(document: Json, headers: dict[str, str] | None = None, *, is_large: bool = False) -> Response:
    """The response of a document.

    Args:
        is_large: it may hold the caller's texts, and is made in steps.
    """
    if is_large:
        return _Parts(await stepped(parsing.render, document), headers)
    return Response(render(document), headers=headers, media_type="application/json")


class _Parts(Response):
    """A body in parts, each sent when the client took the ones before."""

    def __init__(self, parts: list[bytes], headers: dict[str, str] | None) -> None:
        length = {"content-length": str(sum(map(len, parts)))}
        super().__init__(None, headers=length | (headers or {}), media_type="application/json")
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pace = Pace()  # a fast client takes every part at once
        for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await pace.worked()
        await send({"type": "http.response.body", "body": b""})


async def gone(request: Request) -> None:
    """Returns when the client has left. To be called after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def seconds_left(request: Request, at_most: float) -> float:
    """The time a request has: the server's limit, or less where `x-request-timeout-ms` asks for it.

    Raises:
        InvalidRequest: not a number above 0.
    """
    asked = request.headers.get("x-request-timeout-ms")
    if asked is None:
        return at_most
    try:
        seconds = float(asked) / 1000
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest("x-request-timeout-ms", asked[:100], "milliseconds, more than 0")
    return min(at_most, seconds)
