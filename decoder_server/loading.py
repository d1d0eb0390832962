"""Configuration to a loaded model. Runs on the model's thread; knows no server."""

from __future__ import annotations

from decoder_server.backend import Backend
from decoder_server.config import DecoderConfig

# Most and fewest tokens per batch, by device: above the first a pass is no faster per token, below
# the second it is mostly fixed cost.
BATCH_TOKENS = {"cpu": 8192, "cuda": 65_536}
MIN_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}


def load_fbnl(config: DecoderConfig) -> Backend:
    """Opens the checkpoint and loads its decoder half.

    Raises:
        CheckpointError: files that cannot be served.
        ValueError: a device or dtype that is not to be had.
    """
    import torch  # seconds to import; only a process that serves should pay

    from checkpoint import Checkpoint
    from decoder_server.fbnl import FbnlBackend

    torch.set_flush_denormal(True)  # a setting of the thread, and this is the one that computes
    checkpoint = Checkpoint.open(config.checkpoint, max_passage_tokens=config.max_passage_tokens)
    return FbnlBackend.load(checkpoint, device=config.device, dtype=config.dtype)


def batch_tokens(config: DecoderConfig, backend: Backend) -> tuple[int, int]:
    """Fewest and most tokens per batch: as configured, or as suits the device."""
    if config.max_batch_tokens is not None:
        return config.max_batch_tokens, config.max_batch_tokens
    device = backend.device_name.split(":")[0]
    return MIN_BATCH_TOKENS[device], BATCH_TOKENS[device]


def fetch_chunk(max_batch_tokens: int) -> int:
    """Candidates per read of the store: about a batch of short ones, a share of it for long ones."""
    return max(16, max_batch_tokens // 128)
