"""Runs an iterator on a thread of its own, a bounded number of items ahead. Knows nothing about the items."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1
_LEAVE_SECONDS = 1.0


class _End:
    """Marks the end of the items, or the error that ended them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Ahead(Generic[T]):
    """Iterate inside `with`; leaving it stops the thread at its next item, setting `stop` ends the iteration.

    At most `depth` finished items wait while one is being made and one is being used.
    """

    def __init__(self, items: Iterable[T], *, stop: threading.Event, depth: int = 1, name: str = "ahead") -> None:
        self._items = items
        self._stop = stop
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        # A read that blocks (a pipe nobody writes to) cannot be interrupted: the thread is a daemon
        # and is left behind after a moment.
        self._thread.join(timeout=_LEAVE_SECONDS)

    def _take(self) -> Iterator[T]:
        while not self._stop.is_set():
            # With a timeout, because the one who makes the items may itself wait for ever.
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as exc:  # delivered to the consumer, whatever it is
            error = exc
        self._put(_End(error))

    def _put(self, item: T | _End) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
