"""Collections: floats in, floats out, and only what belongs."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from cache.codecs import Codec
from cache.collection import Collection, Manifest, StoredPassage
from cache.errors import (
    CollectionExists,
    CollectionNotFound,
    EncoderMismatch,
    InvalidPassage,
    ManifestError,
    OutOfRange,
)
from cache.open import open_store
from cache.record import Damaged
from cache.states import PassageStates, pool, text_digest

DIM = 8


@pytest.fixture
def backend(make_backend):
    return make_backend("faiss")


@pytest.fixture
def store(backend):
    return backend.open()


@pytest.fixture
def collection(store, make_manifest):
    return Collection.create(store, make_manifest())


def make_passage(passage_id: str, seed: int = 0, *, ratio: int = 4, tokens: int = 10, dim: int = DIM) -> StoredPassage:
    token_states = np.random.default_rng(seed).standard_normal((tokens, dim)).astype(np.float32)
    states = PassageStates(pool(token_states, ratio), (tokens,), ratio, seed % 2 == 1, text_digest(passage_id))
    return StoredPassage(passage_id, states, f"text of {passage_id}")


def test_states_come_back_as_the_codec_keeps_them(collection):
    passages = [make_passage(f"p{i}", i, tokens=1 + 7 * i) for i in range(30)]
    collection.put_many(passages)
    found = collection.get_many(["p29", "absent", "", "p0", "p7"])
    assert found[1] is None
    assert found[2] is None  # an id that cannot exist is missing, and costs no other
    for states, number in ((found[0], 29), (found[3], 0), (found[4], 7)):
        expected = passages[number].states
        assert np.array_equal(states.states, expected.states.astype(np.float16).astype(np.float32))
        assert states.states.flags.c_contiguous
        assert states.window_tokens == expected.window_tokens
        assert states.truncated == expected.truncated
        assert states.text_digest == expected.text_digest
        assert states.at_ratio(8).num_states == -(-expected.num_tokens // 8)


@pytest.mark.parametrize("codec", ["SQfp16", "SQ8", "Z,B8,SQ4"])
def test_passages_encoded_before_their_write_are_stored_as_the_others(store, make_manifest, codec):
    """A writer may encode some early; what is stored and counted does not change, clipped numbers included."""
    passages = [make_passage(f"p{i}", i, tokens=1 + i) for i in range(40)]
    trained = Codec(codec, DIM)
    trained.train(np.concatenate([one.states.states for one in passages[:20]]))
    table = trained.table()
    one, other = (
        Collection.create(store, make_manifest(name, codec=codec, codec_table=table)) for name in ("one", "other")
    )
    clipped = one.put_many(passages, allow_clipped=True)
    early = [*other.encode(passages[:15]), *passages[15:30], *other.encode(passages[30:])]
    assert other.encode(early[:15]) == early[:15]
    assert other.put_many(early, allow_clipped=True) == clipped
    assert sum(clipped) > 0 or codec != "SQ8"
    for passage in passages:
        (found,), (expected,) = (each.store.get_many(each.name, [passage.passage_id]) for each in (other, one))
        assert np.array_equal(found.codes, expected.codes)
        assert found.header.num_clipped == expected.header.num_clipped
    with pytest.raises(InvalidPassage, match="another collection's codec"):
        one.put_many(early[:1])


def test_split_passages_keep_their_windows(collection):
    windows = [np.random.default_rng(i).standard_normal((n, DIM)).astype(np.float32) for i, n in enumerate((9, 4, 1))]
    pooled = np.concatenate([pool(window, 4) for window in windows])
    collection.put_many([StoredPassage("p", PassageStates(pooled, (9, 4, 1), 4, False, text_digest("t")))])
    (found,) = collection.get_many(["p"])
    assert [window.shape[0] for window in found.windows()] == [3, 1, 1]
    assert found.num_tokens == 14


@pytest.fixture
def narrow(make_manifest):
    """A collection whose SQ8 was trained on a tenth of what passages hold."""
    codec = Codec("SQ8", DIM)
    codec.train(0.1 * np.random.default_rng(0).standard_normal((200, DIM)).astype(np.float32))
    store = open_store("memory:narrow")
    yield Collection.create(store, make_manifest(codec="SQ8", codec_table=codec.table()))
    store.close()


def small(passage: StoredPassage) -> StoredPassage:
    """The same passage within the range of `narrow`."""
    states = dataclasses.replace(passage.states, states=0.05 * passage.states.states)
    return dataclasses.replace(passage, states=states)


def test_numbers_outside_the_trained_range_are_counted_in_the_header(narrow):
    inside, outside = small(make_passage("in", 1, tokens=400)), make_passage("out", 2, tokens=40)
    assert narrow.put_many([inside, outside]) == [0, narrow.stats().num_clipped]
    headers = narrow.store.headers_many(narrow.name, ["in", "out"])
    assert headers[0].num_clipped == 0
    assert 0.3 * 10 * DIM < headers[1].num_clipped <= 10 * DIM
    assert narrow.stats().clipped_share(DIM) == pytest.approx(headers[1].num_clipped / (110 * DIM))


def test_a_write_for_which_the_codec_was_not_trained_is_refused_unless_told(narrow):
    """Only the passages that lie outside are named; a few among many are stored."""
    inside = [small(make_passage(f"in{i}", i, tokens=40)) for i in range(6)]
    outside = [make_passage(f"out{i}", i, tokens=40) for i in range(4)]
    with pytest.raises(OutOfRange, match=r"'out0': .* lie outside what SQ8 was trained for") as caught:
        narrow.put_many([*inside, *outside])
    assert caught.value.reasons.keys() == {"out0", "out1", "out2", "out3"}
    assert narrow.stats().num_passages == 0
    narrow.put_many(inside)
    narrow.put_many(outside, allow_clipped=True)
    assert narrow.stats().num_passages == 10
    narrow.put_many(
        [make_passage("few", 9, tokens=4), *[small(make_passage(f"s{i}", i, tokens=400)) for i in range(3)]]
    )


def test_small_writes_are_judged_together(narrow):
    """One odd word is stored; a stream of them is refused when there are as many states as say something."""
    narrow.put_many([make_passage("p0", 0, tokens=4)])
    for i in range(1, 31):
        narrow.put_many([make_passage(f"p{i}", i, tokens=4)])
    with pytest.raises(OutOfRange):
        narrow.put_many([make_passage("p31", 31, tokens=4)])
    assert narrow.stats().num_passages == 31


@pytest.mark.parametrize("factory", ["Flat", "SQbf16", "SQ8", "SQ6", "B4,SQ8", "B3,SQ6", "Z,B8,SQ4", "PQ4x4", "RQ2x4"])
def test_every_codec_survives_being_opened_again(backend, store, make_manifest, factory):
    codec = Codec(factory, DIM)
    codec.train(np.random.default_rng(0).standard_normal((100, DIM)).astype(np.float32))
    made = Collection.create(store, make_manifest("trained", codec=factory, codec_table=codec.table()))
    passage = make_passage("p", tokens=40)
    made.put_many([passage])
    (found,) = Collection.open(backend.open(), "trained").get_many(["p"])
    assert np.array_equal(found.states, codec.decode(codec.encode(passage.states.states)))


def test_texts_are_kept_only_where_the_manifest_says_so(store, make_manifest):
    for name, stores_text in (("with", True), ("without", False)):
        collection = Collection.create(store, make_manifest(name, stores_text=stores_text))
        collection.put_many([make_passage("p")])
        assert collection.get_texts(["p", "absent"]) == ["text of p" if stores_text else None, None]
        assert [*collection.scan_texts()] == [("p", "text of p" if stores_text else None)]


def test_digests_tell_what_changed(collection):
    collection.put_many([make_passage("p")])
    assert collection.digests(["p", "absent", ""]) == [text_digest("p"), None, None]


@pytest.mark.parametrize(
    ("passage", "reason"),
    [
        (make_passage("bad", dim=9), "dim 9, the collection has 8"),
        (make_passage("bad", ratio=2), "compression_ratio 2, the collection has 4"),
        (make_passage("x" * 513), "at most 512"),
        (make_passage(""), "empty"),
        (StoredPassage("bad", make_passage("bad").states, "\udc80"), "surrogates"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(collection, passage, reason):
    with pytest.raises(InvalidPassage, match=reason) as caught:
        collection.put_many([make_passage("good"), passage])
    assert caught.value.passage_id == passage.passage_id
    assert collection.get_many(["good"]) == [None]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_values_that_cannot_be_kept_are_refused_by_name(collection, value):
    bad = make_passage("bad")
    bad.states.states[1, 2] = value
    with pytest.raises(InvalidPassage, match=r"'bad'.*(NaN|float16)"):
        collection.put_many([make_passage("good"), bad])
    assert collection.get_many(["good"]) == [None]


def test_the_same_id_twice_in_one_write_is_refused(collection):
    with pytest.raises(InvalidPassage, match="twice"):
        collection.put_many([make_passage("p", 1), make_passage("p", 2)])


def test_another_encoder_is_refused_with_both_sides_named(store, collection, make_manifest):
    with pytest.raises(EncoderMismatch) as caught:
        Collection.open(store, "passages", fingerprint="b" * 64, checkpoint="other/encoder")
    for side in ("a" * 64, "test/encoder", "b" * 64, "other/encoder"):
        assert side in str(caught.value)
    with pytest.raises(EncoderMismatch, match=r"test/encoder.*other/encoder"):
        Collection.create(store, make_manifest(fingerprint="b" * 64, checkpoint="other/encoder"), exist_ok=True)
    assert Collection.open(store, "passages", fingerprint="a" * 64).manifest == collection.manifest


def test_creating_twice(store, collection, make_manifest):
    with pytest.raises(CollectionExists, match="'passages'"):
        Collection.create(store, make_manifest())
    again = Collection.create(store, make_manifest(created_at="2031-01-01"), exist_ok=True)
    assert again.manifest == collection.manifest
    with pytest.raises(CollectionExists, match="compression_ratio 4, expected 8"):
        Collection.create(store, make_manifest(compression_ratio=8), exist_ok=True)
    with pytest.raises(CollectionExists, match="codec 'SQfp16', expected 'Flat'"):
        Collection.create(store, make_manifest(codec="Flat"), exist_ok=True)


def test_an_unknown_name_tells_what_there_is(store, collection):
    with pytest.raises(CollectionNotFound, match=r"'passagse'.*passages"):
        Collection.open(store, "passagse")
    store.set_alias("live", "passages")
    store.set_alias("docs", "passages")
    with pytest.raises(CollectionNotFound, match=r"the store has: passages \(alias docs, live\)"):
        Collection.open(store, "passagse")


def test_rebuilding_beside_and_moving_the_alias_over(store, collection, make_manifest):
    store.set_alias("live", "passages")
    rebuilt = Collection.create(store, make_manifest("passages-2", fingerprint="b" * 64, checkpoint="new/encoder"))
    rebuilt.put_many([make_passage("p")])
    assert Collection.open(store, "live").name == "passages"
    store.set_alias("live", "passages-2")
    assert store.resolve("live") == "passages-2"
    assert Collection.open(store, "live", fingerprint="b" * 64).get_many(["p"])[0] is not None


def test_states_of_a_recreated_collection_are_not_taken_for_the_old_ones(store, collection, make_manifest):
    # A server that keeps its Collection over a drop and rebuild must not score another encoder's states.
    collection.put_many([make_passage("p")])
    store.drop_collection("passages")
    rebuilt = Collection.create(store, make_manifest(fingerprint="b" * 64))
    rebuilt.put_many([make_passage("p")])
    (found,) = collection.get_many(["p"])
    assert isinstance(found, Damaged)
    assert "another manifest" in found.reason
    assert collection.digests(["p"]) == [None]
    assert not [*collection.scan_texts()]
    assert rebuilt.get_many(["p"])[0].num_states == 3


def test_verify_reads_everything_and_names_the_damaged(backend, collection):
    for i in range(20):
        collection.put_many([make_passage(f"p{i}", i)])
    assert not any(damage for *_, damage in collection.verify())
    backend.tamper("passages", "p3", lambda codes: codes[:5] + b"?" + codes[6:])
    path, _, _ = backend.locate("passages", "p7")
    path.unlink()
    fresh = Collection.open(backend.open(), "passages")
    damaged = {passage_id: damage for passage_id, _, damage in fresh.verify() if damage}
    assert damaged.keys() == {"p3", "p7"}
    assert "checksum" in damaged["p3"]
    assert "is missing" in damaged["p7"]
    assert sum(not isinstance(states, Damaged) for _, states in fresh.scan()) == 18
    assert len([*fresh.scan_texts()]) == 18


def test_a_manifest_survives_json_and_nothing_else_does(make_manifest):
    manifest = make_manifest(codec="SQ8", codec_table=np.arange(2 * DIM, dtype="<f4").tobytes(), passage_template="ü{}")
    data = manifest.to_json()
    assert Manifest.from_json(data) == manifest
    assert Manifest.from_json(data).binding == manifest.binding
    for position in range(len(data)):
        damaged = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with contextlib.suppress(ManifestError):
            assert Manifest.from_json(damaged) == manifest  # white space between the values says nothing
    for junk in (b"", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000):
        with pytest.raises(ManifestError):
            Manifest.from_json(junk)
    newer = json.dumps(json.loads(data) | {"version": 3}).encode()
    with pytest.raises(ManifestError, match="version: 3 is unknown, expected 1 or 2"):
        Manifest.from_json(newer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": "8"}, "dim: '8', expected int"),
        ({"dim": True}, "dim: True, expected int"),
        ({"compression_ratio": 0}, "compression_ratio"),
        ({"codec": "ZIP"}, "ZIP"),
        ({"codec": "SQ8"}, "codec_table: 0 bytes, expected 64"),
        ({"fingerprint": ""}, "fingerprint"),
        ({"version": 3}, "version: 3 is unknown, expected 1 or 2"),
        ({"identity": "A" * 32}, "identity: 'AAAA"),
        ({"identity": ""}, "identity: '', expected 32 hex digits"),
    ],
)
def test_a_wrong_manifest_names_the_field(make_manifest, changes, message):
    with pytest.raises(ManifestError, match=message):
        make_manifest(**changes)


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", ".hidden", "x" * 129, "a:b", "ä"])
def test_a_wrong_collection_name_is_refused(make_manifest, name):
    with pytest.raises(ManifestError, match="collection: "):
        make_manifest(name)


def test_memory_stores_of_one_name_are_one_until_closed(make_manifest):
    first, second, other = open_store("memory:one"), open_store("memory:one"), open_store("memory:two")
    Collection.create(first, make_manifest())
    assert second.list_collections() == ["passages"]
    assert other.list_collections() == []
    first.close()
    assert second.list_collections() == ["passages"]
    second.close()
    other.close()
    third = open_store("memory:one")
    assert third.list_collections() == []
    third.close()


MANIFEST_1 = """{
 "collection": "old",\n "fingerprint": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
 "checkpoint": "c",\n "dim": 8,\n "max_passage_tokens": 1024,\n "passage_template": "{text}",
 "pooling_version": 1,\n "compression_ratio": 4,\n "codec": "SQfp16",\n "codec_table": "",\n "stores_text": true,
 "created_at": "2026-01-01T00:00:00+00:00",\n "version": 1,\n "checksum": "ad8e617a6054794c"\n}"""


def test_a_collection_of_version_1_is_read_and_written_as_old_readers_know_it():
    manifest = Manifest.from_json(MANIFEST_1.encode())
    assert manifest.to_json().decode() == MANIFEST_1
    assert manifest.binding == 2314507997012052886  # as the software of that version computed it
    store = open_store("memory:version-1")
    collection = Collection.create(store, manifest)
    collection.put_many([make_passage("p")])
    assert store.headers_many("old", ["p"])[0].version == 1
    assert isinstance(collection.get_many(["p"])[0], PassageStates)
    store.close()


def test_an_identity_stays_over_names_and_times_and_ends_with_its_collection(store, make_manifest):
    planned = make_manifest("shard-0")
    other = make_manifest("all", identity=planned.identity, created_at="2031-01-01", checkpoint="elsewhere")
    assert other.binding == planned.binding
    assert make_manifest("shard-0").binding != planned.binding
    Collection.create(store, planned).put_many([make_passage("p")])
    Collection.create(store, other)
    store.put_many("all", {"p": store.get_many("shard-0", ["p"])[0]})  # as a merge does, undecoded
    found, merged = (Collection.open(store, name).get_encoded_many(["p"])[0] for name in ("shard-0", "all"))
    assert np.array_equal(found.states.rows, merged.states.rows)
    assert found.key == merged.key


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 4, "compression_ratio": 4}, {"compression_ratio": 8}, {"fingerprint": "b" * 64}, {"codec": "SQbf16"},
        {"codec": "SQ8", "codec_table": np.arange(2 * DIM, dtype="<f4").tobytes()},
    ],
)  # fmt: skip
def test_whatever_decides_how_codes_are_read_is_bound(make_manifest, changes):
    manifest = make_manifest()
    assert make_manifest(identity=manifest.identity, **changes).binding != manifest.binding


def test_a_manifest_under_another_name_is_refused(make_manifest):
    data = make_manifest("left").to_json()
    assert Manifest.from_json(data, "left").collection == "left"
    with pytest.raises(ManifestError, match="collection: 'left', expected 'right'"):
        Manifest.from_json(data, "right")


def test_equal_texts_under_two_ids_have_one_key(collection):
    one, other = make_passage("p"), make_passage("q", 1)
    collection.put_many([one, StoredPassage("again", one.states, one.text), other])
    first, second, third = (states.key for states in collection.get_encoded_many(["p", "again", "q"]))
    assert first == second != third
