"""Who may call: API keys and their scopes, the host names of a listener, and the web pages that may use it.

A line of a key file is `SCOPES KEY`, scopes with commas between them; # starts a comment. On the command line and in
the environment a key is `SCOPES:KEY`, or KEY alone, which may do everything. Only digests of keys are kept.

A page from elsewhere reaches a server on its user's machine in two ways: by a request across origins, which the browser
declares in Origin, and under a name that was made to point here (DNS rebinding), which Host shows.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
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


def _make_key(key: str, scopes: str) -> _ApiKey:
    """
    Raises:
        ValueError: unknown scopes; a key too short, or with characters that no header can carry. It is not shown.
    """
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"an API key is {len(key)} characters long; expected {MIN_KEY_LENGTH} or more, ASCII, no spaces"
        )
    try:
        return _ApiKey(sha256(key.encode()).digest(), frozenset(map(Scope, scopes.split(","))))
    except ValueError:
        known = ", ".join(scope.value for scope in Scope)
        raise ValueError(f"scopes are {scopes!r:.100}; expected some of {known}, with commas between them") from None


def parse_keys(values: Iterable[str]) -> ApiKeys:
    """Keys as given on the command line: `SCOPES:KEY`, or KEY for one that may do everything."""
    keys = []
    for value in values:
        key = without_scopes(value)
        keys.append(_make_key(key, value.removesuffix(key).rstrip(":") or Scope.ADMIN.value))
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
            keys.append(_make_key(words[1], words[0]))
        except ValueError as exc:
            raise ValueError(f"{path}: line {number}: {exc}") from None
    if not keys:
        raise ValueError(f"{path}: holds no key; expected at least one line SCOPES KEY")
    return ApiKeys(tuple(keys))


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
    if not keys.required and not is_loopback(host, unspecified=False):
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


def _header(scope: Any, name: bytes) -> str:
    return next(iter(_values(scope, name)), "")


AsgiScope = MutableMapping[str, Any]
Address = IPv4Address | IPv6Address
_Authority = tuple[Address | str, int | None]  # host and port
_Origin = tuple[str, Address | str, int | None]  # scheme, host and port

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_-]{1,63})*")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]:@/?#\\\s]+)(:(?P<port>[0-9]{0,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#\s]+)")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_PORTS = {"http": 80, "https": 443}

_ANY: _Origin = ("*", "*", None)
METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
ALLOWED_HEADERS = (
    "authorization", "content-type", "x-request-id", "x-request-timeout-ms", "api-key", "x-api-key", "traceparent",
)  # fmt: skip
EXPOSED_HEADERS = (
    "x-request-id", "retry-after", "retry-after-ms", "www-authenticate", "x-preread-read", "x-preread-degraded",
    "x-preread-asked", "x-preread-stopped-early", "x-preread-query-truncated", "x-preread-truncated", "x-preread-empty",
)  # fmt: skip
PREFLIGHT_SECONDS = 600
MAX_REQUESTED_HEADERS = 64


def join(host: str, port: int | str) -> str:
    """host:port as it is written in addresses and URLs: an IPv6 address stands in brackets."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_authority(text: str) -> _Authority | None:
    """The host and the port of an authority; None where it is none, or has a user.

    A name is in lower case and without the dot of the root.
    """
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        return None
    host, port = match["host"], int(match["port"]) if match["port"] else None
    if port is not None and port > 65535:
        return None
    if host[0] == "[":
        try:
            return IPv6Address(host[1:-1]), port
        except ValueError:
            return None
    try:
        return IPv4Address(host), port
    except ValueError:
        name = host.lower().removesuffix(".")
        return (name, port) if _NAME.fullmatch(name) and not name.replace(".", "").isdigit() else None


