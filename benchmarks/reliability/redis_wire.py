"""Faults between the store and its Redis: replies lost, doubled, exchanged, cut, garbled, or never sent.

A proxy in front of a real redis-server changes one reply of a read. The read must be right, an error, or CORRUPT; a
stored passage that reads as missing, or as another one, is silent. The read after it must be right again. Left out is a
nil in a record's place with nothing else amiss: it says that the passage was deleted, and no reader can know better.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from benchmarks.redis_server import redis_url
from cache.collection import Collection, StoredPassage
from cache.errors import CacheError
from cache.manifest import Manifest
from cache.open import open_store
from cache.record import Damaged
from cache.states import PassageStates, text_digest
from cache.store import Store

Send = Callable[[bytes], None]
# number of the reply, over all connections; its bytes; where bytes go. False: the connection is closed.
Fault = Callable[[int, bytes, Send], bool]

NUM_STORED, NUM_ABSENT, DIM = 12, 4, 8
BUDGET_SECONDS = 0.3
RESULTS = ("right", "error", "corrupt", "silent", "lasting", "bug")


def pass_on(number: int, reply: bytes, send: Send) -> bool:
    """No fault."""
    send(reply)
    return True


class Proxy:
    """A TCP proxy on a free port of 127.0.0.1 that gives every reply of a Redis server to `fault`."""

    def __init__(self, port: int, fault: Fault = pass_on) -> None:
        self.fault = fault
        self.num_replies = 0
        self.upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.closing = threading.Event()  # a fault that never answers waits for this
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.closing.set()
        with self._lock:
            sockets = [self._listener, *self._sockets]
        for one in sockets:
            _shut(one)

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.upstream))
            except OSError:
                return
            with self._lock:
                self._sockets += [client, server]
            for pump in (self._commands, self._replies):
                threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _commands(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(1 << 16):
                server.sendall(data)
        except OSError:
            pass
        _shut(server)

    def _replies(self, client: socket.socket, server: socket.socket) -> None:
        try:
            for reply in replies(server.makefile("rb")):
                with self._lock:
                    number, self.num_replies = self.num_replies, self.num_replies + 1
                if not self.fault(number, reply, client.sendall):
                    break
        except OSError:
            pass
        _shut(client)
        _shut(server)


def replies(stream: BinaryIO) -> Iterator[bytes]:
    """The replies of a well-behaved server, each in its byte form (RESP2)."""
    while line := stream.readline():
        yield _whole(line, stream)


def _whole(line: bytes, stream: BinaryIO) -> bytes:
    if line[:1] == b"$" and line != b"$-1\r\n":
        return line + stream.read(int(line[1:]) + 2)
    if line[:1] == b"*" and line != b"*-1\r\n":
        return line + b"".join(_whole(stream.readline(), stream) for _ in range(int(line[1:])))
    return line


def _shut(one: socket.socket) -> None:
    for close in (lambda: one.shutdown(socket.SHUT_RDWR), one.close):
        with contextlib.suppress(OSError):
            close()


def faults(rng: random.Random, proxy: Proxy, at: int) -> dict[str, Fault]:
    """Every kind, each at reply number `at`."""
    held: list[bytes] = []

    def one(change: Callable[[bytes], bytes]) -> Fault:
        def fault(number: int, reply: bytes, send: Send) -> bool:
            send(change(reply) if number == at else reply)
            return True

        return fault

    def exchanged(number: int, reply: bytes, send: Send) -> bool:
        if number == at:
            held.append(reply)
        else:
            send(reply + b"".join(held))
            held.clear()
        return True

    def cut(number: int, reply: bytes, send: Send) -> bool:
        send(reply if number != at else reply[: rng.randrange(len(reply))])
        return number != at

    def hang(number: int, reply: bytes, send: Send) -> bool:
        if number == at:
            proxy.closing.wait(5)
            return False
        return pass_on(number, reply, send)

    def flipped(reply: bytes) -> bytes:
        i = rng.randrange(len(reply))
        return reply[:i] + bytes([reply[i] ^ 1 << rng.randrange(8)]) + reply[i + 1 :]

    lengths = [b"$10000000000", b"$-7", b"$99999999999999999999", b"*3", b"$0", b"$", b"*1000000", b"$1", b"*-4"]
    values = [b"$-1", b":0", b":1", b"+OK", b"*0", b"$0\r\n", b"$3\r\nabc", b"*1\r\n*1\r\n*1\r\n:1"]
    errors = [
        b"LOADING Redis is loading", b"MOVED 1 127.0.0.1:1", b"CLUSTERDOWN The cluster is down", b"READONLY no writes",
        b"OOM no memory", b"NOAUTH Authentication required.", b"ERR unknown command", b"WRONGTYPE no", b"ASK x", b"",
    ]  # fmt: skip
    return {
        "lost": one(lambda _: b""),
        "doubled": one(lambda reply: reply * 2),
        "a leftover before it": one(lambda reply: rng.choice(values) + b"\r\n" + reply),
        "exchanged with the next": exchanged,
        "cut": cut,
        "never sent": hang,
        "a bit flipped": one(flipped),
        "random bytes": one(lambda _: rng.randbytes(rng.randrange(1, 200))),
        "a wrong length": one(lambda reply: rng.choice(lengths) + b"\r\n" + reply.partition(b"\r\n")[2]),
        "another type": one(lambda _: rng.choice(values[1:]) + b"\r\n"),
        "an error": one(lambda _: b"-" + rng.choice(errors) + b"\r\n"),
    }


def fill(store: Store, name: str, count: int, seed: int) -> Collection:
    """A collection of `count` passages of a few random states."""
    rng = np.random.default_rng(seed)
    manifest = Manifest(
        collection=name,
        fingerprint="f" * 64,
        checkpoint="fault injection",
        dim=DIM,
        max_passage_tokens=64,
        passage_template="{text}",
        pooling_version=1,
        compression_ratio=1,
        codec="Flat",
    )
    collection = Collection.create(store, manifest)
    passages = []
    for i in range(count):
        states = rng.standard_normal((int(rng.integers(1, 6)), DIM), dtype=np.float32)
        text = f"text {i}"
        read = PassageStates(states, (len(states),), 1, False, text_digest(text))
        passages.append(StoredPassage(f"p{i}", read, text))
    collection.put_many(passages)
    return collection


def run(count: int, seed: int) -> list[dict[str, Any]]:
    """One row per kind of fault."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    with redis_url() as url:
        prefix = uuid.uuid4().hex
        direct = open_store(f"{url}?prefix={prefix}", read_budget_seconds=10)
        ids = [f"p{i}" for i in range(NUM_STORED + NUM_ABSENT)]
        rng.shuffle(ids)
        truth = dict(zip(ids, fill(direct, "docs", NUM_STORED, seed).get_many(ids), strict=True))
        direct.close()
        proxy = Proxy(int(url.rpartition(":")[2]))
        try:
            for i in range(count):
                proxy.num_replies = 0
                # Replies of a read: aliases, manifest and the passages, each round trip with its echo.
                kinds = faults(rng, proxy, rng.randrange(len(ids) + 8))
                kind = list(kinds)[i % len(kinds)]
                row = rows.setdefault(kind, {"a reply": kind} | dict.fromkeys(("faults", *RESULTS), 0))
                proxy.fault = kinds[kind]
                store = open_store(f"{proxy.url}?prefix={prefix}", read_budget_seconds=BUDGET_SECONDS)
                row["faults"] += 1
                row[_judged(store, ids, truth)] += 1
                proxy.fault = pass_on
                row["lasting"] += _lasts(store, ids, truth)
                store.close()
        finally:
            proxy.close()
    return list(rows.values())


def _lasts(store: Store, ids: list[str], truth: dict[str, PassageStates | Damaged | None]) -> bool:
    """Whether reads go wrong after the fault, too. On a machine that is busy one may be late; what lasts goes on."""
    for _ in range(10):
        if _judged(store, ids, truth) == "right":
            return False
        time.sleep(0.3)  # also past the breaker's cooldown
    return True


def _judged(store: Store, ids: list[str], truth: dict[str, PassageStates | Damaged | None]) -> str:
    """Outcome of a read of all passages."""
    try:
        found = Collection.open(store, "docs").get_many(ids)
    except CacheError:
        return "error"
    except Exception:
        return "bug"
    result = "right"
    for passage_id, states in zip(ids, found, strict=True):
        true = truth[passage_id]
        if isinstance(states, Damaged):
            result = "corrupt"
        elif states is None or not isinstance(true, PassageStates):
            if states is not true:
                return "silent"
        elif not np.array_equal(states.states, true.states) or states.text_digest != true.text_digest:
            return "silent"
    return result
