"""The contract of every store, run against each kind of them, and against the read cache in front."""

import threading

import pytest

from cache.collection import Collection
from cache.errors import CollectionExists, CollectionInUse, CollectionNotFound, InvalidName, InvalidPageToken
from cache.record import Damaged
from cache.store import StoreStats


def test_what_was_put_is_read_back_in_order(store, make_record, same):
    records = {f"p{i}": make_record(i, num_states=1 + i % 5, text=f"text {i}") for i in range(300)}
    store.put_many("passages", records)
    wanted = ["p7", "absent", "p299", "p7", "p0"]
    found = store.get_many("passages", wanted)
    assert found[1] is None
    assert all(same(found[i], records[wanted[i]]) for i in (0, 2, 3, 4))


def test_a_second_read_finds_the_same(store, make_record, same):
    record = make_record(1)
    store.put_many("passages", {"a": record})
    assert all(same(store.get_many("passages", ["a"])[0], record) for _ in range(3))


def test_another_handle_sees_what_was_put_at_once(backend, store, make_record, same):
    other = backend.open()
    assert other.get_many("passages", ["a"]) == [None]
    for seed in range(3):
        record = make_record(seed, num_states=seed + 1)
        store.put_many("passages", {"a": record})
        assert same(other.get_many("passages", ["a"])[0], record)
    store.delete_many("passages", ["a"])
    assert other.get_many("passages", ["a"]) == [None]


def test_replacing_keeps_one(store, make_record, same):
    store.put_many("passages", {"a": make_record(1, num_states=5), "b": make_record(2)})
    newer = make_record(3, num_states=2, truncated=True)
    store.put_many("passages", {"a": newer})
    assert same(store.get_many("passages", ["a"])[0], newer)
    assert store.stats("passages").num_passages == 2


def test_deleting_counts_what_was_there(store, make_record):
    store.put_many("passages", {"a": make_record(1), "b": make_record(2)})
    assert store.delete_many("passages", ["a", "a", "absent"]) == 1
    assert store.get_many("passages", ["a"]) == [None]
    assert store.delete_many("passages", ["a"]) == 0
    assert store.delete_many("elsewhere", ["a"]) == 0


def test_bytes_of_deleted_passages_are_told_and_freed(store, make_record):
    store.put_many("passages", {f"p{i}": make_record(i) for i in range(10)})
    assert store.dead_bytes("passages") == store.dead_bytes("elsewhere") == 0
    store.delete_many("passages", [f"p{i}" for i in range(4)])
    store.put_many("passages", {"p9": make_record(99)})
    # Five passages of 3 states of 16 bytes, where a store holds them until it is compact.
    assert store.dead_bytes("passages") == (5 * 3 * 16 if store.max_copy_bytes else 0)
    store.compact("passages")
    assert store.dead_bytes("passages") == 0
    assert store.stats("passages").num_passages == 6


def test_a_write_without_waiting_is_a_write(store, make_record):
    with store.without_waiting():
        store.put_many("passages", {"a": make_record(1)})
        assert store.delete_many("passages", ["a"]) == 1


def test_headers_are_those_that_were_written(store, make_record):
    records = {"a": make_record(1, text="one"), "b": make_record(2, text="two")}
    store.put_many("passages", records)
    headers = store.headers_many("passages", ["b", "x", "a"])
    assert headers == [records["b"].header, None, records["a"].header]


def test_stats_follow_puts_replacements_and_deletes(store, make_record):
    assert store.stats("passages") == StoreStats()
    records = {f"p{i}": make_record(i, num_states=1 + i % 7, truncated=i % 3 == 0) for i in range(50)}
    store.put_many("passages", records)
    records["p3"] = make_record(99, num_states=40)
    store.put_many("passages", {"p3": records["p3"]})
    store.delete_many("passages", ["p0", "p1"])
    del records["p0"], records["p1"]
    assert store.stats("passages") == StoreStats(
        num_passages=48,
        num_states=sum(record.header.num_states for record in records.values()),
        num_tokens=sum(record.header.num_tokens for record in records.values()),
        num_truncated=sum(record.header.truncated for record in records.values()),
        size_bytes=sum(record.header.total_bytes for record in records.values()),
    )


def test_scan_gives_every_passage_once(store, make_record, same):
    records = {f"p{i}": make_record(i) for i in range(700)}
    store.put_many("passages", records)
    found = list(store.scan("passages"))
    assert sorted(passage_id for passage_id, _ in found) == sorted(records)
    assert all(same(record, records[passage_id]) for passage_id, record in found)
    assert list(store.scan("elsewhere")) == []


