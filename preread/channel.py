"""How a client reaches a server: addresses and proxies, TLS, keepalive, message limits, metadata and retries.

Retried are Overloaded with a server's hint and Unavailable: nothing was done, or doing it again changes nothing. All
calls of a client share a budget (gRPC's retry throttling, proposal A6): no service in trouble is buried under retries.
"""

import ipaddress
import math
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from preread import wire
from preread.arguments import Argument
from preread.errors import Overloaded, PrereadError, Unavailable
from preread.v1.encoder_pb2_grpc import EncoderServiceStub
from preread.v1.rerank_pb2_grpc import RerankServiceStub

LOCAL_ADDRESS = "127.0.0.1:50051"
# While a call runs. Our servers take a ping every ten seconds and less; others hang up on clients that ping more often
# than they were set up for ("too_many_pings"), some of them below five minutes.
KEEPALIVE_SECONDS = 60
BUDGET_TOKENS = 10.0  # as in A6's example: retries stop while less than half is left


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds of retries. `max_attempts=1` turns them off."""

    max_attempts: int = 4
    first_wait_seconds: float = 0.1
    max_wait_seconds: float = 10.0  # a longer hint is left to the caller
    jitter: float = 0.2  # a wait is stretched by up to this share

    def __post_init__(self) -> None:
        Argument("max_attempts", self.max_attempts).integer(at_least=1)
        for name in ("first_wait_seconds", "max_wait_seconds", "jitter"):
            Argument(name, getattr(self, name)).number()

    def wait_seconds(self, error: PrereadError, attempt: int, remaining_seconds: float) -> float | None:
        """Seconds until the next attempt, after those made; None: do not retry, or no time would remain."""
        hint = error.retry_after_seconds
        # Overloaded without a hint: a message over a size limit, a quota; a retry would not help.
        may_help = isinstance(error, Unavailable) or (isinstance(error, Overloaded) and hint is not None)
        wait = min(self.first_wait_seconds * 2 ** (attempt - 1), self.max_wait_seconds) if hint is None else hint
        if attempt >= self.max_attempts or not may_help or wait > self.max_wait_seconds:
            return None
        # Jitter only stretches: a retry before the server's hint would be rejected again.
        wait *= 1 + self.jitter * random.random()
        return None if wait >= remaining_seconds else wait


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a TLS client. Nothing set: the system's certificate authorities, no client certificate."""

    ca_file: str | Path | None = None
    cert_file: str | Path | None = None  # with key_file: mutual TLS
    key_file: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises ValueError for a certificate without its key, or the reverse, and OSError."""
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; only one of them is given")
        paths = (self.ca_file, self.key_file, self.cert_file)
        return grpc.ssl_channel_credentials(*(None if path is None else Path(path).read_bytes() for path in paths))


@dataclass(frozen=True)
class ClientOptions:
    """Settings that every call of a client shares."""

    timeout_seconds: float | None = 120.0  # of a call as a whole, retries included; None: no end
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    tls: TlsFiles | None = None  # None: plain text
    api_key: str | None = field(default=None, repr=False)  # for a server that requires one
    # sent with every call, such as {"x-request-id": "..."}; a function is called for each
    metadata: Mapping[str, str] | Callable[[], Mapping[str, str]] = field(default_factory=dict)
    max_message_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        Argument("timeout_seconds", self.timeout_seconds).seconds()
        Argument("max_message_bytes", self.max_message_bytes).integer(at_least=1)
        Argument("api_key", self.api_key).secret()

    def channel(self, maker: Any, address: str, *more: tuple[str, int]) -> Any:
        """A channel of `maker`, grpc or grpc.aio, with pings and all addresses of a name; `more` are gRPC's."""
        arguments = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 0),  # also in a call that is quiet for long: no limit
            ("grpc.lb_policy_name", "round_robin"),  # a name with several addresses is a set of equal servers
            *([("grpc.enable_http_proxy", 0)] if is_loopback(address) else []),
            *more,
        ]
        if self.tls is None:
            return maker.insecure_channel(address, options=arguments)
        return maker.secure_channel(address, self.tls.credentials(), options=arguments)


