"""Where each pair's rows lie in a packed batch, and the padded view attention needs.

Dense layers work on packed rows; only attention pads, and only keys and queries, never a matrix
product over the model's width. Pure index arithmetic; does not know weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """Rows of one batch.

    A pair's tokens to compute stand on its context: `prefix_lengths` tokens of its prompt that were
    computed before, then its states.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        state_counts: Sequence[int],
        device: torch.device,
        prefix_lengths: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            prompt_lengths: tokens to compute per pair, each at least 1.
            state_counts: per pair, each at least 1.
            prefix_lengths: tokens before them that the context has; None: none.
        """
        prefix_lengths = [0] * len(prompt_lengths) if prefix_lengths is None else prefix_lengths
        counts = [prefix + states for prefix, states in zip(prefix_lengths, state_counts, strict=True)]
        self.batch = len(prompt_lengths)
        self._device = device
        self._prompt, self._context = _Padding(prompt_lengths, device), _Padding(counts, device)
        self._prefix = torch.tensor(prefix_lengths, device=device)[:, None]  # (batch, 1)
        at = self._prefix + torch.arange(self._prompt.longest, device=device)  # (batch, max_prompt)
        self._at = at
        self.positions = self._prompt.pack(at)  # of every packed token in its whole prompt
        self.num_positions = max(p + q for p, q in zip(prefix_lengths, prompt_lengths, strict=True))
        lengths = torch.tensor(prompt_lengths, device=device)
        self.readout = lengths.cumsum(0) - 1  # packed row of each prompt's last token, (batch,)
        self._last = lengths - 1  # the same within its own prompt

    def mask(self, window: int | None, num_kv: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (batch, num_kv, max_prompt, max_context + max_prompt).

        A prompt token sees itself and earlier tokens, within `window` where the layer slides, and
        every state of its passage.
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

    def readout_mask(self, mask: Tensor) -> Tensor:
        """Rows of `mask` at the readout, (batch, num_kv, 1, max_context + max_prompt)."""
        return mask[torch.arange(self.batch, device=self._device), :, self._last][:, :, None]

    def merge(self, context: Tensor, prompt: Tensor) -> Tensor:
        """Packed keys or values (rows, num_kv, head) of both -> (batch, num_kv, max_context + max_prompt, head)."""
        return torch.cat([self._context.pad(context), self._prompt.pad(prompt)], dim=1).transpose(1, 2)

    def fold(self, q: Tensor, num_kv: int, *, readout: bool) -> Tensor:
        """Queries (rows, num_heads, head) -> (batch, num_kv, length * group, head).

        Query heads that share a kv head lie beside one another, so that shared keys are read once and
        never repeated in memory. `readout` says that the rows are the readout rows alone (length 1).
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
        batch, longest = self.real.shape
        if self._source is None:
            return rows.reshape(batch, longest, *rows.shape[1:])
        # Padding repeats the pair's own last row: finite where the pair is, and hidden by the mask.
        return rows[self._source].view(batch, longest, *rows.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1) if self._even else padded[self.real]
