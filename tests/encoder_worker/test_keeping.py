"""Laws of what a worker keeps of texts that it encoded on demand: never waits, never over its budget, never another's.

Real stores, whose files are measured; `tests/decoder_server/test_write_through.py` has servers in front.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cache.collection import Collection
from cache.open import open_store
from cache.states import text_digest
from cache.store import Store
from encoder_worker.config import EncoderConfig
from encoder_worker.keeping import GROUP_PASSAGES, MAX_QUEUED_PASSAGES, OVERHEAD_BYTES
from preread.v1 import encoder_pb2, encoder_pb2_grpc
from tests.redis_fixture import RedisServer

Serve = Callable[..., Any]
WORDS = ("passage", "states", "kept", "where", "another", "server", "finds", "them", "by", "digest", "of", "text")


def id_of(text: str) -> str:
    return text_digest(text).hex()


def texts(start: int, num: int, prefix: str = "") -> list[str]:
    """Distinct texts of some 30 words, so all of about one size."""
    return [
        f"{prefix}{i} " + " ".join(WORDS[(i + k) % len(WORDS)] for k in range(30)) for i in range(start, start + num)
    ]


def counted(to: Any, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(generate_latest(to.server.metrics.registry).decode())
    samples = [sample for family in families for sample in family.samples if sample.name == f"preread_encoder_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def settled(to: Any, num: float) -> None:
    """Returns when so many passages were kept or dropped since the start."""
    await to.until(
        lambda: counted(to, "kept_passages_total") + counted(to, "not_kept_passages_total") >= num  # of all reasons
    )


async def keep(to: Any, some: Sequence[str], caller: str = "", collection: str = "kept") -> None:
    """Encodes texts that are to be kept, and waits until they are written or dropped."""
    before = counted(to, "kept_passages_total") + counted(to, "not_kept_passages_total")
    await to.encode(some, keep_in=collection, caller=caller)
    await settled(to, before + len(some))


def stored(store: Store, collection: str = "kept") -> set[str]:
    ids, found = b"", set[str]()
    while True:
        page, ids = store.list_ids(collection, 1000, ids)
        found |= set(page)
        if not ids:
            return found


def assert_clean(store: Store, collection: str = "kept") -> None:
    """As `preread verify` looks at it."""
    assert [damage for *_, damage in Collection.open(store, collection).verify() if damage] == []
    assert store.audit(collection).problems == ()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are written sooner than a server would."""
    monkeypatch.setattr("encoder_worker.keeping.GROUP_SECONDS", 0.05)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture
def redis_store(redis_server: RedisServer) -> Iterator[Store]:
    with redis_server.client() as client:
        client.flushall()
    with closing(open_store(redis_server.url, read_budget_seconds=5.0)) as store:
        yield store


async def test_a_text_is_kept_under_its_digest_and_without_itself(worker: Serve, store: Store) -> None:
    async with worker() as to:
        await keep(to, texts(0, 3))
        assert stored(store) == {id_of(text) for text in texts(0, 3)}
        collection = Collection.open(store, "kept")
        assert collection.get_texts([id_of(text) for text in texts(0, 3)]) == [None] * 3
        assert not collection.manifest.stores_text
        assert counted(to, "kept_passages_total") == 3
        assert counted(to, "kept_bytes", collection="kept") > 3 * OVERHEAD_BYTES
    assert_clean(store)


async def test_texts_are_kept_only_when_told(worker: Serve, store: Store) -> None:
    async with worker(keeps_texts=True) as to:
        await keep(to, texts(0, 3))
    async with worker() as to:  # the collection may hold texts; this worker is not told to
        await keep(to, texts(3, 1))
    kept = Collection.open(store, "kept").get_texts([id_of(text) for text in texts(0, 4)])
    assert kept == [*texts(0, 3), None]


async def test_nothing_is_kept_unless_asked_for(worker: Serve, store: Store) -> None:
    async with worker() as to:
        await to.encode(texts(0, 3))
        await asyncio.sleep(1.5)
    assert store.list_collections() == []


