"""The T5Gemma 2 decoder as a reranker runs it: one packed pass, read out at each prompt's last token.

Reads like the model's definition (transformers' modeling_t5gemma2 is the oracle in the tests), less
what reranking never uses: no generation, no full vocabulary. Dense layers see prompts packed end to
end, so no padded token is ever multiplied; the last layer computes queries, output projection and MLP
at the readout rows only; two rows of the output embedding are multiplied.

What a pass needs of a passage are its keys and values, layer by layer: a context. `passage_kv` makes
it of pooled states; `prompt_kv` continues it by the beginning of a prompt, so that a pass over the
rest alone gives the same margins. Whoever keeps contexts does it elsewhere. Does not know texts,
stores or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checkpoint.layers import Embedding, LayerWeights, Pointwise, Rope, Rotation, attend, norm_weight, take_layer
from decoder_server.models.fbnl.layout import Layout

if TYPE_CHECKING:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig

KeysValues = tuple[Tensor, Tensor]  # of one layer, normed and rotated, (rows, num_kv, head) each


class Decoder:
    """Decoder weights and the forward pass over them."""

    def __init__(
        self, config: T5Gemma2DecoderConfig, tensors: dict[str, Tensor], eoi_id: int, *, compiled: bool = False
    ) -> None:
        """Takes tensors out of `tensors` (canonical names `decoder.…`) as it packs them.

        Args:
            eoi_id: the token whose embedding row is kept apart (end of image).
            compiled: see Pointwise.
        """
        self.config = config
        self.embedding = Embedding(tensors, "decoder", eoi_id)
        weight = self.embedding.weight
        self.head = tensors.pop("lm_head.weight", weight)
        self.norm = norm_weight(tensors.pop("decoder.norm.weight"))
        scale = float(config.query_pre_attn_scalar**-0.5)
        self.layers = [take_layer(tensors, f"decoder.layers.{i}", scale) for i in range(config.num_hidden_layers)]
        self.layer_types: list[str] = list(config.layer_types or ())
        self.pointwise = Pointwise(float(config.rms_norm_eps), compiled=compiled)
        self._rope = Rope(config, weight.device, weight.dtype)

    @torch.inference_mode()
    def margins(
        self, token_ids: Tensor, context: Iterable[KeysValues], layout: Layout, yes_id: int, no_id: int
    ) -> Tensor:
        """Yes-logit minus no-logit at the last token of every prompt, float32 (batch,).

        Args:
            token_ids: prompts packed end to end, without what the context has of them, (num_tokens,).
            context: per layer, packed end to end.
            layout: which rows of both belong to which pair.
        """
        hidden = self._run(token_ids, context, layout)  # (batch, dim): the readout rows
        logits = hidden.float() @ self.head[[yes_id, no_id]].float().T  # (batch, 2)
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits[:, 0] - logits[:, 1]

    @torch.inference_mode()
    def passage_kv(self, states: Tensor) -> Iterator[KeysValues]:
        """The context that pooled states (num_states, dim) make, layer by layer as it is asked for.

        Passage keys carry no position.
        """
        for layer in self.layers:
            with torch.inference_mode():  # a generator runs in its caller's mode
                k, v = self._projected(layer, states)
                yield self.pointwise.rms_norm(k, layer.k_norm), v

    @torch.inference_mode()
    def prompt_kv(self, token_ids: Tensor, context: Iterable[KeysValues], layout: Layout) -> list[KeysValues]:
        """What the beginning of prompts adds to a context, per layer (num_tokens, num_kv, head) each.

        Args: as of `margins`.
        """
        kept: list[KeysValues] = []
        self._run(token_ids, context, layout, keep=kept.append)
        return kept

    @torch.inference_mode()
    def attention(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """What one prompt's readout token attends to: weights over the states, float32 (num_layers, num_states).

        The mean over heads of the softmax over [states ; prompt]; what a row lacks to 1 went to the
        prompt. For looking at, not for serving.

        Args:
            token_ids: (num_tokens,).
            states: (num_states, dim).
        """
        rows: list[Tensor] = []

        def watch(q: Tensor, keys: Tensor, mask: Tensor) -> None:
            group = q.shape[2] // mask.shape[2]
            logits = q[:, :, -group:].float() @ keys.float().transpose(2, 3) + mask[:, :, -1:].float()
            rows.append(logits.softmax(-1)[0, :, :, : len(states)].mean((0, 1)))  # (num_states,)

        layout = Layout([len(token_ids)], [len(states)], token_ids.device)
        self._run(token_ids, self.passage_kv(states), layout, watch=watch)
        return torch.stack(rows)

    def _run(
        self,
        token_ids: Tensor,
        context: Iterable[KeysValues],
        layout: Layout,
        *,
        keep: Callable[[KeysValues], None] | None = None,
        watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Every layer over every token but the last layer, which computes the readout rows; they come out normed.

        Args:
            keep: takes the prompt's keys and values of each layer; then nothing after the last is computed.
            watch: sees each layer's queries, keys and mask.
        """
        hidden = self.embedding(token_ids)  # (num_tokens, dim)
        views = {kind: self._view(kind, layout, hidden.dtype) for kind in set(self.layer_types)}
        norms = [layer.pre_attention for layer in self.layers] + [self.norm]
        normed: Tensor = self.pointwise.rms_norm(hidden, norms[0])
        for i, (layer, passage) in enumerate(zip(self.layers, context, strict=True)):
            last = i == len(self.layers) - 1
            rotation, mask = views[self.layer_types[i]]
            k, v = self._projected(layer, normed)
            k = self.pointwise.norm_rotate(k, layer.k_norm, *rotation)
            if keep is not None:
                keep((k, v))
                if last:
                    break
            # One softmax over [passage keys ; prompt keys].
            keys, values = layout.merge(passage[0], k), layout.merge(passage[1], v)
            if last:
                rows = layout.readout
                hidden, normed = hidden[rows], normed[rows]  # (batch, dim)
                rotation, mask = (rotation[0][rows], rotation[1][rows]), layout.readout_mask(mask)
            q = layer.q(normed).view(len(normed), -1, self.config.head_dim)
            q = layout.fold(self.pointwise.norm_rotate(q, layer.q_norm, *rotation), keys.shape[1], readout=last)
            if watch is not None:
                watch(q, keys, mask)
            attended = layout.unfold(attend(q, keys, values, mask, self.pointwise), self.groups, readout=last)
            hidden, normed = self.pointwise.add_norm(hidden, layer.o(attended), layer.post_attention, layer.pre_mlp)
            update = layer.down(layer.gated(normed))
            hidden, normed = self.pointwise.add_norm(hidden, update, layer.post_mlp, norms[i + 1])
        return normed

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return int(self.config.num_attention_heads // self.config.num_key_value_heads)

    def _projected(self, layer: LayerWeights, x: Tensor) -> KeysValues:
        """(rows, dim) -> raw keys and values, (rows, num_kv, head) each."""
        kv = layer.kv(x).view(len(x), 2, self.config.num_key_value_heads, self.config.head_dim)
        return kv[:, 0], kv[:, 1]

    def _view(self, kind: str, layout: Layout, dtype: torch.dtype) -> tuple[Rotation, Tensor]:
        """What layers of this kind share: cos and sin of the packed tokens, and the mask."""
        cos, sin = self._rope.table(kind, layout.num_positions)
        window = self.config.sliding_window if kind == "sliding_attention" else None
        mask = layout.mask(window, self.config.num_key_value_heads, dtype)
        return (cos[layout.positions], sin[layout.positions]), mask
