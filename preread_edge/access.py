"""Who may call: API keys and their scopes, the host names of a listener, and the web pages that may use it.

A page from elsewhere reaches a server on its user's machine in two ways: by a request across origins, which the browser
declares in Origin, and under a name that was made to point here (DNS rebinding), which Host shows.
"""

import hmac
import logging
import re
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from preread.channel import is_loopback
from preread.errors import PermissionDenied, Unauthenticated

log = logging.getLogger(__name__)

MIN_KEY_LENGTH = 16  # shorter ones can be guessed
MAX_NAME_CHARS = 128  # of a collection, in an error
CALLER_CHARS = 32  # 128 bits: no two keys have one name


class Scope(Enum):
    """A permission that calls need. ADMIN includes the others."""

    RERANK = "rerank"  # rerank, list, encode a text that comes with a request
    INDEX = "index"  # write passages, read counts
    ADMIN = "admin"  # delete, drop, move aliases

    @staticmethod
    def needed_by(method: str) -> "tuple[Scope, ...]":
        """The scopes of which any one lets a key call the gRPC method; none: no key is needed."""
        return next((scopes for start, scopes in reversed(_NEEDED.items()) if method.startswith(start)), (Scope.ADMIN,))


# The last matching beginning decides; a method that is not listed needs a key that may do everything.
_NEEDED: dict[str, tuple[Scope, ...]] = {
    "/preread.v1.RerankService/": (Scope.RERANK,),
    "/tei.v1.": (Scope.RERANK,),
    "/preread.v1.EncoderService/Encode": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Describe": (Scope.RERANK, Scope.INDEX),
    "/preread.v1.EncoderService/Upsert": (Scope.INDEX,),
    "/preread.v1.EncoderService/Touch": (Scope.INDEX,),
    "/preread.v1.EncoderService/GetStats": (Scope.INDEX,),
    # Probes carry no key, and the services are described in the repository anyway.
    "/grpc.health.v1.": (),
    "/grpc.reflection.v1": (),
}


# The key of this call; None: none is required. Not in threads that do not copy contexts.
_held: "ContextVar[_Key | None]" = ContextVar("preread_key", default=None)


def _permitted() -> frozenset[str] | None:
    """Collections and aliases that the caller's key may use; None: every one."""
    held = _held.get()
    return held.collections if held is not None else None


def permits(*names: str) -> bool:
    """Whether the caller's key may use a collection that has any of these names and aliases."""
    permitted = _permitted()
    return permitted is None or not permitted.isdisjoint(names)


def may(scope: Scope) -> bool:
    """Whether the caller's key has the scope."""
    held = _held.get()
    return held is None or not held.scopes.isdisjoint((scope, Scope.ADMIN))


def caller() -> str:
    """The caller as one name, a part of its key's digest; "" where no key is required."""
    held = _held.get()
    return held.digest.hex()[:CALLER_CHARS] if held is not None else ""


def caller_scope() -> bytes:
    """Names the collections that the caller's key is bound to: only such keys share what is kept; b"": every one."""
    permitted = _permitted()
    return b"" if permitted is None else ",".join(sorted(permitted)).encode()


def require(*names: str) -> None:
    """Raises PermissionDenied where `permits` is false, whether there is such a collection or not."""
    if not permits(*names):
        message = f"this key may not use collection {names[0][:MAX_NAME_CHARS]!r}; it is bound to others"
        raise PermissionDenied(message, reason="COLLECTION_REQUIRED")


