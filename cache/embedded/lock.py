"""The writer lock of an embedded store: one writer at a time, over threads and processes, readers not involved."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import StoreLocked

_POLL_SECONDS = 0.005


class WriterLock:
    """An flock on a file that stays. The kernel drops it when its holder dies, so there are no stale locks."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._thread_lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock. Raises StoreLocked naming the holder after the timeout."""
        deadline = time.monotonic() + self._timeout_seconds
        if not self._thread_lock.acquire(timeout=self._timeout_seconds):
            raise StoreLocked(f"{self._path}: another thread has been writing for {self._timeout_seconds:g} s")
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._acquire(descriptor, deadline)
                os.pwrite(descriptor, f"{os.getpid():<12}".encode(), 0)
                yield
            finally:
                os.close(descriptor)  # closing releases the lock
        finally:
            self._thread_lock.release()

    def _acquire(self, descriptor: int, deadline: float) -> None:
        # flock has no timeout, and a blocking call could not be interrupted from a thread; so it is asked repeatedly.
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as exc:
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 12, 0).decode(errors="replace").strip() or "unknown"
                    raise StoreLocked(
                        f"{self._path}: process {holder} has been writing for more than {self._timeout_seconds:g} s"
                    ) from exc
            time.sleep(_POLL_SECONDS)
