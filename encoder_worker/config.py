"""Everything an encoder worker can be told, checked once. The command line makes its options from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from preread_edge.settings import MIB, LoadConfig, ServerConfig, knob


@dataclass(frozen=True)
class EncoderConfig(LoadConfig, ServerConfig):
    """Configuration of one EncoderServer. Counts are `num_*`, limits `max_*`, units come last."""

    checkpoint: str  # directory or hub id
    port: int = knob(50052, "gRPC port; 0 takes a free one and prints it.", at_least=0, at_most=65535)
    max_batch_tokens: int | None = knob(None, "Padded tokens per forward pass.", at_least=1, shown_default="by device")
    max_queue_tokens: int = knob(1_000_000, "On-demand tokens in flight before new calls are rejected.", at_least=1)
    max_texts: int = knob(4096, "Texts of one Encode request.", at_least=1)
    max_text_bytes: int = knob(16 * MIB, "Longest text of a passage.", flag="--max-passage-bytes", at_least=1)
    max_answer_bytes: int = knob(1024 * MIB, "Largest response to an Encode request.", at_least=1)
    max_unacknowledged_passages: int = knob(
        1024, "Passages of one upload that are read before the first is stored.", at_least=1
    )
    max_unacknowledged_bytes: int = knob(
        64 * MIB, "Bytes of text of one upload that are read before the first passage is stored.", at_least=1
    )
    allow_clipped: bool = knob(
        False,
        "Also store passages of which over 5% of the values lie outside the range that the codec was trained on. Their "
        "scores will be wrong.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError("checkpoint is empty; expected a directory or a hub id")
