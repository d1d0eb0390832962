"""Leases of collections in Redis: who writes one, kept alive by its process, and gone soon after that dies.

    preread:w:COLLECTION    sorted set    "alone" or "shared", and the writer -> end of its lease (server's clock, ms)

One script for taking and keeping, of that key alone, so it runs in a cluster too. A lease that ended while its process
was suspended or the server was away is taken again, or lost to the writer that came meanwhile.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from cache.errors import CacheError, StoreLocked
from cache.redis.link import Link
from cache.redis.replies import is_count, is_value
from cache.store import locked_by, this_writer

LEASE_SECONDS = 30.0

# The lease that is in the way of KEYS[1]'s ARGV[1]; else "", and it is held for ARGV[2] ms from now.
_TAKE = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local shared = string.sub(ARGV[1], 1, 6) == 'shared'
for _, other in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if other ~= ARGV[1] and not (shared and string.sub(other, 1, 6) == 'shared') then return other end
end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return ''
"""


class Leases:
    """The leases of this process."""

    def __init__(self, link: Link, prefix: str) -> None:
        self._link = link
        self._key_start = f"{prefix}:w:"

    @contextmanager
    def held(self, collection: str, *, shared: bool) -> Iterator[Callable[[], None]]:
        """Hold a collection; yields what raises StoreLocked where the lease was lost."""
        key, own = f"{self._key_start}{collection}", f"{'shared' if shared else 'alone'} {this_writer()}"
        lease = _Lease(partial(self._take, collection, key, own))
        stop = threading.Event()
        threading.Thread(target=lease.keep, args=(stop,), name="preread-lease", daemon=True).start()
        try:
            yield lease.check
        finally:
            stop.set()
            with suppress(CacheError):  # it ends soon anyway
                self._link.run([("ZREM", key, own)], is_count)

    def _take(self, collection: str, key: str, own: str) -> None:
        command = ("EVAL", _TAKE, 1, key, own, int(LEASE_SECONDS * 1000))
        (other,) = self._link.run([command], is_value)
        if other:
            raise locked_by(collection, other.partition(b" ")[2])


class _Lease:
    """One lease: taken when it is made, and from time to time."""

    def __init__(self, take: Callable[[], None]) -> None:
        self._take = take
        self._lost: StoreLocked | None = None
        self._renew()

    def check(self) -> None:
        if self._lost is None and time.monotonic() - self._taken > LEASE_SECONDS:  # it may have ended
            self._renew()
        if self._lost is not None:
            raise self._lost

    def keep(self, stop: threading.Event) -> None:
        while self._lost is None and not stop.wait(LEASE_SECONDS / 3):
            try:
                self._renew()
            except StoreLocked as exc:
                self._lost = exc
            except CacheError:
                continue  # nor can anything be written now

    def _renew(self) -> None:
        before = time.monotonic()
        self._take()
        self._taken = before