async def test_a_group_is_written_when_it_has_so_many(
    worker: Serve, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder_worker.keeping.GROUP_SECONDS", 30.0)
    async with worker() as to:
        await to.encode([f"{i}" for i in range(GROUP_PASSAGES - 1)], keep_in="kept")
        await asyncio.sleep(0.5)
        assert counted(to, "kept_passages_total") == 0
        await to.encode(["the last"], keep_in="kept")
        await settled(to, GROUP_PASSAGES)
    assert len(stored(store)) == GROUP_PASSAGES


async def test_what_is_queued_is_written_at_a_stop(worker: Serve, store: Store) -> None:
    async with worker() as to:
        await to.encode(texts(0, 5), keep_in="kept")
    assert len(stored(store)) == 5


async def test_a_full_queue_drops_and_counts_and_no_caller_waits(worker: Serve, store: Store) -> None:
    entered, go_on = threading.Event(), threading.Event()
    put_many = store.put_many

    def held_up(*args: Any) -> None:
        entered.set()
        assert go_on.wait(60)
        put_many(*args)

    async with worker(max_texts=5000) as to:
        store.put_many = held_up  # type: ignore[method-assign]  # a disk that hangs
        await to.encode(["the first"], keep_in="kept")
        await to.until(entered.is_set)
        short = [f"{i}" for i in range(MAX_QUEUED_PASSAGES + 200)]
        answer = await to.encode(short, keep_in="kept")  # answers while the write hangs
        assert all(one.states for one in answer.passages)
        assert counted(to, "not_kept_passages_total", reason="queue") == 200
        go_on.set()
        await settled(to, 1 + len(short))
    assert len(stored(store)) == 1 + MAX_QUEUED_PASSAGES
    assert_clean(store)


@pytest.mark.parametrize("kind", ["lease", "store"])
async def test_a_busy_writer_means_drop_and_never_wait(worker: Serve, store: Store, tmp_path: Path, kind: str) -> None:
    async with worker() as to:
        await keep(to, texts(0, 1))
        other = open_store(f"faiss:{tmp_path / 'store'}")  # as another process
        with closing(other), other.lease("kept") if kind == "lease" else other._catalogue.lock.held():
            start = time.monotonic()
            await keep(to, texts(1, 4))
            assert time.monotonic() - start < 5  # the store's lock is otherwise waited for 30 seconds
            assert counted(to, "not_kept_passages_total", reason="busy") == 4
        await keep(to, texts(5, 2))
        assert stored(store) == {id_of(text) for text in (*texts(0, 1), *texts(5, 2))}


async def test_a_lease_on_redis_means_drop_too(tiny_checkpoint: Path, redis_store: Store) -> None:
    from worker_fixture import serve

    async with serve(tiny_checkpoint, redis_store) as to:
        await keep(to, texts(0, 1))
        with redis_store.lease("kept"):
            await keep(to, texts(1, 4))
        assert counted(to, "not_kept_passages_total", reason="busy") == 4
        await keep(to, texts(5, 1))
    assert len(stored(redis_store)) == 2
    assert_clean(redis_store)


def size_on_disk(path: Path) -> int:
    """Bytes of states, and of the catalogue's pages without its log."""
    total = 0
    for file in [*(path / "segments").glob("*"), path / "catalogue.sqlite"]:
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # a compaction removed it
            continue
    return total


async def test_the_disk_stays_within_the_budget_and_what_is_asked_for_stays(
    worker: Serve, store: Store, tmp_path: Path
) -> None:
    budget, hot = 1_000_000, texts(100_000, 5)
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.002):
            largest = max(largest, size_on_disk(tmp_path / "store"))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        async with worker(max_kept_bytes=budget) as to:
            await keep(to, hot)
            for start in range(0, 3000, 100):
                await keep(to, texts(start, 100))
                touched = encoder_pb2.Touched(passage_ids=[id_of(text) for text in hot])
                await to.stub.Touch(encoder_pb2.TouchRequest(collection="kept", touched=[touched]))
            evicted = counted(to, "evicted_passages_total")
            held = counted(to, "kept_bytes")
    finally:
        done.set()
        watching.join()
    left = stored(store)
    assert {id_of(text) for text in hot} <= left
    assert {id_of(text) for text in texts(2950, 50)} <= left  # the latest
    assert not {id_of(text) for text in texts(0, 1000)} & left
    assert evicted == 3005 - len(left)
    assert largest <= budget, f"{largest:,} bytes"
    assert budget * 0.3 < held <= budget / 2  # the other half is for the copy that a compaction makes
    assert_clean(store)


