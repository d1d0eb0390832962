"""API keys and what each may do. Holds digests only; knows no transport.

A line of a key file is `SCOPES KEY`, scopes with commas between them; # starts a comment. On the
command line and in the environment a key is `SCOPES:KEY`, or KEY alone, which may do everything.

Turns away gRPC calls that bring no key, or one that may not do this. Knows which method needs which scope.

Health and reflection are open: probes carry no keys, and the services are described in the repository anyway.

API keys as ASGI middleware: the same keys and scopes as the gRPC interceptor's.

Knows no framework; which path needs which scope, and what a refusal looks like, is the application's.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc

from preread.channel import listens_on_loopback
from preread_edge import rpc
from preread_edge.rpc import replaced

MIN_KEY_LENGTH = 16  # shorter ones can be guessed


class Scope(Enum):
    """What a call needs. ADMIN includes the others."""

    RERANK = "rerank"  # ask: rerank, list, encode a text that comes with a request
    INDEX = "index"  # write passages, read counts
    ADMIN = "admin"  # take away: delete, drop, move aliases


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key; the key itself is not kept."""

    digest: bytes  # SHA-256
    scopes: frozenset[Scope]

    @property
    def key_id(self) -> str:
        """Tells keys apart in logs without giving them away."""
        return self.digest.hex()[:8]

    def may(self, *scopes: Scope) -> bool:
        """Whether any of the scopes is this key's."""
        return Scope.ADMIN in self.scopes or not self.scopes.isdisjoint(scopes)


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of a server. None at all: whoever reaches it may do everything."""

    keys: tuple[ApiKey, ...] = ()

    @property
    def required(self) -> bool:
        return bool(self.keys)

    def find(self, presented: str) -> ApiKey | None:
        """The key that was presented, in time that does not depend on how much of it is right."""
        digest = sha256(presented.encode()).digest()
        found = None
        for key in self.keys:  # all of them, also after a match
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def __add__(self, other: ApiKeys) -> ApiKeys:
        return ApiKeys(self.keys + other.keys)


def make_key(key: str, scopes: Iterable[Scope]) -> ApiKey:
    """
    Raises:
        ValueError: a key too short, or with characters that no header can carry. The message does not show it.
    """
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"an API key is {len(key)} characters long; expected {MIN_KEY_LENGTH} or more, ASCII, no spaces"
        )
    return ApiKey(sha256(key.encode()).digest(), frozenset(scopes))


def parse_keys(values: Iterable[str]) -> ApiKeys:
    """Keys as given on the command line: `SCOPES:KEY`, or KEY for one that may do everything."""
    keys = []
    for value in values:
        key = without_scopes(value)
        scopes = value.removesuffix(key).rstrip(":")
        keys.append(make_key(key, _scopes(scopes) if scopes else [Scope.ADMIN]))
    return ApiKeys(tuple(keys))


def without_scopes(value: str) -> str:
    """The key in `SCOPES:KEY`, or KEY itself, which may have colons too."""
    scopes, colon, key = value.partition(":")
    known = {scope.value for scope in Scope}
    return key if colon and known.issuperset(scopes.split(",")) else value


def read_keys(path: Path) -> ApiKeys:
    """A key file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line that is not `SCOPES KEY`, named by number; or no key at all.
    """
    keys = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"{path}: line {number} has {len(words)} words; expected SCOPES KEY")
        try:
            keys.append(make_key(words[1], _scopes(words[0])))
        except ValueError as exc:
            raise ValueError(f"{path}: line {number}: {exc}") from None
    if not keys:
        raise ValueError(f"{path}: holds no key; expected at least one line SCOPES KEY")
    return ApiKeys(tuple(keys))


def _scopes(text: str) -> list[Scope]:
    try:
        return [Scope(name) for name in text.split(",")]
    except ValueError:
        known = ", ".join(scope.value for scope in Scope)
        raise ValueError(f"scopes are {text!r:.100}; expected some of {known}, with commas between them") from None


def bearer(header: str) -> str:
    """The key in an `authorization` header: after Bearer, or all of it where it is one word; "" where there is none."""
    words = header.split()
    if len(words) == 2 and words[0].lower() == "bearer":
        return words[1]
    return words[0] if len(words) == 1 and words[0].lower() != "bearer" else ""


def refuse_control_tokens(host: str, keys: ApiKeys) -> None:
    """Raises ValueError where strangers could write prompts: control tokens in texts count, and no key is asked for.

    Args:
        host: the address to listen on.
    """
    if not keys.required and not listens_on_loopback(host):
        raise ValueError(
            f"read_control_tokens is on and {host!r} is reached from other machines without a key; expected API keys, "
            "or a loopback address: a text with control tokens writes the prompt"
        )


log = logging.getLogger(__name__)

OPEN = ("/grpc.health.v1.", "/grpc.reflection.v1")
# The last matching beginning decides; what is not listed needs a key that may do everything.
SCOPES: dict[str, tuple[Scope, ...]] = {
    "/preread.v1.RerankService/": (Scope.RERANK,),
    "/tei.v1.": (Scope.RERANK,),
    "/preread.v1.EncoderService/Encode": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Describe": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Upsert": (Scope.INDEX,),
    "/preread.v1.EncoderService/GetStats": (Scope.INDEX,),
}


def scopes_of(method: str) -> tuple[Scope, ...]:
    """Any one of these lets a key call the method."""
    return next((scopes for start, scopes in reversed(SCOPES.items()) if method.startswith(start)), (Scope.ADMIN,))


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs only
    """UNAUTHENTICATED without a known key, PERMISSION_DENIED without the scope."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not self._keys.required or method.startswith(OPEN):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        key = self._keys.find(bearer(str(metadata.get("authorization", ""))))
        if key is None:
            log.warning("a call of %s without a known key", method)
            return _refusing(
                handler,
                grpc.StatusCode.UNAUTHENTICATED,
                "API_KEY_REQUIRED",
                "authorization is missing or not a key of this server; expected Bearer KEY",
            )
        scopes = scopes_of(method)
        if not key.may(*scopes):
            needed = " or ".join(scope.value for scope in scopes)
            log.warning("key %s may not call %s", key.key_id, method)
            return _refusing(
                handler,
                grpc.StatusCode.PERMISSION_DENIED,
                "SCOPE_REQUIRED",
                f"this key has not the scope {needed}, which {method} needs",
            )
        return handler


def _refusing(handler: Any, code: grpc.StatusCode, reason: str, message: str) -> Any:
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await rpc.abort(context, code, message, rpc.error_info(reason))

    return replaced(handler, refuse)


AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
App = Callable[[AsgiMessage, Receive, Send], Awaitable[None]]

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

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and self._keys.required:
            needed = self._scopes_of(scope["method"], scope["path"])
            if needed:
                app = self._checked(scope, needed)
        await app(scope, receive, send)

    def _checked(self, scope: AsgiMessage, needed: tuple[Scope, ...]) -> App:
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


def header(scope: AsgiMessage, name: bytes) -> str:
    """The first header of that (lower-case) name, or ""."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")
