"""Cuts a batch into passes of similar length. Pure arithmetic; knows no model.

Dense layers see packed rows and never pad; attention pads every pair of a pass to the longest
prompt and the longest passage in it. So the waste is counted in attention cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

# Below this many cells another pass costs more than the padding it saves (about 70 prompt
# tokens of dense work at the Nano shape).
FREE_CELLS = 1 << 18
# Above it, padding may at most double attention's work.
MAX_PADDING = 2.0


class Sized(Protocol):
    """What has the two lengths of a pair."""

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_states(self) -> int: ...


S = TypeVar("S", bound=Sized)


def split_by_length(pairs: Sequence[S]) -> list[list[S]]:
    """`pairs` in passes, each sorted by length, no pass wasting more than the constants above allow."""
    passes: list[list[S]] = []
    real = 0  # cells that the current pass needs
    longest_prompt = 0
    for pair in sorted(pairs, key=lambda p: (p.num_states, p.num_prompt_tokens)):
        own = _cells(pair.num_prompt_tokens, pair.num_states)
        longest = max(longest_prompt, pair.num_prompt_tokens)
        # Sorted by states, so this pair's are the longest so far.
        padded = (len(passes[-1]) + 1) * _cells(longest, pair.num_states) if passes else 0
        if passes and (padded <= FREE_CELLS or padded <= MAX_PADDING * (real + own)):
            passes[-1].append(pair)
            real, longest_prompt = real + own, longest
        else:
            passes.append([pair])
            real, longest_prompt = own, pair.num_prompt_tokens
    return passes


def num_cells(pairs: Sequence[Sized]) -> tuple[int, int]:
    """Attention cells of one pass: those the pairs need, and those computed with padding."""
    needed = sum(_cells(pair.num_prompt_tokens, pair.num_states) for pair in pairs)
    longest = _cells(max(pair.num_prompt_tokens for pair in pairs), max(pair.num_states for pair in pairs))
    return needed, len(pairs) * longest


def _cells(num_prompt_tokens: int, num_states: int) -> int:
    return num_prompt_tokens * (num_prompt_tokens + num_states)
