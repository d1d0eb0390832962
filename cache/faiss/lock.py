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
        """Hold the lock. Raises StoreLocked naming the holder after the timeout."""
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
        """Yield whether there is no writer, and keep writers out meanwhile.

        Also where the lock file may only be read, or is not there.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield True
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def note(self, num_commits: int) -> None:
        """Keep the number of commits, after each; only while the lock is held.

        Not synced: what a power failure takes away is a smaller number, which says nothing wrong.
        """
        os.pwrite(self._descriptor, _NOTE.pack(num_commits, _note_checksum(num_commits)), _NOTE_OFFSET)

    def noted(self) -> int | None:
        """The number that was kept last; None where there is none, or a damaged one."""
        try:
            content = self._path.read_bytes()[_NOTE_OFFSET:]
        except OSError:
            return None
        if len(content) < _NOTE.size:
            return None
        num_commits, checksum = _NOTE.unpack_from(content)
        return int(num_commits) if checksum == _note_checksum(num_commits) else None

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


def _note_checksum(num_commits: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<Q", num_commits))
