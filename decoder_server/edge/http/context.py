"""What the endpoints share: the engines, the store, the encoder worker, the limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import CollectorRegistry
from starlette.requests import Request

from cache.store import Store
from decoder_server.config import ANY_MODEL, DEFAULT_NAMES, HttpConfig
from decoder_server.edge.http import body
from decoder_server.edge.http.errors import HttpError
from decoder_server.engine.engine import Engine
from decoder_server.readiness import Readiness
from preread import AsyncClient
from preread.errors import NotFound, Unavailable
from preread_edge.keys import ApiKeys

T = TypeVar("T")


@dataclass(eq=False)
class Context:
    """One gateway's surroundings. Lives in `app.state.context`."""

    config: HttpConfig
    engines: Mapping[str, Engine]  # empty until the models have loaded; the first is the default
    store: Store
    registry: CollectorRegistry  # what /metrics shows
    readiness: Readiness
    threads: Executor  # for whatever blocks: the store, a tokenizer
    worker: AsyncClient | None  # None: no encoder worker is configured
    keys: ApiKeys = field(default_factory=ApiKeys)  # none: whoever reaches the port may do everything
    tls: bool = False
    draining: bool = False

    @property
    def unready(self) -> str:
        """Why this gateway is not ready; "" where it is."""
        return "the server is stopping" if self.draining else self.readiness.problem

    def engine(self, name: str) -> Engine:
        """
        Raises:
            NotFound: another model is asked for.
            Unavailable: none has loaded yet.
        """
        if not self.engines:
            raise Unavailable("this server is still loading its model")
        if name in self.engines:
            return self.engines[name]
        aliases = self.config.model_aliases
        if not name or name in DEFAULT_NAMES or name in aliases or ANY_MODEL in aliases:
            return next(iter(self.engines.values()))
        raise NotFound("model", name, f"model is {name[:100]!r}; served here: {', '.join(self.engines)}")

    def encoder(self) -> AsyncClient:
        """
        Raises:
            Unavailable: there is none.
        """
        if self.worker is None:
            message = "no encoder worker is configured, so passages cannot be added or deleted here"
            raise Unavailable(f"{message}; start the server with --encoder-address, or without --no-encoder")
        return self.worker

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    async def administer(self, function: Callable[..., T], *args: object) -> T:
        """The same for what no rerank waits for: a store may take its time, and not those threads."""
        return await asyncio.to_thread(function, *args)


def context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. The body must have been read.

    Raises:
        HttpError: the client left; the answer goes nowhere.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(body.gone(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HttpError(499, "client_error", "client_closed_request", "the client closed the connection")
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def read_json(request: Request, deadline: float | None = None) -> body.Json:
    """The body as JSON, within the size limit.

    Args:
        deadline: on time.monotonic's clock; None: the server's time for a request, from now.
    """
    check_encoding(request)
    here = context(request)
    try:
        async with asyncio.timeout_at(deadline or time.monotonic() + here.config.timeout_seconds):
            data = await body.read(request, here.config.max_body_bytes)
            return await body.parse(data)
    except TimeoutError:
        raise too_slow() from None


def too_slow() -> HttpError:
    return HttpError(408, "timeout_error", "request_timeout", "the request body did not arrive in time")


def content_type(request: Request) -> str:
    """The media type of the body, in lower case and without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_written(request: Request, *more: str) -> None:
    """A write says what it writes, as no web page can without being asked first.

    Args:
        more: media types beside application/json.

    Raises:
        HttpError: another content type, or none.
    """
    types = ("application/json", *more)
    if len(request.headers.getlist("content-type")) != 1 or content_type(request) not in types:
        given = request.headers.get("content-type", "")
        message = f"content-type is {given[:100]!r}; expected {' or '.join(types[:2])}"
        raise HttpError(415, "invalid_request_error", "unsupported_media_type", message)


def check_encoding(request: Request) -> None:
    """
    Raises:
        HttpError: a compressed body, whose real size nobody knows before it is in memory.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        message = f"content-encoding {request.headers['content-encoding'][:40]!r} is not understood; send it plain"
        raise HttpError(415, "invalid_request_error", "unsupported_encoding", message)
