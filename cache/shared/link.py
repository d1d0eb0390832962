"""Link: calls to a Redis server within a time budget, with one retry and a circuit breaker.

redis-py's own defaults retry for tens of seconds and its timeouts are per packet; here its retries are off and the
budget bounds the whole call, name lookup and TLS handshake included, because the call runs on another thread that is
left behind when time is up. Large answers earn time as they arrive. Does not know what is asked.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from cache.errors import CacheError, StoreAccessDenied, StoreFull, StoreUnavailable
from cache.shared.address import Address
from cache.shared.breaker import CircuitBreaker

T = TypeVar("T")
# redis-py's commands are typed for sync and async at once, which no caller can use.
Client = Any

_MAX_THREADS = 16
# What a budget leaves out of account: a reply in full flow. A tenth of what one local server was measured to give.
_MIN_BYTES_PER_SECOND = 100e6
_READ_SIZE_BYTES = 1 << 18
_DENIED_CODES = ("NOAUTH", "WRONGPASS", "NOPERM", "READONLY")
_DOWN = (redis.ConnectionError, redis.exceptions.ClusterError, redis.exceptions.RedisClusterException, OSError)
_AGAIN_CODES = ("LOADING", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "BUSY", "MISCONF")


class Deadline:
    """When a call must be over; long work asks between its steps, so that nothing goes on after it was given up."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_seconds(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def received(self, num_bytes: int) -> None:
        """Bytes that came earn the time they may take: the budget bounds silence, not the size of what was asked."""
        self._end += num_bytes / _MIN_BYTES_PER_SECOND

    def check(self) -> None:
        if not self.left_seconds:
            raise redis.TimeoutError("time budget used up")


def _result(future: Future[T], deadline: Deadline) -> T:
    """What the call gives, waited for as long as the deadline says, which may move meanwhile."""
    while True:
        wait([future], timeout=deadline.left_seconds)
        if future.done() or not deadline.left_seconds:
            return future.result(timeout=0)


class Link:
    """One kind of calls to one address. Thread-safe; connects on first use, and again after the server went away."""

    def __init__(self, address: Address, *, budget_seconds: float, tls_ca_file: str | None) -> None:
        self._address = address
        self._budget_seconds = budget_seconds
        self._breaker = CircuitBreaker()
        self._tls_ca_file = tls_ca_file
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="preread-redis")

    def call(self, work: Callable[[Client, Deadline], T]) -> T:
        """The result of `work`, which may run twice. Raises a CacheError, within the budget."""
        self._breaker.check()
        deadline = Deadline(self._budget_seconds)
        future = self._threads.submit(self._try_twice, work, deadline)
        try:
            result = _result(future, deadline)
        except Exception as exc:
            future.cancel()
            error = self._translated(exc)
            if isinstance(error, StoreUnavailable):
                self._breaker.failed(str(error))
            else:
                self._breaker.succeeded()  # it answered
            if error is exc:
                raise
            raise error from exc
        self._breaker.succeeded()
        return result

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _try_twice(self, work: Callable[[Client, Deadline], T], deadline: Deadline) -> T:
        client = None
        try:
            client = self._connected()
            return work(client, deadline)
        except (redis.AuthenticationError, redis.exceptions.AuthorizationError):
            raise
        except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.RedisClusterException, OSError):
            if not deadline.left_seconds:
                raise
            # After a restart every pooled connection is dead, and so the next one would be; start afresh.
            self._forget(client)
            return work(self._connected(), deadline)

    def _connected(self) -> Client:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _forget(self, client: Client | None) -> None:
        with self._lock:
            if client is not None and self._client is client:
                self._client = None

    def _connect(self) -> Client:
        address = self._address
        options: dict[str, Any] = {
            "username": address.username,
            "password": address.password,
            "socket_timeout": self._budget_seconds,
            "socket_connect_timeout": self._budget_seconds,
            "socket_read_size": _READ_SIZE_BYTES,
            "protocol": 2,  # RESP3 would cost a HELLO and open push messages that nobody reads
            "driver_info": None,
        }
        if address.is_tls:
            options |= {"ssl": True, "ssl_ca_certs": self._tls_ca_file}
        if address.is_cluster:
            nodes = [ClusterNode(host, port) for host, port in address.hosts]  # type: ignore[no-untyped-call]  # redis-py has no types here
            return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 0), **options)
        ((host, port),) = address.hosts
        return redis.Redis(host=host, port=port, db=address.database, retry=Retry(NoBackoff(), 0), **options)

    def _translated(self, exc: Exception) -> Exception:
        """The CacheError for what redis-py or the network raised; anything else as it is."""
        code = str(exc).partition(" ")[0]
        if isinstance(exc, TimeoutError | redis.TimeoutError):
            return StoreUnavailable(f"{self._address}: no answer within {self._budget_seconds:g} s")
        if isinstance(exc, redis.AuthenticationError | redis.exceptions.AuthorizationError) or code in _DENIED_CODES:
            return StoreAccessDenied(f"{self._address}: {exc}")
        if isinstance(exc, redis.exceptions.NoPermissionError | redis.ReadOnlyError):
            return StoreAccessDenied(f"{self._address}: {exc}")
        if isinstance(exc, redis.OutOfMemoryError):
            return StoreFull(f"{self._address}: {exc}")
        is_down = isinstance(
            exc,
            redis.ConnectionError | redis.exceptions.ClusterError | redis.exceptions.RedisClusterException | OSError,
        )
        if is_down or code in _AGAIN_CODES:
            return StoreUnavailable(f"{self._address}: {exc}")
        if isinstance(exc, redis.RedisError):
            return CacheError(f"{self._address}: {exc}")
        return exc
