"""Keys and values as they are kept: as computed, in bfloat16, or as int8 with one scale per row and head.

Does not know what the rows belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A row of zeros has a scale, too; far below any number a model computes, far above what a processor rounds to zero.
SMALLEST = 1e-20


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """One entry at rest; owns its memory."""

    numbers: Tensor  # (num_layers, 2, rows, num_kv, head)
    scales: Tensor | None  # int8's, float32 (num_layers, 2, rows, num_kv, 1)

    @classmethod
    def of(cls, kv: Tensor, form: str) -> Kept:
        """A copy of keys and values, (num_layers, 2, rows, num_kv, head).

        Args:
            form: one of budgets.FORMATS; auto keeps them as they are.
        """
        if form != "int8":
            dtype = torch.bfloat16 if form == "bfloat16" else kv.dtype
            return cls(torch.empty(kv.shape, dtype=dtype, device=kv.device).copy_(kv), None)
        # A scale per row and head: keys are normed, so a row's numbers are of one size; values of one row, nearly.
        scales = kv.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST) / 127
        return cls((kv / scales).round().to(torch.int8), scales)

    @property
    def num_bytes(self) -> int:
        return self.numbers.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    @property
    def num_rows(self) -> int:
        return int(self.numbers.shape[2])

    def read(self, dtype: torch.dtype) -> Tensor:
        """Keys and values (num_layers, 2, rows, num_kv, head); the entry itself where it is kept as it is read."""
        if self.scales is None:
            return self.numbers.to(dtype)
        return (self.numbers * self.scales).to(dtype)
