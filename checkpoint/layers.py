"""The pieces of a T5Gemma 2 layer that encoder and decoder share. Pure functions and weights; knows no stack.

The oracle in the tests is transformers' modeling_t5gemma2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from checkpoint.linear import GatedLinear, Linear
from checkpoint.pointwise import Rotation


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of either half; norms are stored as 1 + w, in float32."""

    q: Linear  # dim -> num_heads head_dim
    kv: Linear  # dim -> 2 num_kv_heads head_dim
    o: Linear  # num_heads head_dim -> dim
    gated: GatedLinear  # dim -> inner
    down: Linear  # inner -> dim
    q_norm: Tensor  # (head_dim,); times the scale of the attention's logits
    k_norm: Tensor  # (head_dim,)
    pre_attention: Tensor  # (dim,)
    post_attention: Tensor  # (dim,)
    pre_mlp: Tensor  # (dim,)
    post_mlp: Tensor  # (dim,)


def take_layer(tensors: dict[str, Tensor], prefix: str, scale: float) -> LayerWeights:
    """Removes one layer's tensors from `tensors`, so that packing never holds two copies of the model.

    Args:
        prefix: `encoder.layers.3` or the like.
        scale: of the attention's logits.
    """

    def take(name: str) -> Tensor:
        return tensors.pop(f"{prefix}.{name}.weight")

    return LayerWeights(
        q=Linear(take("self_attn.q_proj")),
        kv=Linear(torch.cat([take("self_attn.k_proj"), take("self_attn.v_proj")])),
        o=Linear(take("self_attn.o_proj")),
        gated=GatedLinear(take("mlp.gate_proj"), take("mlp.up_proj")),
        down=Linear(take("mlp.down_proj")),
        q_norm=norm_weight(take("self_attn.q_norm")) * scale,
        k_norm=norm_weight(take("self_attn.k_norm")),
        pre_attention=norm_weight(take("pre_self_attn_layernorm")),
        post_attention=norm_weight(take("post_self_attn_layernorm")),
        pre_mlp=norm_weight(take("pre_feedforward_layernorm")),
        post_mlp=norm_weight(take("post_feedforward_layernorm")),
    )


class Embedding:
    """Scaled token embedding with the end-of-image row that T5Gemma 2 keeps apart."""

    def __init__(self, tensors: dict[str, Tensor], half: str, eoi_id: int) -> None:
        """Takes the embedding of `half` (`encoder` or `decoder`) out of `tensors`."""
        self.weight = tensors.pop(f"{half}.embed_tokens.weight")  # (vocab, dim)
        self._eoi_row = tensors.pop(f"{half}.embed_tokens.eoi_embedding")
        self._eoi_id = eoi_id
        self._scale = torch.tensor(self.weight.shape[1] ** 0.5, dtype=self.weight.dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(...,) token ids -> (..., dim)."""
        hidden = torch.nn.functional.embedding(token_ids, self.weight) * self._scale
        hidden[token_ids == self._eoi_id] = self._eoi_row
        return hidden


class Rope:
    """Rotary tables per layer type, grown to the longest text seen."""

    def __init__(self, config: object, device: torch.device, dtype: torch.dtype) -> None:
        from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2RotaryEmbedding

        # transformers' own module: every rope_type of config.json is its business, not ours.
        self._module = T5Gemma2RotaryEmbedding(cast(Any, config)).to(device)
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._tables: dict[str, Rotation] = {}

    def table(self, kind: str, num_positions: int) -> Rotation:
        """cos and sin of the first positions (and maybe more) for one layer type, (positions, 1, head_dim) each."""
        if kind not in self._tables or len(self._tables[kind][0]) < num_positions:
            size = 1 << max(9, (num_positions - 1).bit_length())
            ids = torch.arange(size, device=self._like.device)[None]
            cos, sin = self._module(self._like, ids, kind)
            self._tables[kind] = (cos[0, :, None], sin[0, :, None])
        return self._tables[kind]


def norm_weight(weight: Tensor) -> Tensor:
    return 1.0 + weight.float()
