"""Connections to a Redis server or cluster, bounded by a deadline.

redis-py retries for tens of seconds and times packets: here it never retries, and each receive checks the whole call's
deadline (`_Bounded`), which received bytes extend.
"""

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import Connection, SSLConnection
from redis.retry import Retry

from cache.errors import StoreUrlError
from cache.store import public_url

Client = Any  # redis-py's commands are typed for sync and async at once, which no caller can use
_T = TypeVar("_T")

# A reply in full flow does not use up the budget. A tenth of the rate measured of one local server.
_MIN_BYTES_PER_SECOND = 100e6
_READ_SIZE_BYTES = 1 << 18
# Of the replies to one round trip, whatever lengths they claim: eight passages of some 20,000 states.
_MAX_REPLY_BYTES = 256 << 20

_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\],/@\s]+)(?::(?P<port>\d{1,5}))?")
# As RFC 3986, appendix B, but for several hosts: urlsplit of some Pythons takes no bracket behind a comma.
_PARTS = re.compile(r"(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL)
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Address:
    """A Redis URL, parsed and checked."""

    hosts: tuple[tuple[str, int], ...]
    is_tls: bool
    is_cluster: bool
    database: int
    username: str | None = field(repr=False)  # of some services the secret itself
    password: str | None = field(repr=False)
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises StoreUrlError, with nothing in its message that may be a part of the password."""
        scheme, _, rest = url.partition("://")
        shown = public_url(url, "***")
        kind, plus, cluster = scheme.partition("+")
        if kind not in ("redis", "rediss") or (plus and cluster != "cluster") or not rest:
            raise StoreUrlError(f"store: {shown!r}, expected redis://HOST, rediss://HOST or redis+cluster://HOST")
        parts = _PARTS.fullmatch(rest)
        assert parts is not None  # every string has these parts, some of them empty
        user, _, hosts = parts["netloc"].rpartition("@")
        if "@" in rest[parts.end("netloc") :]:
            raise StoreUrlError(f"store: {shown!r}, expected /, ? and # in user and password as %2F, %3F and %23")
        username, _, password = map(unquote, user.partition(":"))
        if _SURROGATE.search(username + password):
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
        addresses: tuple[tuple[str, int], ...] = ()
        for host in map(_HOST.fullmatch, hosts.split(",")):
            if host is None or not 0 < (port := int(host["port"] or 6379)) < 65536:
                raise StoreUrlError(f"store: host of {shown!r}, expected HOST or HOST:PORT")
            addresses += ((host["host"].strip("[]"), port),)
        if len(addresses) > 1 and not plus:
            raise StoreUrlError(f"store: {shown!r} names {len(addresses)} hosts; only redis+cluster:// may")
        return cls(addresses, kind == "rediss", bool(plus), int(database), username or None, password or None, prefix)

    def connect(self, budget_seconds: float, tls_ca_file: str | None) -> Client:
        options: dict[str, Any] = {"username": self.username, "password": self.password, "driver_info": None}
        options |= {"socket_timeout": budget_seconds, "socket_connect_timeout": budget_seconds}
        # RESP3 would cost a HELLO and open push messages that are not read.
        options |= {"socket_read_size": _READ_SIZE_BYTES, "protocol": 2, "connection_class": _PlainConnection}
        if self.is_tls:
            options |= {"connection_class": _TlsConnection, "ssl_ca_certs": tls_ca_file}
        retry = Retry(NoBackoff(), 0)
        if not self.is_cluster:
            ((host, port),) = self.hosts
            pool = redis.ConnectionPool(host=host, port=port, db=self.database, retry=retry, **options)
            return redis.Redis.from_pool(pool)
        # Only with a URL does redis-py take a connection class for a cluster; this one says no more than a node does.
        (host, port), *others = self.hosts
        nodes = [ClusterNode(*other) for other in others]  # type: ignore[no-untyped-call]  # redis-py has no types here
        return RedisCluster(url=f"redis://{_shown(host, port)}", startup_nodes=nodes, retry=retry, **options)

    def __str__(self) -> str:
        hosts = ",".join(_shown(*host) for host in self.hosts)
        return f"redis{'s' * self.is_tls}{'+cluster' * self.is_cluster}://{hosts}"


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Malformed(Exception):  # noqa: N818 - says what the replies are
    """Replies that are not those of the commands sent: of other types, or a stream that is out of step."""


class Deadline:
    """End of a call, checked by every receive, so that nothing goes on after the call was given up."""

    def __init__(self, seconds: float) -> None:
        self.budget_seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_seconds(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def received(self, num_bytes: int) -> None:
        self._end += num_bytes / _MIN_BYTES_PER_SECOND  # the budget bounds silence, not the size of replies

    def bounding(self, call: Callable[[], _T]) -> _T:
        """The result of a call whose receives check this deadline."""
        context = copy_context()
        context.run(_deadline.set, self)
        return context.run(call)

    def on_a_thread(self, call: Callable[[], _T]) -> _T:
        """The result of a call that may outlive the deadline; the thread it runs on is then left behind."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as exc:
                future.set_exception(exc)

        threading.Thread(target=run, name="preread-redis", daemon=True).start()
        while not future.done() and self.left_seconds:  # which grows meanwhile
            wait([future], timeout=self.left_seconds)
        return future.result(timeout=0)

    def check(self) -> None:
        if not self.left_seconds:
            raise redis.TimeoutError("time budget used up")


# Of this thread's call; redis-py has no argument to hand it down.
_deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


class _Bounded:
    """A socket that sends and receives until the deadline of the thread's call, and no endless reply."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._num_bytes = 0
        self._is_blocking = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def settimeout(self, seconds: float | None) -> None:
        """0, of redis-py's check whether a pooled connection is readable, is kept; else the deadline decides."""
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

    def recv_into(self, *args: Any) -> int:  # where hiredis is installed
        self._limit()
        num_bytes: int = self._sock.recv_into(*args)
        self._count(num_bytes)
        return num_bytes

    def _limit(self) -> None:
        deadline = _deadline.get()
        if deadline is not None and self._is_blocking:
            deadline.check()
            self._sock.settimeout(max(deadline.left_seconds, 1e-3))  # 0 would mean: do not block

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > _MAX_REPLY_BYTES:
            raise Malformed(f"replies of more than {_MAX_REPLY_BYTES} bytes")
        if (deadline := _deadline.get()) is not None:
            deadline.received(num_bytes)


class _PlainConnection(Connection):
    def _connect(self) -> Any:
        connect: Callable[[], Any] = super()._connect
        if (deadline := _deadline.get()) is None:
            return _Bounded(connect())
        deadline.check()
        self.socket_connect_timeout = max(deadline.left_seconds, 1e-3)
        return _Bounded(deadline.on_a_thread(connect))  # a name lookup has no timeout


class _TlsConnection(_PlainConnection, SSLConnection): ...