class Guard:
    """Admission to a listener, by the name it was called under and the page that calls."""

    def __init__(
        self, allowed_hosts: Sequence[str] = (), allowed_origins: Sequence[str] = (), *, any_host: bool = False
    ) -> None:
        """
        Args:
            allowed_hosts: next to loopback's names and the address that a connection came in at.
            any_host: keys are required, so a name proves nothing.

        Raises:
            ValueError: a host or an origin that cannot be one.
        """
        self._any_host = any_host
        self._origins = frozenset(map(self._allowed_origin, allowed_origins))
        self._hosts = frozenset(_host(name.removeprefix(".")) for name in allowed_hosts)
        self._suffixes = tuple(name.lower() for name in allowed_hosts if name.startswith("."))

    def problem(self, scope: AsgiScope) -> tuple[str, str] | None:
        """Why an ASGI request is refused, as a code and a message; None: it is not.

        A request that names its target in full (`GET http://HOST/PATH`) gets the path alone.
        """
        authorities = []
        for target in [*_absolute(scope), *_values(scope, b"host")]:
            authority = _parse_authority(target)
            if authority is None or not self._allows(authority[0], scope):
                expected = "a name of this machine's loopback, the address it listens on, or one of --allowed-host"
                return "host_not_allowed", f"host is {target[:100]!r}; expected {expected}"
            authorities.append(authority)
        origins = _values(scope, b"origin")
        if origins and (len(origins) > 1 or not self._is_known(origins[0], authorities)):
            expected = "none, this server's own, or one of --allow-origin"
            return "origin_not_allowed", f"origin is {origins[0][:100]!r}; expected {expected}"
        # Without an Origin: a browser tells the same in another word.
        if not origins and scope["method"] not in ("GET", "HEAD") and "cross-site" in _values(scope, b"sec-fetch-site"):
            return "origin_not_allowed", "sec-fetch-site is 'cross-site'; expected a page of this server"
        return None

    def cors(self, scope: AsgiScope) -> dict[str, str]:
        """Headers of every response to the request: a page of an allowed origin may read it."""
        origin = _header(scope, b"origin")
        if not self._is_allowed(origin):
            return {"vary": "origin"}
        exposed = ", ".join(EXPOSED_HEADERS)
        return {"vary": "origin", "access-control-allow-origin": origin, "access-control-expose-headers": exposed}

    def preflight(self, scope: AsgiScope) -> dict[str, str] | None:
        """Headers of the response to a CORS preflight; None: the request is none."""
        if scope["method"] != "OPTIONS" or not _values(scope, b"access-control-request-method"):
            return None
        requested = ",".join(_values(scope, b"access-control-request-headers")).split(",")[:MAX_REQUESTED_HEADERS]
        names = [name for one in requested if _TOKEN.fullmatch(name := one.strip().lower())]
        headers = {
            "vary": "origin, access-control-request-headers",
            "access-control-allow-methods": METHODS,
            "access-control-allow-headers": ", ".join(dict.fromkeys((*ALLOWED_HEADERS, *names))),
            "access-control-max-age": str(PREFLIGHT_SECONDS),
        }
        if "true" in _values(scope, b"access-control-request-private-network"):
            headers["access-control-allow-private-network"] = "true"
        return headers

    def _allowed_origin(self, text: str) -> _Origin:
        if text == "*" and self._any_host:
            return _ANY
        origin = _parse_origin(text)
        if origin is None:
            expected = "SCHEME://HOST[:PORT], or '*' where keys are required"
            raise ValueError(f"allow_origin is {text[:100]!r}; expected {expected}")
        return origin

    def _allows(self, host: Address | str, scope: AsgiScope) -> bool:
        if self._any_host or host in self._hosts or _is_loopback(host):
            return True
        if isinstance(host, str):
            return host.endswith(self._suffixes)
        server = scope.get("server")
        return server is not None and str(host) == str(_unmapped(ip_address(server[0].partition("%")[0])))

    def _is_known(self, origin: str, authorities: Iterable[_Authority]) -> bool:
        """Whether it is this server's own, as the caller names it, or an allowed one."""
        theirs = _parse_origin(origin)
        own = {theirs and (theirs[0], host, _port(theirs[0], port)) for host, port in authorities}
        return (theirs is not None and own == {theirs}) or self._is_allowed(origin)

    def _is_allowed(self, origin: str) -> bool:
        parsed = _parse_origin(origin)
        return parsed is not None and (parsed in self._origins or _ANY in self._origins)


def _parse_origin(text: str) -> _Origin | None:
    """Scheme, host and port of an origin, also where the port is the scheme's; None: it is none, such as `null`."""
    match = _ORIGIN.fullmatch(text.lower())
    authority = _parse_authority(match["authority"]) if match else None
    if match is None or authority is None:
        return None
    host, port = authority
    return match["scheme"], host, _port(match["scheme"], port)


def _port(scheme: str, port: int | None) -> int | None:
    return _PORTS.get(scheme) if port is None else port


def _host(text: str) -> Address | str:
    parsed = _parse_authority(f"[{text}]" if text.count(":") > 1 and text[0] != "[" else text)
    if parsed is None or parsed[1] is not None:
        raise ValueError(f"allowed_host is {text[:100]!r}; expected NAME, .SUFFIX or an address, without a port")
    return parsed[0]


def _is_loopback(host: Address | str) -> bool:
    return host == "localhost" if isinstance(host, str) else host.is_loopback and not getattr(host, "ipv4_mapped", None)


def _unmapped(address: Address) -> Address:
    """The IPv4 address of a connection that a socket for both families took."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _values(scope: AsgiScope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def _absolute(scope: AsgiScope) -> list[str]:
    """The authority of a target in absolute form, as proxies send it; the scope's path becomes the path alone."""
    raw: bytes = scope.get("raw_path") or b""
    match = re.match(rb"(?i:https?)://([^/?#]*)", raw)
    if match is None:
        return []
    scope["raw_path"] = raw[match.end() :] or b"/"
    scope["path"] = unquote(scope["raw_path"].decode("latin-1"))
    return [match[1].decode("latin-1")]
