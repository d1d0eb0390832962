"""The T5Gemma 2 decoder as a reranker runs it: one packed pass, read out at each prompt's last token.

Reads like the model's definition (transformers' modeling_t5gemma2 is the oracle in the tests), less
what reranking never uses: no cache, no generation, no full vocabulary. Dense layers see prompts
packed end to end, so no padded token is ever multiplied; the last layer computes queries, output
projection and MLP at the readout rows only; two rows of the output embedding are multiplied.
Does not know texts, stores or requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from checkpoint.fused import gated_linear_for
from checkpoint.layers import Embedding, LayerWeights, Rope, Rotation, norm_weight, rms_norm, rotate, take_layer
from decoder_server.layout import Layout

if TYPE_CHECKING:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig


class Decoder:
    """Decoder weights and the forward pass over them."""

    def __init__(self, config: T5Gemma2DecoderConfig, tensors: dict[str, Tensor], eoi_id: int) -> None:
        """Takes tensors out of `tensors` (canonical names `decoder.…`) as it fuses them.

        Args:
            eoi_id: the token whose embedding row is kept apart (end of image).
        """
        self.config = config
        self.embedding = Embedding(tensors, "decoder", eoi_id)
        weight = self.embedding.weight
        self.head = tensors.pop("lm_head.weight", weight)
        self.norm = norm_weight(tensors.pop("decoder.norm.weight"))
        self.layers = [take_layer(tensors, f"decoder.layers.{i}") for i in range(config.num_hidden_layers)]
        self.layer_types: list[str] = list(config.layer_types or ())
        self._gated = gated_linear_for(weight)
        self.rope = Rope(config, weight.device, weight.dtype)

    @torch.inference_mode()
    def margins(self, token_ids: Tensor, states: Tensor, layout: Layout, yes_id: int, no_id: int) -> Tensor:
        """Yes-logit minus no-logit at the last token of every prompt, float32 (batch,).

        Args:
            token_ids: prompts packed end to end, (num_tokens,).
            states: pooled passage states packed end to end, (num_states, dim).
            layout: which rows of both belong to which pair.
        """
        hidden = self.embedding(token_ids)  # (num_tokens, dim)
        rope = {kind: self._rotation(kind, layout) for kind in set(self.layer_types)}
        masks = {kind: layout.mask(self._window(kind), self.groups, hidden.dtype) for kind in rope}
        for i, (layer, kind) in enumerate(zip(self.layers, self.layer_types, strict=True)):
            last = i == len(self.layers) - 1
            hidden = self._layer(layer, hidden, states, layout, rope[kind], masks[kind], last)
        hidden = rms_norm(hidden, self.norm, self.eps)  # (batch, dim): the readout rows
        logits = hidden.float() @ self.head[[yes_id, no_id]].float().T  # (batch, 2)
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits[:, 0] - logits[:, 1]

    @torch.inference_mode()
    def attention(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """What one prompt's readout token attends to: weights over the states, float32 (num_layers, num_states).

        The mean over heads of the softmax over [prompt ; states]; what a row lacks to 1 went to the
        prompt. For looking at, not for serving: queries and keys are projected twice.

        Args:
            token_ids: (num_tokens,).
            states: (num_states, dim).
        """
        layout = Layout([len(token_ids)], [len(states)], token_ids.device)
        hidden = self.embedding(token_ids)
        rows = []
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            rope = self._rotation(kind, layout)
            mask = layout.mask(self._window(kind), self.groups, hidden.dtype)
            normed = rms_norm(hidden, layer.pre_attention, self.eps)
            q, keys, _, seen = self._projected(layer, normed, states, layout, rope, mask, True)
            logits = q.float() @ keys.float().transpose(2, 3) * self._scale + seen.float()
            rows.append(logits.softmax(-1)[0, :, :, layout.max_prompt :].mean((0, 1)))  # (num_states,)
            hidden = self._layer(layer, hidden, states, layout, rope, mask, False)
        return torch.stack(rows)

    @property
    def _scale(self) -> float:
        return float(self.config.query_pre_attn_scalar**-0.5)

    @property
    def eps(self) -> float:
        return float(self.config.rms_norm_eps)

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return int(self.config.num_attention_heads // self.config.num_key_value_heads)

    def _window(self, kind: str) -> int | None:
        return self.config.sliding_window if kind == "sliding_attention" else None

    def _rotation(self, kind: str, layout: Layout) -> Rotation:
        """cos and sin of the packed prompt tokens, (num_tokens, 1, head_dim) each."""
        cos, sin = self.rope.table(kind, layout.max_prompt)
        return cos[layout.positions], sin[layout.positions]

    def _layer(
        self,
        layer: LayerWeights,
        hidden: Tensor,  # (num_tokens, dim)
        states: Tensor,  # (num_states, dim)
        layout: Layout,
        rope: Rotation,
        mask: Tensor,
        last: bool,
    ) -> Tensor:
        """One layer; the last one returns the readout rows (batch, dim), the others every token."""
        normed = rms_norm(hidden, layer.pre_attention, self.eps)
        attended = self._attention(layer, normed, states, layout, rope, mask, last)
        if last:
            hidden = hidden[layout.readout]
        hidden = hidden + rms_norm(F.linear(attended, layer.o), layer.post_attention, self.eps)
        normed = rms_norm(hidden, layer.pre_mlp, self.eps)
        inner = self._gated(normed, layer.gate, layer.up)
        return hidden + rms_norm(F.linear(inner, layer.down), layer.post_mlp, self.eps)

    def _attention(
        self,
        layer: LayerWeights,
        normed: Tensor,
        states: Tensor,
        layout: Layout,
        rope: Rotation,
        mask: Tensor,
        last: bool,
    ) -> Tensor:
        """Merged attention: one softmax over [prompt keys ; passage keys]."""
        q, keys, values, mask = self._projected(layer, normed, states, layout, rope, mask, last)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self._scale)
        return layout.unfold(out, self.groups, readout=last)  # (num_tokens or batch, num_heads head)

    def _projected(
        self,
        layer: LayerWeights,
        normed: Tensor,
        states: Tensor,
        layout: Layout,
        rope: Rotation,
        mask: Tensor,
        last: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Folded queries, merged keys, merged values, and the mask over them.

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
        k = rotate(rms_norm(k, layer.k_norm, self.eps), rope)
        keys = layout.merge(k, rms_norm(cross_k, layer.k_norm, self.eps))  # (batch, num_kv, max_keys, head)
        values = layout.merge(v, cross_v)
        if last:
            q, rope = q[layout.readout], (rope[0][layout.readout], rope[1][layout.readout])
        q = rotate(rms_norm(q, layer.q_norm, self.eps), rope)
        q = layout.fold(q, num_kv, readout=last)  # (batch, num_kv, max_prompt * groups, head)
        if last:
            mask = layout.readout_mask(mask, self.groups)
        return q, keys, values, mask
