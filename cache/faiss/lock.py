"""The writer lock of an embedded store: one writer at a time, over threads and processes, readers not involved.

Its file also keeps how many commits were acknowledged, which tells a catalogue whose last commits were lost (a log
that is damaged ends where the damage is) from one that never had them.
"""

import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from cache.errors import StoreLocked

_POLL_SECONDS = 0.005
# After the holder's process id: number of commits u64, and its checksum.
_NOTE, _NOTE_OFFSET = struct.Struct("<QQ"), 16


class WriterLock:
    """An flock on a file that stays. The kernel drops it when its holder dies, so there are no stale locks."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._thread_lock = threading.Lock()
        self._descriptor = -1  # while it is held

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; StoreLocked, naming the holder, after the timeout."""
        deadline = time.monotonic() + self._timeout_seconds
        if not self._thread_lock.acquire(timeout=self._timeout_seconds):
            raise StoreLocked(f"{self._path}: another thread has been writing for {self._timeout_seconds:g} s")
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._acquire(descriptor, deadline)
                os.pwrite(descriptor, f"{os.getpid():<12}".encode(), 0)
                self._descriptor = descriptor
                yield
            finally:
                self._descriptor = -1
                os.close(descriptor)  # closing releases the lock
        finally:
            self._thread_lock.release()

    @contextmanager
    def idle(self) -> Iterator[bool]:
        """Yield whether there is no writer, and keep writers out meanwhile, if the lock file can be read at all."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield True
            return
        try:
            is_idle = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                is_idle = False
            yield is_idle
        finally:
            os.close(descriptor)

    def note(self, num_commits: int) -> None:
        """Keep the number of commits, after each; only while the lock is held.

        Not synced: after a power failure it may be smaller, which does no harm.
        """
        os.pwrite(self._descriptor, _NOTE.pack(num_commits, _note_checksum(num_commits)), _NOTE_OFFSET)

    def noted(self) -> int:
        """The number that was kept last; 0 where there is none, or a damaged one."""
        try:
            num_commits, checksum = _NOTE.unpack_from(self._path.read_bytes(), _NOTE_OFFSET)
        except (OSError, struct.error):
            return 0
        return int(num_commits) if checksum == _note_checksum(num_commits) else 0

    def _acquire(self, descriptor: int, deadline: float) -> None:
        # flock has no timeout, and a blocking call could not be interrupted from a thread, so it is repeated.
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


def _note_checksum(num_commits: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<Q", num_commits))
