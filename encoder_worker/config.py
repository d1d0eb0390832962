"""Everything an encoder worker can be told, checked once. Reads no environment; the command line does."""

from __future__ import annotations

from dataclasses import dataclass, field

from preread_edge.tls import ServerTls

MIB = 1 << 20


@dataclass(frozen=True)
class EncoderConfig:
    """Configuration of one EncoderServer. Counts are `num_*`, limits `max_*`, units come last."""

    checkpoint: str  # directory or hub id
    host: str = "127.0.0.1"
    port: int = 50052  # 0: any free one
    store: str = field(default="faiss:./preread-data", repr=False)  # may hold a password
    device: str | None = None  # None: CUDA where present
    dtype: str | None = None  # None: bfloat16 where the hardware has it
    max_passage_tokens: int | None = None  # None: the checkpoint's; part of the fingerprint
    read_control_tokens: bool = False  # in texts, as KaLM's own code does; part of the fingerprint when on

    max_batch_tokens: int | None = None  # padded tokens of one pass; None: by device
    max_message_bytes: int = 64 * MIB  # of one request message; published by Describe
    max_answer_bytes: int = 1024 * MIB  # of one Encode answer
    max_texts: int = 4096  # of one Encode request
    max_text_bytes: int = 16 * MIB  # of one text
    max_queue_tokens: int = 1_000_000  # on-demand tokens under way before new calls are turned away
    max_connections: int = 1024  # gRPC calls at once
    max_unacknowledged_passages: int = 1024  # of one Upsert stream; the next message is read when there is room
    max_unacknowledged_bytes: int = 64 * MIB  # of their texts
    allow_clipped: bool = False  # store also passages that a collection's codec was not trained for

    tls_cert_file: str = ""  # PEM of this server; "": plain text
    tls_key_file: str = ""
    tls_client_ca_file: str = ""  # callers must show a certificate of this authority

    def __post_init__(self) -> None:
        positive = (
            "max_message_bytes", "max_answer_bytes", "max_texts", "max_text_bytes", "max_queue_tokens",
            "max_connections", "max_unacknowledged_passages", "max_unacknowledged_bytes",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("max_batch_tokens", "max_passage_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; expected 0..65535")
        if not self.checkpoint:
            raise ValueError("checkpoint is empty; expected a directory or a hub id")
        _ = self.tls  # raises where files contradict each other

    @property
    def tls(self) -> ServerTls:
        """How the port is opened."""
        return ServerTls(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)
