"""Passages found by their text: the contract of every store, and what a Collection makes of a store's hints."""

import hashlib
import sqlite3
import uuid

import numpy as np
import pytest

from cache.collection import Collection, StoredPassage
from cache.errors import CollectionNotFound, StoreUnavailable
from cache.faiss import rows, texts
from cache.open import open_store
from cache.states import PassageStates, text_digest
from cache.store import MAX_IDS_OF_TEXT


def stored(passage_id: str, text: str, dim: int = 8) -> StoredPassage:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    rows = np.random.default_rng(seed).standard_normal((2, dim), dtype=np.float32)
    return StoredPassage(passage_id, PassageStates(rows, (5,), 4, False, text_digest(text)), text)


def ids_of(store, *texts: str) -> list[list[str]]:
    return store.ids_of_texts("passages", [text_digest(text) for text in texts])


def test_a_passage_is_found_by_its_text(store, make_record):
    store.put_many("passages", {f"p{i}": make_record(i, text=f"text {i}") for i in range(1200)})
    assert store.finds_texts("passages")
    assert ids_of(store, "text 7", "absent", "text 1199") == [["p7"], [], ["p1199"]]
    assert store.ids_of_texts("elsewhere", [text_digest("text 7")]) == [[]]
    assert store.ids_of_texts("passages", []) == []


def test_ids_of_one_text_come_in_order_and_are_bounded(store, make_record):
    ids = ["ü", "p2", "p10", "a", "P", "z", "x:y"]
    for one in ids:
        store.put_many("passages", {one: make_record(1, text="same")})
    in_order = sorted(ids, key=str.encode)
    assert ids_of(store, "same") == [in_order[:MAX_IDS_OF_TEXT]]
    store.delete_many("passages", in_order[:1])  # which does not hide the others
    assert ids_of(store, "same") == [in_order[1 : MAX_IDS_OF_TEXT + 1]]


def test_more_ids_of_one_text_come_where_more_are_asked_for(store, make_record):
    ids = sorted(f"p{i}" for i in range(50))
    store.put_many("passages", {one: make_record(1, text="same") for one in ids})
    assert store.ids_of_texts("passages", [text_digest("same")], 20) == [ids[:20]]
    assert store.ids_of_texts("passages", [text_digest("same"), text_digest("other")], 100) == [ids, []]


def test_a_changed_or_deleted_passage_is_not_found_by_its_old_text(store, make_record):
    store.put_many("passages", {"a": make_record(1, text="old"), "b": make_record(2, text="kept")})
    store.put_many("passages", {"a": make_record(3, text="new")})
    assert ids_of(store, "old", "new", "kept") == [[], ["a"], ["b"]]
    store.delete_many("passages", ["a", "absent"])
    assert ids_of(store, "new", "kept") == [[], ["b"]]


def test_a_dropped_collection_leaves_nothing_to_be_found(store, make_record, make_manifest):
    store.put_many("passages", {"a": make_record(1, text="one")})
    store.write_manifest(make_manifest("others"))
    store.put_many("others", {"a": make_record(1, text="one")})
    store.drop_collection("passages")
    assert ids_of(store, "one") == [[]]
    store.write_manifest(make_manifest())
    assert ids_of(store, "one") == [[]]
    assert store.ids_of_texts("others", [text_digest("one")]) == [["a"]]


def test_indexing_again_changes_nothing(store, make_record):
    store.put_many("passages", {f"p{i}": make_record(i, text=f"text {i}") for i in range(50)})
    store.index_texts("passages")
    assert ids_of(store, "text 3") == [["p3"]]
    assert store.audit("passages").problems == ()
    with pytest.raises(CollectionNotFound):
        store.index_texts("elsewhere")


def test_a_collection_gives_the_states_of_a_text(backend, make_manifest):
    store = backend.open()
    collection = Collection.create(store, make_manifest(codec="SQfp16"))
    collection.put_many([stored(f"p{i}", f"text {i}") for i in range(20)] + [stored("q3", "text 3")])
    found = collection.find_texts([text_digest(text) for text in ("text 3", "absent", "text 19")])
    assert [one and one[0] for one in found] == ["p3", None, "p19"]
    (again,) = collection.get_encoded_many(["p3"])
    assert np.array_equal(found[0][1].states.rows, again.states.rows)
    collection.delete_many(["p3"])
    ((passage_id, states),) = collection.find_texts([text_digest("text 3")])
    assert passage_id == "q3"
    assert states.text_digest == text_digest("text 3")


@pytest.mark.parametrize("name", ["memory", "faiss", "redis"])
def test_a_damaged_record_gives_way_to_another_of_the_same_text(make_backend, make_manifest, name):
    backend = make_backend(name)
    collection = Collection.create(backend.open(), make_manifest())
    collection.put_many([stored("a", "same"), stored("b", "other")])
    collection.put_many([stored("c", "same")])
    backend.tamper("passages", "a", lambda value: value[:-1] + bytes([value[-1] ^ 1]))
    reader = Collection.open(backend.open(), "passages")
    assert [one and one[0] for one in reader.find_texts([text_digest("same"), text_digest("other")])] == ["c", "b"]
    collection.delete_many(["c"])
    assert reader.find_texts([text_digest("same")]) == [None]


