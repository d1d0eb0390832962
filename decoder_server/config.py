"""How much a model's tiers may hold, and how. Plain values; loads nothing.

Which model is served under which name, and how it is loaded. Reads nothing; plain values.

Everything the gateway can be told, checked once. Reads no environment; the command line does.

Everything an online server can be told, checked once. Reads no environment; the command line does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preread.channel import TlsFiles
from preread.types import Stage, format_stages, stages_problem
from preread_edge.listener import HEADER_SECONDS
from preread_edge.tls import ServerTls

FORMATS = ("auto", "bfloat16", "int8")
MIB = 1 << 20


@dataclass(frozen=True)
class TierBudgets:
    """Of one model."""

    max_keys_bytes: int = 256 * MIB  # keys and values of passages; 0: none are kept
    max_prefix_bytes: int = 256 * MIB  # keys and values of the beginnings of prompts over them
    form: str = "auto"  # at rest: as computed, bfloat16 or int8

    def __post_init__(self) -> None:
        for name in ("max_keys_bytes", "max_prefix_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.form not in FORMATS:
            raise ValueError(f"form is {self.form!r}; expected {', '.join(FORMATS)}")


NO_TIERS = TierBudgets(0, 0)


BACKENDS = ("auto", "fbnl", "cross_encoder")
RUNTIMES = ("torch", "onnx", "onnx-int8")


@dataclass(frozen=True)
class ModelConfig:
    """One model of a server."""

    checkpoint: str  # directory or hub id
    name: str = ""  # what clients call it; "": the checkpoint's last path component
    backend: str = "auto"  # auto: fbnl for a T5Gemma 2 checkpoint, else cross_encoder
    device: str | None = None  # None: CUDA where present
    dtype: str | None = None  # None: bfloat16 where the processor has it
    max_passage_tokens: int | None = None  # None: the checkpoint's; for fbnl part of the fingerprint
    read_control_tokens: bool = False  # in texts, as KaLM's own code does (fbnl); part of the fingerprint when on
    encoder_address: str = ""  # host:port of an encoder worker (fbnl); "": nothing is encoded on demand
    encoder_in_process: bool = False  # that worker is a part of this process, which is not ready without it
    encoder_api_key: str = field(default="", repr=False)  # shown to that worker
    runtime: str = "torch"  # of a cross-encoder
    trust_remote_code: bool = False  # run Python that a cross-encoder's checkpoint brings
    tiers: TierBudgets = field(default_factory=TierBudgets)  # what is kept of passes (fbnl)
    profile: str = ""  # of a cross-encoder; "": by id, else from its own configuration

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is empty; expected a directory or a hub id")
        for name, allowed in (("backend", BACKENDS), ("runtime", RUNTIMES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(allowed)}")
        if self.max_passage_tokens is not None and self.max_passage_tokens < 1:
            raise ValueError(f"max_passage_tokens is {self.max_passage_tokens}; expected at least 1")

    @property
    def served_name(self) -> str:
        return self.name or Path(self.checkpoint.rstrip("/")).name


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


@dataclass(frozen=True)
class DecoderConfig:
    """Configuration of one DecoderServer. Counts are `num_*`, limits `max_*`, units come last."""

    models: tuple[ModelConfig, ...]  # the first is what a request gets that names none
    host: str = "127.0.0.1"
    port: int = 50051  # 0: any free one
    store: str = field(default="faiss:./preread-data", repr=False)  # may hold a password
    read_budget_seconds: float = 0.1  # of each online read of a Redis store
    num_threads: int | None = None

    max_batch_tokens: int | None = None  # None: by device and measured rate
    max_queue_requests: int = 256
    max_queue_tokens: int = 1_000_000
    max_queue_seconds: float = 0.0  # of work at the measured rate; 0: no such limit
    max_candidates: int = 1000
    read_ratio: int | None = None  # what a request is read at that names no ratio; None: as stored
    stages: tuple[Stage, ...] = ()  # a cascade in place of read_ratio
    degrade: bool = False  # under pressure requests are read coarser than asked, and told so
    degrade_queue_share: float = 0.5  # of what the queue may hold, before that
    max_request_tokens: int | None = None  # prompt tokens and states over all candidates; None: the queue's limit only
    max_query_bytes: int = 1 * MIB  # that are tokenized, of a query and of an instruction; a query is cut by tokens
    max_instruction_tokens: int = 512
    max_text_bytes: int = 1 * MIB  # of one candidate
    max_message_bytes: int = 64 * MIB
    max_inline_cache_bytes: int = 256 * MIB  # states of inline texts
    max_store_cache_bytes: int = 256 * MIB  # tier in front of the store; 0: none
    encode_timeout_seconds: float = 60.0
    encoder_tls_ca_file: str = ""  # PEM; any of the three: the worker is spoken to with TLS
    encoder_tls_cert_file: str = ""
    encoder_tls_key_file: str = ""
    tls_cert_file: str = ""  # PEM of this server; "": plain text
    tls_key_file: str = ""
    tls_client_ca_file: str = ""  # callers must show a certificate of this authority
    max_connections: int = 1024  # gRPC calls at once
    max_connection_age_seconds: float = 0.0  # then a gRPC client is asked to connect anew; 0: never
    log_text: bool = False  # queries in the log
    max_staleness_seconds: float = 1.0  # how long a moved alias or a passage written anew may go unnoticed

    def __post_init__(self) -> None:
        positive = (
            "max_queue_requests", "max_queue_tokens", "max_candidates", "max_query_bytes", "max_instruction_tokens",
            "max_text_bytes", "max_message_bytes", "encode_timeout_seconds", "max_connections",
            "read_budget_seconds",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in (
            "max_inline_cache_bytes",
            "max_store_cache_bytes",
            "max_staleness_seconds",
            "max_queue_seconds",
            "max_connection_age_seconds",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("max_batch_tokens", "num_threads", "max_request_tokens", "read_ratio"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; expected 0..65535")
        if not self.models:
            raise ValueError("models is empty; expected at least one")
        names = [model.served_name for model in self.models]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two models are called {twice.pop()!r}; give them names: name=checkpoint")
        if not 0 <= self.degrade_queue_share <= 1:
            raise ValueError(f"degrade_queue_share is {self.degrade_queue_share}; expected 0..1")
        self._check_stages()
        _ = self.tls  # raises where files contradict each other
        if bool(self.encoder_tls_cert_file) != bool(self.encoder_tls_key_file):
            raise ValueError("encoder_tls_cert_file and encoder_tls_key_file go together; only one of them is given")

    def _check_stages(self) -> None:
        problem = stages_problem(self.stages) if self.stages else None
        if problem is not None:
            raise ValueError("{} is {}; expected {}".format(*problem))
        if self.stages and self.read_ratio is not None:
            raise ValueError(
                f"read_ratio is {self.read_ratio} and stages is {format_stages(self.stages)}; expected one of the two"
            )

    @property
    def tls(self) -> ServerTls:
        """How this server's ports are opened."""
        return ServerTls(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)

    @property
    def encoder_tls(self) -> TlsFiles | None:
        """How the encoder worker is reached; None: in plain text."""
        files = (self.encoder_tls_ca_file, self.encoder_tls_cert_file, self.encoder_tls_key_file)
        return TlsFiles(*(name or None for name in files)) if any(files) else None

    @classmethod
    def of_one(cls, checkpoint: str, **fields: Any) -> DecoderConfig:
        """A server of one model; `fields` are those of the model and of the server."""
        own = {field.name for field in dataclasses.fields(ModelConfig)}
        model = ModelConfig(checkpoint, **{name: value for name, value in fields.items() if name in own})
        return cls((model,), **{name: value for name, value in fields.items() if name not in own})
