"""Keys and values as they are kept: as computed, in bfloat16, or as int8 with one scale per row and head.

Does not know what the rows belong to.

Tier: computed keys and values in memory, within a byte budget.

What comes in is decided by how often it was asked for: an entry is worth its copy from its second asking on, and where
the budget is full, only if it was asked for more often than what would have to leave (TinyLFU, as Moka does it). Does
not know what an entry is computed of, nor how.

The two tiers of one model.

    keys      per passage and read ratio: keys and values of its states in every layer
    prefixes  per passage, read ratio and beginning of a prompt: keys and values of that beginning in every layer

Pooled states have a read cache in front of the store (cache/read_cache.py).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from moka_py import Moka
from torch import Tensor

from cache.read_cache import ByteBoundedCache
from decoder_server.config import TierBudgets

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


# Askings that make an entry worth keeping.
MIN_ASKINGS = 2
# Keys whose askings are remembered: a number each.
MAX_REMEMBERED = 1 << 17
# Python objects and keys beside the numbers of an entry, generously.
ENTRY_OVERHEAD_BYTES = 1024


class Tier:
    """Written to by one thread; counters may be read from any."""

    def __init__(self, name: str, max_bytes: int, form: str) -> None:
        """
        Args:
            max_bytes: 0 keeps nothing, and nothing is counted.
            form: how numbers are kept, one of budgets.FORMATS.
        """
        self.name = name
        self.max_bytes = max_bytes
        self.num_hits = 0
        self.num_misses = 0
        self.num_admitted = 0
        self._form = form
        self._kept: ByteBoundedCache[Hashable, Kept] = ByteBoundedCache(max_bytes, _size_bytes)
        self._askings: Moka[int, int] = Moka(MAX_REMEMBERED, policy="lru")

    @property
    def on(self) -> bool:
        return self.max_bytes > 0

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._kept.num_bytes

    @property
    def num_entries(self) -> int:
        return self._kept.num_entries

    def get(self, key: Hashable) -> Kept | None:
        """What is kept, if anything; either way the key was asked for once more."""
        kept = self._kept.get(key)
        if kept is not None:
            self.num_hits += 1
            return kept
        self.num_misses += 1
        digest = hash(key)
        self._askings.set(digest, (self._askings.get(digest) or 0) + 1)
        return None

    def wants(self, key: Hashable) -> bool:
        """Whether what `get` did not find is worth keeping once it is computed."""
        return self.on and (self._askings.get(hash(key)) or 0) >= MIN_ASKINGS

    def put(self, key: Hashable, kv: Tensor) -> Kept | None:
        """Keeps a copy of keys and values (num_layers, 2, rows, num_kv, head); None where it is over the budget.

        A full tier may still let go of it at once, in favour of what is asked for more often.
        """
        kept = Kept.of(kv, self._form)
        if not self._kept.put(key, kept):
            return None
        self.num_admitted += 1
        return kept

    def holds(self, key: Hashable) -> bool:
        """Whether an entry is there now; nobody asked for it."""
        return self._kept.get(key) is not None

    def clear(self) -> None:
        """Drops everything, what is known of askings too."""
        self._kept.clear()
        self._askings.clear()


def _size_bytes(kept: Kept) -> int:
    return kept.num_bytes + ENTRY_OVERHEAD_BYTES


class Tiers:
    """Made by and for one loaded model, and gone with it: no entry outlives its weights or templates."""

    def __init__(self, budgets: TierBudgets) -> None:
        self.keys = Tier("keys", budgets.max_keys_bytes, budgets.form)
        self.prefixes = Tier("prefixes", budgets.max_prefix_bytes, budgets.form)

    @property
    def on(self) -> bool:
        return self.keys.on or self.prefixes.on

    def clear(self) -> None:
        self.keys.clear()
        self.prefixes.clear()

    def all(self) -> tuple[Tier, Tier]:
        return self.keys, self.prefixes
