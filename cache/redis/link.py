"""Link: calls to a Redis server or cluster within a time budget, with one retry and a circuit breaker."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import redis

from cache.errors import CacheError, StoreAccessDenied, StoreFull, StoreUnavailable
from cache.redis.connection import Address, Client, Deadline, Malformed

T = TypeVar("T")
Command = tuple[Any, ...]  # name, key, arguments; EVAL, script, 1, key, arguments
IsValid = Callable[[object], bool]

log = logging.getLogger(__name__)

# Of calls in a row: then the circuit breaker opens, and one trial call passes every so many seconds.
_MAX_FAILURES, _COOLDOWN_SECONDS = 5, 1.0
_MAX_ERROR_CHARS = 200
# The first chunk of a read tells how large values are; enough to be worth its round trip, few enough to fit a budget.
_FIRST_CHUNK = 8

# Meanings of the first word of an error reply. The reply's own words are not repeated: a server that does not know AUTH
# quotes the password.
_ERRORS: dict[str, tuple[type[CacheError], str]] = {
    "NOAUTH": (StoreAccessDenied, "requires a password, and the store URL has none"),
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


class Link:
    """One kind of calls to one address. Thread-safe; connects on first use, and again after a server went away."""

    def __init__(self, address: Address, *, budget_seconds: float, tls_ca_file: str | None) -> None:
        self._address = address
        self._budget_seconds = budget_seconds
        self._num_failures, self._open_until, self._reason = 0, 0.0, ""  # of the circuit breaker
        self._tls_ca_file = tls_ca_file
        self._lock = threading.Lock()
        self._shared = threading.local()  # its `deadline`: of all calls of a thread, within `one_budget`
        self.client: Client | None = None

    def call(self, work: Callable[[Client, Deadline], T]) -> T:
        """The result of `work`, which may run twice, or a CacheError, within the budget."""
        self._check_breaker()
        deadline = getattr(self._shared, "deadline", None) or Deadline(self._budget_seconds)
        try:
            attempt = partial(deadline.bounding, partial(self._try_twice, work, deadline))
            # A cluster's client sleeps and waits for locks between its reads, whatever the deadline.
            result = deadline.on_a_thread(attempt) if self._address.is_cluster else attempt()
        except Exception as exc:
            error = self._translated(exc, deadline)
            self._ended(str(error) if isinstance(error, StoreUnavailable) else None)  # else it answered
            if error is exc:
                raise
            raise error from exc
        self._ended()
        return result

    @contextmanager
    def one_budget(self) -> Iterator[None]:
        """All calls of this thread within the block share one budget."""
        self._shared.deadline = Deadline(self._budget_seconds)
        try:
            yield
        finally:
            self._shared.deadline = None

    def run(
        self, commands: Sequence[Command], is_valid: IsValid, max_chunk: int = 1, chunk_bytes: int = 0, node: Any = None
    ) -> list[Any]:
        """Replies in order. One that says that a key is of another type stays in its place; errors are raised.

        `is_valid` tells whether a reply, as redis-py gives it, can be one to these commands. `chunk_bytes`, unless 0,
        is about how much a chunk's replies hold, judged by earlier ones. A command without a key needs a `node`.
        """

        def work(client: Client, deadline: Deadline) -> list[Any]:
            client = client if node is None else client.get_redis_connection(node)
            results: list[Any] = []
            num_bytes = 0
            while len(results) < len(commands):
                deadline.check()
                chunk = max_chunk
                if chunk_bytes:
                    fitting = chunk_bytes * len(results) // max(num_bytes, 1) if results else _FIRST_CHUNK
                    chunk = min(max(fitting, 1), max_chunk)
                replies = _exchange(client, commands[len(results) : len(results) + chunk], is_valid)
                num_bytes += sum(len(reply) for reply in replies if isinstance(reply, bytes))
                results.extend(replies)
            return results

        return self.call(work) if commands else []

    def primaries(self) -> list[Any]:
        """The primaries of a cluster, as `node`s of `run`; [None] for a single server."""
        return self.call(lambda client, _: list(client.get_primaries())) if self._address.is_cluster else [None]

    def close(self) -> None:
        with self._lock:
            client, self.client = self.client, None
        if client is not None:
            client.close()

    def _check_breaker(self) -> None:
        with self._lock:
            if self._num_failures < _MAX_FAILURES:
                return
            wait_seconds = self._open_until - time.monotonic()
            if wait_seconds > 0:
                state = f"{self._num_failures} failures in a row, next try in {wait_seconds:.1f} s"
                raise StoreUnavailable(f"circuit breaker open: {state}; last: {self._reason}")
            self._open_until = time.monotonic() + _COOLDOWN_SECONDS  # for the calls next to this trial

    def _ended(self, failure: str | None = None) -> None:
        with self._lock:
            self._num_failures = 0 if failure is None else self._num_failures + 1
            self._reason, self._open_until = failure or "", time.monotonic() + _COOLDOWN_SECONDS

    def _try_twice(self, work: Callable[[Client, Deadline], T], deadline: Deadline) -> T:
        client = None
        try:
            client = self._connected()
            return work(client, deadline)
        except Exception as exc:
            # After a restart every pooled connection is dead, a stream that is out of step stays so, and a replica that
            # takes no writes may have been replaced behind its name: reconnect.
            types = redis.ResponseError | redis.exceptions.BusyLoadingError | CacheError
            is_settled = _is_denied(exc) or isinstance(exc, types)  # fresh connections would give the same answer
            if not is_settled or isinstance(exc, redis.ReadOnlyError):
                self.forget(client)
                if deadline.left_seconds:
                    return work(self._connected(), deadline)
            raise

    def _connected(self) -> Client:
        with self._lock:
            client = self.client
        if client is None:
            # A cluster answers here: not under the lock, where every other call would wait.
            client = self._address.connect(self._budget_seconds, self._tls_ca_file)
            with self._lock:
                if self.client is None:
                    self.client = client
                client = self.client
        return client

    def forget(self, client: Client) -> None:
        """Drop a client's connections, so that the next call is made on fresh ones."""
        with self._lock:
            if client is not self.client or client is None:
                return
            self.client = None
        nodes = client.get_nodes() if self._address.is_cluster else []
        for one in [node.redis_connection for node in nodes] if nodes else [client]:
            if one is not None:
                one.connection_pool.disconnect(inuse_connections=False)  # those of other calls may be in step

    def _translated(self, exc: Exception, deadline: Deadline) -> Exception:
        if isinstance(exc, CacheError):
            return exc
        is_of_cluster = isinstance(exc, redis.exceptions.RedisClusterException)
        if is_of_cluster and isinstance(exc.__cause__, Exception):
            return self._translated(exc.__cause__, deadline)  # it only says that no node answered
        is_network = is_of_cluster or isinstance(exc, redis.ConnectionError | OSError)
        code = ""  # the first word of an error reply
        if isinstance(exc, redis.RedisError):
            code = exc.status_code or (str(exc).partition(" ")[0] if isinstance(exc, redis.ResponseError) else "")
        kind: type[CacheError] = StoreUnavailable
        if isinstance(exc, TimeoutError | redis.TimeoutError):
            text = f"no answer within {deadline.budget_seconds:g} s"
        elif code in _ERRORS:
            kind, meaning = _ERRORS[code]
            text = f"{code}: the server {meaning}"
        elif _is_denied(exc):
            kind, text = StoreAccessDenied, "the server does not accept the user name or password"
        elif isinstance(exc, redis.ResponseError | redis.exceptions.ClusterError):
            text = "the server refused a command" + (f" ({code})" if re.fullmatch("[A-Z]{2,20}", code) else "")
        elif is_network and not isinstance(exc, redis.AuthenticationError):  # one line, without the secrets of the URL
            text = "".join(char if char.isprintable() else " " for char in str(exc))[:_MAX_ERROR_CHARS]
            for secret in filter(None, (self._address.password, self._address.username)):
                text = text.replace(secret, "***")
        else:
            text = "the server's replies are malformed or out of step"
            if not isinstance(exc, Malformed | redis.RedisError):
                shown = exc if log.isEnabledFor(logging.DEBUG) else None  # a hostile server can make many and long ones
                named = type(exc).__name__
                log.warning("%s: a reply could not be read: %s", self._address, named, exc_info=shown)
        return kind(f"{self._address}: {text}")


