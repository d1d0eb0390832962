"""Requests to the endpoints, their responses and errors: what all endpoints share."""

import asyncio
import math
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import msgspec
from msgspec import Struct
from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from cache import errors as cache
from cache.store import Store
from decoder_server.config import DEFAULT_NAMES, HttpConfig
from decoder_server.edge.http.json_steps import ENCODER, parse, render_in_steps
from decoder_server.edge.word_search import WordSearch
from decoder_server.engine.engine import Engine, choose
from decoder_server.readiness import Readiness
from preread import AsyncClient, errors
from preread.errors import InvalidRequest, Unavailable
from preread_edge.steps import SMALL_BYTES, Pauses, Step, stepped

T = TypeVar("T")
Endpoint = Callable[["HttpRequest"], Awaitable[Response]]

RETRY_SECONDS = 1.0  # where the cause says nothing
INFLATED_AT_ONCE = 1 << 20  # of a gzip body, before its size is compared with the limit

_TeiKind = Literal["unhealthy", "backend", "overloaded", "validation"]


class _ErrorDetail(Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class _Error(Struct, kw_only=True):
    """An error as all dialects but TEI's read it: each its own part."""

    error: _ErrorDetail
    message: str
    detail: str


class _TeiError(Struct, kw_only=True):
    error: str
    error_type: _TeiKind


ERRORS = (_Error, _TeiError)  # of every dialect but TEI's, and TEI's
_TEI_KINDS: dict[int, _TeiKind] = {429: "overloaded", 503: "unhealthy"}
# `type` and `code` of the body, where the cause has no other.
_BY_STATUS = {
    400: ("invalid_request_error", "bad_request"), 401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"), 404: ("not_found_error", "path_not_found"),
    405: ("invalid_request_error", "method_not_allowed"), 408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "body_too_large"), 415: ("invalid_request_error", "unsupported_media_type"),
    429: ("overloaded_error", "overloaded"), 431: ("invalid_request_error", "header_too_large"),
    499: ("client_error", "client_closed_request"), 500: ("internal_error", "internal_error"),
    503: ("unavailable_error", "unavailable"), 504: ("timeout_error", "deadline_exceeded"),
}  # fmt: skip


class Problem(Exception):  # noqa: N818 - most are made of an error
    """One failed request, before its response has a shape; raised where this edge itself fails it."""

    TOO_SLOW = "the request body did not arrive in time"

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "",  # `type` of the body; "": as the status says, like code
        code: str = "",
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        by_status = _BY_STATUS.get(status, _BY_STATUS[400])
        self.status, self.message, self.param = status, message, param
        self.kind, self.code = kind or by_status[0], code or by_status[1]
        self.headers = dict(headers or {})
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        if status in (429, 503):
            # Whole seconds for everybody, milliseconds for clients that read them. Never 0, which is a busy loop.
            seconds = retry_after_seconds or RETRY_SECONDS
            self.headers["retry-after"] = str(max(1, math.ceil(seconds)))
            self.headers["retry-after-ms"] = str(max(1, math.ceil(seconds * 1000)))

    @classmethod
    def of(cls, error: Exception) -> "Problem":
        """An error of this edge, an engine, the encoder worker, which has an address, the store; or a bug."""
        # less the id, which the response has, and for `own` less the server that it came from: the caller is at fault
        own = message = error.message if isinstance(error, errors.PrereadError) else str(error)
        if isinstance(error, errors.PrereadError) and error.address:
            message = f"encoder worker: {message}"
        match error:
            case Problem():
                return error
            case ClientDisconnect():  # for no reader; the request ends all the same
                return cls(499, "the client closed the connection")
            case errors.InvalidRequest():
                param = error.violations[0].field if error.violations else None
                return cls(400, own, code="invalid_value", param=param)
            case errors.NotFound():
                kind = error.resource_type or "resource"
                return cls(404, own, code=f"{kind}_not_found", param=kind)
            case errors.FailedPrecondition():  # not 409, which clients try again
                return cls(400, own, "failed_precondition_error", (error.reason or "refused").lower())
            case errors.Overloaded():
                return cls(429, message, retry_after_seconds=error.retry_after_seconds)
            case errors.DeadlineExceeded():
                return cls(504, message)
            case errors.Unavailable() | cache.StoreUnavailable() | cache.StoreLocked() | cache.StoreAccessDenied():
                return cls(503, message)
            case cache.StoreFull():
                return cls(503, message)
            case errors.PermissionDenied() if not error.address:  # of the caller's key, not of this server's
                return cls(403, message)
            case errors.PrereadError():  # a bug of the worker: the text of its exception is for its log
                return cls(500, "the encoder worker failed; its log has the cause", code="encoder_failed")
            case cache.CollectionNotFound():
                return cls(404, message, code="collection_not_found", param="collection")
            case cache.InvalidName() | cache.CollectionExists() | cache.CollectionInUse():
                return cls(400, message, code="invalid_value", param="collection")
            case cache.CacheError():
                return cls(500, message, code="store_failed")
        return cls(500, "internal error; the log has it under x-request-id")  # nothing of the cause

    def response(self, *, as_text: bool = False) -> Response:
        """The response, in the common shape; `as_text` in TEI's, where `error` is a string."""
        message = self.message or self.code
        detail = _ErrorDetail(message=message, type=self.kind, param=self.param, code=self.code)
        body: _TeiError | _Error = _Error(error=detail, message=message, detail=message)
        if as_text:
            kind = _TEI_KINDS.get(self.status, "backend" if self.status >= 500 else "validation")
            body = _TeiError(error=message, error_type=kind)
        return Response(ENCODER.encode(msgspec.to_builtins(body)), self.status, self.headers, "application/json")


