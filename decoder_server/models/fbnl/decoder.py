"""The T5Gemma 2 decoder as a reranker runs it; transformers' modeling_t5gemma2 is the oracle in the tests.

Dense layers see prompts packed end to end, so no padded token is ever multiplied; only attention pads. A pass needs
of a passage its keys and values, layer by layer: a context. `passage_kv` makes it of states; `prompt_kv` continues it
by a prompt's prefix, so that a pass over the rest alone gives the same margins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checkpoint.layers import Rotation, Stack, attend

if TYPE_CHECKING:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig


class Layout:
    """Where the rows of each pair lie in a packed batch, and the padded view that attention needs.

    A pair's tokens stand on its context: `prefix_lengths` tokens of its prompt that were computed before, then states.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],  # tokens to compute per pair, each at least 1
        state_counts: Sequence[int],  # per pair, each at least 1
        device: torch.device,
        prefix_lengths: Sequence[int] | None = None,  # tokens before them that the context has; None: none
    ) -> None:
        prefix_lengths = [0] * len(prompt_lengths) if prefix_lengths is None else prefix_lengths
        counts = [prefix + states for prefix, states in zip(prefix_lengths, state_counts, strict=True)]
        self._device = device
        self._prompt, self._context = _Padding(prompt_lengths, device), _Padding(counts, device)
        self._prefix = torch.tensor(prefix_lengths, device=device)[:, None]  # (batch, 1)
        self._at = self._prefix + torch.arange(self._prompt.longest, device=device)  # (batch, max_prompt)
        self.positions = self._prompt.pack(self._at)  # of every packed token in its whole prompt
        self.num_positions = max(p + q for p, q in zip(prefix_lengths, prompt_lengths, strict=True))
        lengths = torch.tensor(prompt_lengths, device=device)
        self.readout = lengths.cumsum(0) - 1  # packed row of each prompt's last token, (batch,)
        self.last = lengths - 1  # the same within its own prompt

    def mask(self, window: int | None, num_kv: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (batch, num_kv, max_prompt, max_context + max_prompt).

        A prompt token sees itself and earlier tokens, within `window` where the layer slides, and every state.
        """
        at = self._at[:, :, None]
        index = torch.arange(self._context.longest, device=self._device)
        context = self._context.real[:, None, :].expand(-1, self._prompt.longest, -1)
        causal = (at >= self._at[:, None, :]) & self._prompt.real[:, None, :]
        if window is not None:
            context = context & ((index >= self._prefix[:, :, None]) | (at - index < window))
            causal = causal & (at - self._at[:, None, :] < window)
        allowed = torch.cat([context, causal], dim=2)[:, None].expand(-1, num_kv, -1, -1)
        return torch.zeros(allowed.shape, dtype=dtype, device=self._device).masked_fill_(~allowed, float("-inf"))

    def merge(self, context: Tensor, prompt: Tensor) -> Tensor:
        """Packed keys or values (rows, num_kv, head) of both -> (batch, num_kv, max_context + max_prompt, head)."""
        return torch.cat([self._context.pad(context), self._prompt.pad(prompt)], dim=1).transpose(1, 2)

    def fold(self, q: Tensor, num_kv: int, *, readout: bool) -> Tensor:
        """Queries (rows, num_heads, head) -> (batch, num_kv, length * group, head); of `readout` rows alone: length 1.

        Query heads that share a kv head are adjacent, so that shared keys are read once, never repeated in memory.
        """
        padded = q[:, None] if readout else self._prompt.pad(q)  # (batch, length, num_heads, head)
        batch, length, num_heads, head = padded.shape
        folded = padded.view(batch, length, num_kv, num_heads // num_kv, head).transpose(1, 2)
        return folded.reshape(batch, num_kv, length * (num_heads // num_kv), head)

    def unfold(self, out: Tensor, group: int, *, readout: bool) -> Tensor:
        """The inverse of `fold`, packed again: (rows, num_heads * head)."""
        batch, num_kv, _, head = out.shape
        rows = out.view(batch, num_kv, -1, group, head).transpose(1, 2)  # (batch, length, num_kv, group, head)
        rows = rows.reshape(batch, rows.shape[1], -1)
        return rows[:, 0] if readout else self._prompt.pack(rows)


class _Padding:
    """Packed rows (sum of lengths, ...) to padded (batch, longest, ...) and back."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.longest = max(lengths)
        self.real = torch.arange(self.longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        self._even = len(set(lengths)) == 1  # the common case, one query: both ways are views
        self._source = None if self._even else (self.real.flatten().cumsum(0) - 1).clamp(min=0)

    def pad(self, rows: Tensor) -> Tensor:
        # Padding repeats the pair's own last row: finite where the pair is, and hidden by the mask.
        rows = rows if self._source is None else rows[self._source]
        return rows.reshape(*self.real.shape, *rows.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1) if self._even else padded[self.real]


KeysValues = tuple[Tensor, Tensor]  # of one layer, normed and rotated, (rows, num_kv, head) each


class Decoder(Stack):
    """Decoder weights and the forward pass over them."""

    def __init__(
        self, config: T5Gemma2DecoderConfig, tensors: dict[str, Tensor], eoi_id: int, *, compiled: bool = False
    ) -> None:
        """Takes tensors (`decoder.…`) out of `tensors` as it packs them; `eoi_id` has its own embedding row."""
        super().__init__(config, "decoder", tensors, eoi_id, compiled=compiled)
        self.head = tensors.pop("lm_head.weight", self.embedding)

    @torch.inference_mode()
    def margins(
        self, token_ids: Tensor, context: Iterable[KeysValues], layout: Layout, yes_id: int, no_id: int
    ) -> Tensor:
        """Yes-logit minus no-logit at the last token of every prompt, float32 (batch,).

        `token_ids` (num_tokens,) are prompts packed end to end, without what the context has of them; `context` is per
        layer, packed end to end; `layout` says which rows of both belong to which pair.
        """
        hidden = self._run(token_ids, context, layout)  # (batch, dim): the readout rows
        logits = hidden.float() @ self.head[[yes_id, no_id]].float().T  # (batch, 2)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits[:, 0] - logits[:, 1]

    @torch.inference_mode()
    def passage_kv(self, states: Tensor) -> Iterator[KeysValues]:
        """The context that pooled states (num_states, dim) make, layer by layer, on demand; keys carry no position."""
        for layer in self.layers:
            with torch.inference_mode():  # a generator runs in its caller's mode
                k, v = self.keys_values(layer, states)
                yield self.pointwise.rms_norm(k, layer.k_norm), v

    @torch.inference_mode()
    def prompt_kv(self, token_ids: Tensor, context: Iterable[KeysValues], layout: Layout) -> list[KeysValues]:
        """Keys and values that a prefix of the prompts adds to a context, per layer (num_tokens, num_kv, head) each."""
        kept: list[KeysValues] = []
        self._run(token_ids, context, layout, keep=kept.append)
        return kept

    @torch.inference_mode()
    def attention(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """Weights of one prompt's readout token over states (num_states, dim): float32 (num_layers, num_states).

        The mean over heads of the softmax over [states ; prompt]; what a row lacks to 1 went to the prompt.
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
        # Takes the prompt's keys and values of each layer; then nothing after the last is computed.
        keep: Callable[[KeysValues], None] | None = None,
        watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,  # sees each layer's queries, keys and mask
    ) -> Tensor:
        """Every layer over every token but the last layer, which computes the readout rows; they come out normed."""
        hidden, normed = self.embed(token_ids)  # (num_tokens, dim)
        views = {kind: self._view(kind, layout, hidden.dtype) for kind in set(self.layer_types)}
        group = self.config.num_attention_heads // self.config.num_key_value_heads  # query heads per kv head
        for i, (layer, passage) in enumerate(zip(self.layers, context, strict=True)):
            last = i == len(self.layers) - 1
            rotation, mask = views[self.layer_types[i]]
            k, v = self.keys_values(layer, normed)
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
                rotation = rotation[0][rows], rotation[1][rows]
                every = torch.arange(len(rows), device=rows.device)
                mask = mask[every, :, layout.last][:, :, None]  # (batch, num_kv, 1, max_context + max_prompt)
            q = layout.fold(self.queries(layer, normed, rotation), keys.shape[1], readout=last)
            if watch is not None:
                watch(q, keys, mask)
            attended = layout.unfold(attend(q, keys, values, mask, self.pointwise), group, readout=last)
            hidden, normed = self.finish(i, hidden, attended)
        return normed

    def _view(self, kind: str, layout: Layout, dtype: torch.dtype) -> tuple[Rotation, Tensor]:
        """Shared by the layers of this kind: cos and sin of the packed tokens, and the mask."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        mask = layout.mask(window, self.config.num_key_value_heads, dtype)
        return self.rotation(kind, layout.positions, layout.num_positions), mask
