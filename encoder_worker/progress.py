"""How far an index run is, how fast, and how long it will take. Knows no terminals."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from encoder_worker.report import IndexReport

_MEMORY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of a run."""

    num_done: int  # encoded, unchanged or refused
    num_encoded: int
    fraction: float | None  # of the source, 0 to 1; None where its size is not known
    seconds: float
    passages_per_second: float  # encoded, over the last minute
    eta_seconds: float | None


class Speedometer:
    """Rates over the last minute, so that a resumed run's skipped beginning does not promise too much."""

    def __init__(self, report: IndexReport) -> None:
        self._report = report
        self._start = time.monotonic()
        self._marks: deque[tuple[float, int, float | None]] = deque([(0.0, 0, 0.0)])
        self._fraction: float | None = 0.0  # of the source, up to the present window
        self._encoded = 0  # up to the present window

    def next_window(self, fraction: float | None) -> None:
        """The present window, which ended at `fraction` of the source, is done."""
        self._fraction = fraction
        self._encoded = self._report.num_encoded

    def read(self, fraction: float | None, num_todo: int) -> Progress:
        """Now, within a window that ends at `fraction` of the source and has `num_todo` passages to encode."""
        now = time.monotonic() - self._start
        encoded = self._report.num_encoded
        left = max(0, num_todo - (encoded - self._encoded))
        if fraction is not None and self._fraction is not None and num_todo:
            fraction = self._fraction + (fraction - self._fraction) * (1 - left / num_todo)
        self._marks.append((now, encoded, fraction))
        while len(self._marks) > 2 and now - self._marks[0][0] > _MEMORY_SECONDS:
            self._marks.popleft()
        then, encoded_then, fraction_then = self._marks[0]
        seconds = now - then
        eta = None
        if fraction is not None and fraction_then is not None and fraction > fraction_then and seconds:
            eta = (1 - fraction) / (fraction - fraction_then) * seconds
        rate = (encoded - encoded_then) / seconds if seconds else 0.0
        return Progress(self._report.num_read - left, encoded, fraction, now, rate, eta)
