"""A registry on a port of its own, for Prometheus. Knows no server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, make_asgi_app

from preread.edge.hosts import Guard
from preread.edge.listener import HEADER_SECONDS, bind, make_server

MAX_CONNECTIONS = 64
PATHS = ("/metrics", "/metrics/", "/")


@contextmanager
def metrics_listener(
    registry: CollectorRegistry,
    host: str,
    port: int,
    guard: Guard | None = None,
    *,
    header_seconds: float = HEADER_SECONDS,
) -> Iterator[int]:
    """Answers GET /metrics on a thread until the block ends; yields the port, which 0 leaves to the system.

    Raises:
        OSError: the port is taken.
    """
    app = _Guarded(make_asgi_app(registry), guard or Guard())
    server = make_server(app, max_connections=MAX_CONNECTIONS, header_seconds=header_seconds)
    with bind(host, port, "metrics") as listener:
        thread = threading.Thread(target=_serve, args=(server, listener), name="metrics", daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.config.timeout_graceful_shutdown = 1
            server.should_exit = True
            thread.join()


def _serve(server: Any, listener: socket.socket) -> None:
    asyncio.run(server.serve(sockets=[listener]))


class _Guarded:
    """The application for callers that the guard lets in."""

    def __init__(self, app: Any, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        problem = self._guard.problem(scope)
        if problem is not None:
            await _say(send, 403, problem[1])
        elif scope["path"] not in PATHS:
            await _say(send, 404, "not here; expected /metrics")
        else:
            headers = [(name, value.decode("latin-1").encode()) for name, value in scope["headers"]]  # it reads UTF-8
            await self._app({**scope, "headers": headers}, receive, send)


async def _say(send: Any, status: int, message: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{message}\n".encode()})
