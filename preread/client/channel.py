"""How a client is set up, sync or async: addresses, message limits, keepalive, TLS, metadata, retries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from preread.client.retry import RetryPolicy

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_SECONDS = 120.0
MAX_MESSAGE_BYTES = 64 << 20
# Not below one a minute, and only while a call runs: servers hang up on clients that ping more ("too_many_pings").
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
        if self.timeout_seconds is not None and self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; expected more than 0, or None")
        if self.max_message_bytes < 1:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}; expected at least 1")

    def channel_arguments(self) -> list[tuple[str, int | str]]:
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
            ("grpc.lb_policy_name", "round_robin"),  # a name with several addresses is a set of equal servers
        ]

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        key = () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)
        own = self.metadata() if callable(self.metadata) else self.metadata
        # HTTP/2 wants lower case
        return (*key, *((name.lower(), value) for name, value in own.items()))


def check_address(name: str, address: str) -> str:
    """ValueError unless it looks like host:port, or like a gRPC target (dns:///name:port, unix:path)."""
    if ":" not in address:
        raise ValueError(f"{name} is {address!r}; expected host:port")
    return address
