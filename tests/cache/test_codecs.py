"""Codecs: what comes back is as near as the codec promises, and tables are checked like any foreign bytes."""

import faiss
import numpy as np
import pytest

from cache.codecs import DEFAULT_CODEC, Codec
from cache.errors import CodecError

DIM = 64
# Bytes per state at DIM, and the largest mean error allowed for values of unit variance.
CODECS = {
    "Flat": (256, 0.0), "SQfp16": (128, 5e-4), "SQbf16": (128, 4e-3), "SQ8": (64, 0.02), "SQ4": (32, 0.2),
    "PQ16": (16, 0.4), "PQ32x4": (16, 0.5), "PQ8x6": (6, 0.7), "RQ4x8": (4, 0.7), "RQ8x4": (4, 0.7), "RQ3x5": (2, 0.8),
}  # fmt: skip


@pytest.fixture(scope="module")
def sample():
    return np.random.default_rng(0).standard_normal((2000, DIM)).astype(np.float32)


@pytest.fixture(params=CODECS, scope="module")
def codec(request, sample):
    codec = Codec(request.param, DIM)
    codec.train(sample)
    return codec


def test_code_size_and_error(codec, sample):
    code_size, max_error = CODECS[codec.factory]
    codes = codec.encode(sample)
    assert codec.code_size_bytes == code_size
    assert codes.shape == (2000, code_size)
    assert codes.dtype == np.uint8
    decoded = codec.decode(codes)
    assert decoded.shape == sample.shape
    assert decoded.dtype == np.float32
    assert np.abs(decoded - sample).mean() <= max_error


def test_the_table_is_all_there_is_to_a_trained_codec(codec, sample):
    again = Codec.from_table(codec.factory, DIM, codec.table())
    codes = codec.encode(sample[:300])
    assert again.is_trained
    assert np.array_equal(again.encode(sample[:300]), codes)
    assert np.array_equal(again.decode(codes), codec.decode(codes))
    assert again.table() == codec.table()


def test_rows_do_not_depend_on_each_other(codec, sample):
    codes = codec.encode(sample[:50])
    assert np.array_equal(np.concatenate([codec.encode(sample[i : i + 1]) for i in range(50)]), codes)
    assert np.array_equal(codec.decode(codes[10:20]), codec.decode(codes)[10:20])


def test_nothing_in_nothing_out(codec):
    assert codec.encode(np.empty((0, DIM), dtype=np.float32)).shape == (0, codec.code_size_bytes)
    assert codec.decode(np.empty((0, codec.code_size_bytes), dtype=np.uint8)).shape == (0, DIM)


def test_any_bytes_decode_without_harm(codec):
    # A forged value may carry right checksums, so every code must be in range whatever its bits.
    codes = np.random.default_rng(1).integers(0, 256, (500, codec.code_size_bytes), dtype=np.uint8)
    assert codec.decode(codes).shape == (500, DIM)


def test_a_faiss_index_of_the_codec_decodes_the_same(codec, sample):
    codes = codec.encode(sample[:100])
    index = codec.new_index()
    index.add_sa_codes(codes)
    assert np.array_equal(
        faiss.deserialize_index(faiss.serialize_index(index)).reconstruct_n(0, 100), codec.decode(codes)
    )


def test_wrong_tables_are_refused(codec):
    table = codec.table()
    for wrong in (table + b"\0", table + bytes(4), *([table[:-4], b""] if table else [])):
        with pytest.raises(CodecError, match=rf"codec_table: {len(wrong)} bytes, expected {len(table)}"):
            Codec.from_table(codec.factory, DIM, wrong)
    if table:
        nan = np.float32(np.nan).tobytes()
        with pytest.raises(CodecError, match="not finite"):
            Codec.from_table(codec.factory, DIM, nan + table[4:])


@pytest.mark.parametrize(
    "factory", ["", "SQ6", "IVF100,Flat", "HNSW32", "PCA32,SQ8", "flat", "PQ", "PQ0", "RQ4", "SQ8 ", "LSQ4x8"]
)
def test_an_unknown_codec_names_the_known_ones(factory):
    with pytest.raises(CodecError, match=r"SQfp16, SQbf16, SQ8, SQ4"):
        Codec(factory, DIM)


def test_impossible_codecs():
    with pytest.raises(CodecError, match="64 dimensions into 7 equal parts"):
        Codec("PQ7", DIM)
    with pytest.raises(CodecError, match="24 bits"):
        Codec("PQ8x24", DIM)
    with pytest.raises(CodecError, match="dim: 0"):
        Codec("Flat", 0)


def test_an_untrained_codec_says_so(sample):
    codec = Codec("PQ16", DIM)
    for use in (lambda: codec.encode(sample), lambda: codec.table(), lambda: codec.decode(sample.view(np.uint8))):
        with pytest.raises(CodecError, match="PQ16 must be trained"):
            use()
    with pytest.raises(CodecError, match="255 states, PQ16 trains on at least 256"):
        codec.train(sample[:255])
    with pytest.raises(CodecError, match="not finite"):
        codec.train(np.full((300, DIM), np.inf, dtype=np.float32))


def test_wrong_arrays_name_what_was_expected(sample):
    codec = Codec("SQfp16", DIM)
    with pytest.raises(CodecError, match=r"states: float64 \(2000, 64\), expected float32 \(n, 64\)"):
        codec.encode(sample.astype(np.float64))
    with pytest.raises(CodecError, match=r"codes: uint8 \(1, 127\), expected uint8 \(n, 128\)"):
        codec.decode(np.zeros((1, 127), dtype=np.uint8))


def test_float16_does_not_overflow_silently():
    states = np.full((2, DIM), 65504.0, dtype=np.float32)
    codec = Codec(DEFAULT_CODEC, DIM)
    assert np.array_equal(codec.decode(codec.encode(states)), states)
    states[1, 3] = -70000.0
    with pytest.raises(CodecError, match=r"70000.*SQbf16"):
        codec.encode(states)
    assert np.isfinite(Codec("SQbf16", DIM).decode(Codec("SQbf16", DIM).encode(states))).all()
