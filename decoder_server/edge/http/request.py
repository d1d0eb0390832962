"""Requests to the endpoints and their responses: limits, JSON bodies as typed structs, and what all endpoints share.

The class that a body is read into checks it, and describes it in /openapi.json. Null is absent, unknown fields are
ignored, and an error names the path of the field. The types here are what msgspec does not have: strings that UTF-8
must be able to hold, counts that clients write as 3.0, texts inside objects.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

import msgspec
from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from cache.store import Store
from decoder_server.config import DEFAULT_NAMES, HttpConfig
from decoder_server.edge.http.errors import TOO_SLOW, Problem
from decoder_server.edge.http.json_steps import ENCODER, parse, render_in_steps
from decoder_server.engine.engine import Engine, choose
from decoder_server.readiness import Readiness
from preread import AsyncClient
from preread.errors import InvalidRequest, Path, Unavailable
from preread_edge.steps import Pauses, stepped

T = TypeVar("T")
Endpoint = Callable[["HttpRequest"], Awaitable[Response]]
Schema = dict[str, Any]

MAX_INT = 2**31 - 1  # gRPC's fields hold no more
HALF_A_PAIR = "half of a surrogate pair", "text that UTF-8 can hold"  # value and expectation

_KINDS = {
    "object": "an object", "array": "a list", "str": "a string", "bool": "true or false", "int": "a whole number",
    "float": "a number", "null": "null",
}  # fmt: skip
_AT = re.compile(r" - at `\$(.*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_EXPECTED = re.compile(r"Expected `([^`]+)`( of length \d+)?, got `?([^`]+)`?")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")


@dataclass(eq=False)
class Context:
    """Everything the endpoints of one gateway share. Lives in `app.state.context`."""

    config: HttpConfig
    engines: Mapping[str, Engine]  # empty until the models have loaded; the first is the default
    store: Store
    registry: CollectorRegistry  # of /metrics
    readiness: Readiness
    threads: Executor  # for blocking work: the store, a tokenizer
    worker: AsyncClient | None  # None: no encoder worker is configured
    draining: bool = False

    def engine(self, name: str) -> Engine:
        """The engine of a served name or alias."""
        return choose(self.engines, name, DEFAULT_NAMES | {*self.config.model_aliases})

    def encoder(self) -> AsyncClient:
        """The client of the encoder worker; Unavailable, if there is none."""
        if self.worker is None:
            message = "no encoder worker is configured, so passages cannot be added or deleted here"
            raise Unavailable(f"{message}; start the server with --encoder-address, or without --no-encoder")
        return self.worker


class HttpRequest(Request):
    """A request to an endpoint, with the limits of this edge."""

    @property
    def context(self) -> Context:
        return cast(Context, self.app.state.context)

    def deadline(self) -> float:
        """When the response is due, on time.monotonic's clock: `x-request-timeout-ms` from now, or less."""
        given = self.headers.get("x-request-timeout-ms", "inf")
        try:
            seconds = float(given) / 1000
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            raise InvalidRequest("x-request-timeout-ms", given[:100], "milliseconds, more than 0")
        return time.monotonic() + min(self.context.config.timeout_seconds, seconds)

    async def read_json(self, deadline: float | None = None) -> Any:
        """The body as JSON, within the limits of size and time; None: the server's time for a request, from now."""
        self.check_plain()
        max_bytes = self.context.config.max_body_bytes
        too_large = f"the request body is larger than {max_bytes} bytes"
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            raise Problem(413, too_large)
        data = bytearray()
        try:
            async with asyncio.timeout_at(deadline or time.monotonic() + self.context.config.timeout_seconds):
                async for chunk in self.stream():
                    data += chunk
                    if len(data) > max_bytes:
                        raise Problem(413, too_large)
                return await parse(data)
        except TimeoutError:
            raise Problem(408, TOO_SLOW) from None

    def check_plain(self) -> None:
        """Rejects a compressed body, whose size is unknown before it is in memory."""
        if self.headers.get("content-encoding", "identity") != "identity":
            message = f"content-encoding {self.headers['content-encoding'][:40]!r} is not understood; send it plain"
            raise Problem(415, message, code="unsupported_encoding")

    def check_written(self, *more: str) -> str:
        """The media type of a write: application/json, which no web page can send unasked, or one of `more`."""
        types = ("application/json", *more)
        given = self.headers.getlist("content-type")
        media_type = given[0].partition(";")[0].strip().lower() if len(given) == 1 else ""
        if media_type not in types:
            expected = " or ".join(types[:2])
            raise Problem(415, f"content-type is {''.join(given[:1])[:100]!r}; expected {expected}")
        return media_type

    async def while_connected(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the client leaves. The body must have been read."""

        async def gone() -> None:
            while (await self.receive())["type"] != "http.disconnect":
                pass

        task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            for one in (task, leaving):
                one.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)


async def respond(document: Any, headers: dict[str, str] | None = None, *, is_large: bool = False) -> Response:
    """The response of a struct, or of JSON values. A large one may hold the caller's texts, and is made in steps."""
    values = msgspec.to_builtins(document)
    if not is_large:
        return Response(ENCODER.encode(values), headers=headers, media_type="application/json")
    parts = await stepped(render_in_steps, values)

    async def paced() -> AsyncIterator[bytes]:
        pace = Pauses()  # a fast client takes every part immediately
        for part in parts:
            yield part
            await pace.worked()

    headers = {"content-length": str(sum(map(len, parts)))} | (headers or {})
    return StreamingResponse(paced(), headers=headers, media_type="application/json")


class RawText(str):
    """A string, or an object with `text`, as NIM and Jina write it. UTF-8 may be unable to hold it."""

    schema: ClassVar[Schema] = {"type": "string"}

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, dict):
            value = value.get("text")
        if not isinstance(value, str):
            raise InvalidRequest((), kind_of(value), "a string")
        return cls(value)

    @staticmethod
    def is_utf8(text: str) -> bool:
        """Whether UTF-8 can hold a string: JSON's escapes can spell half a surrogate pair."""
        try:
            return text.isascii() or bool(text.encode())
        except UnicodeEncodeError:
            return False


