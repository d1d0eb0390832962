"""What the checks of both kinds of model do alike: stages, comparisons of what has a number, notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tuning.health.compare import Margins, compare
from tuning.health.limits import Limits
from tuning.health.pairs import FEW_PAIRS, PairSet
from tuning.health.report import Finding, Section, State
from tuning.progress import Progress


def judged(title: str, served: Margins, reference: Margins, limits: Limits) -> Section:
    """A comparison over the pairs that both have a number for."""
    both = np.isfinite(served) & np.isfinite(reference)
    if both.sum() < 2:
        detail = f"not finite: {int(both.sum())} of {len(both)} pairs have a number in both"
        return Section(title, [Finding("comparison", State.FAIL, detail=detail)])
    return compare(title, served[both], reference[both], limits)


def failed(sections: Sequence[Section], name: str) -> bool:
    """Whether a finding of that name failed."""
    return any(f.state is State.FAIL for section in sections for f in section.findings if f.name == name)


def notes(pairs: PairSet) -> list[str]:
    """What a reader of the numbers should know."""
    few = f"only {len(pairs)} pairs: below {FEW_PAIRS} one pair out of order decides"
    return [few] if len(pairs) < FEW_PAIRS else []


@contextmanager
def counted(progress: Progress, stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """A stage that ends at its total even where less was told."""
    progress.begin(stage, total)
    told = 0

    def advance(num: int) -> None:
        nonlocal told
        told += num
        progress.advance(stage, num)

    yield advance
    if told < total:
        progress.advance(stage, total - told)