async def test_the_budget_holds_on_redis_and_over_a_restart(
    tiny_checkpoint: Path, redis_store: Store, redis_server: RedisServer
) -> None:
    from worker_fixture import serve

    budget = 400_000
    for run in range(3):
        async with serve(tiny_checkpoint, redis_store, max_kept_bytes=budget) as to:
            for start in range(0, 300, 100):
                await keep(to, texts(start + 1000 * run, 100))
            assert counted(to, "kept_bytes") <= budget
            with redis_server.client() as client:
                taken = sum(client.memory_usage(key) for key in client.scan_iter("preread:[pt]:kept:*"))
            assert 0.5 * budget < taken <= budget
    assert {id_of(text) for text in texts(2200, 100)} <= stored(redis_store)
    assert len(stored(redis_store)) < 300
    assert_clean(redis_store)


async def test_workers_of_one_redis_keep_one_budget(tiny_checkpoint: Path, redis_store: Store) -> None:
    from worker_fixture import serve

    budget = 400_000
    async with (
        serve(tiny_checkpoint, redis_store, max_kept_bytes=budget) as one,
        serve(tiny_checkpoint, redis_store, max_kept_bytes=budget) as two,
    ):
        for start in range(0, 1500, 100):
            await keep(one, texts(start, 50))
            await keep(two, texts(start + 50, 50))
            taken = redis_store.stats("kept").size_bytes + OVERHEAD_BYTES * len(stored(redis_store))
            assert taken <= budget
    assert len(stored(redis_store)) > 100
    assert_clean(redis_store)


async def test_what_is_asked_for_after_a_restart_stays(worker: Serve, store: Store) -> None:
    some = texts(0, 100)
    hot = [id_of(text) for text in some[::5]]
    async with worker(max_kept_bytes=800_000) as to:
        await keep(to, some[:50])
        await keep(to, some[50:])
    async with worker(max_kept_bytes=800_000) as to:
        touched = encoder_pb2.Touched(passage_ids=hot)
        await to.stub.Touch(encoder_pb2.TouchRequest(collection="kept", touched=[touched]))  # before it keeps any
        for start in range(1000, 1100, 20):
            await keep(to, texts(start, 20))
            if counted(to, "evicted_passages_total"):
                break
        assert counted(to, "evicted_passages_total") > 10
    assert set(hot) <= stored(store)


async def test_one_caller_cannot_evict_anothers(worker: Serve, store: Store) -> None:
    async with worker(max_kept_bytes=1_000_000, max_kept_share=0.5) as to:
        hot = texts(0, 60, "theirs ")
        await keep(to, hot, caller="quiet")
        for start in range(0, 2000, 100):
            await keep(to, texts(start, 100), caller="flood")
        usage = to.server.engine.keeper._opened["kept"][0].usage
        flood = usage.bytes_of("flood")
        assert {id_of(text) for text in hot} <= stored(store)  # never asked for again
        assert 0.4 * 250_000 < flood <= 250_000  # half of what a faiss: store holds within the budget
        # Without a share it would have: the same flood without a name.
        for start in range(5000, 7000, 100):
            await keep(to, texts(start, 100))
        assert not {id_of(text) for text in hot} & stored(store)
    assert_clean(store)


async def test_more_at_a_time_than_a_share_is_dropped_and_counted(worker: Serve, store: Store) -> None:
    async with worker(max_kept_bytes=200_000, max_kept_share=0.1) as to:
        await keep(to, texts(0, 100), caller="one")
        assert counted(to, "not_kept_passages_total", reason="share") == 100 - len(stored(store)) > 0


async def test_a_collection_of_another_writer_is_refused(worker: Serve, store: Store) -> None:
    async with worker() as to:
        await to.upsert(to.message("docs", p1="indexed", p2="by somebody"))
        before = await to.encode(["a text"])
        answer = await to.encode(["a text"], keep_in="docs")
        assert answer.passages[0].states == before.passages[0].states
        assert counted(to, "not_kept_passages_total", reason="foreign") == 1
        # One that an upload comes into later is left alone from then on.
        await keep(to, texts(0, 1))
        await to.upsert(to.message("kept", p1="indexed"))
        await keep(to, texts(1, 1))
        await asyncio.sleep(0)
    assert stored(store, "docs") == {"p1", "p2"}
    assert "p1" in stored(store)


