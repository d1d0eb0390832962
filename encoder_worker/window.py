"""Which tokens see which in one encoder layer, and attention over just those. Knows no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.attention import BLOCK_LOGITS, attend
from checkpoint.pointwise import Pointwise

# Queries at a time where a layer slides: their keys are these and what the window reaches beside
# them, so more would see more keys in vain.
BLOCK_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries [first, last) against keys [first_key, last_key) of every passage of a group."""

    first: int
    last: int
    first_key: int
    last_key: int
    mask: Tensor | None  # additive, (batch or 1, 1, queries, keys)


@dataclass(frozen=True, slots=True)
class _Group:
    """Passages of one length that lie beside one another; or, padded, of several lengths."""

    rows: slice  # of the packed batch
    source: Tensor | None  # packed row of every padded one; None: nothing is padded
    real: Tensor | None  # (batch, longest)
    batch: int
    length: int
    blocks: tuple[_Block, ...]


class Window:
    """Bidirectional attention, sliding or over everything, for one packed batch."""

    def __init__(
        self, size: int | None, lengths: Sequence[int], group: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """
        Args:
            size: sliding window in tokens: a query sees (size - 1) // 2 tokens to its left and size // 2 to
                its right (source: sliding_window_mask_function in transformers' modeling_t5gemma2);
                None sees everything.
            lengths: of the packed passages, in order.
            group: query heads per kv head.
        """
        self._size, self._group, self._device, self._dtype = size, group, device, dtype
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        # A CPU takes every length by itself and pads nothing; a GPU would spend its time launching.
        pad = device.type != "cpu" and len(set(lengths)) > 1
        self._groups = [self._padded(lengths)] if pad else list(self._even(lengths))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pointwise: Pointwise) -> Tensor:
        """Attention of every token; q is scaled already.

        Args:
            q: (num_tokens, num_heads, head).
            k, v: (num_tokens, num_kv, head).

        Returns:
            (num_tokens, num_heads * head).
        """
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

    def _even(self, lengths: Sequence[int]) -> Iterator[_Group]:
        """Runs of passages of one length."""
        first = row = 0
        while first < len(lengths):
            length, last = lengths[first], first
            while last < len(lengths) and lengths[last] == length:
                last += 1
            batch = last - first
            yield _Group(slice(row, row + batch * length), None, None, batch, length, self._blocks(length, None))
            first, row = last, row + batch * length

    def _padded(self, lengths: Sequence[int]) -> _Group:
        longest = max(lengths)
        real = torch.arange(longest, device=self._device) < torch.tensor(lengths, device=self._device)[:, None]
        source = (real.flatten().cumsum(0) - 1).clamp(min=0)
        return _Group(slice(None), source, real, len(lengths), longest, self._blocks(longest, real))

    def _blocks(self, length: int, real: Tensor | None) -> tuple[_Block, ...]:
        """The queries of `length` tokens, cut so that whole rows of logits fit."""
        if self._size is None or length <= (self._size + 1) // 2:
            left = right = length
            step = max(1, BLOCK_LOGITS // (self._group * length))
        else:
            left, right = (self._size + 1) // 2 - 1, self._size // 2
            step = BLOCK_TOKENS
        blocks = []
        for first in range(0, length, step):
            last = min(first + step, length)
            first_key, last_key = max(0, first - left), min(length, last + right)
            mask = self._mask(first - first_key, last - first, last_key - first_key, left, right)
            if real is not None:
                padding = _additive(real[:, None, None, first_key:last_key], self._dtype)
                mask = padding if mask is None else mask + padding
            blocks.append(_Block(first, last, first_key, last_key, mask))
        return tuple(blocks)

    def _mask(self, offset: int, num_queries: int, num_keys: int, left: int, right: int) -> Tensor | None:
        """Of a block whose first query is its key number `offset`; made once for all blocks that look alike."""
        if num_queries + offset - 1 <= left and num_keys - 1 - offset <= right:
            return None
        key = (offset, num_queries, num_keys)
        if key not in self._masks:
            queries = torch.arange(offset, offset + num_queries, device=self._device)[:, None]
            distance = queries - torch.arange(num_keys, device=self._device)
            self._masks[key] = _additive((distance <= left) & (distance >= -right), self._dtype)[None, None]
        return self._masks[key]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    # Lowest rather than -inf: a padding query that sees padding alone still has something to average.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 4)
