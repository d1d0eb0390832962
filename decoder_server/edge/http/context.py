"""Surroundings of the endpoints: engines, store, encoder worker and limits; and how a request is read and answered."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cache.store import Store
from decoder_server.config import DEFAULT_NAMES, HttpConfig
from decoder_server.edge.engines import choose
from decoder_server.edge.http.bodies import parse
from decoder_server.edge.http.errors import LEFT, TOO_SLOW, HttpError, Problem
from decoder_server.edge.http.json_steps import ENCODER, render_in_steps
from decoder_server.engine.engine import Engine
from decoder_server.readiness import Readiness
from preread import AsyncClient
from preread.errors import InvalidRequest, Unavailable
from preread_edge.keys import ApiKeys
from preread_edge.steps import Pauses, stepped

T = TypeVar("T")
Endpoint = Callable[["HttpRequest"], Awaitable[Response]]


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
    keys: ApiKeys = field(default_factory=ApiKeys)  # none: no key is required
    tls: bool = False
    draining: bool = False

    @property
    def unready(self) -> str:
        """Why this gateway is not ready; "" where it is."""
        return "the server is stopping" if self.draining else self.readiness.problem

    def engine(self, name: str) -> Engine:
        """The engine of a served name or alias; raises as `choose` does."""
        return choose(self.engines, name, DEFAULT_NAMES | {*self.config.model_aliases})

    def encoder(self) -> AsyncClient:
        """The client of the encoder worker.

        Raises:
            Unavailable: there is none.
        """
        if self.worker is None:
            message = "no encoder worker is configured, so passages cannot be added or deleted here"
            raise Unavailable(f"{message}; start the server with --encoder-address, or without --no-encoder")
        return self.worker

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """The result of a blocking function, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)


class HttpRequest(Request):
    """A request to an endpoint, with the limits of this edge."""

    @property
    def context(self) -> Context:
        found: Context = self.app.state.context
        return found

    def deadline(self) -> float:
        """When the response is due, on time.monotonic's clock: `x-request-timeout-ms` from now, or less.

        Raises:
            InvalidRequest: not a number above 0.
        """
        limit = self.context.config.timeout_seconds
        given = self.headers.get("x-request-timeout-ms")
        if given is None:
            return time.monotonic() + limit
        try:
            seconds = float(given) / 1000
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            raise InvalidRequest("x-request-timeout-ms", given[:100], "milliseconds, more than 0")
        return time.monotonic() + min(limit, seconds)

    async def read_json(self, deadline: float | None = None) -> Any:
        """The body as JSON, within the limits of size and time.

        Args:
            deadline: None: the server's time for a request, from now.

        Raises:
            HttpError: compressed, too large or too slow.
            InvalidRequest: not JSON.
            ClientDisconnect: the client left.
        """
        self.check_plain()
        try:
            async with asyncio.timeout_at(deadline or time.monotonic() + self.context.config.timeout_seconds):
                return await parse(await self._read())
        except TimeoutError:
            raise HttpError(TOO_SLOW) from None

    async def _read(self) -> bytearray:
        """The whole body; over its limit it fails at the declared length, or as soon as more has come."""
        max_bytes = self.context.config.max_body_bytes
        declared = self.headers.get("content-length", "")
        data = bytearray()
        too_large = declared.isdecimal() and int(declared) > max_bytes
        if not too_large:
            async for chunk in self.stream():
                data += chunk
                if too_large := len(data) > max_bytes:
                    break
        if too_large:
            message = f"the request body is larger than {max_bytes} bytes"
            raise HttpError(Problem(413, "invalid_request_error", "body_too_large", message))
        return data

    def check_plain(self) -> None:
        """
        Raises:
            HttpError: a compressed body, whose size is unknown before it is in memory.
        """
        if self.headers.get("content-encoding", "identity") != "identity":
            message = f"content-encoding {self.headers['content-encoding'][:40]!r} is not understood; send it plain"
            raise HttpError(Problem(415, "invalid_request_error", "unsupported_encoding", message))

    def check_written(self, *more: str) -> str:
        """The media type of a write: application/json, which no web page can send unasked, or one of `more`.

        Raises:
            HttpError: another content type, or none.
        """
        types = ("application/json", *more)
        given = self.headers.getlist("content-type")
        media_type = given[0].partition(";")[0].strip().lower() if len(given) == 1 else ""
        if media_type not in types:
            message = f"content-type is {''.join(given[:1])[:100]!r}; expected {' or '.join(types[:2])}"
            raise HttpError(Problem(415, "invalid_request_error", "unsupported_media_type", message))
        return media_type

    async def while_connected(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the client leaves. The body must have been read.

        Raises:
            HttpError: the client left; the response goes nowhere.
        """

        async def gone() -> None:
            while (await self.receive())["type"] != "http.disconnect":
                pass

        task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise HttpError(LEFT)
            return task.result()
        finally:
            for one in (task, leaving):
                one.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)


async def respond(document: Any, headers: dict[str, str] | None = None, *, is_large: bool = False) -> Response:
    """The response of a struct, or of JSON values.

    Args:
        is_large: it may hold the caller's texts, and is made in steps.
    """
    values = msgspec.to_builtins(document)
    if is_large:
        return _Parts(await stepped(render_in_steps, values), headers)
    return Response(ENCODER.encode(values), headers=headers, media_type="application/json")


class _Parts(Response):
    """A body in parts, each sent when the client took the ones before."""

    def __init__(self, parts: list[bytes], headers: dict[str, str] | None) -> None:
        length = {"content-length": str(sum(map(len, parts)))}
        super().__init__(None, headers=length | (headers or {}), media_type="application/json")
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pace = Pauses()  # a fast client takes every part immediately
        for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await pace.worked()
        await send({"type": "http.response.body", "body": b""})
