"""ByteBounded: values in memory within a byte budget, evicted by Moka. Does not know what they are."""

from collections.abc import Callable, Hashable
from typing import Generic, Literal, TypeVar

from moka_py import Moka

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# More than Moka counts an entry's weight in.
MAX_ENTRY_BYTES = (1 << 32) - 1


class ByteBounded(Generic[K, V]):
    """Thread-safe. Never holds more than its bytes once a call has returned."""

    def __init__(
        self, max_bytes: int, size_bytes: Callable[[V], int], *, policy: Literal["tiny_lfu", "lru"] = "tiny_lfu"
    ) -> None:
        """
        Args:
            max_bytes: 0 holds nothing.
            size_bytes: of a value, what it takes beside its numbers included.
            policy: who leaves when it is full: what is asked for least (tiny_lfu), or longest ago (lru).
        """
        self.max_bytes = max_bytes
        self._size_bytes = size_bytes
        self._kept: Moka[K, V] = Moka(max(1, max_bytes), policy=policy, weigher=lambda _, value: size_bytes(value))

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        self._kept.run_pending_tasks()
        return self._kept.weighted_size()

    @property
    def num_entries(self) -> int:
        self._kept.run_pending_tasks()
        return self._kept.count()

    def get(self, key: K) -> V | None:
        return self._kept.get(key)

    def put(self, key: K, value: V) -> bool:
        """False where it is over the whole budget. Where it is full, a value may be let go of at once."""
        if self._size_bytes(value) > min(self.max_bytes, MAX_ENTRY_BYTES):
            return False
        self._kept.set(key, value)
        self._kept.run_pending_tasks()  # else Moka lets some sixty entries wait, over the budget
        return True

    def remove(self, key: K) -> None:
        self._kept.remove(key)

    def clear(self) -> None:
        self._kept.clear()
        self._kept.run_pending_tasks()