EXPECTED = (Problem, errors.PrereadError, cache.CacheError, ClientDisconnect)  # any other is a bug


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
    word_search: WordSearch
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


def is_gzip(headers: Mapping[str, str]) -> bool:
    return headers.get("content-encoding", "").lower() in ("gzip", "x-gzip")


class _Gzip:
    """A gzip body in parts: one member or several (RFC 1952). A bomb costs no more than the output that is taken."""

    def __init__(self) -> None:
        self._member = self._new()
        self._is_full = False  # the last part was as long as it might be: zlib may hold more of it
        self._is_within = False  # a member that has not ended
        self.compressed = b""  # what is left of the input

    @property
    def has_more(self) -> bool:
        return self._is_full or bool(self.compressed)

    def inflate(self, step: Step, max_bytes: int) -> bytes:
        """The next part of the output, `max_bytes` or a little more; `step` is called between blocks of it."""
        parts, num_bytes = list[bytes](), 0
        while self.has_more and num_bytes < max_bytes:
            parts.append(self.block())
            num_bytes += len(parts[-1])
            step()
        return b"".join(parts)

    def block(self) -> bytes:
        """At most SMALL_BYTES, of one member. Raises InvalidRequest for what is no gzip."""
        if self._member.eof:
            self._member = self._new()
        try:
            block: bytes = self._member.decompress(self.compressed, SMALL_BYTES)
        except zlib.error:
            raise InvalidRequest("body", "not gzip", "gzip, as content-encoding says") from None
        self._is_within = not self._member.eof
        self._is_full = self._is_within and len(block) == SMALL_BYTES
        self.compressed = self._member.unconsumed_tail if self._is_within else self._member.unused_data
        return block

    def check_end(self) -> None:
        """Raises InvalidRequest for a body that ends within a member."""
        if self._is_within:
            raise InvalidRequest("body", "a part of a gzip stream", "all of it")

    @staticmethod
    def _new() -> Any:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # 16: with a header and a checksum, as gzip has them


def inflated_beginning(data: bytes) -> bytes:
    """The first SMALL_BYTES of a gzip body whose beginning is here; b"" for what is no gzip."""
    gzip = _Gzip()
    gzip.compressed = data
    try:
        return gzip.block()
    except InvalidRequest:
        return b""


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
        max_bytes = self.context.config.max_body_bytes
        too_large = f"the request body is larger than {max_bytes} bytes"
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            raise Problem(413, too_large)
        data = bytearray()
        try:
            async with asyncio.timeout_at(deadline or time.monotonic() + self.context.config.timeout_seconds):
                async for chunk in self.chunks():
                    data += chunk
                    if len(data) > max_bytes:
                        raise Problem(413, too_large)
                self.state.is_large = len(data) > SMALL_BYTES
                return await parse(data)
        except TimeoutError:
            raise Problem(408, Problem.TOO_SLOW) from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, inflated where it is gzip, at most INFLATED_AT_ONCE at a time."""
        self.check_encoding()
        if not is_gzip(self.headers):
            async for chunk in self.stream():
                yield chunk
            return
        gzip = _Gzip()
        async for chunk in self.stream():
            gzip.compressed += chunk
            if gzip.has_more:
                yield gzip.block()
            while gzip.has_more:  # longer than a small body
                yield await stepped(gzip.inflate, INFLATED_AT_ONCE)
        gzip.check_end()

    def check_encoding(self) -> None:
        """Rejects a body that is compressed by anything but gzip."""
        given = self.headers.get("content-encoding", "identity")
        if given.lower() != "identity" and not is_gzip(self.headers):
            message = f"content-encoding {given[:40]!r} is not understood; send gzip, or the body as it is"
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
    """The response of a struct, or of an object of JSON values.

    A large one may hold the caller's texts, and is made in steps.
    """
    values = document if isinstance(document, dict) else msgspec.to_builtins(document)
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