@pytest.mark.parametrize(
    "passage_id", ["a", "a b", "ä/日本", "x" * 512, "*", "a:b", "nul\0", "'; --", "\n", "[a-z]?", "%s"]
)
def test_any_id_is_its_own(store, make_record, same, passage_id):
    record = make_record(5)
    store.put_many("passages", {passage_id: record, "other": make_record(6)})
    assert same(store.get_many("passages", [passage_id])[0], record)
    assert passage_id in dict(store.scan("passages"))
    assert store.delete_many("passages", [passage_id]) == 1
    assert [passage_id for passage_id, _ in store.scan("passages")] == ["other"]


@pytest.mark.parametrize("passage_id", ["", "x" * 513, "é" * 257, "\ud800"])
def test_an_impossible_id_is_refused_and_nothing_written(store, make_record, passage_id):
    with pytest.raises(InvalidName, match="passage_id"):
        store.put_many("passages", {"good": make_record(1), passage_id: make_record(2)})
    assert store.get_many("passages", ["good"]) == [None]


def test_nothing_of_nothing(store):
    store.put_many("passages", {})
    assert store.get_many("passages", []) == []
    assert store.headers_many("passages", []) == []
    assert store.delete_many("passages", []) == 0


def test_an_unknown_collection_reads_empty_and_refuses_writes(store, make_record):
    assert store.get_many("elsewhere", ["a"]) == [None]
    assert store.headers_many("elsewhere", ["a"]) == [None]
    assert store.stats("elsewhere") == StoreStats()
    assert store.read_manifest("elsewhere") is None
    with pytest.raises(CollectionNotFound, match="'elsewhere'"):
        store.put_many("elsewhere", {"a": make_record()})
    with pytest.raises(CollectionNotFound, match="'elsewhere'"):
        store.drop_collection("elsewhere")
    with pytest.raises(CollectionNotFound, match="'elsewhere'"):
        store.set_alias("live", "elsewhere")


def test_collections_do_not_mix(store, make_manifest, make_record, same):
    store.write_manifest(make_manifest("passages-2"))
    left, right = make_record(1), make_record(2)
    store.put_many("passages", {"a": left})
    store.put_many("passages-2", {"a": right, "b": right})
    assert same(store.get_many("passages", ["a"])[0], left)
    assert [passage_id for passage_id, _ in store.scan("passages")] == ["a"]
    store.drop_collection("passages-2")
    assert store.list_collections() == ["passages"]
    assert store.get_many("passages-2", ["a"]) == [None]
    assert same(store.get_many("passages", ["a"])[0], left)


def test_a_dropped_name_starts_empty_and_with_another_generation(store, make_manifest, make_record):
    store.put_many("passages", {"a": make_record(1)})
    seen = store.generation("passages")
    store.drop_collection("passages")
    assert store.read_manifest("passages") is None
    store.write_manifest(make_manifest())
    assert store.get_many("passages", ["a"]) == [None]
    assert store.stats("passages") == StoreStats()
    assert store.generation("passages") != seen


def test_manifests_are_kept_whole_and_written_once(backend, store, make_manifest):
    manifest = make_manifest("trained", codec="SQ8", codec_table=bytes(4 * 2 * 8), passage_template="<{text}> ä")
    store.write_manifest(manifest)
    assert backend.open().read_manifest("trained") == manifest
    for again in (manifest, make_manifest("trained", fingerprint="b")):
        with pytest.raises(CollectionExists, match="'trained'"):
            store.write_manifest(again)
    assert store.read_manifest("trained") == manifest
    assert store.list_collections() == ["passages", "trained"]


def test_an_alias_moves_in_one_step(backend, store, make_manifest):
    store.write_manifest(make_manifest("next"))
    store.set_alias("live", "passages")
    store.set_alias("live", "next")
    assert backend.open().aliases() == {"live": "next"}
    with pytest.raises(CollectionInUse, match="live"):
        store.drop_collection("next")
    assert store.remove_alias("live")
    assert not store.remove_alias("live")
    store.drop_collection("next")


def test_an_alias_may_take_the_place_of_a_collection_when_told(backend, store, make_manifest):
    """Readers of the name see the other collection in one step, and the first one again when the alias is gone."""
    store.write_manifest(make_manifest("next"))
    store.set_alias("passages", "next", shadowing=True)
    assert Collection.open(backend.open(), "passages").name == "next"
    assert store.list_collections() == ["next", "passages"]
    with pytest.raises(CollectionInUse):
        store.drop_collection("next")
    assert store.remove_alias("passages")
    assert Collection.open(backend.open(), "passages").name == "passages"
    store.set_alias("passages", "next", shadowing=True)
    store.drop_collection("passages")
    assert Collection.open(backend.open(), "passages").name == "next"


def test_aliases_and_collections_share_one_namespace(store, make_manifest):
    store.set_alias("live", "passages")
    with pytest.raises(CollectionExists, match="'live'"):
        store.write_manifest(make_manifest("live"))
    with pytest.raises(CollectionExists, match="'passages'"):
        store.set_alias("passages", "passages")
    with pytest.raises(InvalidName, match="alias"):
        store.set_alias("not a name", "passages")


