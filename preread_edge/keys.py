"""API keys: what each may do, and who may call which gRPC method or HTTP path. Holds digests only.

A line of a key file is `SCOPES KEY`, scopes with commas between them; # starts a comment. On the command line and in
the environment a key is `SCOPES:KEY`, or KEY alone, which may do everything.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

from preread.channel import listens_on_loopback
from preread.errors import PermissionDenied, PrereadError, Unauthenticated

log = logging.getLogger(__name__)

MIN_KEY_LENGTH = 16  # shorter ones can be guessed
# Health and reflection need no key: probes carry none, and the services are described in the repository anyway.
OPEN = ("/grpc.health.v1.", "/grpc.reflection.v1")

App = Callable[[Any, Any, Any], Awaitable[None]]  # of ASGI


class Scope(Enum):
    """A permission that calls need. ADMIN includes the others."""

    RERANK = "rerank"  # rerank, list, encode a text that comes with a request
    INDEX = "index"  # write passages, read counts
    ADMIN = "admin"  # delete, drop, move aliases


@dataclass(frozen=True, slots=True)
class _ApiKey:
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
    """The keys of a server. None at all: every caller may do everything."""

    keys: tuple[_ApiKey, ...] = ()

    @property
    def required(self) -> bool:
        return bool(self.keys)

    def find(self, presented: str) -> _ApiKey | None:
        """The key that was presented, in time that does not depend on how much of it is right."""
        digest = sha256(presented.encode()).digest()
        found = None
        for key in self.keys:  # all of them, also after a match
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def check(self, presented: str, scopes: Iterable[Scope], target: str) -> None:
        """Let a call of `target` pass if the key has any one of the scopes.

        Raises:
            Unauthenticated: no key, or an unknown one.
            PermissionDenied: a key without the scopes.
        """
        key = self.find(presented)
        if key is None:
            log.warning("a call of %s without a known key", target)
            message = "the API key is missing or not one of this server; expected Authorization: Bearer KEY"
            raise Unauthenticated(message, reason="API_KEY_REQUIRED")
        if not key.may(*scopes):
            needed = " or ".join(scope.value for scope in scopes)
            log.warning("key %s may not call %s", key.key_id, target)
            raise PermissionDenied(f"this key lacks the scope {needed}, which {target} needs", reason="SCOPE_REQUIRED")

    def __add__(self, other: ApiKeys) -> ApiKeys:
        return ApiKeys(self.keys + other.keys)


def make_key(key: str, scopes: Iterable[Scope]) -> _ApiKey:
    """
    Raises:
        ValueError: a key too short, or with characters that no header can carry. The message does not show it.
    """
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"an API key is {len(key)} characters long; expected {MIN_KEY_LENGTH} or more, ASCII, no spaces"
        )
    return _ApiKey(sha256(key.encode()).digest(), frozenset(scopes))


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
    """Raises ValueError where strangers could write prompts: control tokens in texts count, and no key is required.

    Args:
        host: the address to listen on.
    """
    if not keys.required and not listens_on_loopback(host):
        raise ValueError(
            f"read_control_tokens is on and {host!r} is reached from other machines without a key; expected API keys, "
            "or a loopback address: a text with control tokens writes the prompt"
        )


# The last matching beginning decides; a method that is not listed needs a key that may do everything.
SCOPES: dict[str, tuple[Scope, ...]] = {
    "/preread.v1.RerankService/": (Scope.RERANK,),
    "/tei.v1.": (Scope.RERANK,),
    "/preread.v1.EncoderService/Encode": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Describe": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Upsert": (Scope.INDEX,),
    "/preread.v1.EncoderService/GetStats": (Scope.INDEX,),
}


def scopes_of(method: str) -> tuple[Scope, ...]:
    """The scopes of which any one lets a key call the gRPC method."""
    return next((scopes for start, scopes in reversed(SCOPES.items()) if method.startswith(start)), (Scope.ADMIN,))


class AccessMiddleware:
    """ASGI: 401 without a known key, 403 without the scope. Without keys everything passes."""

    def __init__(
        self,
        app: App,
        keys: ApiKeys,
        scopes_of: Callable[[str, str], tuple[Scope, ...]],
        refuse: Callable[[int, str], App],
    ) -> None:
        """
        Args:
            scopes_of: (method, path) -> any one of these scopes; an empty tuple: open to everyone.
            refuse: (status, message) -> the application that answers so.
        """
        self._app = app
        self._keys = keys
        self._scopes_of = scopes_of
        self._refuse = refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._app
        if scope["type"] == "http" and self._keys.required:
            needed = self._scopes_of(scope["method"], scope["path"])
            # api-key: what a few clients send in place of a bearer token
            key = bearer(_header(scope, b"authorization")) or _header(scope, b"api-key") or _header(scope, b"x-api-key")
            try:
                if needed:
                    self._keys.check(key, needed, f"{scope['method']} {scope['path']}")
            except PrereadError as error:
                app = self._refuse(401 if isinstance(error, Unauthenticated) else 403, str(error))
        await app(scope, receive, send)


def _header(scope: Any, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")
