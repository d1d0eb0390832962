"""Which tokens see which in one encoder layer, and attention over just those. Knows no weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

BLOCK_TOKENS = 512  # queries a block; their keys are the block and what the window reaches beside it


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries [first, last) against keys [first_key, last_key)."""

    first: int
    last: int
    first_key: int
    last_key: int
    mask: Tensor | None  # additive, broadcastable to (batch, 1, queries * groups, keys)


class Window:
    """Bidirectional attention, sliding or over everything, for one padded batch."""

    def __init__(self, size: int | None, real: Tensor, groups: int, dtype: torch.dtype) -> None:
        """
        Args:
            size: sliding window in tokens: a query sees (size - 1) // 2 tokens to its left and size // 2 to
                its right (source: sliding_window_mask_function in transformers' modeling_t5gemma2);
                None sees everything.
            real: (batch, length), True where a token is not padding.
            groups: query heads per kv head.
        """
        self._groups = groups
        length = real.shape[1]
        padding = None if bool(real.all()) else _additive(real[:, None, None, :], dtype)  # (batch, 1, 1, length)
        if size is None or length <= (size + 1) // 2:
            self._blocks = [_Block(0, length, 0, length, padding)]
            return
        left, right = (size + 1) // 2 - 1, size // 2
        self._blocks = []
        for first in range(0, length, BLOCK_TOKENS):
            last = min(first + BLOCK_TOKENS, length)
            first_key, last_key = max(0, first - left), min(length, last + right)
            queries = torch.arange(first, last, device=real.device)[:, None]
            distance = queries - torch.arange(first_key, last_key, device=real.device)
            seen = ((distance <= left) & (distance >= -right)).repeat_interleave(groups, dim=0)[None, None]
            if padding is not None:
                seen = seen & real[:, None, None, first_key:last_key]
                # A padding query whose window holds padding alone would have nothing to average: let it see itself.
                seen = seen | ~seen.any(-1, keepdim=True)
            self._blocks.append(_Block(first, last, first_key, last_key, _additive(seen, dtype)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of every token.

        Query heads that share a kv head are folded into the query axis: shared keys are read once.

        Args:
            q: (batch, length, num_heads, head_dim).
            k, v: (batch, num_kv, length, head_dim).

        Returns:
            (batch, length, num_heads, head_dim).
        """
        batch, length, num_heads, head = q.shape
        num_kv = k.shape[1]
        folded = q.view(batch, length, num_kv, self._groups, head).transpose(1, 2)
        out = q.new_empty(batch, length, num_kv, self._groups, head)
        for block in self._blocks:
            part = F.scaled_dot_product_attention(
                folded[:, :, block.first : block.last].reshape(batch, num_kv, -1, head),
                k[:, :, block.first_key : block.last_key],
                v[:, :, block.first_key : block.last_key],
                attn_mask=block.mask,
                scale=scale,
            )
            out[:, block.first : block.last] = part.view(batch, num_kv, -1, self._groups, head).transpose(1, 2)
        return out.view(batch, length, num_heads, head)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
