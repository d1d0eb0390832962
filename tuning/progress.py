"""How far a long run is: stages with totals; several may run at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]  # takes how much of a stage was done


def ignore(amount: int) -> None:
    """Progress that is not shown."""


class StageProgress:
    """Shows nothing; subclasses show stages."""

    def begin(self, stage: str, total: int) -> Advance:
        return ignore


SILENT = StageProgress()


@contextmanager
def counted(progress: StageProgress, stage: str, total: int) -> Iterator[Advance]:
    """A stage that ends at its total even where less was counted."""
    advance, left = progress.begin(stage, total), total

    def count(amount: int) -> None:
        nonlocal left
        left -= amount
        advance(amount)

    yield count
    if left > 0:
        advance(left)


class TerminalProgress(StageProgress):
    """One bar a stage with the time left, on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description:>15}"), BarColumn(), MofNCompleteColumn(), TextColumn("elapsed"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        hidden = not console.is_terminal
        # Stages alternate: a rate over the last seconds would see only one of them move.
        self._bars = Progress(
            *columns, *times, console=console, disable=hidden, transient=True, speed_estimate_period=3600
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, stage: str, total: int) -> Advance:
        return partial(self._bars.advance, self._bars.add_task(stage, total=total))