class Service:
    """A gRPC service at an address: its channel, and the retry budget that all its calls share; thread-safe."""

    def __init__(self, address: str, options: ClientOptions, maker: Any, stub: Callable[[Any], object]) -> None:
        """`maker` is grpc or grpc.aio, `stub` the class of the service's generated stub."""
        self.address, self.options, self.channel = address, options, options.channel(maker, address)
        self._stub = stub(self.channel)
        self._tokens, self._lock = BUDGET_TOKENS, threading.Lock()

    def seconds(self, timeout: float | None) -> float:
        """Time limit of a call: its own, else the one of all calls, else inf."""
        own = Argument("timeout", timeout).seconds() or self.options.timeout_seconds
        return math.inf if own is None else own

    def start(self, method: str, request: object, seconds: float | None) -> Any:
        """gRPC's call of the method; `request` is a message, or the messages of a stream; None or inf: no end."""
        metadata = self.options.metadata
        entries = Argument("metadata", metadata() if callable(metadata) else metadata).metadata()
        if self.options.api_key is not None:
            entries = (("authorization", f"Bearer {self.options.api_key}"), *entries)
        timeout = None if seconds is None or math.isinf(seconds) else max(0.0, seconds)
        return getattr(self._stub, method)(request, timeout=timeout, metadata=entries)

    def succeeded(self) -> None:
        """Gives a tenth of a token back to the budget."""
        with self._lock:
            self._tokens = min(BUDGET_TOKENS, self._tokens + 0.1)

    def wait_seconds(self, exc: grpc.RpcError, attempt: int, remaining_seconds: float) -> float:
        """Seconds until the attempt after a failed one, which costs a token; raises PrereadError where none follows."""
        error = wire.translate(exc, self.address)
        wait = self.options.retry.wait_seconds(error, attempt, remaining_seconds)
        if wait is not None:
            with self._lock:
                self._tokens = max(0.0, self._tokens - 1)
                if self._tokens > BUDGET_TOKENS / 2:
                    return wait
        raise error from exc


class BaseClient:
    """Calls a reranking server and, where `encoder_address` is given, an encoder worker; raises PrereadError.

    Connects at the first call. Client is thread-safe; AsyncClient belongs to the event loop it was made on.
    """

    _grpc: Any  # grpc or grpc.aio

    def __init__(
        self, address: str = LOCAL_ADDRESS, *, encoder_address: str | None = None, options: ClientOptions | None = None
    ) -> None:
        """`address` is host:port of the reranking server; upsert, delete, stats, describe go to `encoder_address`."""
        options = options or ClientOptions()
        address = Argument("address", address).address()
        worker = None if encoder_address is None else Argument("encoder_address", encoder_address).address()
        self._server = Service(address, options, self._grpc, RerankServiceStub)
        self._worker = None if worker is None else Service(worker, options, self._grpc, EncoderServiceStub)

    def _encoder(self) -> Service:
        if self._worker is None:
            raise ValueError("encoder_address is not set; upsert, delete, stats and describe need an encoder worker")
        return self._worker


def _host_of(target: str) -> str:
    """The host of `host:port`, or of a gRPC target such as dns:///name:port or ipv6:[::1]:50051; no brackets."""
    rest = re.sub(r"^(dns:(//[^/]*/)?|ipv[46]:)", "", unquote(target.strip()))
    if rest.startswith("["):
        return rest[1:].partition("]")[0]
    return rest if rest.count(":") > 1 else rest.partition(":")[0]


def is_loopback(target: str, *, unspecified: bool = True) -> bool:
    """Whether a target is here, in any notation; `unspecified` (0.0.0.0, ::) is too, for all but listeners."""
    host = _host_of(target).rstrip(".").lower()
    is_name = f".{host}".endswith(".localhost") or host.startswith(("ip6-localhost", "ip6-loopback"))
    if is_name or target.startswith(("unix:", "unix-abstract:")):
        return True
    address = _address(host.partition("%")[0])
    return address is not None and (address.is_loopback or (unspecified and address.is_unspecified))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        found = ipaddress.ip_address(host)
        return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found
    with suppress(OSError, UnicodeError):
        return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, and whatever else the system resolves so
    return None


def proxy_variable(target: str = "", environment: Mapping[str, str] = os.environ) -> str:
    """Name of the variable whose proxy gRPC would use for a target, or any elsewhere; "": it would connect directly."""
    name = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if environment.get(name)), "")
    if not target or not name or is_loopback(target):
        return "" if target else name
    host, address = _host_of(target).lower(), _address(_host_of(target))
    # no_proxy names the end of a host's name, or a network it is in
    for entry in (environment.get("no_grpc_proxy") or environment.get("no_proxy") or "").split(","):
        entry = entry.strip().lower()
        if entry and host.endswith(entry):
            return ""
        with suppress(ValueError):  # no network
            if address is not None and "/" in entry and address in ipaddress.ip_network(entry, strict=False):
                return ""
    return name
