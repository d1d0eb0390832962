"""The T5Gemma 2 decoder as a reranker runs it: one packed pass, read out at each prompt's last token.

Reads like the model's definition (transformers' modeling_t5gemma2 is the oracle in the tests), less
what reranking never uses: no cache, no generation, no full vocabulary. Dense layers see prompts
packed end to end, so no padded token is ever multiplied; the last layer computes queries, output
projection and MLP at the readout rows only; two rows of the output embedding are multiplied.
Does not know texts, stores or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from decoder_server.fused import gated_linear_for
from decoder_server.layout import Layout

if TYPE_CHECKING:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; norms are stored as 1 + w, in float32."""

    qkv: Tensor  # ((num_heads + 2 num_kv_heads) head_dim, dim)
    o: Tensor  # (dim, num_heads head_dim)
    gate: Tensor  # (inner, dim)
    up: Tensor  # (inner, dim)
    down: Tensor  # (dim, inner)
    q_norm: Tensor  # (head_dim,)
    k_norm: Tensor  # (head_dim,)
    pre_attention: Tensor  # (dim,)
    post_attention: Tensor  # (dim,)
    pre_mlp: Tensor  # (dim,)
    post_mlp: Tensor  # (dim,)


class Decoder:
    """Decoder weights and the forward pass over them."""

    def __init__(self, config: T5Gemma2DecoderConfig, tensors: dict[str, Tensor], eoi_id: int) -> None:
        """Takes tensors out of `tensors` (canonical names `decoder.…`) as it fuses them.

        Args:
            eoi_id: the token whose embedding row is kept apart (end of image).
        """
        self.config = config
        self.embedding = tensors.pop("decoder.embed_tokens.weight")  # (vocab, dim)
        self.head = tensors.pop("lm_head.weight", self.embedding)
        self.eoi_row = tensors.pop("decoder.embed_tokens.eoi_embedding")
        self.eoi_id = eoi_id
        self.norm = _norm_weight(tensors.pop("decoder.norm.weight"))
        self.layers = [_take_layer(tensors, i) for i in range(config.num_hidden_layers)]
        self.layer_types: list[str] = list(config.layer_types or ())
        self._gated = gated_linear_for(self.embedding)
        self.rope = _Rope(config, self.embedding.device, self.embedding.dtype)

    @torch.inference_mode()
    def margins(self, token_ids: Tensor, states: Tensor, layout: Layout, yes_id: int, no_id: int) -> Tensor:
        """Yes-logit minus no-logit at the last token of every prompt, float32 (batch,).

        Args:
            token_ids: prompts packed end to end, (num_tokens,).
            states: pooled passage states packed end to end, (num_states, dim).
            layout: which rows of both belong to which pair.
        """
        hidden = self._embed(token_ids)  # (num_tokens, dim)
        rope = {kind: self.rope.at(kind, layout.positions) for kind in set(self.layer_types)}
        masks = {kind: layout.mask(self._window(kind), self.groups, hidden.dtype) for kind in rope}
        for i, (layer, kind) in enumerate(zip(self.layers, self.layer_types, strict=True)):
            last = i == len(self.layers) - 1
            hidden = self._layer(layer, hidden, states, layout, rope[kind], masks[kind], last)
        hidden = _rms_norm(hidden, self.norm, self.eps)  # (batch, dim): the readout rows
        logits = hidden.float() @ self.head[[yes_id, no_id]].float().T  # (batch, 2)
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits[:, 0] - logits[:, 1]

    @property
    def eps(self) -> float:
        return float(self.config.rms_norm_eps)

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return int(self.config.num_attention_heads // self.config.num_key_value_heads)

    def _window(self, kind: str) -> int | None:
        return self.config.sliding_window if kind == "sliding_attention" else None

    def _embed(self, token_ids: Tensor) -> Tensor:
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.embedding.dtype)
        hidden = F.embedding(token_ids, self.embedding) * scale
        hidden[token_ids == self.eoi_id] = self.eoi_row
        return hidden

    def _layer(
        self,
        layer: LayerWeights,
        hidden: Tensor,  # (num_tokens, dim)
        states: Tensor,  # (num_states, dim)
        layout: Layout,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        last: bool,
    ) -> Tensor:
        """One layer; the last one returns the readout rows (batch, dim), the others every token."""
        normed = _rms_norm(hidden, layer.pre_attention, self.eps)
        attended = self._attention(layer, normed, states, layout, rope, mask, last)
        if last:
            hidden = hidden[layout.readout]
        hidden = hidden + _rms_norm(F.linear(attended, layer.o), layer.post_attention, self.eps)
        normed = _rms_norm(hidden, layer.pre_mlp, self.eps)
        inner = self._gated(normed, layer.gate, layer.up)
        return hidden + _rms_norm(F.linear(inner, layer.down), layer.post_mlp, self.eps)

    def _attention(
        self,
        layer: LayerWeights,
        normed: Tensor,
        states: Tensor,
        layout: Layout,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        last: bool,
    ) -> Tensor:
        """Merged attention: one softmax over [prompt keys ; passage keys].

        Passage keys carry no position and no window. Query heads that share a kv head are folded
        into the query axis, so that shared keys are read once and never repeated in memory.
        """
        config, head = self.config, self.config.head_dim
        num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
        qkv = F.linear(normed, layer.qkv).view(-1, num_q + 2 * num_kv, head)
        q, k, v = torch.split(qkv, [num_q, num_kv, num_kv], dim=1)
        # Passage states have no query: the k and v rows of the fused projection alone.
        cross = F.linear(states, layer.qkv[num_q * head :]).view(-1, 2 * num_kv, head)
        cross_k, cross_v = torch.split(cross, num_kv, dim=1)
        k = _rotate(_rms_norm(k, layer.k_norm, self.eps), rope)
        keys = layout.merge(k, _rms_norm(cross_k, layer.k_norm, self.eps))  # (batch, num_kv, max_keys, head)
        values = layout.merge(v, cross_v)
        if last:
            q, rope = q[layout.readout], (rope[0][layout.readout], rope[1][layout.readout])
        q = _rotate(_rms_norm(q, layer.q_norm, self.eps), rope)
        q = layout.fold(q, num_kv, readout=last)  # (batch, num_kv, max_prompt * groups, head)
        if last:
            mask = layout.readout_mask(mask, self.groups)
        scale = config.query_pre_attn_scalar**-0.5
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        return layout.unfold(out, self.groups, readout=last)  # (num_tokens or batch, num_heads head)