class Text(RawText):
    """A string as RawText reads it, and UTF-8 can hold it."""

    @classmethod
    def read(cls, value: object) -> Self:
        text = super().read(value)
        if not cls.is_utf8(text):
            raise InvalidRequest((), *HALF_A_PAIR)
        return text


class Query(Text):
    """A text whose object form is published."""

    schema: ClassVar[Schema] = {
        "anyOf": [Text.schema, {"type": "object", "required": ["text"], "properties": {"text": Text.schema}}]
    }


class Word(Text):
    """One of `words`, in any case; in lower case once read."""

    words: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def read(cls, value: object) -> Self:
        word = super().read(value).lower()
        if word not in cls.words:
            raise InvalidRequest((), word[:100], f"one of {', '.join(cls.words)}")
        return cls(word)


class Count(int):
    """A whole number from 0 up: 3.0 is 3, and more than MAX_INT is MAX_INT."""

    schema: ClassVar[Schema] = {"type": "integer", "minimum": 0}

    @classmethod
    def read(cls, value: object) -> Self:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # as languages with one number type write it
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest((), kind_of(value), "a whole number")
        if value < 0:
            raise InvalidRequest((), str(max(value, -MAX_INT)), "0 or more")
        return cls(min(value, MAX_INT))


def kind_of(value: object) -> str:
    """The JSON name of a value's type: the value itself may be a passage."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "absent"}
    return names.get(type(value), "a number")


def read(kind: type[T], value: Any, root: Path = ()) -> T:
    """A JSON value, which stands at `root` in the body, as a struct, or as anything that structs may hold."""
    try:
        return msgspec.convert(value, kind, dec_hook=lambda custom, item: custom.read(item))
    except UnicodeEncodeError:  # the name of a field inside an object
        raise InvalidRequest(root or ("body",), *HALF_A_PAIR) from None
    except msgspec.ValidationError as exc:
        # The path and JSON's names of types, which msgspec has in its message only.
        message, cause = str(exc), exc.__cause__
        at = _AT.search(message)
        path = root + tuple(name or int(index) for name, index in _STEP.findall(at[1] if at else ""))
        if isinstance(cause, InvalidRequest):  # of a type here, with a path relative to the value
            raise InvalidRequest(path + cause.path or ("body",), cause.value, cause.expected) from None
        if missing := _MISSING.match(message):
            raise InvalidRequest((*path, missing[1]), "absent", "a value") from None
        found, expected = "not valid", "a value as /openapi.json describes it"
        if wrong := _EXPECTED.match(message):
            kinds = [_KINDS.get(name, name) for name in wrong[1].split(" | ") if name != "null"]
            found, expected = _KINDS.get(wrong[3], wrong[3]), " or ".join(kinds) + (wrong[2] or "")
        raise InvalidRequest(path or ("body",), found, expected) from None
