"""The fbnl backend: stored passage states, read by the decoder half of a checkpoint."""

import copy
import struct
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from cache.states import AnyStates
from checkpoint import Checkpoint, CheckpointError, EncoderIdentity, TokenizedPrompt
from checkpoint.compute import choose_device, choose_fused, dtype_name
from decoder_server.config import NO_KV_CACHES, KvCacheConfig
from decoder_server.models.fbnl.decoder import Decoder
from decoder_server.models.fbnl.kv_cache import Contexts, KVCache, StatePair, batch_states


class FbnlBackend:
    """Decoder half of one checkpoint, loaded."""

    name = "fbnl"
    notice = ""
    listwise = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | None = None,  # auto, cpu or cuda[:N]; None is auto
        dtype: str | None = None,  # auto, float32 or bfloat16; None is auto
        budgets: KvCacheConfig = NO_KV_CACHES,
    ) -> None:
        """Raises CheckpointError for files that cannot be served, ValueError for a device or dtype not to be had."""
        self._device, self._dtype = choose_device(device, dtype)
        fused = choose_fused(checkpoint.dim, self._device)
        self.dtype_name, self.device_name = dtype_name(self._dtype), str(self._device)
        self.checkpoint, self.checkpoint_name, self.settings = checkpoint, checkpoint.name, checkpoint.settings
        self._text = text = checkpoint.text  # read before the weights: a wrong tokenizer should fail fast
        self.prompt, self.cut, self.is_empty, self.spans = text.prompt, text.cut, text.is_empty, text.spans
        tensors = checkpoint.decoder_tensors(self._dtype)
        if self._device.type != "cpu":
            tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        self._decoder = Decoder(checkpoint.decoder_config, tensors, checkpoint.eoi_id, compiled=fused)
        self._contexts = Contexts(self._decoder, budgets, self._device, self._dtype)

    def with_caches(self, budgets: KvCacheConfig) -> Self:
        """The same weights with caches of another size, empty."""
        other = copy.copy(self)
        other._contexts = Contexts(self._decoder, budgets, self._device, self._dtype)
        return other

    @property
    def num_compilations(self) -> int:
        return self._decoder.pointwise.num_compilations

    def identity(self) -> EncoderIdentity:
        return self.checkpoint.identity

    def pairs(self, prompt: TokenizedPrompt, passages: Sequence[AnyStates]) -> list[list[StatePair]]:
        """Per passage its windows under the prompt."""
        pairs: list[list[StatePair]] = [[] for _ in passages]
        for own, passage in zip(pairs, passages, strict=True):
            for window, states in enumerate(passage.windows()):
                # Names the window at its ratio in the caches; empty for a passage without a key.
                key = passage.key and passage.key + struct.pack("<II", passage.compression_ratio, window)
                own.append(StatePair(prompt, states, passage.truncated, key))
        return pairs

    def activate(self, margin: float) -> float:
        """P(yes), in float32. Of one number: numpy's array functions take four times as long."""
        x = np.float32(margin)
        if x >= 0:
            return float(np.float32(1) / (np.float32(1) + np.exp(-x)))
        return float(np.exp(x) / (np.float32(1) + np.exp(x)))

    def score(self, pairs: Sequence[StatePair]) -> NDArray[np.float32]:
        """Margins (len(pairs),); NaN where a logit was not finite."""
        margins = np.empty(len(pairs), dtype=np.float32)
        for rows, inputs in self._contexts.passes(pairs) if pairs else ():
            margins[rows] = self._decoder.margins(*inputs, self._text.yes_id, self._text.no_id).cpu().numpy()
        return np.where(np.isfinite(margins), margins, np.float32("nan"))

    @property
    def caches(self) -> tuple[KVCache, KVCache]:
        return self._contexts.keys, self._contexts.prefixes

    def fill(self, pairs: Sequence[StatePair]) -> tuple[int, int]:
        """Pre-fills the caches; per cache, how many of the pairs it holds now."""
        return self._contexts.fill(pairs)

    def attention(self, pair: StatePair) -> NDArray[np.float32]:
        """The readout token's weight on every state, (num_states,): mean over heads and layers."""
        ids = torch.tensor(pair.prompt.ids, device=self._device)
        states = batch_states([pair], self._device, self._dtype)
        weights: NDArray[np.float32] = self._decoder.attention(ids, states).mean(0).cpu().numpy()
        return weights

    def warm_up(self) -> None:
        """One real pass over a real prompt; CheckpointError where the weights give no finite margin."""
        states = np.full((4, self.checkpoint.dim), 0.5, dtype=np.float32)
        margin = self.score([StatePair(self.prompt("Does this model answer?"), states)])
        if not np.isfinite(margin).all():
            raise CheckpointError(f"{self.checkpoint.path}: the first forward pass gave no finite margin")
