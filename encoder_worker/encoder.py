"""The encoder half: token ids in, pooled token states out.

Reads the encoder's tensors straight from safetensors; the vision tower and the decoder are never
built. Does not know texts, batching policy or stores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from checkpoint import Checkpoint
from checkpoint.compute import choose_device, choose_dtype, choose_fused, dtype_name
from encoder_worker.text_encoder import TextEncoder


class Encoder:
    """Encoder half of one checkpoint, loaded. Call it from one thread."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        self.dim = checkpoint.dim
        self.dtype_name = dtype_name(dtype)
        self.device_name = str(device)
        self._device = device
        tensors = checkpoint.encoder_tensors(dtype)
        if device.type != "cpu":
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._model = TextEncoder(checkpoint.encoder_config, tensors, checkpoint.eoi_id, compiled=compiled)

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, device: str | None = None, dtype: str | None = None) -> Encoder:
        """Reads the encoder's tensors.

        Args:
            device: auto, cpu or cuda[:N]; None is auto.
            dtype: auto, float32 or bfloat16; None is auto.

        Raises:
            CheckpointError: files that cannot be used.
            ValueError: a device or dtype that is not to be had.
        """
        where = choose_device(device)
        fused = choose_fused(checkpoint.dim, where)
        return cls(checkpoint, where, choose_dtype(dtype, where), compiled=fused)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Sequence[int]], ratio: int) -> list[NDArray[np.float32]]:
        """Pooled states of one batch.

        Args:
            batch: token ids per passage, template included, each at least one token.
            ratio: tokens per pooled state.

        Returns:
            Per passage (ceil(num_tokens / ratio), dim) float32.
        """
        lengths = [len(ids) for ids in batch]
        ids = torch.from_numpy(np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in batch]))
        states = self._model.states(ids.to(self._device), lengths)
        pooled = pool_packed(states, lengths, ratio).cpu()
        # Copies, so that one passage kept does not keep the whole batch alive.
        counts = [-(-length // ratio) for length in lengths]
        return [rows.copy() for rows in np.split(pooled.numpy(), np.cumsum(counts)[:-1])]


def pool_packed(states: Tensor, lengths: Sequence[int], ratio: int) -> Tensor:
    """Matryoshka embedding pooling of packed passages on their own device.

    The mean over groups of `ratio` tokens aligned at each passage's token 0; cache.pooling has the
    same law for one passage, and the tests hold both to it.

    Args:
        states: (num_tokens, dim).

    Returns:
        (sum of ceil(length / ratio), dim) float32.
    """
    num_tokens = np.asarray(lengths)
    counts = -(-num_tokens // ratio)  # states per passage
    sizes = np.full(counts.sum(), ratio)
    sizes[counts.cumsum() - 1] = num_tokens - (counts - 1) * ratio  # the last group has what is left
    return torch.segment_reduce(states.float(), "mean", lengths=torch.from_numpy(sizes).to(states.device), axis=0)
