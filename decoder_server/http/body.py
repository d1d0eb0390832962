"""Bytes to JSON and back, with limits. Knows no fields."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from starlette.requests import Request

from decoder_server.errors import InvalidRequest

Json = Any


class TooLarge(Exception):  # noqa: N818 - says what happened
    """A body over its limit; `limit` in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is larger than {limit} bytes")
        self.limit = limit


async def read(request: Request, max_bytes: int) -> bytes:
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
    return bytes(data)


def parse(data: bytes, what: str = "body") -> Json:
    """A JSON document.

    Raises:
        InvalidRequest: anything else, NaN and infinity included.
    """
    try:
        return json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidRequest(what, "too deeply nested", "JSON") from None
    except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError are both
        raise InvalidRequest(what, f"not JSON ({exc})" if data else "empty", "JSON") from None


def render(document: Json) -> bytes:
    """UTF-8; a NaN would be a bug and raises."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


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
        raise InvalidRequest("x-request-timeout-ms", asked, "milliseconds, more than 0")
    return min(at_most, seconds)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
