"""Renaming collections: the contract of every store, readers next to a rename, and renames that are cut off."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from cache.collection import Collection
from cache.errors import CollectionExists, CollectionInUse, CollectionNotFound, InvalidName
from cache.faiss.store import FaissStore
from cache.manifest import Manifest
from cache.open import open_store
from cache.store import Audit, StoreStats

SCRIPT = Path(__file__).with_name("renaming.py")
_spec = importlib.util.spec_from_file_location("cache_test_renaming", SCRIPT)
renaming = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(renaming)


def texts_of(collection: Collection) -> dict[str, str]:
    """Ids and digests of what is read without damage, in every way there is."""
    read = {passage_id: states.text_digest for passage_id, states in collection.scan()}
    ids = sorted(read)
    assert sorted(collection.list_ids(1000)[0]) == ids
    assert (
        collection.digests(ids) == [read[one] for one in ids] == [one.text_digest for one in collection.get_many(ids)]
    )
    assert collection.stats().num_passages == len(ids)
    assert not [damage for _, _, damage in collection.verify() if damage]
    return read


@pytest.fixture
def docs(store, make_manifest) -> Collection:
    docs = Collection.create(store, make_manifest("docs"))
    docs.put_many(renaming.passages("old", 5))
    return docs


def test_a_renamed_collection_is_the_same_to_everyone(backend, store, docs):
    store.set_alias("live", "docs")
    generation, before, other = store.generation("docs"), texts_of(docs), backend.open()
    ids, token = docs.list_ids(2)

    assert store.rename_collection("docs", "docs-1", "docs") == ["docs", "live"]

    assert store.list_collections() == ["docs-1", "passages"]
    assert other.aliases() == {"docs": "docs-1", "live": "docs-1"}
    for name in ("docs", "docs-1", "live"):
        opened = Collection.open(other, name)
        assert (opened.name, opened.manifest.identity) == ("docs-1", docs.manifest.identity)
        assert texts_of(opened) == before
    assert texts_of(docs) == before  # one that was open
    assert store.generation(docs.storage_name) == generation
    if token:
        assert {*ids, *docs.list_ids(10, token)[0]} == before.keys()
    assert store.audit("docs-1") == Audit()
    assert store.mend() == []
    assert texts_of(Collection.open(store, "docs-1")) == before


def test_old_and_new_name_are_two_collections_after_it(backend, store, docs, make_manifest):
    before = texts_of(docs)
    assert store.rename_collection("docs", "docs-1") == []
    with pytest.raises(CollectionNotFound):
        Collection.open(store, "docs")
    second = Collection.create(store, make_manifest("docs"))
    assert texts_of(second) == {}
    second.put_many(renaming.passages("new", 3))
    docs.put_many(renaming.passages("late", 1))  # by a writer that opened it before
    after, reader = texts_of(second), backend.open()
    first = Collection.open(reader, "docs-1")
    assert len(texts_of(first)) == 5
    assert texts_of(first) != before
    assert texts_of(Collection.open(reader, "docs")) == after
    assert first.delete_many(["p0"]) == 1
    assert texts_of(second) == after
    assert second.delete_many(["p1"]) == 1
    for name in store.list_collections():
        store.compact(Collection.open(store, name).storage_name)
        assert store.audit(name) == Audit()

    store.drop_collection("docs-1")

    assert sorted(texts_of(Collection.open(reader, "docs"))) == ["p0", "p2"]
    assert store.stats(first.storage_name) == StoreStats()
    third = Collection.create(store, make_manifest("docs-1"))
    assert texts_of(third) == {}
    third.put_many(renaming.passages("third", 2))
    store.drop_collection("docs")
    with pytest.raises(CollectionNotFound):
        second.put_many(renaming.passages("later", 1))
    assert len(texts_of(third)) == 2
    assert store.rename_collection("docs-1", "docs") == []
    assert store.rename_collection("docs", "docs-1", "docs") == ["docs"]
    assert len(texts_of(Collection.open(backend.open(), "docs"))) == 2


def test_a_rename_back_leaves_no_trace(store, docs):
    store.rename_collection("docs", "docs-1")
    store.rename_collection("docs-1", "docs")
    assert store.read_manifest("docs") == docs.manifest
    assert b"storage_name" not in store.read_manifest("docs").to_json()


def test_a_collection_of_version_1_keeps_its_passages(store, make_manifest):
    """Whose records are bound to the manifest as it was created, name and all."""
    old = Collection.create(store, make_manifest("old", version=1))
    old.put_many(renaming.passages("old", 3))
    before = texts_of(old)
    store.rename_collection("old", "newer", "old")
    renamed = Collection.open(store, "old")
    assert (renamed.name, renamed.manifest.binding) == ("newer", old.manifest.binding)
    assert texts_of(renamed) == before
    renamed.put_many(renaming.passages("more", 4))
    assert len(texts_of(old)) == 4


def test_what_a_rename_refuses_changes_nothing(store, docs, make_manifest):
    store.write_manifest(make_manifest("other"))
    store.set_alias("live", "other")
    store.set_alias("mine", "docs")
    before = store.list_collections(), store.aliases()
    for arguments, error, told in (
        (("absent", "x"), CollectionNotFound, "'absent' does not exist"),
        (("live", "x"), CollectionNotFound, "'live' is an alias of 'other'"),
        (("docs", "other"), CollectionExists, "'other' already exists"),
        (("docs", "docs"), CollectionExists, "'docs' already exists"),
        (("docs", "live"), CollectionExists, "'live' is an alias of 'other'"),
        (("docs", "mine"), CollectionExists, "'mine' is an alias of 'docs'"),
        (("docs", "x", "other"), CollectionExists, "'other' is the name of a collection"),
        (("docs", "x", "x"), CollectionExists, "'x' is the name of a collection"),
        (("docs", "x", "live"), CollectionExists, "'live' points at 'other'"),
        (("docs", "a name"), InvalidName, "collection"),
        (("docs", "x", "a name"), InvalidName, "alias"),
    ):
        with pytest.raises(error, match=told):
            store.rename_collection(*arguments)
    assert (store.list_collections(), store.aliases()) == before
    assert store.rename_collection("docs", "docs-1", "mine") == ["mine"]
    with pytest.raises(CollectionInUse):
        store.drop_collection("docs-1")


def test_the_collection_that_an_alias_hides_can_be_renamed(store, docs, make_manifest):
    """As `reencode` leaves it: the old one can get out of the way of its name."""
    store.write_manifest(make_manifest("docs.v2"))
    store.set_alias("docs", "docs.v2", shadowing=True)
    assert store.rename_collection("docs", "docs-old") == []
    assert Collection.open(store, "docs").name == "docs.v2"
    assert len(texts_of(Collection.open(store, "docs-old"))) == 5
    assert store.rename_collection("docs.v2", "docs-new") == ["docs"]


def test_a_rename_that_was_cut_off_in_redis_is_harmless_and_run_again(make_backend, make_manifest):
    """After each of its steps every name leads to the passages, and dropping one of two names drops no passage."""
    backend = make_backend("redis")
    for num_steps in range(4):
        store = open_store(f"{backend.url}{num_steps}", read_budget_seconds=20)
        docs = Collection.create(store, make_manifest("docs"))
        docs.put_many(renaming.passages("old", 5))
        before, ask, left = texts_of(docs), store._ask, [num_steps]

        def cut_off(link, is_valid, name, *rest, ask=ask, left=left):
            if name in ("HSETNX", "HSET", "HDEL"):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return ask(link, is_valid, name, *rest)

        store._ask = cut_off
        if num_steps < 3:
            with pytest.raises(KeyboardInterrupt):
                store.rename_collection("docs", "docs-1", "docs")
        else:
            store.rename_collection("docs", "docs-1", "docs")
        store._ask = ask
        for name in {"docs", *store.list_collections(), *store.aliases()}:
            assert texts_of(Collection.open(store, name)) == before
            assert store.audit(name) == Audit()
        if num_steps == 2:  # the two names are there
            store.drop_collection("docs")
        elif num_steps < 3:
            assert store.rename_collection("docs", "docs-1", "docs") == ["docs"]
        assert (store.list_collections(), store.aliases()) == (["docs-1"], {"docs": "docs-1"})
        assert texts_of(Collection.open(store, "docs")) == before
        store.close()


def test_a_renamed_collection_is_whole_to_stores_of_before(docs, store):
    """Its manifest has a field they do not know; of others nothing is new."""
    assert set(json.loads(docs.manifest.to_json())) == renaming.FIELDS
    store.rename_collection("docs", "docs-1")
    manifest = store.read_manifest("docs-1")
    assert json.loads(manifest.to_json())["storage_name"] == "docs"
    assert Manifest.from_json(manifest.to_json(), "docs-1") == manifest


@pytest.fixture
def shared(request, tmp_path, make_backend):
    """URL of a store that processes share, and the options to open it with."""
    if request.param == "faiss":
        return f"faiss:{tmp_path / 'store'}"
    return make_backend(request.param).url


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("shared", ["faiss", "redis", "redis+cluster"], indirect=True)
def test_readers_by_name_find_every_passage_while_it_is_renamed(shared, make_manifest):
    """By every name it ever had, which becomes an alias, by an alias that follows, and by a collection that is open."""
    with closing(open_store(shared, read_budget_seconds=20)) as store:
        Collection.create(store, make_manifest("docs-0")).put_many(renaming.passages("old", 5))
        store.set_alias("live", "docs-0")
        readers = [start("read", shared) for _ in range(2)]
        for reader in readers:
            assert reader.stdout.readline() == "reading\n"
        for number in range(20):
            assert len(store.rename_collection(f"docs-{number}", f"docs-{number + 1}", f"docs-{number}")) == number + 2
            time.sleep(0.02)
        for reader in readers:
            output, _ = reader.communicate("enough\n", timeout=60)
            report = json.loads(output)
            assert report["problems"] == []
            assert report["number"] == 20
            assert report["num_reads"] > 20


@pytest.mark.slow
def test_a_rename_killed_at_any_moment_is_done_or_not(tmp_path, make_manifest):
    path, rng, done = tmp_path / "store", random.Random(5), []
    with closing(FaissStore(path)) as store:
        Collection.create(store, make_manifest("docs")).put_many(renaming.passages("old", 5))
        store.set_alias("live", "docs")
    for attempt in range(16):
        process = start("rename", f"faiss:{path}")
        assert process.stdout.readline() == "renaming\n"
        time.sleep(rng.uniform(0, 0.005 * attempt))
        process.kill()
        process.communicate()
        with closing(FaissStore(path)) as store:
            (name,) = store.list_collections()
            done.append(name)
            assert store.aliases() == {"live": name} | ({} if name == "docs" else {"docs": name})
            assert store.audit(name) == Audit()
            assert len(texts_of(Collection.open(store, "docs"))) == 5
    assert len(set(done)) > 1


def test_a_damaged_manifest_of_a_renamed_collection_costs_it_alone(make_backend, make_manifest):
    backend = make_backend("redis")
    store = backend.open()
    Collection.create(store, make_manifest("docs")).put_many(renaming.passages("old", 5))
    store.rename_collection("docs", "docs-1")
    second = Collection.create(store, make_manifest("docs"))
    second.put_many(renaming.passages("new", 3))
    with backend.server.client() as client:
        key = f"{backend.prefix}:manifests"
        client.hset(key, "docs-1", client.hget(key, "docs-1").replace(b"SQfp16", b"SQfp17"))
    assert len(texts_of(Collection.open(store, "docs"))) == 3
    assert [problem for problem in store.audit("docs").problems if "docs-1" in problem]
    store.drop_collection("docs-1")
    assert len(texts_of(Collection.open(store, "docs"))) == 3
    with backend.server.client() as client:
        assert not client.keys(f"{backend.prefix}:p:docs:*")
