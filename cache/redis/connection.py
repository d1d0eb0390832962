"""Address: a Redis URL, taken apart and checked. Does not connect.

CircuitBreaker: stops asking a server that keeps failing, so that callers fail at once instead of waiting each.

Knows no server: it is told of successes and failures.

Link: calls to a Redis server within a time budget, with one retry on fresh connections and a circuit breaker.

redis-py's own defaults retry for tens of seconds and its timeouts are per packet; here its retries are off and the
budget bounds the whole call by the clock. A call runs on another thread whose every receive knows the deadline
(`_Bounded`); only a name lookup can outlive it, and that thread is left behind. Large replies earn time as they
arrive. Does not know what is asked.

Many commands to Redis in few round trips, in chunks, with a proof that every reply is its command's own.

Does not know keys or records.
"""

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import Connection, SSLConnection
from redis.retry import Retry

from cache.errors import CacheError, StoreAccessDenied, StoreFull, StoreUnavailable, StoreUrlError
from cache.record import Record
from cache.store import public_url

_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\],/@\s]+)(?::(?P<port>\d{1,5}))?")
# As RFC 3986, appendix B, but for several hosts: urlsplit of some Pythons takes no bracket behind a comma.
_PARTS = re.compile(r"(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL)
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis server or cluster is and how to greet it."""

    hosts: tuple[tuple[str, int], ...]
    is_tls: bool
    is_cluster: bool
    database: int
    username: str | None = field(repr=False)  # of some services the secret itself
    password: str | None = field(repr=False)
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises StoreUrlError; nothing that may be a part of the password is in the message."""
        scheme, _, rest = url.partition("://")
        shown = public_url(url, "***")
        kind, plus, cluster = scheme.partition("+")
        if kind not in ("redis", "rediss") or (plus and cluster != "cluster") or not rest:
            raise StoreUrlError(f"store: {shown!r}, expected redis://HOST, rediss://HOST or redis+cluster://HOST")
        parts = _PARTS.fullmatch(rest)
        assert parts is not None  # every string has these parts, some of them empty
        user, at, hosts = parts["netloc"].rpartition("@")
        if "@" in rest[parts.end("netloc") :]:
            raise StoreUrlError(f"store: {shown!r}, expected /, ? and # in user and password as %2F, %3F and %23")
        username, _, password = (unquote(part) for part in user.partition(":"))
        if not _is_text(username + password):
            raise StoreUrlError(f"store: {shown!r}, expected user and password as UTF-8")
        query = dict(parse_qsl(parts["query"] or "", keep_blank_values=True))
        prefix = query.pop("prefix", "preread")
        if query or parts["fragment"]:
            raise StoreUrlError(f"store: {shown!r}, expected no options besides ?prefix=; the password goes before @")
        if not _PREFIX.fullmatch(prefix):
            raise StoreUrlError(f"prefix: {shown!r}, expected 1 to 64 of letters, digits, '.', '_' and '-'")
        database = parts["path"].strip("/") or "0"
        if not database.isascii() or not database.isdigit() or (plus and database != "0"):
            raise StoreUrlError(f"store: database of {shown!r}, expected a number (0 in a cluster)")
        addresses = tuple(_host(host, shown) for host in hosts.split(","))
        if len(addresses) > 1 and not plus:
            raise StoreUrlError(f"store: {shown!r} names {len(addresses)} hosts; only redis+cluster:// may")
        return cls(
            hosts=addresses,
            is_tls=kind == "rediss",
            is_cluster=bool(plus),
            database=int(database),
            username=username or None if at else None,
            password=password or None if at else None,
            prefix=prefix,
        )

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"redis{'s' * self.is_tls}{'+cluster' * self.is_cluster}://{hosts}"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _host(host: str, shown: str) -> tuple[str, int]:
    match = _HOST.fullmatch(host)
    port = int((match and match["port"]) or 6379)
    if match is None or not 0 < port < 65536:
        raise StoreUrlError(f"store: host of {shown!r}, expected HOST or HOST:PORT")
    return match["host"].strip("[]"), port


class CircuitBreaker:
    """Opens after `max_failures` in a row; then every `cooldown_seconds` one call is let through to try."""

    def __init__(self, max_failures: int = 5, cooldown_seconds: float = 1.0) -> None:
        self._max_failures = max_failures
        self._cooldown_seconds = cooldown_seconds
        self._lock = threading.Lock()
        self._num_failures = 0
        self._open_until = 0.0
        self._reason = ""

    @property
    def is_open(self) -> bool:
        return self._num_failures >= self._max_failures

    def check(self) -> None:
        """Raises StoreUnavailable where the call should not be made."""
        with self._lock:
            if not self.is_open:
                return
            wait_seconds = self._open_until - time.monotonic()
            if wait_seconds > 0:
                raise StoreUnavailable(
                    f"not asked: {self._num_failures} failures in a row, next try in {wait_seconds:.1f} s; "
                    f"last: {self._reason}"
                )
            self._open_until = time.monotonic() + self._cooldown_seconds  # this call tries, others wait for it

    def succeeded(self) -> None:
        with self._lock:
            self._num_failures = 0

    def failed(self, reason: str) -> None:
        with self._lock:
            self._num_failures += 1
            self._reason = reason
            self._open_until = time.monotonic() + self._cooldown_seconds


T = TypeVar("T")
# redis-py's commands are typed for sync and async at once, which no caller can use.
Client = Any

log = logging.getLogger(__name__)

_MAX_THREADS = 16
# What a budget leaves out of account: a reply in full flow. A tenth of what one local server was measured to give.
_MIN_BYTES_PER_SECOND = 100e6
_READ_SIZE_BYTES = 1 << 18
# Of the replies to one round trip, whatever lengths they claim: eight passages of some 20,000 states.
_MAX_REPLY_BYTES = 256 << 20
_MAX_ERROR_CHARS = 200

# Meanings of the first word of an error reply. The reply's own words are not repeated: a server that does not know AUTH
# quotes the password.
_ERRORS: dict[str, tuple[type[CacheError], str]] = {
    "NOAUTH": (StoreAccessDenied, "asks for a password, and the store URL has none"),
    "WRONGPASS": (StoreAccessDenied, "does not accept the user name or password"),
    "NOPERM": (StoreAccessDenied, "does not allow this user a command or key that is needed"),
    "READONLY": (StoreAccessDenied, "is a read-only replica and takes no writes"),
    "OOM": (StoreFull, "has used up its maxmemory"),
    "LOADING": (StoreUnavailable, "is still loading its data"),
    "CLUSTERDOWN": (StoreUnavailable, "belongs to a cluster that is down"),
    "MASTERDOWN": (StoreUnavailable, "has lost its primary"),
    "TRYAGAIN": (StoreUnavailable, "is moving the keys to another node"),
    "BUSY": (StoreUnavailable, "is busy with a script"),
    "MISCONF": (StoreUnavailable, "cannot save its data and takes no writes"),
    "MOVED": (StoreUnavailable, "is a node of a cluster that has the keys elsewhere; expected redis+cluster://"),
    "ASK": (StoreUnavailable, "is a node of a cluster that has the keys elsewhere; expected redis+cluster://"),
}


class Malformed(Exception):  # noqa: N818 - says what the replies are
    """Replies that are not those of the commands sent: of other types, or a stream that is out of step."""


class Deadline:
    """When a call must be over; every receive asks, so that nothing goes on after the call was given up."""

    def __init__(self, seconds: float) -> None:
        self.budget_seconds = seconds
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


class _Current(threading.local):
    """The deadline of the call that this thread works on; redis-py has no argument to hand it down."""

    deadline: Deadline | None = None


_current = _Current()


class _Bounded:
    """A socket that sends and receives until the deadline of the thread's call, and no endless reply.

    A timeout per packet, redis-py's own, lets a server that sends a byte a second go on without end.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._num_bytes = 0
        self._is_blocking = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def settimeout(self, seconds: float | None) -> None:
        """redis-py looks without waiting whether a pooled connection has something to read; else we know better."""
        self._is_blocking = seconds != 0
        self._sock.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        self._limit()
        self._num_bytes = 0
        self._sock.sendall(data)

    def recv(self, size: int) -> bytes:
        self._limit()
        data: bytes = self._sock.recv(size)
        self._count(len(data))
        return data

    def recv_into(self, *args: Any) -> int:
        """Called by redis-py where hiredis is installed."""
        self._limit()
        num_bytes: int = self._sock.recv_into(*args)
        self._count(num_bytes)
        return num_bytes

    def _limit(self) -> None:
        deadline = _current.deadline
        if deadline is not None and self._is_blocking:
            deadline.check()
            self._sock.settimeout(max(deadline.left_seconds, 1e-3))  # 0 would mean: do not block

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > _MAX_REPLY_BYTES:
            raise Malformed(f"replies of more than {_MAX_REPLY_BYTES} bytes")
        if _current.deadline is not None:
            _current.deadline.received(num_bytes)


class _PlainConnection(Connection):
    def _connect(self) -> Any:
        _limit_connecting(self)
        return _Bounded(super()._connect())  # type: ignore[no-untyped-call]  # redis-py has no types here


class _TlsConnection(SSLConnection):
    def _connect(self) -> Any:
        _limit_connecting(self)
        return _Bounded(super()._connect())  # type: ignore[no-untyped-call]  # redis-py has no types here


def _limit_connecting(connection: Any) -> None:
    if _current.deadline is not None:
        _current.deadline.check()
        connection.socket_connect_timeout = max(_current.deadline.left_seconds, 1e-3)


class _Threads:
    """Threads that run calls; unlike an executor's they end with the process, whatever they wait for."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._num_threads = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._queue.put((future, call))
        if not self._idle.acquire(blocking=False):
            with self._lock:
                if self._num_threads < _MAX_THREADS:
                    self._num_threads += 1
                    threading.Thread(target=self._run, name="preread-redis", daemon=True).start()
        return future

    def close(self) -> None:
        with self._lock:
            for _ in range(self._num_threads):
                self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as exc:
                    future.set_exception(exc)
            del item, future, call  # not kept alive while the thread is idle
            self._idle.release()


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
        self._threads = _Threads()

    def call(self, work: Callable[[Client, Deadline], T], *, budget_seconds: float | None = None) -> T:
        """The result of `work`, which may run twice. Raises a CacheError, within the budget."""
        self._breaker.check()
        deadline = Deadline(self._budget_seconds if budget_seconds is None else budget_seconds)
        future = self._threads.submit(lambda: self._try_twice(work, deadline))
        try:
            result = _result(future, deadline)
        except Exception as exc:
            future.cancel()
            error = self._translated(exc, deadline)
            if isinstance(error, StoreUnavailable):
                self._breaker.failed(str(error))
            else:
                self._breaker.succeeded()  # it answered
            if error is exc:
                raise
            raise error from exc
        self._breaker.succeeded()
        return result

    def reconnect(self) -> None:
        """Drop the connections, so that the next call is made on fresh ones."""
        self._forget(self._client)

    def close(self) -> None:
        self._threads.close()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _try_twice(self, work: Callable[[Client, Deadline], T], deadline: Deadline) -> T:
        client = None
        _current.deadline = deadline
        try:
            deadline.check()
            client = self._connected()
            return work(client, deadline)
        except Exception as exc:
            # After a restart every pooled connection is dead, a stream that is out of step stays so, and a replica that
            # takes no writes may have been replaced behind its name: start afresh.
            if not _is_settled(exc):
                self._forget(client)
                if deadline.left_seconds:
                    return work(self._connected(), deadline)
            raise
        finally:
            _current.deadline = None

    def _connected(self) -> Client:
        with self._lock:
            client = self._client
        if client is None:
            client = self._connect()  # a cluster's answers here: not under the lock, where every other call would wait
            with self._lock:
                if self._client is None:
                    self._client = client
                client = self._client
        return client

    def _forget(self, client: Client) -> None:
        with self._lock:
            is_current = client is not None and client is self._client
            if is_current:
                self._client = None
        if not is_current:
            return
        nodes = client.get_nodes() if self._address.is_cluster else []
        for one in [node.redis_connection for node in nodes] if nodes else [client]:
            if one is not None:
                one.connection_pool.disconnect(inuse_connections=False)  # those of other calls may be in step

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
            options["ssl_ca_certs"] = self._tls_ca_file
        options["connection_class"] = _TlsConnection if address.is_tls else _PlainConnection
        retry = Retry(NoBackoff(), 0)
        if not address.is_cluster:
            ((host, port),) = address.hosts
            pool = redis.ConnectionPool(host=host, port=port, db=address.database, retry=retry, **options)
            return redis.Redis.from_pool(pool)
        # Only with a URL does redis-py take a connection class for a cluster; this one says no more than a node does.
        (host, port), *others = address.hosts
        nodes = [ClusterNode(*other) for other in others]  # type: ignore[no-untyped-call]  # redis-py has no types here
        url = f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}"
        return RedisCluster(url=url, startup_nodes=nodes, retry=retry, **options)

    def _translated(self, exc: Exception, deadline: Deadline) -> Exception:
        """The CacheError for what redis-py, the network or a reply raised."""
        if isinstance(exc, CacheError):
            return exc
        where = self._address
        if isinstance(exc, redis.exceptions.RedisClusterException) and isinstance(exc.__cause__, Exception):
            return self._translated(exc.__cause__, deadline)  # it only says that no node could be asked
        if isinstance(exc, TimeoutError | redis.TimeoutError):
            return StoreUnavailable(f"{where}: no answer within {deadline.budget_seconds:g} s")
        code = _code(exc)
        if code in _ERRORS:
            kind, meaning = _ERRORS[code]
            return kind(f"{where}: {code}: the server {meaning}")
        if _is_denied(exc):
            return StoreAccessDenied(f"{where}: the server does not accept the user name or password")
        if isinstance(exc, redis.ResponseError | redis.exceptions.ClusterError):
            named = f" ({code})" if re.fullmatch("[A-Z]{2,20}", code) else ""
            return StoreUnavailable(f"{where}: the server refused a command{named}")
        is_network = isinstance(exc, redis.ConnectionError | redis.exceptions.RedisClusterException | OSError)
        if is_network and not isinstance(exc, redis.AuthenticationError):
            return StoreUnavailable(f"{where}: {self._said(exc)}")
        if not isinstance(exc, Malformed | redis.RedisError):
            shown = exc if log.isEnabledFor(logging.DEBUG) else None  # a hostile server can make many and long ones
            log.warning("%s: a reply could not be read: %s", where, type(exc).__name__, exc_info=shown)
        return StoreUnavailable(f"{where}: the server's replies are malformed or out of step")

    def _said(self, exc: Exception) -> str:
        """The network's own words: one line, without what the URL keeps secret."""
        text = "".join(char if char.isprintable() else " " for char in str(exc))[:_MAX_ERROR_CHARS]
        for secret in (self._address.password, self._address.username):
            text = text.replace(secret, "***") if secret else text
        return text