def require_every(target: str) -> None:
    """Raises PermissionDenied for a key that is bound to some collections, where `target` shows all of them."""
    if _permitted() is not None:
        message = f"this key is bound to some collections, and {target} shows every one"
        raise PermissionDenied(message, reason="COLLECTION_REQUIRED")


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes  # SHA-256, all that is kept of a key
    scopes: frozenset[Scope]
    collections: frozenset[str] | None  # or aliases; None: every one


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of a server. None at all: every caller may do everything."""

    keys: tuple[_Key, ...] = ()

    @classmethod
    def parse(cls, values: Iterable[str]) -> "ApiKeys":
        """Keys of the command line and the environment, each as `split` reads it. Raises ValueError."""
        return cls(tuple(_make_key(*cls.split(value)) for value in values))

    @staticmethod
    def split(value: str) -> tuple[str, str]:
        """SCOPES[@COLLECTIONS], with commas, and key of `SCOPES:KEY`; or of KEY alone, which may do everything."""
        scopes, colon, key = value.partition(":")
        is_scoped = colon and {scope.value for scope in Scope}.issuperset(scopes.partition("@")[0].split(","))
        return (scopes, key) if is_scoped else (Scope.ADMIN.value, value)

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """Keys of a file of lines `SCOPES[@COLLECTIONS] KEY`; # starts a comment.

        Raises OSError, and ValueError with the line.
        """
        keys = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = line.partition("#")[0].split()
            if len(words) not in (0, 2):
                raise ValueError(f"{path}: line {number} has {len(words)} words; expected SCOPES KEY")
            try:
                if words:
                    keys.append(_make_key(*words))
            except ValueError as exc:
                raise ValueError(f"{path}: line {number}: {exc}") from None
        if not keys:
            raise ValueError(f"{path}: holds no key; expected at least one line SCOPES KEY")
        return cls(tuple(keys))

    def check(self, authorization: str, scopes: Collection[Scope], target: str, *alone: str) -> None:
        """Raises Unauthenticated without a known key, PermissionDenied where it has none of the scopes needed.

        From here on `permits` answers for that key, in this task and those started from it.
        """
        if not self.keys or not scopes:
            return
        # the key is the one in the header, after Bearer or as its only word, or comes `alone`
        words = authorization.split()
        if words and words[0].lower() == "bearer":
            del words[0]
        presented = words[0] if len(words) == 1 else next(filter(None, alone), "")
        digest, held = sha256(presented.encode()).digest(), None
        for key in self.keys:  # all of them, also after a match: the time tells nothing
            if hmac.compare_digest(digest, key.digest):
                held = key
        if held is None:
            log.warning("a call of %s without a known key", target)
            message = "the API key is missing or not one of this server; expected Authorization: Bearer KEY"
            raise Unauthenticated(message, reason="API_KEY_REQUIRED")
        if Scope.ADMIN not in held.scopes and held.scopes.isdisjoint(scopes):
            needed = " or ".join(scope.value for scope in scopes)
            log.warning("key %s may not call %s", digest.hex()[:8], target)
            raise PermissionDenied(f"this key lacks the scope {needed}, which {target} needs", reason="SCOPE_REQUIRED")
        _held.set(held)

    def refuse_control_tokens(self, host: str) -> None:
        """Raises ValueError where strangers could write prompts: control tokens in texts count, and `host` is open."""
        if not self.keys and not is_loopback(host, unspecified=False):
            problem = f"read_control_tokens is on and {host!r} is reached from other machines without a key"
            expected = "API keys, or a loopback address: a text with control tokens writes the prompt"
            raise ValueError(f"{problem}; expected {expected}")

    def __add__(self, other: "ApiKeys") -> "ApiKeys":
        return ApiKeys(self.keys + other.keys)


def _make_key(scopes: str, key: str) -> _Key:
    """Raises ValueError for unknown scopes, a collection without a name, and a key too short or not fit for a header.

    The key is not shown.
    """
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        expected = f"{MIN_KEY_LENGTH} or more, ASCII, no spaces"
        raise ValueError(f"an API key is {len(key)} characters long; expected {expected}")
    scopes, bound, names = scopes.partition("@")
    collections = frozenset(names.split(",")) if bound else None
    if collections is not None and "" in collections:
        raise ValueError(f"collections are {names!r:.100}; expected their names or aliases, with commas between them")
    try:
        return _Key(sha256(key.encode()).digest(), frozenset(map(Scope, scopes.split(","))), collections)
    except ValueError:
        known = ", ".join(scope.value for scope in Scope)
        raise ValueError(f"scopes are {scopes!r:.100}; expected some of {known}, with commas between them") from None


AsgiScope = MutableMapping[str, Any]
Address = IPv4Address | IPv6Address
_Authority = tuple[Address | str, int | None]  # host and port
_Origin = tuple[str, Address | str, int | None]  # scheme, host and port

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_-]{1,63})*")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]:@/?#\\\s]+)(:(?P<port>[0-9]{0,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#\s]+)")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#]*)")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_PORTS = {"http": 80, "https": 443}

ALLOWED_HEADERS = (
    "authorization", "content-type", "x-request-id", "x-request-timeout-ms", "api-key", "x-api-key", "traceparent",
)  # fmt: skip
EXPOSED_HEADERS = (
    "x-request-id", "retry-after", "retry-after-ms", "www-authenticate", "x-preread-read", "x-preread-degraded",
    "x-preread-asked", "x-preread-stopped-early", "x-preread-query-truncated", "x-preread-truncated", "x-preread-empty",
    "x-preread-lookup",
)  # fmt: skip


def join(host: str, port: int | str) -> str:
    """host:port as it is written in addresses and URLs: an IPv6 address stands in brackets."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


