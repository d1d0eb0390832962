"""How far a long run is: stages with totals, several at a time, and sentences about what it is going to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]  # takes how much of a stage was done


def ignore(amount: int) -> None:
    """Progress that is not shown."""


class StageProgress:
    """Shows nothing; subclasses show stages."""

    def begin(self, stage: str, total: int, unit: str, *, kept: int = 0) -> Advance:
        """A stage of `total` things, named by `unit`; `kept` of them were done by an earlier run."""
        return ignore

    def tell(self, sentence: Callable[[], str]) -> None:
        """A line of text, before stages begin; it is made only where it is shown."""


SILENT = StageProgress()


@contextmanager
def counted(progress: StageProgress, stage: str, total: int, unit: str) -> Iterator[Advance]:
    """A stage that ends at its total even where less was counted."""
    advance, left = progress.begin(stage, total, unit), total

    def count(amount: int) -> None:
        nonlocal left
        left -= amount
        advance(amount)

    yield count
    if left > 0:
        advance(left)