def _code(exc: Exception) -> str:
    """The first word of an error reply; "" for what is none."""
    if not isinstance(exc, redis.RedisError):
        return ""
    return exc.status_code or (str(exc).partition(" ")[0] if isinstance(exc, redis.ResponseError) else "")


def _is_settled(exc: Exception) -> bool:
    """Whether fresh connections would give the same answer."""
    if isinstance(exc, redis.ReadOnlyError):
        return False
    return _is_denied(exc) or isinstance(exc, redis.ResponseError | redis.exceptions.BusyLoadingError | CacheError)


def _is_denied(exc: Exception) -> bool:
    # redis-py raises it without a code where the reply to AUTH was no reply to AUTH.
    return isinstance(exc, redis.AuthenticationError | redis.exceptions.AuthorizationError) and bool(exc.status_code)


Command = tuple[Any, ...]  # name, key, arguments
IsValid = Callable[[object], bool]
# The first chunk of a read tells how large values are; enough to be worth its round trip, few enough to fit a budget.
_FIRST_CHUNK = 8


def run(
    link: Link,
    commands: Sequence[Command],
    is_valid: IsValid,
    max_chunk: int,
    *,
    chunk_bytes: int | None = None,
    budget_seconds: float | None = None,
) -> list[Any]:
    """Results in order. A reply that says that one key is of another type stays in its place; errors are raised.

    Args:
        is_valid: whether a reply, as redis-py gives it, can be one to these commands.
        chunk_bytes: keep the replies of a chunk near this size, judged by those before it.
        budget_seconds: None: the link's.
    """

    def work(client: Client, deadline: Deadline) -> list[Any]:
        results: list[Any] = []
        num_bytes = 0
        while len(results) < len(commands):
            deadline.check()
            chunk = max_chunk
            if chunk_bytes is not None:
                fitting = chunk_bytes * len(results) // max(num_bytes, 1) if results else _FIRST_CHUNK
                chunk = min(max(fitting, 1), max_chunk)
            replies = exchange(client, commands[len(results) : len(results) + chunk], is_valid)
            num_bytes += sum(len(reply) for reply in replies if isinstance(reply, bytes))
            results.extend(replies)
        return results

    return link.call(work, budget_seconds=budget_seconds) if commands else []


