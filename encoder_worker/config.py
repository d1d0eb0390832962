"""What an encoder worker and an indexing run can be told, checked once; a help text reads it without the encoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cache import DEFAULT_CODEC, KNOWN_CODECS
from preread_edge.settings import MIB, Config, LoadConfig, ServerConfig, knob


@dataclass(frozen=True)
class CollectionSettings(Config):
    """Of a collection to make; None: the checkpoint's or the default. One that exists must agree with the others."""

    compression_ratio: int | None = knob(None, "Tokens per stored state.", at_least=1, shown_default="the checkpoint's")
    codec: str | None = knob(None, f"{KNOWN_CODECS}.", metavar="CODEC", shown_default=DEFAULT_CODEC)
    stores_text: bool | None = knob(
        None, "Keep texts with the states.", flag="--store-text/--no-store-text", shown_default="keep"
    )


@dataclass(frozen=True)
class PipelineLimits:
    """Sizes, backpressure and writes of one stream of passages."""

    # A batch of a file is sorted by length as a whole, and ends at the first of these that it reaches.
    batch_passages: int = 4096
    batch_text_bytes: int = 32 << 20
    # The next batch is taken when fewer passages (bytes of their texts) wait.
    max_unencoded: float = 1
    max_unacknowledged: float = math.inf
    max_unacknowledged_bytes: float = math.inf
    # A group is written when it reaches the first of these, or completes the oldest batch.
    group_passages: int = 2048
    group_bytes: int = 64 << 20
    group_seconds: float = 20.0
    write_whole_batches: bool = False  # so that they are acknowledged soon
    retry_seconds: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0)  # pauses before trying a silent store again


@dataclass(frozen=True, kw_only=True)
class IndexOptions(Config):
    """How to index; none of it changes a state except `split`."""

    alias: str | None = knob(None, "Point this name at the collection once all input was read.", metavar="NAME")
    split: bool = knob(False, "Split longer passages into windows instead of cutting them.")
    strict: bool = knob(False, "Stop at the first item that would be refused.")
    force: bool = knob(False, "Also encode passages stored with the same text.")
    wait: bool = knob(False, "Wait while another process writes the collection.")
    allow_clipped: bool = False  # as an encoder worker's
    limits: PipelineLimits = field(default_factory=PipelineLimits)


@dataclass(frozen=True, kw_only=True)
class WriteThroughConfig(Config):
    """What a worker keeps of the texts that it encodes on demand, for servers with `--write-through`."""

    max_kept_bytes: int = knob(
        1024 * MIB,
        "Of the encoder that writes through: bytes that a collection may take in the store; what is asked for least is "
        "evicted.",
        flag="--write-through-bytes", at_least=1,
    )  # fmt: skip
    max_kept_share: float = knob(
        0.5, "Of the encoder that writes through: share of these bytes that the texts of one API key may take.",
        flag="--write-through-share", above=0, at_most=1, metavar="SHARE",
    )  # fmt: skip
    max_kept_seconds: int = knob(
        0, "Of the encoder that writes through: age at which Redis expires kept states; 0: never.",
        flag="--write-through-ttl-seconds", at_least=0,
    )  # fmt: skip
    keeps_texts: bool = knob(
        False, "Of the encoder that writes through: keep texts next to their states.", flag="--write-through-texts"
    )

    def check_store(self, store: str) -> None:
        """Raises ValueError for an age where the store, a URL, does not expire passages."""
        if self.max_kept_seconds and not store.startswith(("redis:", "rediss:", "redis+", "rediss+")):
            expected = "0 where the store is not Redis: no other one expires passages"
            raise ValueError(f"max_kept_seconds is {self.max_kept_seconds}; expected {expected}")


@dataclass(frozen=True)
class EncoderConfig(LoadConfig, ServerConfig, WriteThroughConfig):
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
        self.check_store(self.store)
