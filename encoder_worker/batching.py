"""Which sequences share a forward pass. Pure functions of lengths; knows neither tokens nor models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Padded tokens of one pass. A CPU runs at full rate far below; a GPU needs more to be busy, and a
# pass that is mostly launching kernels may as well carry padding.
_MAX_BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
_FREE_PADDING_TOKENS = {"cpu": 0, "cuda": 4096}


@dataclass(frozen=True)
class BatchLimits:
    """How large and how ragged a batch may be.

    max_batch_tokens: padded tokens of one pass; a longer sequence goes alone
    max_padding: share of a batch's tokens that may be padding
    free_padding_tokens: batches up to this size may pad as they like
    """

    max_batch_tokens: int
    max_padding: float = 0.05
    free_padding_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {self.max_batch_tokens}; expected at least 1")
        if not 0 <= self.max_padding < 1:
            raise ValueError(f"max_padding is {self.max_padding}; expected 0 to below 1")

    @classmethod
    def for_device(cls, device_name: str, max_batch_tokens: int | None = None) -> BatchLimits:
        """The defaults of a device (`cpu`, `cuda:0`), with another budget where one is given."""
        kind = device_name.split(":")[0]
        return cls(
            max_batch_tokens or _MAX_BATCH_TOKENS.get(kind, 4096), free_padding_tokens=_FREE_PADDING_TOKENS.get(kind, 0)
        )

    def fits(self, longest: int, count: int, num_tokens: int) -> bool:
        """Whether `count` sequences of together `num_tokens`, padded to `longest`, may share a pass."""
        padded = longest * count
        if padded > self.max_batch_tokens:
            return count == 1
        return padded <= self.free_padding_tokens or padded - num_tokens <= self.max_padding * padded


def plan(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Cuts sequences into batches, longest first, every one within the limits.

    Padding has a bound that no input breaks: a batch is closed when one more, shorter sequence would
    take it over `max_padding`. That costs little: lengths within about a tenth of each other always
    share, so at most some fifty batches per window are closed for raggedness.

    Returns:
        Indices into `lengths`, each exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    longest = num_tokens = 0
    for i in order:
        if batches and limits.fits(longest, len(batches[-1]) + 1, num_tokens + lengths[i]):
            batches[-1].append(i)
            num_tokens += lengths[i]
        else:
            batches.append([i])
            longest = num_tokens = lengths[i]
    return batches
