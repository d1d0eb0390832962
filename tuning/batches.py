"""Items of similar length together, up to a token budget. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def by_length(items: Sequence[T], length: Callable[[T], int], max_tokens: int) -> Iterator[list[T]]:
    """Batches that pad to at most `max_tokens`, longest items first; a longer item goes alone.

    The longest first, so that memory runs out at once or not at all and the time left is
    guessed too high rather than too low.
    """
    batch: list[T] = []
    for item in sorted(items, key=length, reverse=True):
        if batch and (len(batch) + 1) * length(batch[0]) > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
