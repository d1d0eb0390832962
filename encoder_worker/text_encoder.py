"""The T5Gemma 2 text encoder: token ids to token states, bidirectional, one packed batch a pass.

Reads like the model's definition (transformers' modeling_t5gemma2 is the oracle in the tests). Passages
lie end to end, so no padding is ever multiplied. Sliding layers are computed in blocks of queries
against the keys their window reaches, so time and memory grow with the length of a passage, not with
its square. Does not know texts, pooling or stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checkpoint.layers import Embedding, LayerWeights, Rope, norm_weight, take_layer
from checkpoint.pointwise import Pointwise, Rotation
from encoder_worker.window import Window

if TYPE_CHECKING:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2TextConfig


class TextEncoder:
    """Encoder weights and the forward pass over them."""

    def __init__(
        self, config: T5Gemma2TextConfig, tensors: dict[str, Tensor], eoi_id: int, *, compiled: bool = False
    ) -> None:
        """Takes tensors out of `tensors` (canonical names `encoder.…`) as it packs them.

        Args:
            eoi_id: the token whose embedding row is kept apart (end of image).
            compiled: see Pointwise.
        """
        self.config = config
        self.embedding = Embedding(tensors, "encoder", eoi_id)
        weight = self.embedding.weight
        self.norm = norm_weight(tensors.pop("encoder.norm.weight"))
        scale = float(config.query_pre_attn_scalar**-0.5)
        self.layers = [take_layer(tensors, f"encoder.layers.{i}", scale) for i in range(config.num_hidden_layers)]
        self.layer_types: list[str] = list(config.layer_types or ())
        self.pointwise = Pointwise(float(config.rms_norm_eps), compiled=compiled)
        self._rope = Rope(config, weight.device, weight.dtype)

    @torch.inference_mode()
    def states(self, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Token states after the final norm, (num_tokens, dim).

        Args:
            token_ids: passages packed end to end, (num_tokens,).
            lengths: of the passages.
        """
        hidden = self.embedding(token_ids)
        device, dtype = hidden.device, hidden.dtype
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        windows, rotations = {}, {}
        for kind in set(self.layer_types):
            size = self.config.sliding_window if kind == "sliding_attention" else None
            windows[kind] = Window(size, lengths, group, device, dtype)
            cos, sin = self._rope.table(kind, max(lengths))
            rotations[kind] = (cos[positions], sin[positions])
        norms = [layer.pre_attention for layer in self.layers] + [self.norm]
        normed: Tensor = self.pointwise.rms_norm(hidden, norms[0])
        for layer, kind, following in zip(self.layers, self.layer_types, norms[1:], strict=True):
            attended = self._attended(layer, normed, windows[kind], rotations[kind])
            hidden, normed = self.pointwise.add_norm(hidden, layer.o(attended), layer.post_attention, layer.pre_mlp)
            update = layer.down(layer.gated(normed))
            hidden, normed = self.pointwise.add_norm(hidden, update, layer.post_mlp, following)
        return normed

    def _attended(self, layer: LayerWeights, normed: Tensor, window: Window, rotation: Rotation) -> Tensor:
        """(num_tokens, dim) -> (num_tokens, num_heads * head_dim)."""
        head = self.config.head_dim
        q = layer.q(normed).view(len(normed), -1, head)
        k, v = layer.kv(normed).view(len(normed), 2, -1, head).unbind(1)
        q = self.pointwise.norm_rotate(q, layer.q_norm, *rotation)
        k = self.pointwise.norm_rotate(k, layer.k_norm, *rotation)
        return window.attend(q, k, v.contiguous(), self.pointwise)
