"""Stages of a cascade: read all at a coarse ratio, go on with the best at finer ones. Plain values; knows no wire.

`32:100, 4:20, 1` reads every candidate at ratio 32, the best 100 at 4, and the best 20 of those at 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_STAGES = 8
MAX_TEXT_CHARS = 400
MAX_NUMBER = 2**31 - 1  # of a ratio or a count: the wire holds no greater one


@dataclass(frozen=True, slots=True)
class Stage:
    """One reading of what the stage before let through; the first reads every candidate."""

    compression_ratio: int  # a multiple of the stored one
    keep: int = 0  # how many go on to the next stage; nobody reads after the last, so there it may be left out


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`RATIO:KEEP, RATIO:KEEP, RATIO` as stages; blanks do not matter.

    Raises:
        ValueError: what cannot be read, or does not fit together.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"stages is {len(text)} characters long; expected at most {MAX_TEXT_CHARS}")
    stages = tuple(_parse(text, part) for part in text.split(","))
    problem = stages_problem(stages)
    if problem is not None:
        field, value, expected = problem
        raise ValueError(f"{field} of {text!r} is {value}; expected {expected}")
    return stages


def _parse(text: str, part: str) -> Stage:
    ratio, colon, keep = (word.strip() for word in part.partition(":"))
    # isdecimal alone takes other scripts' digits, which int reads too but nobody meant.
    if not (ratio.isascii() and ratio.isdecimal()) or (colon and not (keep.isascii() and keep.isdecimal())):
        raise ValueError(f"stages is {text!r}; expected RATIO:KEEP, RATIO:KEEP, RATIO, such as 32:100, 4:20, 1")
    return Stage(int(ratio), int(keep) if colon else 0)


def format_stages(stages: Iterable[Stage]) -> str:
    """As parse_stages reads them."""
    return ",".join(f"{s.compression_ratio}:{s.keep}" if s.keep else str(s.compression_ratio) for s in stages)


def stages_problem(stages: Sequence[Stage]) -> tuple[str, object, str] | None:
    """The first field that does not fit, its value, and what was expected; None: all fit."""
    if not 1 <= len(stages) <= MAX_STAGES:
        return "stages", f"{len(stages)} of them", f"1..{MAX_STAGES}"
    for i, stage in enumerate(stages):
        before = stages[max(0, i - 1)]
        ratio, keep = f"stages[{i}].compression_ratio", f"stages[{i}].keep"
        is_last = i == len(stages) - 1
        if not 1 <= stage.compression_ratio <= MAX_NUMBER:
            return ratio, stage.compression_ratio, f"1 or more, at most {MAX_NUMBER}"
        if not (0 if is_last else 1) <= stage.keep <= MAX_NUMBER:
            return keep, stage.keep, f"{0 if is_last else 1} or more, how many go on, at most {MAX_NUMBER}"
        if i and stage.compression_ratio >= before.compression_ratio:
            return (
                ratio,
                stage.compression_ratio,
                f"less than {before.compression_ratio}, the stage before",
            )
        if i and stage.keep > before.keep:
            return keep, stage.keep, f"at most {before.keep}, what the stage before lets through"
    return None
