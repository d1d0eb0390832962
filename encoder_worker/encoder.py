"""The encoder half: token ids in, pooled token states out.

Reads the encoder's tensors straight from safetensors; the vision tower and the decoder are never
built. Does not know texts, batching policy or stores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from checkpoint import Checkpoint
from checkpoint.compute import choose_device, choose_dtype, dtype_name
from encoder_worker.text_encoder import TextEncoder


class Encoder:
    """Encoder half of one checkpoint, loaded. Call it from one thread."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.dim = checkpoint.dim
        self.dtype_name = dtype_name(dtype)
        self.device_name = str(device)
        self._device = device
        tensors = checkpoint.encoder_tensors(dtype)
        if device.type != "cpu":
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._model = TextEncoder(checkpoint.encoder_config, tensors, checkpoint.eoi_id)

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
        return cls(checkpoint, where, choose_dtype(dtype, where))

    @torch.inference_mode()
    def encode(self, batch: Sequence[Sequence[int]], ratio: int) -> list[NDArray[np.float32]]:
        """Pooled states of one padded batch.

        Args:
            batch: token ids per passage, template included, each at least one token.
            ratio: tokens per pooled state.

        Returns:
            Per passage (ceil(num_tokens / ratio), dim) float32.
        """
        lengths = torch.tensor([len(ids) for ids in batch])
        longest = int(lengths.max())
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        real = torch.arange(longest) < lengths[:, None]
        ids, real = ids.to(self._device), real.to(self._device)
        states = self._model.states(ids, real)
        pooled = pool_batch(states, real, ratio).cpu()
        # Copies, so that one passage kept does not keep the whole batch alive.
        return [pooled[row, : -(-len(tokens) // ratio)].numpy().copy() for row, tokens in enumerate(batch)]


def pool_batch(states: Tensor, real: Tensor, ratio: int) -> Tensor:
    """Matryoshka embedding pooling of a padded batch on its own device.

    The mean over groups of `ratio` tokens aligned at token 0, over real tokens alone; cache.pooling
    has the same law for one passage, and the tests hold both to it.

    Args:
        states: (batch, num_tokens, dim).
        real: (batch, num_tokens), True where a token is not padding.

    Returns:
        (batch, ceil(num_tokens / ratio), dim) float32; groups without a real token are zero.
    """
    batch, length, dim = states.shape
    extra = -length % ratio
    grouped = F.pad(states.float() * real[..., None], (0, 0, 0, extra)).view(batch, -1, ratio, dim)
    counts = F.pad(real, (0, extra)).view(batch, -1, ratio).sum(2)
    return grouped.sum(2) / counts.clamp(min=1)[..., None]
