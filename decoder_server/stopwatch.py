"""Wall time during which something was under way, however many times at once."""

from __future__ import annotations

import time


class Stopwatch:
    """Runs while at least one `with` block of it is open. Only touched from the event loop."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running = 0
        self._since = 0.0

    def __enter__(self) -> Stopwatch:
        if self._running == 0:
            self._since = time.monotonic()
        self._running += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._running -= 1
        if self._running == 0:
            self._seconds += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._since if self._running else 0.0)