def _is_denied(exc: Exception) -> bool:
    # redis-py raises it without a code where the reply to AUTH was no reply to AUTH.
    return isinstance(exc, redis.AuthenticationError | redis.exceptions.AuthorizationError) and bool(exc.status_code)


def _exchange(client: Client, commands: Sequence[Command], is_valid: IsValid) -> list[Any]:
    """Replies to one round trip, in step with the commands.

    An ECHO of a new token ends what is sent to each node: a reply too many or too few before it, also a leftover of an
    earlier call, puts another reply in its place. Otherwise a shifted nil would read as a missing passage.
    """
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    token = os.urandom(8).hex().encode()
    if hasattr(client, "get_node_from_key"):
        for node in {node.name: node for node in (client.get_node_from_key(_key(one)) for one in commands)}.values():
            pipeline.execute_command("ECHO", token, target_nodes=[node])
    else:
        pipeline.execute_command("ECHO", token)
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    results, echoes = replies[: len(commands)], replies[len(commands) :]
    if not echoes or not all(_is_echo(reply, token) for reply in echoes):
        raise Malformed("the stream of replies is out of step")
    for error in [reply for reply in results if isinstance(reply, Exception)]:
        if not (isinstance(error, redis.ResponseError) and str(error).startswith("WRONGTYPE")):
            raise error
    for reply in results:
        if not (isinstance(reply, Exception) or is_valid(reply)):
            raise Malformed(f"a reply of type {type(reply).__name__}")
    return results


def _key(command: Command) -> Any:
    return command[3 if command[0] == "EVAL" else 1]


def _is_echo(reply: object, token: bytes) -> bool:
    # The reply to a user or proxy without ECHO, which looks like no other reply here.
    if isinstance(reply, redis.ResponseError):
        return reply.status_code == "NOPERM" or "unknown command" in str(reply).lower()
    if isinstance(reply, Exception):
        raise reply
    return reply in (token, token.decode())
