"""Everything the gateway can be told, checked once. Reads no environment; the command line does."""

from __future__ import annotations

from dataclasses import dataclass

from preread.edge.listener import HEADER_SECONDS

MIB = 1 << 20

# What clients send when nobody chose a model: the 4D AI Kit's example, infinity_client's default.
DEFAULT_NAMES = frozenset({"default", "default/not-specified"})
ANY_MODEL = "*"


@dataclass(frozen=True)
class HttpConfig:
    """Configuration of one Gateway."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free one
    model_aliases: tuple[str, ...] = ()  # other names of the first model; "*": every name
    max_body_bytes: int = 64 * MIB  # of a request that is read as a whole
    max_line_bytes: int = 16 * MIB  # of an NDJSON upload, whose whole is not bounded
    max_connections: int = 1024  # at once; requests on more are turned away
    timeout_seconds: float = 120.0  # of a request as a whole, uploads excepted; clients may ask for less
    header_seconds: float = HEADER_SECONDS  # for a request's header to be complete
    allowed_hosts: tuple[str, ...] = ()  # names that requests may ask for, beside loopback's and the address itself
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_line_bytes", "max_connections", "timeout_seconds", "header_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; expected 0..65535")