def test_the_generation_changes_with_every_write(store, make_record):
    seen = [store.generation("passages")]
    store.put_many("passages", {"a": make_record(1)})
    seen.append(store.generation("passages"))
    store.put_many("passages", {"a": make_record(1)})
    seen.append(store.generation("passages"))
    store.delete_many("passages", ["a"])
    seen.append(store.generation("passages"))
    assert len(set(seen)) == 4
    assert store.generation("passages") == seen[-1]


def flipped(position: float):
    """A change that flips one bit at a relative position."""

    def change(value: bytes) -> bytes:
        index = min(int(len(value) * position), len(value) - 1)
        return value[:index] + bytes([value[index] ^ 0x10]) + value[index + 1 :]

    return change


DAMAGE = {
    "first byte": ("tamper", flipped(0.0)),
    "middle byte": ("tamper", flipped(0.5)),
    "last byte": ("tamper", flipped(1.0)),
    "cut short": ("tamper", lambda value: value[:-1]),
    "cut to nothing": ("tamper", lambda value: b""),
    "header byte": ("tamper_header", flipped(0.1)),
    "unknown version": ("tamper_header", lambda value: value[:4] + b"\x09\x00" + value[6:]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_costs_that_passage_alone(backend, store, make_record, same, damage):
    records = {passage_id: make_record(seed, num_states=4) for seed, passage_id in enumerate("abc")}
    for passage_id, record in records.items():  # one write each, so that an embedded store has one segment each
        store.put_many("passages", {passage_id: record})
    method, change = DAMAGE[damage]
    getattr(backend, method)("passages", "b", change)
    reader = backend.open()
    before, damaged, after = reader.get_many("passages", ["a", "b", "c"])
    assert isinstance(damaged, Damaged)
    assert damaged.passage_id == "b"
    assert ("version 9" in damaged.reason) == (damage == "unknown version")
    assert same(before, records["a"])
    assert same(after, records["c"])
    scanned = dict(reader.scan("passages"))
    assert scanned["b"] == damaged
    assert same(scanned["a"], records["a"])
    store.put_many("passages", {"b": records["b"]})  # writing it again heals it
    assert same(reader.get_many("passages", ["b"])[0], records["b"])


def test_pages_of_ids_hold_every_passage(store, make_record):
    ids = {f"p{i}" for i in range(150)} | {"a b", "ü/ö", "x:y"}
    store.put_many("passages", {id_: make_record(1) for id_ in ids})
    store.delete_many("passages", ["p3"])
    assert store.list_ids("elsewhere", 10) == ([], b"")
    for limit in (1, 50, 152, 1000):
        found, after, num_pages = [], b"", 0
        while after or not num_pages:
            page, after = store.list_ids("passages", limit, after)
            found, num_pages = found + page, num_pages + 1
        assert set(found) == ids - {"p3"}
        assert len(found) == 152  # nothing rehashes meanwhile
        assert num_pages > 1 or limit >= 100


def test_passages_that_stay_are_listed_whatever_changes_meanwhile(store, make_record):
    store.put_many("passages", {f"p{i}": make_record(1) for i in range(300)})
    found, after = store.list_ids("passages", 50)
    store.delete_many("passages", [f"p{i}" for i in range(100)])
    store.put_many("passages", {f"new{i}": make_record(1) for i in range(600)})
    while after:
        page, after = store.list_ids("passages", 50, after)
        found += page
    assert set(found) >= {f"p{i}" for i in range(100, 300)}


def test_a_page_token_is_of_one_collection_and_whole(store, make_record, make_manifest):
    store.put_many("passages", {f"p{i}": make_record(1) for i in range(300)})
    store.write_manifest(make_manifest("others"))
    collection, others = Collection.open(store, "passages"), Collection.open(store, "others")
    ids, token = collection.list_ids(100)
    rest, _ = collection.list_ids(1000, token)
    assert len({*ids, *rest}) == 300
    assert others.list_ids(10) == ([], "")
    for wrong in (token[:-4], token + "AAAA", "A" * len(token), "no token", "é", token.swapcase()):
        with pytest.raises(InvalidPageToken):
            collection.list_ids(100, wrong)
    with pytest.raises(InvalidPageToken):
        others.list_ids(100, token)


def test_threads_share_a_store(store, make_record, same):
    records = {f"p{i}": make_record(i) for i in range(40)}
    failures: list[BaseException] = []

    def work(part: int) -> None:
        try:
            mine = {passage_id: records[passage_id] for passage_id in list(records)[part::4]}
            for passage_id, record in mine.items():
                store.put_many("passages", {passage_id: record})
                assert same(store.get_many("passages", [passage_id])[0], record)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.stats("passages").num_passages == 40
