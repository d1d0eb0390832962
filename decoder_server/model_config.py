"""Which model is served under which name, and how it is loaded. Reads nothing; plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from decoder_server.tiers.budgets import TierBudgets

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
