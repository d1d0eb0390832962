"""The encoder half of T5Gemma 2: token ids in, pooled token states out, bidirectional, one packed batch a pass.

Reads like the model's definition (transformers' modeling_t5gemma2 is the oracle in the tests). Sliding layers take
blocks of queries against the keys their window reaches: time and memory grow with a passage's length, not its square.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from checkpoint import Checkpoint
from checkpoint.compute import choose_device, choose_fused, dtype_name
from checkpoint.layers import BLOCK_LOGITS, Pointwise, Stack, attend

# Queries at a time where a layer slides: more would see more keys in vain, those that their windows reach.
BLOCK_TOKENS = 128


class _Block(NamedTuple):
    """Queries [first, last) against keys [first_key, last_key) of every passage of a group."""

    first: int
    last: int
    first_key: int
    last_key: int
    mask: Tensor | None  # additive, (batch or 1, 1, queries, keys)


class _Group(NamedTuple):
    """Passages of one length that lie next to one another; or, padded, of several lengths."""

    rows: slice  # of the packed batch
    source: Tensor | None  # packed row of every padded one; None: nothing is padded
    real: Tensor | None  # (batch, longest)
    batch: int
    length: int
    blocks: list[_Block]


class _Attention:
    """Bidirectional attention for one packed batch of passages; `group`: query heads per kv head.

    With a `size` it slides: a query sees (size - 1) // 2 tokens to its left and size // 2 to its right (source:
    sliding_window_mask_function in transformers' modeling_t5gemma2); None sees all.
    """

    def __init__(self, size: int | None, lengths: Sequence[int], group: int, hidden: Tensor) -> None:
        self._size, self._group, self._device, self._dtype = size, group, hidden.device, hidden.dtype
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        self._groups: list[_Group] = []
        if self._device.type != "cpu" and len(set(lengths)) > 1:  # a GPU would spend its time launching
            longest = max(lengths)
            real = torch.arange(longest, device=self._device) < torch.tensor(lengths, device=self._device)[:, None]
            source = (real.flatten().cumsum(0) - 1).clamp(min=0)
            blocks = self._blocks(longest, real)
            self._groups.append(_Group(slice(None), source, real, len(lengths), longest, blocks))
            return
        row = 0
        for length, run in groupby(lengths):  # a CPU takes every length alone and pads nothing
            batch = len(list(run))
            rows = slice(row, row + batch * length)
            self._groups.append(_Group(rows, None, None, batch, length, self._blocks(length, None)))
            row = rows.stop

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pointwise: Pointwise) -> Tensor:
        """Scaled q (num_tokens, num_heads, head), k, v (num_tokens, num_kv, head) to (num_tokens, num_heads head)."""
        num_heads, head, num_kv = q.shape[1], q.shape[2], k.shape[1]
        out = torch.empty_like(q)
        for group in self._groups:
            queries, keys, values = (
                x[group.rows if group.source is None else group.source].view(group.batch, group.length, *x.shape[1:])
                for x in (q, k, v)
            )
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # (batch, num_kv, length, head)
            parts = []
            for block in group.blocks:
                part = queries[:, block.first : block.last]  # (batch, queries, num_heads, head)
                folded = part.reshape(*part.shape[:2], num_kv, self._group, head).transpose(1, 2)
                part = attend(
                    folded.reshape(group.batch, num_kv, -1, head),
                    keys[:, :, block.first_key : block.last_key],
                    values[:, :, block.first_key : block.last_key],
                    None if block.mask is None else block.mask.expand(group.batch, num_kv, -1, -1),
                    pointwise,
                )
                parts.append(part.view(group.batch, num_kv, -1, self._group, head).transpose(1, 2))
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            rows = whole.reshape(group.batch, group.length, num_heads, head)
            out[group.rows] = rows.flatten(0, 1) if group.real is None else rows[group.real]
        return out.flatten(1)

    def _blocks(self, length: int, real: Tensor | None) -> list[_Block]:
        """The queries of `length` tokens, cut so that whole rows of logits fit."""
        if self._size is None or length <= (self._size + 1) // 2:
            left = right = length
            step = max(1, BLOCK_LOGITS // (self._group * length))
        else:
            left, right, step = (self._size + 1) // 2 - 1, self._size // 2, BLOCK_TOKENS
        blocks = []
        for first in range(0, length, step):
            last = min(first + step, length)
            first_key, last_key = max(0, first - left), min(length, last + right)
            offset, num_queries, num_keys = first - first_key, last - first, last_key - first_key
            mask = None
            if num_queries + offset - 1 > left or num_keys - 1 - offset > right:
                key = (offset, num_queries, num_keys)  # blocks that look alike share one
                if key not in self._masks:
                    queries = torch.arange(offset, offset + num_queries, device=self._device)[:, None]
                    distance = queries - torch.arange(num_keys, device=self._device)
                    self._masks[key] = _additive((distance <= left) & (distance >= -right), self._dtype)[None, None]
                mask = self._masks[key]
            if real is not None:
                padding = _additive(real[:, None, None, first_key:last_key], self._dtype)
                mask = padding if mask is None else mask + padding
            blocks.append(_Block(first, last, first_key, last_key, mask))
        return blocks


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    # Lowest rather than -inf: a padding query that sees padding alone still has something to average.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 4)


class Encoder:
    """Encoder half of one checkpoint, loaded; call it from one thread.

    Device is auto, cpu or cuda[:N], dtype auto, float32 or bfloat16; None is auto. ValueError where one is not to be
    had, CheckpointError for files that cannot be used.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None, dtype: str | None = None) -> None:
        where, number_format = choose_device(device, dtype)
        self.dim, self.dtype_name, self.device_name = checkpoint.dim, dtype_name(number_format), str(where)
        tensors = {name: tensor.to(where) for name, tensor in checkpoint.encoder_tensors(number_format).items()}
        fused = choose_fused(checkpoint.dim, where)
        self._stack = Stack(checkpoint.encoder_config, "encoder", tensors, checkpoint.eoi_id, compiled=fused)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Sequence[int]], ratio: int) -> list[NDArray[np.float32]]:
        """Token ids per passage (template included, at least one) to states (ceil(num_tokens / ratio), dim) float32.

        Matryoshka embedding pooling: the mean over groups of `ratio` tokens aligned at each passage's token 0, on the
        model's device. cache.states has the same law for one passage, and the tests hold both to it.
        """
        ids = torch.from_numpy(np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in batch]))
        num_tokens = np.array([len(tokens) for tokens in batch])
        states = self._states(ids.to(self._stack.embedding.device), num_tokens.tolist())
        counts = -(-num_tokens // ratio)  # states per passage
        ends = counts.cumsum()
        sizes = np.full(ends[-1], ratio)
        sizes[ends - 1] = num_tokens - (counts - 1) * ratio  # the last group has what is left
        lengths = torch.from_numpy(sizes).to(states.device)
        pooled = torch.segment_reduce(states.float(), "mean", lengths=lengths, axis=0).cpu().numpy()
        # Copies, so that one passage kept does not keep the whole batch alive.
        return [rows.copy() for rows in np.split(pooled, ends[:-1])]

    def _states(self, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed token ids (num_tokens,) to states after the final norm, (num_tokens, dim)."""
        stack, config = self._stack, self._stack.config
        hidden, normed = stack.embed(token_ids)
        positions = torch.cat([torch.arange(length, device=hidden.device) for length in lengths])
        group = config.num_attention_heads // config.num_key_value_heads
        attentions, rotations = {}, {}
        for kind in set(stack.layer_types):
            size = config.sliding_window if kind == "sliding_attention" else None
            attentions[kind] = _Attention(size, lengths, group, hidden)
            rotations[kind] = stack.rotation(kind, positions, max(lengths))
        for i, (layer, kind) in enumerate(zip(stack.layers, stack.layer_types, strict=True)):
            k, v = stack.keys_values(layer, normed)
            k = stack.pointwise.norm_rotate(k, layer.k_norm, *rotations[kind])
            q = stack.queries(layer, normed, rotations[kind])
            attended = attentions[kind].attend(q, k, v.contiguous(), stack.pointwise)
            del q, k, v  # not held through the layer's other half
            hidden, normed = stack.finish(i, hidden, attended)
        return normed
