"""GET /metrics, and the count of every HTTP answer. Knows Prometheus; not what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# status, seconds
OnAnswer = Callable[[int, float], None]


def metrics_route(registry: CollectorRegistry) -> Route:
    """What Prometheus scrapes."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # Off the event loop: counting collections reads the store.
        return Response(await asyncio.to_thread(encode, registry), headers={"content-type": content_type})

    return Route("/metrics", metrics, methods=["GET"])


class Counted:
    """Plain ASGI: tells of every answer that was begun, whoever gave it."""

    def __init__(self, app: ASGIApp, on_answer: OnAnswer) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status = 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            if status:
                self._on_answer(status, time.monotonic() - start)
