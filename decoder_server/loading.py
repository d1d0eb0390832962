"""Configuration to a loaded model. Runs on the model's thread; knows no server."""

from __future__ import annotations

from decoder_server.backend import Backend
from decoder_server.config import DecoderConfig

# Tokens per batch. On a CPU a pass of this size already runs at full rate, and a caller who
# comes next waits for it; a GPU needs far more to be busy.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}


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


def batch_tokens(config: DecoderConfig, backend: Backend) -> int:
    """The configured budget, or the device's."""
    return config.max_batch_tokens or BATCH_TOKENS[backend.device_name.split(":")[0]]


def fetch_chunk(num_batch_tokens: int) -> int:
    """Candidates per read of the store: about a batch of short ones, a share of it for long ones."""
    return max(16, num_batch_tokens // 128)