class Guard:
    """Admission to a listener, by the name it was called under and the page that calls."""

    def __init__(
        self, allowed_hosts: Sequence[str] = (), allowed_origins: Sequence[str] = (), *, any_host: bool = False
    ) -> None:
        """Raises ValueError for what is no host, no origin. `any_host`: keys are required, so a name proves nothing."""
        self._any_host, self._any_origin = any_host, any_host and "*" in allowed_origins
        self._hosts: set[Address | str] = set()
        self._origins: set[_Origin] = set()
        self._suffixes = tuple(name.lower() for name in allowed_hosts if name.startswith("."))
        for text in (name.removeprefix(".") for name in allowed_hosts):
            parsed = _parse_authority(f"[{text}]" if text.count(":") > 1 and text[0] != "[" else text)
            if parsed is None or parsed[1] is not None:
                expected = "NAME, .SUFFIX or an address, without a port"
                raise ValueError(f"allowed_host is {text[:100]!r}; expected {expected}")
            self._hosts.add(parsed[0])
        for text in allowed_origins:
            if origin := _parse_origin(text):
                self._origins.add(origin)
            elif text != "*" or not any_host:
                expected = "SCHEME://HOST[:PORT], or '*' where keys are required"
                raise ValueError(f"allow_origin is {text[:100]!r}; expected {expected}")

    def problem(self, scope: AsgiScope) -> tuple[str, str] | None:
        """Why an ASGI request is refused, as a code and a message, or None; a target in full becomes its path."""
        targets, authorities = _values(scope, b"host"), []
        if absolute := _ABSOLUTE.match(scope.get("raw_path") or b""):
            targets.insert(0, absolute[1].decode("latin-1"))
            scope["raw_path"] = absolute.string[absolute.end() :] or b"/"
            scope["path"] = unquote(scope["raw_path"].decode("latin-1"))
        for target in targets:
            authority = _parse_authority(target)
            if authority is None or not self._allows(authority[0], scope):
                expected = "a name of this machine's loopback, the address it listens on, or one of --allowed-host"
                return "host_not_allowed", f"host is {target[:100]!r}; expected {expected}"
            authorities.append(authority)
        if origins := _values(scope, b"origin"):
            theirs = _parse_origin(origins[0])
            own = {theirs and (theirs[0], host, _port(theirs[0], port)) for host, port in authorities}
            if len(origins) > 1 or theirs is None or not (own == {theirs} or self._allows_origin(theirs)):
                expected = "none, this server's own, or one of --allow-origin"
                return "origin_not_allowed", f"origin is {origins[0][:100]!r}; expected {expected}"
        # Without an Origin: a browser tells the same in another word.
        elif scope["method"] not in ("GET", "HEAD") and "cross-site" in _values(scope, b"sec-fetch-site"):
            return "origin_not_allowed", "sec-fetch-site is 'cross-site'; expected a page of this server"
        return None

    def cors(self, scope: AsgiScope) -> dict[str, str]:
        """Headers of every response to the request: a page of an allowed origin may read it."""
        origin = next(iter(_values(scope, b"origin")), "")
        if not self._allows_origin(_parse_origin(origin)):
            return {"vary": "origin"}
        exposed = ", ".join(EXPOSED_HEADERS)
        return {"vary": "origin", "access-control-allow-origin": origin, "access-control-expose-headers": exposed}

    def preflight(self, scope: AsgiScope) -> dict[str, str] | None:
        """Headers of the response to a CORS preflight; None: the request is none."""
        if scope["method"] != "OPTIONS" or not _values(scope, b"access-control-request-method"):
            return None
        requested = ",".join(_values(scope, b"access-control-request-headers")).split(",")[:64]
        names = [name for one in requested if _TOKEN.fullmatch(name := one.strip().lower())]
        headers = {
            "vary": "origin, access-control-request-headers",
            "access-control-allow-methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
            "access-control-allow-headers": ", ".join(dict.fromkeys((*ALLOWED_HEADERS, *names))),
            "access-control-max-age": "600",
        }
        if "true" in _values(scope, b"access-control-request-private-network"):
            headers["access-control-allow-private-network"] = "true"
        return headers

    def _allows(self, host: Address | str, scope: AsgiScope) -> bool:
        if self._any_host or host in self._hosts:
            return True
        if isinstance(host, str):
            return host == "localhost" or host.endswith(self._suffixes)
        if host.is_loopback and not getattr(host, "ipv4_mapped", None):
            return True
        if scope.get("server") is None:
            return False
        server = ip_address(scope["server"][0].partition("%")[0])
        return str(host) == str(getattr(server, "ipv4_mapped", None) or server)  # a socket may take both families

    def _allows_origin(self, origin: _Origin | None) -> bool:
        return origin is not None and (self._any_origin or origin in self._origins)


def _values(scope: AsgiScope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def _parse_authority(text: str) -> _Authority | None:
    """Host, a name in lower case and without the dot of the root, and port; None: it is none, or has a user."""
    match = _AUTHORITY.fullmatch(text)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or (port or 0) > 65535:
        return None
    host = match["host"]
    try:
        return IPv6Address(host[1:-1]) if host[0] == "[" else IPv4Address(host), port
    except ValueError:
        name = host.lower().removesuffix(".")
        return (name, port) if _NAME.fullmatch(name) and not name.replace(".", "").isdigit() else None


def _parse_origin(text: str) -> _Origin | None:
    """Scheme, host and port of an origin, also where the port is the scheme's; None: it is none, such as `null`."""
    match = _ORIGIN.fullmatch(text.lower())
    authority = _parse_authority(match["authority"]) if match else None
    return (match["scheme"], authority[0], _port(match["scheme"], authority[1])) if match and authority else None


def _port(scheme: str, port: int | None) -> int | None:
    return _PORTS.get(scheme) if port is None else port