def exchange(client: Client, commands: Sequence[Command], is_valid: IsValid) -> list[Any]:
    """Replies to one round trip, in step with the commands.

    An ECHO of something new ends what is sent to each node: a reply too many or too few before it, a leftover of an
    earlier call too, puts another reply in its place. Otherwise a shifted nil would read as a missing passage.

    Raises:
        Malformed: they are not.
        redis.RedisError: an error reply.
    """
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    token = os.urandom(8).hex().encode()
    if hasattr(client, "get_node_from_key"):
        for node in {node.name: node for node in (client.get_node_from_key(key) for _, key, *_ in commands)}.values():
            pipeline.execute_command("ECHO", token, target_nodes=[node])
    else:
        pipeline.execute_command("ECHO", token)
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    results, echoes = replies[: len(commands)], replies[len(commands) :]
    if not echoes or not all(_is_echo(reply, token) for reply in echoes):
        raise Malformed("the stream of replies is out of step")
    for reply in results:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    for reply in results:
        if not is_wrong_type(reply) and not is_valid(reply):
            raise Malformed(f"a reply of type {type(reply).__name__}")
    return results


def take_bytes(pairs: Iterator[tuple[bytes, Record]], num_bytes: int) -> list[tuple[bytes, Record]]:
    """The next pairs, until they are about `num_bytes`."""
    chunk = []
    for encoded_id, record in pairs:
        chunk.append((encoded_id, record))
        num_bytes -= record.header.total_bytes
        if num_bytes <= 0:
            break
    return chunk


def is_wrong_type(reply: object) -> bool:
    """Whether a key holds another type of value than the command is for."""
    return isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE")


def _is_echo(reply: object, token: bytes) -> bool:
    # A user or proxy without ECHO is told so in its place, which no other reply of ours looks like.
    if isinstance(reply, redis.ResponseError):
        return reply.status_code == "NOPERM" or "unknown command" in str(reply).lower()
    if isinstance(reply, Exception):
        raise reply
    return reply in (token, token.decode())
