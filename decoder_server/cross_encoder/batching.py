"""Pairs to padded batches: sorted by length, filled by a token budget. Pure arithmetic; knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

# Padding may add at most this share to a batch's real tokens: dense layers compute it too.
MAX_PADDING = 0.25


class Sized(Protocol):
    @property
    def num_tokens(self) -> int: ...


def batches(items: Sequence[Sized], max_tokens: int) -> Iterator[list[int]]:
    """Indices of `items` by length, in batches of at most `max_tokens` padded tokens (one item at least)."""
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(items)), key=lambda i: items[i].num_tokens):
        longest = items[index].num_tokens  # sorted, so the longest so far
        padded = (len(batch) + 1) * longest
        if batch and (padded > max_tokens or padded > (1 + MAX_PADDING) * (real + longest)):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += longest
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows of one length."""

    ids: NDArray[np.int64]  # (batch, length)
    mask: NDArray[np.int64]  # (batch, length), 1 where a token is real
    type_ids: NDArray[np.int64]  # (batch, length)
    positions: NDArray[np.int64]  # (batch, length), each row's first real token at 0


def pad(
    rows: Sequence[Sequence[int]],
    types: Sequence[Sequence[int] | None],
    *,
    side: Literal["left", "right"],
    pad_id: int,
) -> Padded:
    """Pads rows to the longest."""
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask, type_ids = np.zeros_like(ids), np.zeros_like(ids)
    for i, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
        if kinds is not None:
            type_ids[i, where] = kinds
    return Padded(ids, mask, type_ids, np.maximum(mask.cumsum(1) - 1, 0))
