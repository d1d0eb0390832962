"""Tier: computed keys and values in memory, within a byte budget.

What comes in is decided by how often it was asked for: an entry is worth its copy from its second asking on, and where
the budget is full, only if it was asked for more often than what would have to leave (TinyLFU, as Moka does it). Does
not know what an entry is computed of, nor how.
"""

from __future__ import annotations

from collections.abc import Hashable

from moka_py import Moka
from torch import Tensor

from cache.bounded import ByteBounded
from decoder_server.tiers.at_rest import Kept

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
        self._kept: ByteBounded[Hashable, Kept] = ByteBounded(max_bytes, _size_bytes)
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
