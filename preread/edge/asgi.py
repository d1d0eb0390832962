"""API keys as ASGI middleware: the same keys and scopes as the gRPC interceptor's.

Knows no framework; which path needs which scope, and what a refusal looks like, is the application's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from preread.edge.keys import ApiKeys, Scope, bearer

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# (method, path) -> any one of these scopes; an empty tuple: open to everyone
ScopesOf = Callable[[str, str], tuple[Scope, ...]]
# (status, message) -> the application that answers so
Refuse = Callable[[int, str], App]


class AccessMiddleware:
    """401 without a known key, 403 without the scope. Without keys everything passes."""

    def __init__(self, app: App, keys: ApiKeys, scopes_of: ScopesOf, refuse: Refuse) -> None:
        self._app = app
        self._keys = keys
        self._scopes_of = scopes_of
        self._refuse = refuse

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and self._keys.required:
            needed = self._scopes_of(scope["method"], scope["path"])
            if needed:
                app = self._checked(scope, needed)
        await app(scope, receive, send)

    def _checked(self, scope: Message, needed: tuple[Scope, ...]) -> App:
        # api-key: what a few clients send in place of a bearer token
        presented = bearer(header(scope, b"authorization")) or header(scope, b"api-key") or header(scope, b"x-api-key")
        key = self._keys.find(presented)
        if key is None:
            log.warning("a request of %s without a known key", scope["path"])
            expected = "expected Authorization: Bearer KEY"
            return self._refuse(401, f"the API key is missing or not one of this server; {expected}")
        if not key.may(*needed):
            names = " or ".join(one.value for one in needed)
            log.warning("key %s may not %s %s", key.key_id, scope["method"], scope["path"])
            return self._refuse(403, f"this key has not the scope {names}, which this needs")
        return self._app


def header(scope: Message, name: bytes) -> str:
    """The first header of that (lower-case) name, or ""."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")
