"""Where each pair's rows lie in a packed batch, and the padded view attention needs.

Dense layers work on packed rows; only attention pads, and only keys and queries, never a matrix
product over the model's width. Pure index arithmetic; does not know weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """Rows of one batch: prompt lengths (batch,) and state counts (batch,), both at least 1."""

    def __init__(self, prompt_lengths: Sequence[int], state_counts: Sequence[int], device: torch.device) -> None:
        self.batch = len(prompt_lengths)
        self.max_prompt, self.max_states = max(prompt_lengths), max(state_counts)
        prompts = torch.tensor(prompt_lengths, device=device)
        self._prompt_real = torch.arange(self.max_prompt, device=device) < prompts[:, None]  # (batch, max_prompt)
        self._prompt_rows = _Padding(prompt_lengths, self._prompt_real)
        states_real = torch.arange(self.max_states, device=device) < torch.tensor(state_counts, device=device)[:, None]
        self._state_rows = _Padding(state_counts, states_real)
        self._states_real = states_real  # (batch, max_states)
        self.positions = torch.arange(self.max_prompt, device=device).expand(self.batch, -1)[self._prompt_real]
        self.readout = prompts.cumsum(0) - 1  # packed row of each prompt's last token, (batch,)
        self._last = prompts - 1  # the same within its own prompt

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (batch, 1, max_prompt * groups, max_prompt + max_states).

        A prompt token sees itself and earlier tokens, within `window` where the layer slides, and
        every state of its passage.
        """
        index = torch.arange(self.max_prompt, device=self.positions.device)
        distance = index[:, None] - index[None, :]
        causal = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        prompt = causal & self._prompt_real[:, None, :]  # (batch, max_prompt, max_prompt)
        passage = self._states_real[:, None, :].expand(-1, self.max_prompt, -1)
        allowed = torch.cat([prompt, passage], dim=2).repeat_interleave(groups, dim=1)[:, None]
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))

    def readout_mask(self, mask: Tensor, groups: int) -> Tensor:
        """Rows of `mask` at the readout, (batch, 1, groups, max_prompt + max_states)."""
        rows = self._last[:, None] * groups + torch.arange(groups, device=mask.device)  # (batch, groups)
        return mask.gather(2, rows[:, None, :, None].expand(-1, -1, -1, mask.shape[3]))

    def merge(self, prompt: Tensor, passage: Tensor) -> Tensor:
        """Packed keys or values of both sides -> (batch, num_kv, max_prompt + max_states, head)."""
        both = torch.cat([self._prompt_rows.pad(prompt), self._state_rows.pad(passage)], dim=1)
        return both.transpose(1, 2)

    def fold(self, q: Tensor, num_kv: int, *, readout: bool) -> Tensor:
        """Queries (rows, num_heads, head) -> (batch, num_kv, length * groups, head).

        `readout` says that the rows are the readout rows alone (length 1).
        """
        padded = q[:, None] if readout else self._prompt_rows.pad(q)  # (batch, length, num_heads, head)
        batch, length, num_heads, head = padded.shape
        folded = padded.view(batch, length, num_kv, num_heads // num_kv, head).transpose(1, 2)
        return folded.reshape(batch, num_kv, length * (num_heads // num_kv), head)

    def unfold(self, out: Tensor, groups: int, *, readout: bool) -> Tensor:
        """The inverse of `fold`, packed again: (rows, num_heads * head)."""
        batch, num_kv, _, head = out.shape
        rows = out.view(batch, num_kv, -1, groups, head).transpose(1, 2)  # (batch, length, num_kv, groups, head)
        rows = rows.reshape(batch, rows.shape[1], -1)
        return rows[:, 0] if readout else self._prompt_rows.pack(rows)


class _Padding:
    """Packed rows (sum of lengths, ...) to padded (batch, max length, ...) and back."""

    def __init__(self, lengths: Sequence[int], real: Tensor) -> None:
        self._real = real
        self._even = len(set(lengths)) == 1  # the common case, one query: both ways are views
        self._source = None if self._even else (real.flatten().cumsum(0) - 1).clamp(min=0)

    def pad(self, rows: Tensor) -> Tensor:
        batch, longest = self._real.shape
        if self._source is None:
            return rows.reshape(batch, longest, *rows.shape[1:])
        # Padding repeats a neighbour's row: finite, and hidden by the mask.
        return rows[self._source].view(batch, longest, *rows.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1) if self._even else padded[self._real]
