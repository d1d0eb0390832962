"""How a client reaches a server: addresses and proxies, TLS, keepalive, reconnecting, message limits, metadata."""

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from preread.arguments import Argument
from preread.retry import RetryPolicy

LOCAL_ADDRESS = "127.0.0.1:50051"
# While a call runs. Our servers take a ping every ten seconds and less; others hang up on clients that ping more often
# than they were set up for ("too_many_pings"), some of them below five minutes.
KEEPALIVE_SECONDS = 60
CONNECT_SECONDS, CONNECT_ONE_OF_SEVERAL_SECONDS = 5.0, 1.0  # calls wait for a first connection, and for no later one
FIRST_RECONNECT_SECONDS, RECONNECT_SECONDS = 0.1, 1.0  # so soon a server that is back is found


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a TLS client. Nothing set: the system's certificate authorities, no client certificate."""

    ca_file: str | Path | None = None
    cert_file: str | Path | None = None  # with key_file: mutual TLS
    key_file: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises ValueError: one cannot be read, or a certificate without its key, or the reverse."""
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; only one of them is given")
        paths = (Argument(name, getattr(self, name)) for name in ("ca_file", "key_file", "cert_file"))
        return grpc.ssl_channel_credentials(*(path.file_contents() for path in paths))


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
        if not isinstance(self.retry, RetryPolicy):
            raise Argument("retry", self.retry).wrong("a RetryPolicy")
        if self.tls is not None and not isinstance(self.tls, TlsFiles):
            raise Argument("tls", self.tls).wrong("TlsFiles, or None")
        if not callable(self.metadata):
            Argument("metadata", self.metadata).metadata()
        Argument("timeout_seconds", self.timeout_seconds).seconds()
        Argument("max_message_bytes", self.max_message_bytes).integer(at_least=1)
        Argument("api_key", self.api_key).secret()

    def channel(self, maker: Any, address: str, connect_seconds: float = CONNECT_SECONDS) -> Any:
        """A channel of `maker`, grpc or grpc.aio, with pings and all addresses of a name."""
        arguments = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 0),  # also in a call that is quiet for long: no limit
            ("grpc.lb_policy_name", "round_robin"),  # a name with several addresses is a set of equal servers
            *([("grpc.enable_http_proxy", 0)] if is_loopback(address) else []),
            ("grpc.min_reconnect_backoff_ms", int(connect_seconds * 1000)),  # the time limit of connecting
            ("grpc.initial_reconnect_backoff_ms", int(FIRST_RECONNECT_SECONDS * 1000)),
            ("grpc.max_reconnect_backoff_ms", int(RECONNECT_SECONDS * 1000)),
        ]
        if self.tls is None:
            return maker.insecure_channel(address, options=arguments)
        return maker.secure_channel(address, self.tls.credentials(), options=arguments)


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
