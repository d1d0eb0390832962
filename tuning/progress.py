"""How far a long run is: stages with totals. Does not know what the stages do."""

from __future__ import annotations

from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress(Protocol):
    """Hears of stages; several may run at a time."""

    def begin(self, stage: str, total: int) -> None: ...

    def advance(self, stage: str, amount: int) -> None: ...


class Silent:
    """Says nothing."""

    def begin(self, stage: str, total: int) -> None:
        pass

    def advance(self, stage: str, amount: int) -> None:
        pass


SILENT: Progress = Silent()


class TerminalProgress:
    """One bar a stage with the time left, on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description:>15}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # Stages take turns: a rate over the last seconds would see only one of them move.
            speed_estimate_period=3600,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars.console.is_terminal:  # else it never started, and stopping it would print an empty line
            self._bars.stop()

    def begin(self, stage: str, total: int) -> None:
        self._tasks[stage] = self._bars.add_task(stage, total=total)

    def advance(self, stage: str, amount: int) -> None:
        self._bars.advance(self._tasks[stage], amount)
