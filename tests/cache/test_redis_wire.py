"""The shared store over a wire that fails: replies out of step, garbled, endless, dripping, or none at all."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.reliability import redis_damage, redis_wire
from cache.collection import Collection
from cache.errors import CacheError, StoreAccessDenied, StoreDamaged, StoreFull, StoreUnavailable
from cache.open import open_store
from cache.read_cache import CachedStore
from cache.record import Damaged

BOUND_SECONDS = 5.0  # for what has a budget of 0.3; where a step waits outside it, it waits 30
OPERATIONS = {
    "aliases": lambda store: store.aliases(),
    "manifest": lambda store: store.read_manifest("passages"),
    "list": lambda store: store.list_collections(),
    "generation": lambda store: store.generation("passages"),
    "read": lambda store: store.get_many("passages", ["a", "b"]),
    "headers": lambda store: store.headers_many("passages", ["a", "b"]),
    "stats": lambda store: store.stats("passages"),
}


class WireServer:
    """Accepts, and gives each connection to `serve`; what that raises ends the connection."""

    def __init__(self, serve) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self._sockets.append(connection)
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._serve(connection)

    def close(self) -> None:
        for one in self._sockets:
            one.close()


@pytest.fixture
def wire():
    """Start a WireServer; stopped at the end."""
    servers = []

    def wire(serve) -> WireServer:
        servers.append(WireServer(serve))
        return servers[-1]

    yield wire
    for server in servers:
        server.close()


@pytest.fixture
def proxy(redis_server):
    proxy = redis_wire.Proxy(redis_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def open_redis():
    opened = []

    def open_redis(url: str, **options):
        opened.append(open_store(url, **{"read_budget_seconds": 0.3} | options))
        return opened[-1]

    yield open_redis
    for store in opened:
        store.close()


@pytest.fixture
def filled(redis_server, make_manifest, make_record):
    """A prefix under which `passages` holds a and b."""
    store = open_store(f"{redis_server.url}?prefix=wire", read_budget_seconds=20)
    if "passages" not in store.list_collections():
        store.write_manifest(make_manifest())
        store.put_many("passages", {"a": make_record(1), "b": make_record(2)})
    store.close()
    return "wire"


def bounded(call) -> None:
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        call()
    assert time.monotonic() - started < BOUND_SECONDS


def drip(connection: socket.socket) -> None:
    """A bulk reply of a million bytes, one of them every 20 ms."""
    connection.recv(1 << 16)
    connection.sendall(b"$1000000\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


def flood(connection: socket.socket) -> None:
    """A reply that claims ten gigabytes, and sends them as fast as they are read."""
    connection.recv(1 << 16)
    connection.sendall(b"$10000000000\r\n")
    while True:
        connection.sendall(bytes(1 << 20))


def nested(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    while True:
        connection.sendall(b"*1\r\n" * 10_000)


def test_no_fault_of_one_reply_is_silent():
    rows = redis_wire.run(44, seed=5)
    assert len(rows) == 11
    for row in rows:
        assert (row["silent"], row["bug"], row["lasting"]) == (0, 0, 0), row
    assert sum(row["right"] for row in rows) > 0


def test_no_damaged_or_exchanged_value_is_silent():
    *rows, total = redis_damage.run(100, 4)
    assert total["flips"] == 100
    assert (total["silent"], total["crashed"], total["unused"]) == (0, 0, 0), rows
    assert len(rows) == 16


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_server_that_accepts_and_never_answers_costs_the_read_budget(proxy, open_redis, filled, operation):
    proxy.fault = lambda number, reply, send: proxy.closing.wait(60)
    store = open_redis(f"{proxy.url}?prefix={filled}")
    bounded(lambda: OPERATIONS[operation](store))


@pytest.mark.parametrize("serve", [drip, flood, nested])
def test_replies_without_end_cost_no_more_than_the_budget(wire, open_redis, serve):
    store = open_redis(wire(serve).url)
    bounded(lambda: store.aliases())
    bounded(lambda: store.get_many("passages", ["a"]))


def test_a_reply_that_claims_ten_gigabytes_is_given_up_on_before_they_are_in_memory(wire):
    code = (
        "import re, sys; from cache.open import open_store\n"
        "from cache.errors import StoreUnavailable\n"
        "store = open_store(sys.argv[1], read_budget_seconds=30)\n"
        "try: store.get_many('passages', ['a'])\n"
        "except StoreUnavailable as exc: print(exc)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    told = subprocess.run([sys.executable, "-c", code, wire(flood).url], capture_output=True, text=True, timeout=60)
    message, peak_kib = told.stdout.splitlines()
    assert "malformed" in message
    assert int(peak_kib) < 1 << 20  # ru_maxrss has the process that started it in it, and other children


def test_commands_end_although_their_server_goes_on(wire):
    environment = os.environ | {"PREREAD_STORE": wire(drip).url.replace("redis://", "redis://:hunter2@")}
    commands = {
        ("stats",): 3,
        ("verify", "-c", "docs"): 3,
        ("collection", "drop", "docs", "--yes"): 3,
        ("doctor", "--model", "/no/such"): 1,
    }
    running = {
        words: subprocess.Popen(
            [sys.executable, "-m", "preread", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for words in commands
    }  # fmt: skip
    for words, process in running.items():
        told, _ = process.communicate(timeout=60)
        assert process.returncode == commands[words], told
        assert "no answer within 5 s" in told
        assert "hunter2" not in told


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (b"-NOAUTH Authentication required.", StoreAccessDenied, "requires a password"),
        (b"-WRONGPASS invalid username-password pair", StoreAccessDenied, "does not accept"),
        (b"-NOPERM this user has no permissions", StoreAccessDenied, "does not allow"),
        (b"-READONLY You can't write against a read only replica.", StoreAccessDenied, "read-only replica"),
        (b"-OOM command not allowed when used memory > 'maxmemory'.", StoreFull, "maxmemory"),
        (b"-LOADING Redis is loading the dataset in memory", StoreUnavailable, "loading"),
        (b"-CLUSTERDOWN Hash slot not served", StoreUnavailable, "down"),
        (b"-MASTERDOWN Link with MASTER is down", StoreUnavailable, "primary"),
        (b"-MOVED 1 127.0.0.1:1", StoreUnavailable, "cluster"),
        (b"-MOVED", StoreUnavailable, "malformed"),
        (b"-MISCONF Redis is configured to save", StoreUnavailable, "save"),
        (b"-ERR unknown command 'AUTH', with args beginning with: 'user' 'hunter2'", StoreUnavailable, "refused"),
        (b"-hunter2", StoreUnavailable, "refused"),
        (b"HTTP/1.1 400 hunter2", StoreUnavailable, "malformed"),
        (b"+OK", StoreUnavailable, "malformed"),
        (b":1", StoreUnavailable, "malformed"),
        (b"$abc", StoreUnavailable, "malformed"),
        (b"*2\r\n:1\r\n:2", StoreUnavailable, "malformed"),
        (b"-WRONGTYPE Operation against a key", StoreUnavailable, "refused"),  # to AUTH
        (b"\xff\x00" * 100, StoreUnavailable, "malformed"),
    ],
)  # fmt: skip
def test_an_error_reply_says_what_it_means_and_nothing_the_server_said(wire, open_redis, reply, error, message):
    def answer(connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            connection.sendall((reply + b"\r\n") * max(1, data.count(b"\r\n*") + 1))

    store = open_redis(wire(answer).url.replace("redis://", "redis://user:hunter2@"))
    for operation in ("aliases", "list", "read"):
        with pytest.raises(error, match=message) as caught:
            OPERATIONS[operation](store)
        assert type(caught.value) is error
        assert "hunter2" not in str(caught.value)


def shift_once(proxy, leftover: bytes):
    """One reply too many before the next; that connection stays one out of step."""
    state = {"left": 1}

    def fault(number: int, reply: bytes, send) -> bool:
        if state["left"]:
            state["left"] -= 1
            send(leftover)
        send(reply)
        return True

    return fault


@pytest.mark.parametrize("leftover", [b"$-1\r\n", b"$1\r\nx\r\n", b":1\r\n", b"+OK\r\n"])
def test_a_stream_out_of_step_is_noticed_and_dropped(proxy, open_redis, filled, same, make_record, leftover):
    store = open_redis(f"{proxy.url}?prefix={filled}", read_budget_seconds=10)
    for _ in range(3):
        proxy.fault = shift_once(proxy, leftover)
        found = store.get_many("passages", ["a", "absent", "b"])
        assert same(found[0], make_record(1))
        assert found[1] is None
        assert same(found[2], make_record(2))


def test_values_exchanged_between_two_keys_are_corrupt_and_healed_by_writing(
    redis_server, open_redis, make_manifest, make_record, same
):
    store = open_redis(f"{redis_server.url}?prefix=exchanged", read_budget_seconds=10)
    store.write_manifest(make_manifest())
    records = {passage_id: make_record(seed) for seed, passage_id in enumerate("abc")}
    store.put_many("passages", records)
    with redis_server.client() as client:
        keys = ["exchanged:p:passages:a", "exchanged:p:passages:b"]
        client.mset(dict(zip(keys, reversed(client.mget(keys)), strict=True)))
    found = store.get_many("passages", list("abc"))
    assert [isinstance(one, Damaged) for one in found] == [True, True, False]
    assert store.headers_many("passages", ["a", "b"]) == [None, None]
    assert {id_ for id_, one in store.scan("passages") if isinstance(one, Damaged)} == {"a", "b"}
    store.put_many("passages", {"a": records["a"]})
    assert same(store.get_many("passages", ["a"])[0], records["a"])


def test_stray_keys_and_fields_are_passed_over(redis_server, open_redis, make_manifest, make_record):
    store = open_redis(f"{redis_server.url}?prefix=stray", read_budget_seconds=10)
    store.write_manifest(make_manifest())
    store.write_manifest(make_manifest("other"))
    store.put_many("passages", {"a": make_record(1)})
    store.set_alias("live", "other")
    stray = [b"", b"\xff\xfe", b"x" * 600, b"\xed\xa0\x80"]
    with redis_server.client() as client:
        for passage_id in stray:
            client.set(b"stray:p:passages:" + passage_id, b"not ours")
        client.rpush("stray:p:passages:b", "a list under an id that could be ours")
        for key in ("stray:manifests", "stray:aliases", "stray:generations"):
            client.hset(key, mapping={b"": b"", b"\xff": b"\xfe", b"a b": b"c d"})
        client.hset("stray:aliases", mapping={b"good": b"\xff", b"empty": b""})
        client.hset("stray:generations", "passages", b"not a number")
    assert store.list_collections() == ["other", "passages"]
    assert store.aliases() == {"live": "other"}
    assert store.stats("passages").num_passages == 2
    assert {id_: type(one).__name__ for id_, one in store.scan("passages")} == {"a": "Record", "b": "Damaged"}
    problems = store.audit("passages").problems
    assert "4 keys under stray:p:passages: that no passage can have" in problems
    assert len(problems) == 1 + 3 * 3 + 2 + 1  # fields of each hash, two aliases, a generation
    assert len(store.mend()) == len(problems) - 1  # the generation is another one now
    assert store.audit("passages").problems == ()
    before = store.generation("passages")
    assert store.delete_many("passages", ["a"]) == 1
    assert store.generation("passages") != before
    with redis_server.client() as client:
        client.set(b"stray:p:passages:", b"not ours")
    store.drop_collection("passages")
    with redis_server.client() as client:
        assert client.keys("stray:p:passages:*") == []


@pytest.mark.parametrize("key", ["manifests", "aliases", "generations"])
def test_a_key_of_the_stores_own_with_another_type_is_damage(redis_server, open_redis, key):
    store = open_redis(f"{redis_server.url}?prefix=type-{key}", read_budget_seconds=10)
    with redis_server.client() as client:
        client.set(f"type-{key}:{key}", "x")
    operation = {"manifests": "manifest", "aliases": "aliases", "generations": "generation"}[key]
    with pytest.raises(StoreDamaged, match=f"type-{key}:{key}"):
        OPERATIONS[operation](store)


def test_an_alias_that_was_damaged_means_no_other_collection(redis_server, open_redis, make_manifest):
    store = open_redis(f"{redis_server.url}?prefix=alias", read_budget_seconds=10)
    for name in ("docs1", "docs2", "docs3"):
        store.write_manifest(make_manifest(name))
    store.set_alias("live", "docs1")
    store.set_alias("next", "docs3")
    with redis_server.client() as client:
        value = client.hget("alias:aliases", "live")
        client.hset("alias:aliases", "live", value.replace(b"docs1", b"docs2"))
        client.hset("alias:aliases", "moved", client.hget("alias:aliases", "next"))
        client.hset("alias:aliases", "old", b"docs2")  # as versions before wrote it
    assert store.aliases() == {"next": "docs3", "old": "docs2"}
    with pytest.raises(CacheError, match="'live' does not exist"):
        Collection.open(store, "live")


def test_what_a_read_cache_holds_does_not_outlive_a_restart_without_data(
    redis_server, make_manifest, make_record, same
):
    """Numbers of a counter come again after it; what was held under them is another passage's states by then."""
    url = f"{redis_server.url}?prefix=restart"
    reader = CachedStore(open_store(url, read_budget_seconds=10), max_bytes=1 << 20)
    writer = open_store(url, read_budget_seconds=10)
    for seed in (1, 2):  # the same writes, of other states
        writer.write_manifest(make_manifest(identity="0" * 32))
        writer.put_many("passages", {"a": make_record(seed)})
        assert same(reader.get_many("passages", ["a"])[0], make_record(seed))
        with redis_server.client() as client:
            client.delete(*client.keys("restart:*"))
    for store in (reader, writer):
        store.close()
