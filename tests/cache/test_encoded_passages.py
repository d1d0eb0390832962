"""A passage that stays encoded says of itself what it says decoded, and becomes the same numbers."""

import numpy as np
import pytest

from cache.codecs import Codec
from cache.collection import Collection, StoredPassage
from cache.errors import RatioError
from cache.open import open_store
from cache.record import Damaged
from cache.states import Codes, EncodedPassage, PassageStates, all_at_ratio, decode_all, num_pooled, text_digest

DIM = 8
WINDOWS = [(10,), (9, 4, 1), (1,), (33, 64)]


def numbers(windows, seed, ratio=4):
    shape = (sum(num_pooled(n, ratio) for n in windows), DIM)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=["Flat", "SQbf16", "SQ8", "B4,SQ8", "PQ4x4", "RQ2x4"])
def collection(request, make_manifest):
    codec = Codec(request.param, DIM)
    codec.train(numbers((400,), 0))
    store = open_store("memory:encoded")
    collection = Collection.create(store, make_manifest("c", codec=request.param, codec_table=codec.table()))
    collection.put_many(
        [
            StoredPassage(f"p{i}", PassageStates(numbers(n, i), n, 4, i % 2 == 1, text_digest(str(i))))
            for i, n in enumerate(WINDOWS)
        ]
    )
    yield collection
    store.close()


def test_it_is_what_is_read_decoded(collection):
    ids = ["p3", "absent", "p0", "p1", "p3"]
    for encoded, decoded in zip(collection.get_encoded_many(ids), collection.get_many(ids), strict=True):
        if decoded is None:
            assert encoded is None
            continue
        for name in ("num_tokens", "num_states", "window_tokens", "compression_ratio", "truncated", "key"):
            assert getattr(encoded, name) == getattr(decoded, name)
        assert np.array_equal(decode_all([encoded])[0].states, decoded.states)
        assert encoded.states.codec.dim == decoded.dim
        assert encoded.states.rows.nbytes == encoded.num_states * collection.codec.code_size_bytes
        for codes, window in zip(encoded.windows(), decoded.windows(), strict=True):
            assert np.array_equal(codes.codec.decode(codes.rows), window)


def test_pooled_together_is_pooled_alone(collection):
    encoded = collection.get_encoded_many([f"p{i}" for i in range(len(WINDOWS))])
    own = [PassageStates(numbers((5,), 9, 1), (5,), 1, False, text_digest("inline"))]
    for ratio in (4, 8, 32):
        together = all_at_ratio([*encoded, *own], ratio)
        for one, alone in zip(together, [*encoded, *own], strict=True):
            expected = decode_all([alone])[0].at_ratio(ratio)
            assert (one.compression_ratio, one.key, one.num_states) == (ratio, expected.key, expected.num_states)
            assert np.array_equal(decode_all([one])[0].states, expected.states)
    assert all_at_ratio(encoded, 4) == encoded  # nothing to pool: the very same, still encoded
    with pytest.raises(RatioError, match="6 is not a multiple of the stored ratio 4"):
        all_at_ratio(encoded, 6)
    assert all_at_ratio([], 4) == []


def test_damage_and_foreign_records_are_told_as_before(collection):
    collection._binding += 1  # as one who opened another collection of this name
    (found,) = collection.get_encoded_many(["p0"])
    assert isinstance(found, Damaged)
    assert "another manifest" in found.reason


def test_codes_are_checked():
    codec = Codec("SQfp16", DIM)
    with pytest.raises(ValueError, match=r"rows: uint8 \(3, 15\), expected uint8 \(num_states, 16\)"):
        Codes(codec, np.zeros((3, 15), np.uint8))
    with pytest.raises(ValueError, match="3 rows, expected 2"):
        EncodedPassage(Codes(codec, np.zeros((3, 16), np.uint8)), (8,), 4, False, text_digest("x"))