class _Rope:
    """Rotary tables per layer type, grown to the longest prompt seen."""

    def __init__(self, config: T5Gemma2DecoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2RotaryEmbedding

        # transformers' own module: every rope_type of config.json is its business, not ours.
        self._module = T5Gemma2RotaryEmbedding(cast(Any, config)).to(device)
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}

    def at(self, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at packed positions, (num_tokens, 1, head_dim) each."""
        needed = int(positions.max()) + 1
        if kind not in self._tables or len(self._tables[kind][0]) < needed:
            size = 1 << max(9, (needed - 1).bit_length())
            ids = torch.arange(size, device=positions.device)[None]
            cos, sin = self._module(self._like, ids, kind)
            self._tables[kind] = (cos[0, :, None], sin[0, :, None])
        cos, sin = self._tables[kind]
        return cos[positions], sin[positions]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis, in float32, back in x's format."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).mul_(weight).to(x.dtype)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding on (tokens, heads, head_dim)."""
    cos, sin = rope
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _norm_weight(weight: Tensor) -> Tensor:
    return 1.0 + weight.float()


def _take_layer(tensors: dict[str, Tensor], index: int) -> LayerWeights:
    """Removes one layer's tensors from `tensors`, so that fusing never holds two copies of the model."""

    def take(name: str) -> Tensor:
        return tensors.pop(f"decoder.layers.{index}.{name}.weight")

    return LayerWeights(
        qkv=torch.cat([take("self_attn.q_proj"), take("self_attn.k_proj"), take("self_attn.v_proj")]),
        o=take("self_attn.o_proj"),
        gate=take("mlp.gate_proj"),
        up=take("mlp.up_proj"),
        down=take("mlp.down_proj"),
        q_norm=_norm_weight(take("self_attn.q_norm")),
        k_norm=_norm_weight(take("self_attn.k_norm")),
        pre_attention=_norm_weight(take("pre_self_attn_layernorm")),
        post_attention=_norm_weight(take("post_self_attn_layernorm")),
        pre_mlp=_norm_weight(take("pre_feedforward_layernorm")),
        post_mlp=_norm_weight(take("post_feedforward_layernorm")),
    )
