"""The T5Gemma 2 text encoder: token ids to token states, bidirectional, one padded batch a pass.

Reads like the model's definition (transformers' modeling_t5gemma2 is the oracle in the tests). Sliding
layers are computed in blocks of queries against the keys their window reaches, so time and memory
grow with the length of a passage, not with its square. Does not know texts, pooling or stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from checkpoint.fused import gated_linear_for
from checkpoint.layers import Embedding, LayerWeights, Rope, Rotation, norm_weight, rms_norm, rotate, take_layer
from encoder_worker.window import Window

if TYPE_CHECKING:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2TextConfig


class TextEncoder:
    """Encoder weights and the forward pass over them."""

    def __init__(self, config: T5Gemma2TextConfig, tensors: dict[str, Tensor], eoi_id: int) -> None:
        """Takes tensors out of `tensors` (canonical names `encoder.…`) as it fuses them.

        Args:
            eoi_id: the token whose embedding row is kept apart (end of image).
        """
        self.config = config
        self.embedding = Embedding(tensors, "encoder", eoi_id)
        weight = self.embedding.weight
        self.norm = norm_weight(tensors.pop("encoder.norm.weight"))
        self.layers = [take_layer(tensors, f"encoder.layers.{i}") for i in range(config.num_hidden_layers)]
        self.layer_types: list[str] = list(config.layer_types or ())
        self._gated = gated_linear_for(weight)
        self._rope = Rope(config, weight.device, weight.dtype)

    @torch.inference_mode()
    def states(self, token_ids: Tensor, real: Tensor) -> Tensor:
        """Token states after the final norm, (batch, length, dim); at padding they mean nothing.

        Args:
            token_ids: (batch, length), padded on the right.
            real: (batch, length), True where a token is not padding.
        """
        hidden = self.embedding(token_ids)
        length, groups = token_ids.shape[1], self.config.num_attention_heads // self.config.num_key_value_heads
        windows, rotations = {}, {}
        for kind in set(self.layer_types):
            size = self.config.sliding_window if kind == "sliding_attention" else None
            windows[kind] = Window(size, real, groups, hidden.dtype)
            cos, sin = self._rope.table(kind, length)
            rotations[kind] = (cos[:length], sin[:length])
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            hidden = self._layer(layer, hidden, windows[kind], rotations[kind])
        return rms_norm(hidden, self.norm, self.config.rms_norm_eps)

    def _layer(self, layer: LayerWeights, hidden: Tensor, window: Window, rotation: Rotation) -> Tensor:
        eps = self.config.rms_norm_eps
        attended = self._attention(layer, rms_norm(hidden, layer.pre_attention, eps), window, rotation)
        hidden = hidden + rms_norm(F.linear(attended, layer.o), layer.post_attention, eps)
        inner = self._gated(rms_norm(hidden, layer.pre_mlp, eps), layer.gate, layer.up)
        return hidden + rms_norm(F.linear(inner, layer.down), layer.post_mlp, eps)

    def _attention(self, layer: LayerWeights, normed: Tensor, window: Window, rotation: Rotation) -> Tensor:
        """(batch, length, dim) -> (batch, length, num_heads * head_dim)."""
        config = self.config
        num_q, num_kv, head, eps = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
        )
        qkv = F.linear(normed, layer.qkv).view(*normed.shape[:2], num_q + 2 * num_kv, head)
        q, k, v = torch.split(qkv, [num_q, num_kv, num_kv], dim=2)
        q = rotate(rms_norm(q, layer.q_norm, eps), rotation)
        k = rotate(rms_norm(k, layer.k_norm, eps), rotation)
        out = window.attend(q, k.transpose(1, 2), v.transpose(1, 2), config.query_pre_attn_scalar**-0.5)
        return out.flatten(2)