def test_an_old_catalogue_finds_texts_once_it_was_indexed(tmp_path, make_manifest, make_record):
    path = tmp_path / "store"
    store = open_store(f"faiss:{path}")
    store.write_manifest(make_manifest())
    store.put_many("passages", {f"p{i}": make_record(i, text=f"text {i}") for i in range(10)})
    store.close()
    without_index(path)

    old = open_store(f"faiss:{path}")
    assert not old.finds_texts("passages")
    assert ids_of(old, "text 1") == [[]]
    old.put_many("passages", {"later": make_record(1, text="later")})
    old.index_texts("passages")
    assert old.finds_texts("passages")
    assert ids_of(old, "text 1", "later") == [["p1"], ["later"]]
    assert old.audit("passages").problems == ()
    other = open_store(f"faiss:{path}")  # the schema is the one it says it has
    assert ids_of(other, "text 9") == [["p9"]]
    other.close()
    old.close()


def without_index(path) -> None:
    """As a catalogue was made before there was the index."""
    connection = rows.Connection.open(path / "catalogue.sqlite")
    connection.execute("DROP INDEX passages_by_text")
    query = "UPDATE store SET schema = ?1, checksum = row_checksum(num_commits, ?1)"
    connection.execute(query, (connection.schema(),))
    connection.close()


def test_a_lookup_reads_no_other_rows(tmp_path, make_manifest):
    store = open_store(f"faiss:{tmp_path / 'store'}")
    store.write_manifest(make_manifest())
    store.close()
    connection = sqlite3.connect(tmp_path / "store" / "catalogue.sqlite")
    plan = [row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {texts._BY_TEXT}", (1, b"", 4))]
    connection.close()
    assert plan == ["SEARCH passages USING INDEX passages_by_text (collection_id=? AND <expr>=?)"]  # and sorts nothing


def test_redis_collections_made_before_find_texts_once_they_were_indexed(
    redis_server, make_backend, make_manifest, make_record
):
    backend = make_backend("redis")
    store = backend.open()
    store.write_manifest(make_manifest())
    store.put_many("passages", {f"p{i}": make_record(i, text=f"text {i}") for i in range(1500)})
    with redis_server.client() as client:
        client.delete(f"{backend.prefix}:texts", *client.keys(f"{backend.prefix}:t:*"))
    assert not store.finds_texts("passages")
    seen = []
    store.index_texts("passages", lambda done, of: seen.append((done, of)))
    assert seen[-1] == (1500, 1500)
    assert store.finds_texts("passages")
    assert ids_of(store, "text 1499") == [["p1499"]]


def test_verify_tells_what_redis_cannot_find_by_text(redis_server, make_backend, make_manifest, make_record):
    backend = make_backend("redis")
    store = backend.open()
    store.write_manifest(make_manifest())
    store.put_many("passages", {f"p{i}": make_record(i, text=f"text {i}") for i in range(5)})
    with redis_server.client() as client:
        client.delete(f"{backend.prefix}:t:passages:{text_digest('text 1')[:16].hex()}")
        client.set(f"{backend.prefix}:t:passages:{text_digest('text 2')[:16].hex()}", "of another type")
    assert ids_of(store, "text 1", "text 2", "text 3") == [[], [], ["p3"]]
    (problem,) = store.audit("passages").problems
    assert problem == "2 passages cannot be found by their text; `preread collection reindex passages` mends it"


def test_both_reads_of_a_lookup_share_one_budget(make_backend, make_manifest, make_record, monkeypatch):
    backend = make_backend("redis")
    collection = Collection.create(backend.open(), make_manifest())
    collection.put_many([stored("a", "text")])
    store = open_store(backend.url, read_budget_seconds=0.5)
    reader = Collection.open(store, "passages")
    assert reader.find_texts([text_digest("text")])[0][0] == "a"
    with store.one_read():
        deadline = store._online._shared.deadline
        deadline._end = 0.0  # used up by a read before
        with pytest.raises(StoreUnavailable, match="no answer within"):
            store.get_many("passages", ["a"])
    assert store.get_many("passages", ["a"])[0] is not None
    store.close()


def test_entries_expire_with_their_passages(redis_server, make_manifest, make_record):
    prefix = uuid.uuid4().hex
    store = open_store(f"{redis_server.url}?prefix={prefix}", ttl_seconds=600)
    store.write_manifest(make_manifest())
    store.put_many("passages", {"a": make_record(1, text="text")})
    with redis_server.client() as client:
        (key,) = client.keys(f"{prefix}:t:passages:*")
        (record,) = client.keys(f"{prefix}:p:passages:*")
        # After it: at no moment is a passage stored that cannot be found by its text.
        assert 0 < client.ttl(record) <= 600 < client.ttl(key) <= 660
    store.close()
