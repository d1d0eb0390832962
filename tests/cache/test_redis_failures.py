"""The shared store when things go wrong: down, hung, restarted, full, the wrong password, a foreign certificate."""

import re
import socket
import threading
import time

import pytest

from cache.collection import Collection
from cache.errors import StoreAccessDenied, StoreDamaged, StoreFull, StoreUnavailable, StoreUrlError
from cache.open import open_store
from cache.record import Damaged
from cache.redis.connection import Address
from cache.redis.link import Link
from cache.store import public_url
from decoder_server.config import DecoderConfig


@pytest.fixture
def start(tmp_path):
    """Start a redis-server of one's own, to be killed; RedisServer(directory, *arguments)."""
    from redis_fixture import RedisServer

    servers = []

    def start(*arguments: str, port: int | None = None):
        server = RedisServer(tmp_path / f"redis{len(servers)}", *arguments, port=port).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def open_redis():
    opened = []

    def open_redis(url: str, **options):
        # Tests share two cores: the product's 100 ms is for those that say so.
        opened.append(open_store(url, **({"read_budget_seconds": 20.0} | options)))
        return opened[-1]

    yield open_redis
    for store in opened:
        store.close()


@pytest.fixture
def silent_port():
    """A server that accepts and never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))
    accepted, stop = [], threading.Event()

    def accept() -> None:
        listener.settimeout(0.05)
        while not stop.is_set():
            try:
                accepted.append(listener.accept()[0])
            except TimeoutError:
                continue

    thread = threading.Thread(target=accept)
    thread.start()
    yield listener.getsockname()[1]
    stop.set()
    thread.join()
    for connection in [listener, *accepted]:
        connection.close()


def elapsed(function) -> float:
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        function()
    return time.monotonic() - start


def until(holds) -> None:
    """Waits for the store to answer again, and for what it answers."""
    deadline = time.monotonic() + 30
    while True:
        try:
            if holds():
                return
        except StoreUnavailable:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_restart_in_the_middle_is_survived(start, open_redis, make_manifest, make_record, same):
    server = start("--appendonly", "yes", "--appendfsync", "always")
    store = open_redis(server.url, read_budget_seconds=5.0)
    store.write_manifest(make_manifest())
    record = make_record(1)
    store.put_many("passages", {"a": record})
    for _ in range(2):
        server.kill()
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1"):
            store.get_many("passages", ["a"])
        server.start()
        assert same(store.get_many("passages", ["a"])[0], record)  # on the first call, over its dead connections
        store.put_many("passages", {"a": record})


def test_many_threads_survive_a_restart(start, open_redis, make_manifest, make_record):
    server = start("--appendonly", "yes")
    store = open_redis(server.url, read_budget_seconds=5.0)
    store.write_manifest(make_manifest())
    store.put_many("passages", {"a": make_record(1)})
    stop, others, num_reads = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            try:
                assert store.get_many("passages", ["a"])[0] is not None
                num_reads.append(1)
            except StoreUnavailable:
                time.sleep(0.01)
            except BaseException as exc:
                others.append(exc)
                return

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.kill()
    time.sleep(0.3)
    server.start()
    recovered = len(num_reads)
    deadline = time.monotonic() + 20
    while len(num_reads) < recovered + 50 and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert others == []
    assert len(num_reads) >= recovered + 50


def test_a_server_that_is_down_fails_at_once_and_then_without_asking(start, open_redis):
    server = start()
    server.kill()
    store = open_redis(server.url)
    for _ in range(5):
        assert elapsed(lambda: store.get_many("passages", ["a"])) < 10
    started, told = time.monotonic(), []
    for _ in range(200):
        with pytest.raises(StoreUnavailable) as caught:
            store.get_many("passages", ["a"])
        told.append(str(caught.value))
    quiet = [
        one for one in told if re.search("circuit breaker open: .* in a row, next try in .* Connection refused", one)
    ]
    assert len(quiet) >= len(told) - 1 - (time.monotonic() - started)  # the breaker lets one in a second try
    server.start()
    until(lambda: store.get_many("passages", ["a"]) == [None])


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster"])
def test_a_server_that_hangs_costs_the_budget_and_no_more(silent_port, open_redis, make_manifest, scheme):
    store = open_redis(f"{scheme}://127.0.0.1:{silent_port}", read_budget_seconds=0.1, write_budget_seconds=0.3)
    for _ in range(3):  # without a budget, a read of it does not end
        assert 0.09 < elapsed(lambda: store.get_many("passages", ["a"])) < 10
    assert 0.29 < elapsed(lambda: store.delete_many("passages", ["a"])) < 10
    indexed = Collection(store, make_manifest())
    assert 0.29 < elapsed(lambda: indexed.digests(["a"])) < 10  # indexing looks for what it has: a writer's budget


def test_a_server_that_stops_in_the_middle_of_an_answer(start, open_redis, make_manifest, make_record):
    server = start()
    store = open_redis(server.url, read_budget_seconds=0.5)
    store.write_manifest(make_manifest())
    store.put_many("passages", {"a": make_record(1)})
    assert store.get_many("passages", ["a"])[0] is not None
    with server.client() as client:
        client.execute_command("CLIENT PAUSE", 3000)
    assert 0.49 < elapsed(lambda: store.get_many("passages", ["a"])) < 2.5
    until(lambda: store.get_many("passages", ["a"])[0] is not None)


def test_bytes_that_come_earn_a_read_more_time(redis_server):
    link = Link(Address.parse(redis_server.url), budget_seconds=1.0, tls_ca_file=None)

    def work(num_bytes: int):
        def step(client, deadline):
            for _ in range(6):
                time.sleep(0.25)
                deadline.check()
                deadline.received(num_bytes)
            return client.ping()

        return step

    try:
        assert link.call(work(100_000_000))
        with pytest.raises(StoreUnavailable, match="no answer within 1 s"):
            link.call(work(0))
    finally:
        link.close()


def test_reads_larger_than_a_chunk_come_in_order(open_redis, redis_server, make_manifest, make_record, same):
    store = open_redis(f"{redis_server.url}?prefix=large")
    store.write_manifest(make_manifest())
    records = {f"p{i}": make_record(i, num_states=1 if i % 3 else 30_000) for i in range(90)}
    store.put_many("passages", records)
    found = store.get_many("passages", [*records, "missing"])
    assert found.pop() is None
    assert all(same(record, records[passage_id]) for passage_id, record in zip(records, found, strict=True))


def test_the_budget_covers_name_lookup_too(open_redis):
    store = open_redis("redis://name-that-does-not-exist.invalid", read_budget_seconds=0.2)
    assert elapsed(lambda: store.get_many("passages", ["a"])) < 10


def test_memory_that_is_used_up(start, open_redis, make_manifest, make_record, same):
    server = start("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    store = open_redis(server.url)
    store.write_manifest(make_manifest())
    store.put_many("passages", {"a": make_record(1)})
    records = {f"p{i}": make_record(i, num_states=4000) for i in range(100)}
    with pytest.raises(StoreFull, match="maxmemory"):
        store.put_many("passages", records)
    assert same(store.get_many("passages", ["a"])[0], make_record(1))  # the breaker stays closed: it did answer


def test_passwords(start, open_redis):
    server = start("--requirepass", "secret/:@")
    address = f"127.0.0.1:{server.port}"
    assert open_redis(f"redis://:secret%2F%3A%40@{address}").list_collections() == []
    for wrong in (f"redis://:wr0ng@{address}", f"redis://{address}"):
        with pytest.raises(StoreAccessDenied, match=address) as caught:
            open_redis(wrong).list_collections()
        assert "wr0ng" not in str(caught.value)


def test_a_certificate_of_someone_else_is_not_trusted(redis_tls_server, pem, open_redis, make_record):
    trusted = open_redis(redis_tls_server.url, tls_ca_file=pem[0])
    assert trusted.get_many("passages", ["a"]) == [None]
    with pytest.raises(StoreUnavailable, match="certificate"):
        open_redis(redis_tls_server.url).get_many("passages", ["a"])
    plain = redis_tls_server.url.replace("rediss", "redis")
    with pytest.raises(StoreUnavailable):
        open_redis(plain).get_many("passages", ["a"])


def test_passages_expire_and_collections_do_not(redis_server, open_redis, make_manifest, make_record):
    store = open_redis(f"{redis_server.url}?prefix=expiring", ttl_seconds=1)
    store.write_manifest(make_manifest())
    store.put_many("passages", {"a": make_record(1)})
    assert store.get_many("passages", ["a"])[0] is not None
    with redis_server.client() as client:
        assert 0 < client.pttl("expiring:p:passages:a") <= 1000
        client.pexpire("expiring:p:passages:a", 1)
        time.sleep(0.05)
    assert store.get_many("passages", ["a"]) == [None]
    assert store.stats("passages").num_passages == 0
    assert store.list_collections() == ["passages"]


def test_a_key_of_another_kind_is_that_passages_damage(redis_server, open_redis, make_manifest, make_record, same):
    store = open_redis(f"{redis_server.url}?prefix=foreign")
    store.write_manifest(make_manifest())
    store.put_many("passages", {"a": make_record(1)})
    with redis_server.client() as client:
        client.rpush("foreign:p:passages:b", "x")
        client.set("foreign:p:passages:c", b"")
        client.set("foreign:p:passages:d", make_record(4).pack("d")[:-3] + b"abc")
    found = store.get_many("passages", list("abcd"))
    assert same(found[0], make_record(1))
    assert all(isinstance(entry, Damaged) for entry in found[1:])
    assert store.headers_many("passages", list("abc"))[1:] == [None, None]


def test_a_manifest_someone_wrote_over_is_not_believed(redis_server, open_redis, make_manifest):
    store = open_redis(f"{redis_server.url}?prefix=overwritten")
    store.write_manifest(make_manifest())
    with redis_server.client() as client:
        client.hset("overwritten:manifests", "passages", make_manifest().to_json().replace(b"test/", b"evil/"))
    with pytest.raises(StoreDamaged, match=r"collection 'passages' cannot be read: .*checksum"):
        store.read_manifest("passages")


def test_the_breaker_lets_one_try_at_a_time():
    link = Link(Address.parse("redis://localhost:1"), budget_seconds=1.0, tls_ca_file=None)

    def fail(client, deadline):
        raise StoreUnavailable("down")

    def count(client, deadline):
        with pytest.raises(StoreUnavailable, match="circuit breaker open"):  # next to the one that tries
            link.call(fail)
        return 1

    for _ in range(5):
        with pytest.raises(StoreUnavailable, match="down"):
            link.call(fail)
    with pytest.raises(StoreUnavailable, match=r"5 failures in a row.*down"):
        link.call(count)
    time.sleep(1.01)
    assert link.call(count) == 1  # this one may try
    for _ in range(4):
        with pytest.raises(StoreUnavailable, match="down"):
            link.call(fail)
    assert link.call(lambda client, deadline: 2) == 2
    link.close()


def test_addresses():
    address = Address.parse("rediss+cluster://user:p%40ss@one:7000,[::1],three?prefix=p1")
    assert address.hosts == (("one", 7000), ("::1", 6379), ("three", 6379))
    assert (address.username, address.password, address.prefix) == ("user", "p@ss", "p1")
    assert address.is_tls
    assert address.is_cluster
    assert Address.parse("redis://h/3").database == 3
    assert "p@ss" not in repr(address) + str(address)


@pytest.mark.parametrize(
    "url",
    [
        "redis:", "redis://", "redis://h:0", "redis://h:99999", "redis://h:port", "redis://a,b", "redis+sentinel://h",
        "redis://h/x", "redis+cluster://h/1", "redis://h?db=1", "redis://h?prefix=a:b", "redis://:secret@h:x",
        "", "memory", "http://h", "faiss:", "/some/path",
    ],
)  # fmt: skip
def test_wrong_urls_are_refused_and_keep_the_password(url):
    with pytest.raises(StoreUrlError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


PASSWORDS = [
    "p@ss", "p/ss", "a/b@c", "x?y", "x#y", "a:b", "a%40b", "p\u00e4 ss", "p?y@z", "1/2@z", "12/3?4@5", "a,b", "[x]",
    "a]b@[c", "\udcff", "p\nq", "%zz", "https://x@y", "a&b=c", "0", "\u202e",
]  # fmt: skip
FORMS = [
    "redis://:{}@host:6379/0", "rediss://user:{}@host/3?prefix=abc", "redis+cluster://u:{}@a:1,[::1]:2,c", "redis://{}@host",
    "redis://host/0?password={}", "redis://host?x={}&prefix=p", "redis://host#{}", "reds://u:{}@host", "u:{}@host:6379",
    "redis:/:{}@host", "redis//:{}@h", "redis://:{}@", "redis://user:123/{}@host", "redis://u:{}@h:port", "redis://u:{}@h/x",
    "redis://u:{}@h1,h2", "redis://u:{}@h?prefix=a:b", "redis+sentinel://u:{}@h",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("password", PASSWORDS)
def test_no_part_of_a_password_is_shown(form, password):
    url = form.format(f"s3cr{password}3t0")
    shown = [public_url(url), public_url(url, "***")]
    try:
        store = open_store(url)
        shown += [repr(store), repr(vars(store)), repr(store._address)]
        store.close()
    except StoreUrlError as exc:
        shown.append(str(exc))
    shown.append(repr(DecoderConfig.of_one("m", store=url)))
    for text in shown:
        assert "s3cr" not in text
        assert "3t0" not in text


@pytest.mark.parametrize(
    ("url", "shown", "with_mask"),
    [
        ("redis://u:p@h:1/2?prefix=x", "redis://h:1/2?prefix=x", "redis://***@h:1/2?prefix=x"),
        ("redis://:a/b@host:6379/0", "redis://host:6379/0", "redis://***@host:6379/0"),
        ("redis+cluster://u:p@@a:1,[::1]:2,c", "redis+cluster://a:1,[::1]:2,c", "redis+cluster://***@a:1,[::1]:2,c"),
        ("redis://h", "redis://h", "redis://h"),
        ("faiss:./a@b", "faiss:./a@b", "faiss:./a@b"),
        ("memory:", "memory:", "memory:"),
        ("/some/path", "/some/path", "/some/path"),
    ],
)
def test_what_is_harmless_is_shown(url, shown, with_mask):
    assert public_url(url) == shown
    assert public_url(url, "***") == with_mask


def test_options_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(StoreUrlError, match="ttl_seconds: 5"):
        open_store(f"faiss:{tmp_path}", ttl_seconds=5)
