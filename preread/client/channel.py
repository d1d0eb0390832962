"""How a client is set up, sync or async: addresses, message limits, keepalive, TLS, metadata, retries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from preread.client import checks
from preread.client.retry import RetryPolicy
from preread.edge.addresses import proxy_options

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_SECONDS = 120.0
MAX_MESSAGE_BYTES = 64 << 20
# While a call runs. Our servers take a ping every ten seconds and less; others hang up on clients that ping more often
# than they were set up for ("too_many_pings"), some of them below five minutes.
KEEPALIVE_SECONDS = 60
KEEPALIVE_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a TLS client. Nothing set: the system's certificate authorities, no client certificate."""

    ca_file: str | Path | None = None
    cert_file: str | Path | None = None  # with key_file: mutual TLS
    key_file: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            ValueError: a certificate without its key, or the reverse.
            OSError: a file that cannot be read.
        """
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; only one of them is given")
        paths = (self.ca_file, self.key_file, self.cert_file)
        return grpc.ssl_channel_credentials(*(None if path is None else Path(path).read_bytes() for path in paths))


@dataclass(frozen=True)
class ClientOptions:
    """Settings that every call of a client shares."""

    timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS  # of a call as a whole, retries included; None: no end
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    tls: TlsFiles | None = None  # None: plain text
    api_key: str | None = field(default=None, repr=False)  # for a server that asks for one
    # sent with every call, such as {"x-request-id": "..."}; a function is asked anew for each
    metadata: Mapping[str, str] | Callable[[], Mapping[str, str]] = field(default_factory=dict)
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def __post_init__(self) -> None:
        checks.seconds("timeout_seconds", self.timeout_seconds)
        if checks.integer("max_message_bytes", self.max_message_bytes) < 1:
            raise checks.invalid("max_message_bytes", str(self.max_message_bytes), "at least 1")
        if self.api_key is not None:
            _check_key(self.api_key)

    def channel_arguments(self, address: str) -> list[tuple[str, int | str]]:
        """gRPC's arguments of a channel to that address."""
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            *connection_arguments(address),
        ]

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        """
        Raises:
            TypeError, InvalidRequest: an entry that HTTP/2 does not carry.
        """
        key = () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)
        own = self.metadata() if callable(self.metadata) else self.metadata
        return (*key, *(checks.metadata(name, value) for name, value in own.items()))

    def call_timeout(self, timeout: float | None) -> float | None:
        """Time limit of a call in seconds: its own, else the one of all calls."""
        own = checks.seconds("timeout", timeout)
        return self.timeout_seconds if own is None else own


def _check_key(key: object) -> None:
    """It is a secret: errors do not show it."""
    if not isinstance(key, str):
        raise TypeError(f"api_key is of type {type(key).__name__}; expected a string")
    if not key.isascii() or not key.isprintable():
        raise checks.invalid("api_key", "not printable ASCII", "printable ASCII characters")


def connection_arguments(address: str) -> list[tuple[str, int | str]]:
    """How any client of ours keeps a connection: pings, no proxy on this machine, every address of a name in turn."""
    return [
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.http2.max_pings_without_data", 0),  # also in a call that is quiet for long: no limit
        ("grpc.lb_policy_name", "round_robin"),  # a name with several addresses is a set of equal servers
        *proxy_options(address),
    ]


def check_address(name: str, address: str) -> str:
    """An address as it is.

    Raises:
        TypeError, InvalidRequest: it does not look like host:port, or like a gRPC target (dns:///name:port, unix:path).
    """
    if ":" not in checks.text(name, address) or not address.isprintable():
        raise checks.invalid(name, ascii(address), "host:port")
    return address
