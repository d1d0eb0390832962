"""The read cache: bounded by bytes, never stale, and really a cache."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cache.errors import StoreUnavailable
from cache.memory import MemoryStore
from cache.read_cache import CachedStore


class Counting(MemoryStore):
    """A memory store that counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.num_generation_reads = 0
        self.is_down = False

    def get_many(self, collection, passage_ids):
        self.read.extend(passage_ids)
        return super().get_many(collection, passage_ids)

    def generation(self, collection):
        if self.is_down:
            raise StoreUnavailable("down")
        self.num_generation_reads += 1
        return super().generation(collection)


@pytest.fixture
def behind(make_manifest, make_record):
    behind = Counting()
    behind.write_manifest(make_manifest())
    behind.put_many("passages", {f"p{i}": make_record(i) for i in range(100)})
    return behind


def test_a_hit_does_not_reach_the_store(behind, make_record, same):
    cached = CachedStore(behind, max_bytes=1 << 20)
    for _ in range(3):
        found = cached.get_many("passages", ["p1", "absent", "p2", "p1"])
        assert same(found[0], make_record(1))
        assert same(found[3], make_record(1))
        assert same(found[2], make_record(2))
        assert found[1] is None
    assert behind.read == ["p1", "absent", "p2", "absent", "absent"]
    assert (cached.num_hits, cached.num_misses) == (4, 5)


def test_a_change_behind_its_back_costs_only_what_changed(behind, make_record, same):
    cached = CachedStore(behind, max_bytes=1 << 20)
    cached.get_many("passages", ["p1", "p2", "p3"])
    behind.read.clear()
    behind.put_many("passages", {"p1": make_record(77)})
    behind.delete_many("passages", ["p3"])
    found = cached.get_many("passages", ["p1", "p2", "p3"])
    assert same(found[0], make_record(77))
    assert same(found[1], make_record(2))
    assert found[2] is None
    assert behind.read == ["p1", "p3"]  # p2 was settled by its checksum


def test_it_never_holds_more_than_its_bytes(behind):
    cached = CachedStore(behind, max_bytes=10_000)
    for i in range(100):
        cached.get_many("passages", [f"p{i}"])
        assert cached.num_bytes <= 10_000
    assert cached.num_bytes > 8_000


def test_what_is_asked_for_often_survives_a_scan_of_what_is_not(behind):
    cached = CachedStore(behind, max_bytes=40_000)
    for i in range(2, 20):  # frequencies are counted from a cache half full on
        cached.get_many("passages", [f"p{i}"])
    assert cached.num_bytes > 20_000
    for _ in range(8):
        cached.get_many("passages", ["p0", "p1"])
    for i in range(20, 100):
        cached.get_many("passages", [f"p{i}"])
    assert 30_000 < cached.num_bytes <= 40_000
    behind.read.clear()
    cached.get_many("passages", ["p0", "p1"])
    assert behind.read == []


def test_what_several_threads_miss_is_read_once(behind, make_record, same):
    """The first reader is held inside the store until the others have asked, too."""
    cached = CachedStore(behind, max_bytes=1 << 20)
    inside, go_on = threading.Event(), threading.Event()
    read = behind.get_many

    def held(collection, passage_ids):
        inside.set()
        assert go_on.wait(30)
        return read(collection, passage_ids)

    behind.get_many = held
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(cached.get_many, "passages", ["p1", "p2"])
        assert inside.wait(30)
        others = [threads.submit(cached.get_many, "passages", ["p2", "p1"]) for _ in range(7)]
        while cached.num_misses < 16:  # all of them found nothing in memory
            time.sleep(0.001)
        go_on.set()
        assert all(same(found, make_record(1)) for found in [first.result()[0], *(o.result()[1] for o in others)])
    assert sorted(behind.read) == ["p1", "p2"]


def test_a_read_that_fails_fails_for_everyone_who_waited_and_is_tried_again_by_the_next(behind, make_record, same):
    cached = CachedStore(behind, max_bytes=1 << 20)
    read = behind.get_many

    def broken(collection, passage_ids):
        raise StoreUnavailable("down")

    behind.get_many = broken
    with pytest.raises(StoreUnavailable):
        cached.get_many("passages", ["p1"])
    behind.get_many = read
    assert same(cached.get_many("passages", ["p1"])[0], make_record(1))


def test_what_does_not_fit_is_served_and_not_kept(behind, make_record, same):
    behind.put_many("passages", {"huge": make_record(5, num_states=2000)})
    cached = CachedStore(behind, max_bytes=10_000)
    cached.get_many("passages", ["p1"])
    assert same(cached.get_many("passages", ["huge"])[0], make_record(5, num_states=2000))
    behind.read.clear()
    cached.get_many("passages", ["p1"])
    assert behind.read == []


def test_staleness_saves_questions_and_own_writes_end_it(behind, make_record, same):
    cached = CachedStore(behind, max_bytes=1 << 20, staleness_seconds=60)
    for _ in range(5):
        cached.get_many("passages", ["p1"])
    assert behind.num_generation_reads == 1
    cached.put_many("passages", {"p1": make_record(77)})
    assert same(cached.get_many("passages", ["p1"])[0], make_record(77))


def test_a_store_that_is_down_is_said_to_be_down(behind):
    cached = CachedStore(behind, max_bytes=1 << 20)
    cached.get_many("passages", ["p1"])
    behind.is_down = True
    with pytest.raises(StoreUnavailable):
        cached.get_many("passages", ["p1"])


def test_readers_racing_a_writer_never_go_back(behind, make_record):
    cached = CachedStore(behind, max_bytes=1 << 20)
    versions = {make_record(seed, num_states=seed + 1).header.checksum: seed for seed in range(100)}
    behind.put_many("passages", {"p": make_record(0, num_states=1)})
    failures, stop = [], threading.Event()

    def read() -> None:
        newest = 0
        while not stop.is_set():
            version = versions[cached.get_many("passages", ["p"])[0].header.checksum]
            if version < newest:
                failures.append((version, newest))
            newest = version

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for seed in range(100):
        behind.put_many("passages", {"p": make_record(seed, num_states=seed + 1)})
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert versions[cached.get_many("passages", ["p"])[0].header.checksum] == 99


def test_a_size_of_nothing_is_refused(behind):
    with pytest.raises(ValueError, match="max_bytes: 0"):
        CachedStore(behind, max_bytes=0)