async def test_only_states_at_the_collections_ratio_are_kept(worker: Serve, store: Store) -> None:
    async with worker() as to:
        await keep(to, texts(0, 2))
        await to.encode(texts(2, 3), keep_in="kept", compression_ratio=2)
        assert counted(to, "not_kept_passages_total", reason="ratio") == 3
    assert len(stored(store)) == 2


async def test_a_text_that_cannot_be_encoded_is_not_kept(worker: Serve, store: Store) -> None:
    async with worker() as to:
        answer = await to.encode(["good", " ", "good"], keep_in="kept")
        assert [bool(one.states) for one in answer.passages] == [True, False, True]
        await to.until(lambda: counted(to, "kept_passages_total") == 1)
    assert stored(store) == {id_of("good")}


async def test_a_dropped_collection_is_made_again(worker: Serve, store: Store) -> None:
    async with worker() as to:
        await keep(to, texts(0, 2))
        store.drop_collection("kept")
        await keep(to, texts(2, 2))
        assert counted(to, "not_kept_passages_total", reason="failed") == 2
        to.server.engine.keeper._opened.clear()  # as after a few seconds
        await keep(to, texts(4, 2))
    assert stored(store) == {id_of(text) for text in texts(4, 2)}


async def test_what_cannot_be_is_refused(worker: Serve) -> None:
    async with worker() as to:
        for fields, field in (
            ({"keep_in": "a b"}, "keep_in"),
            ({"keep_in": "kept", "split": True}, "split"),
            ({"keep_in": "kept", "caller": "x" * 33}, "caller"),
        ):
            code, _, details = await to.failure(to.encode(["x"], **fields))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details[0].field_violations[0].field == field


async def test_passages_expire_on_redis_and_the_rest_is_clean(
    tiny_checkpoint: Path, redis_store: Store, redis_server: RedisServer
) -> None:
    from worker_fixture import serve

    settings = {"store": redis_server.url, "max_kept_seconds": 2}
    async with serve(tiny_checkpoint, redis_store, **settings) as to:
        await keep(to, texts(0, 5))
        assert len(stored(redis_store)) == 5
        deadline = time.monotonic() + 20
        while stored(redis_store):
            assert_clean(redis_store)
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert Collection.open(redis_store, "kept").find_texts([text_digest(texts(0, 1)[0])]) == [None]
        assert redis_store.stats("kept").num_passages == 0
        await keep(to, texts(0, 2))  # again
        assert len(stored(redis_store)) == 2
        assert_clean(redis_store)


def test_only_redis_forgets() -> None:
    for store in ("faiss:somewhere", "memory:"):
        with pytest.raises(ValueError, match="max_kept_seconds is 60; expected 0 where the store is not Redis"):
            EncoderConfig("model", store=store, max_kept_seconds=60)
    assert EncoderConfig("model", store="redis://somewhere", max_kept_seconds=60).max_kept_seconds == 60


async def test_a_killed_worker_loses_what_was_queued_and_no_more(
    preread: Callable[..., Any], store: Store, tmp_path: Path
) -> None:
    for run in range(3):
        process = preread("encode-worker", "--port", "0")
        said = ""
        while "\nready" not in said:
            said += process.stdout.readline().decode()
            assert process.poll() is None, said
        address = re.search(r"^listening\s+(\S+)", said, re.MULTILINE)[1]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = encoder_pb2_grpc.EncoderServiceStub(channel)
            for start in range(0, 400, 20):
                some = texts(1000 * run + start, 20)
                await stub.Encode(encoder_pb2.EncodeRequest(texts=some, keep_in="kept"), timeout=60)
            await asyncio.sleep(0.3 * run)  # in the middle of a write, or before, or after
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    with closing(open_store(f"faiss:{tmp_path / 'store'}")) as found:
        asked_for = {id_of(text) for run in range(3) for text in texts(1000 * run, 400)}
        assert 0 < len(stored(found)) <= len(asked_for)
        assert stored(found) <= asked_for
        assert_clean(found)
