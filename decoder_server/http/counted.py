"""Tells of every HTTP answer, whoever gave it. Plain ASGI; knows neither paths (there are too many) nor metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
