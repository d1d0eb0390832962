"""The fbnl backend: stored passage states, read by the decoder half of a checkpoint."""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence

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
        """Reads the decoder's tensors.

        Raises:
            CheckpointError: files that cannot be served.
            ValueError: a device or dtype that is not to be had.
        """
        self._device, self._dtype = choose_device(device, dtype)
        fused = choose_fused(checkpoint.dim, self._device)
        self.settings = checkpoint.settings
        self.checkpoint_name = checkpoint.name
        self.dtype_name = dtype_name(self._dtype)
        self.device_name = str(self._device)
        self.checkpoint = checkpoint
        self._text = checkpoint.text  # read before the weights: a wrong tokenizer should fail fast
        tensors = checkpoint.decoder_tensors(self._dtype)
        if self._device.type != "cpu":
            tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        self._decoder = Decoder(checkpoint.decoder_config, tensors, checkpoint.eoi_id, compiled=fused)
        self._contexts = Contexts(self._decoder, budgets, self._device, self._dtype)

    def with_caches(self, budgets: KvCacheConfig) -> FbnlBackend:
        """The same weights with caches of another size, empty."""
        other = copy.copy(self)
        other._contexts = Contexts(self._decoder, budgets, self._device, self._dtype)
        return other

    @property
    def num_compilations(self) -> int:
        """Fused steps compiled so far; constant once warm, whatever comes."""
        return self._decoder.pointwise.num_compilations

    def identity(self) -> EncoderIdentity:
        return self.checkpoint.identity()

    def prompt(self, query: str, instruction: str | None = None) -> TokenizedPrompt:
        return self._text.prompt(query, instruction)

    def pairs(self, prompt: TokenizedPrompt, passages: Sequence[AnyStates]) -> list[list[StatePair]]:
        """Per passage its windows under the prompt."""
        return [
            [
                StatePair(prompt, states, passage.truncated, _window_key(passage, window))
                for window, states in enumerate(passage.windows())
            ]
            for passage in passages
        ]

    def activate(self, margin: float) -> float:
        """P(yes), in float32. Of one number: numpy's array functions take four times as long."""
        x = np.float32(margin)
        if x >= 0:
            return float(np.float32(1) / (np.float32(1) + np.exp(-x)))
        return float(np.exp(x) / (np.float32(1) + np.exp(x)))

    def cut(self, text: str, max_tokens: int | None, *, keep_end: bool = False) -> str:
        return self._text.cut(text, max_tokens, keep_end=keep_end)

    def is_empty(self, text: str) -> bool:
        return self._text.is_empty(text)

    def spans(self, text: str) -> list[tuple[int, int]]:
        return self._text.spans(text)

    def score(self, pairs: Sequence[StatePair]) -> NDArray[np.float32]:
        """Margins (len(pairs),); NaN where a logit was not finite."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        margins = np.empty(len(pairs), dtype=np.float32)
        for rows, inputs in self._contexts.passes(pairs):
            margins[rows] = self._decoder.margins(*inputs, self._text.yes_id, self._text.no_id).cpu().numpy()
        return np.where(np.isfinite(margins), margins, np.float32("nan"))

    @property
    def caches(self) -> tuple[KVCache, KVCache]:
        """The KV cache and the prefix cache."""
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
        """One real pass over a real prompt.

        Raises:
            CheckpointError: the weights give no finite margin.
        """
        states = np.full((4, self.checkpoint.dim), 0.5, dtype=np.float32)
        margin = self.score([StatePair(self.prompt("Does this model answer?"), states)])
        if not np.isfinite(margin).all():
            raise CheckpointError(f"{self.checkpoint.path}: the first forward pass gave no finite margin")


def _window_key(passage: AnyStates, window: int) -> bytes:
    """Names a window at its ratio in the caches; empty for a passage without a key."""
    return passage.key and passage.key + struct.pack("<II", passage.compression_ratio, window)
