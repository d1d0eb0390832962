"""Codecs: what comes back is as near as the codec promises, and tables are checked like any foreign bytes."""

import os
import threading

import faiss
import numpy as np
import pytest

from cache.codecs import Codec
from cache.errors import CodecError

DIM = 64
# Bytes per state at DIM, and the largest mean error allowed for values of unit variance.
CODECS = {
    "Flat": (256, 0.0), "SQfp16": (128, 5e-4), "SQbf16": (128, 4e-3), "SQ8": (64, 0.02), "SQ6": (48, 0.05),
    "SQ4": (32, 0.2), "B16,SQ8": (72, 0.01), "B24,SQ6": (54, 0.03), "B64,SQ4": (34, 0.2), "Z,B16,SQ4": (40, 0.2),
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
    assert np.array_equal(again.encode(sample[:300]), codes)
    assert np.array_equal(again.decode(codes), codec.decode(codes))
    assert again.table() == codec.table()


def test_rows_do_not_depend_on_each_other(codec, sample):
    codes = codec.encode(sample[:50])
    assert np.array_equal(np.concatenate([codec.encode(sample[i : i + 1]) for i in range(50)]), codes)
    assert np.array_equal(codec.decode(codes[10:20]), codec.decode(codes)[10:20])


def test_many_passages_decode_into_one_buffer(codec, sample):
    codes = codec.encode(sample[:60])
    parts = [codes[:1], codes[1:30], codes[30:30], codes[30:]]
    expected = codec.decode(codes)
    assert np.array_equal(codec.decode_many(parts), expected)
    buffer = np.full((60, DIM), np.nan, dtype=np.float32)
    assert codec.decode_many(parts, out=buffer) is buffer
    assert np.array_equal(buffer, expected)
    assert codec.decode_many([]).shape == (0, DIM)
    for wrong in (buffer[:59], buffer.astype(np.float64), np.asfortranarray(buffer)):
        with pytest.raises(CodecError, match=r"out: .* expected C-contiguous float32 \(60, 64\)"):
            codec.decode_many(parts, out=wrong)


def test_decoding_starts_no_threads(codec, sample):
    """Whatever OpenMP was told before, in whichever thread; and what it was told stays."""
    codes = codec.encode(sample)
    seen = []

    def decode():
        faiss.omp_set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))
        codec.decode_many([codes[:700], codes[700:]])
        seen.append((len(os.listdir("/proc/self/task")) - before, faiss.omp_get_max_threads()))

    thread = threading.Thread(target=decode)
    thread.start()
    thread.join()
    assert seen == [(0, 3)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_states_that_are_not_finite_are_refused(codec, sample, value):
    states = sample[:5].copy()
    states[3, 7] = value
    with pytest.raises(CodecError, match="states: hold NaN or infinity"):
        codec.encode(states)


@pytest.mark.parametrize("factory", [name for name in CODECS if "SQ" in name])
def test_dimensions_that_never_move_come_back(factory, sample):
    still = sample.copy()
    still[:, :20] = 0.0
    codec = Codec(factory, DIM)
    codec.train(still)
    decoded = codec.decode(codec.encode(still[:50]))
    assert np.abs(decoded - still[:50]).mean() <= CODECS[factory][1]
    assert np.abs(decoded[:, :20]).max() <= 1e-5


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
    if "B" in codec.factory:  # FAISS does not know our scalings: to it the codes are bytes
        assert np.array_equal(index.reconstruct_n(0, 100).astype(np.uint8), codes)
        return
    assert np.array_equal(
        faiss.deserialize_index(faiss.serialize_index(index)).reconstruct_n(0, 100), codec.decode(codes)
    )


def test_what_the_table_was_trained_for_is_inside_and_what_it_was_not_is_counted(codec, sample):
    """Half the states, ten times as large: SQ and PQ cut them to their range, the others hold them as they are."""
    inside = codec.count_outside(sample, codec.encode(sample))
    assert inside.shape == (len(sample),)
    assert inside.mean() < 0.01 * DIM
    odd = np.concatenate([sample[:100], 10 * sample[:100]])
    counts = codec.count_outside(odd, codec.encode(odd))
    assert counts[:100].mean() < 0.02 * DIM
    if codec.factory.startswith(("SQ8", "SQ6", "SQ4", "PQ", "RQ")):
        assert counts[100:].mean() > 0.6 * DIM
        assert counts.max() <= DIM
    else:
        assert not counts.any()


@pytest.mark.parametrize("factory", ["PQ4x4", "PQ8x4", "PQ16x4", "PQ32x4", "PQ8x5", "PQ8x6", "RQ4x4"])
def test_few_codes_that_are_coarse_hold_what_they_were_trained_for(factory):
    """Each of 16 codes in 24 dimensions is farther from what it stands for than from the codes' mean."""
    rng = np.random.default_rng(1)
    sample, others = rng.standard_normal((2, 1000, 96), dtype=np.float32)
    codec = Codec(factory, 96)
    codec.train(sample)
    assert codec.count_outside(others, codec.encode(others)).mean() < 0.05 * 96
    odd = 10 * others
    if not factory.startswith("RQ"):
        assert codec.count_outside(odd, codec.encode(odd)).mean() > 0.6 * 96


@pytest.mark.parametrize("factory", ["SQ8", "SQ4"])
def test_a_number_outside_by_less_than_a_rounding_is_not_counted(factory):
    codec = Codec(factory, 2)
    codec.train(np.linspace([0, 5], [1, 5], 64).astype(np.float32))
    step = 1 / 2 ** int(factory[2:])
    rows = np.array([[0, 5], [1, 5], [1 + 0.4 * step, 5], [1 + 0.6 * step, 5], [-0.6 * step, 5.1]], dtype=np.float32)
    assert codec.count_outside(rows, codec.encode(rows)).tolist() == [0, 0, 0, 1, 2]


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
    "factory",
    [
        "",
        "SQ5",
        "Z,SQ8",
        "B32",
        "B0,SQ8",
        "B32,PQ16",
        "Z,B32,SQfp16",
        "L2norm,SQ8",
        "IVF100,Flat",
        "HNSW32",
        "PCA32,SQ8",
        "flat",
        "PQ",
        "PQ0",
        "RQ4",
        "SQ8 ",
        "LSQ4x8",
    ],
)
def test_an_unknown_codec_names_the_known_ones(factory):
    with pytest.raises(CodecError, match=r"SQfp16, SQbf16, SQ8, SQ6, SQ4"):
        Codec(factory, DIM)


def test_impossible_codecs():
    with pytest.raises(CodecError, match="64 dimensions into 7 equal parts"):
        Codec("PQ7", DIM)
    with pytest.raises(CodecError, match="24 bits"):
        Codec("PQ8x24", DIM)
    with pytest.raises(CodecError, match="dim: 0"):
        Codec("Flat", 0)


@pytest.mark.parametrize("factory", ["RQ1x1", "RQ2x4"])
def test_residual_quantizers_train_on_as_many_states_as_dimensions(factory, sample):
    # FAISS itself ends in an error about a matrix inside it.
    codec = Codec(factory, DIM)
    with pytest.raises(CodecError, match=rf"63 states, {factory} trains on at least 64"):
        codec.train(sample[: DIM - 1])
    codec.train(sample[:DIM])
    assert codec.encode(sample[:5]).shape == (5, 1)


def test_an_untrained_codec_says_so(sample):
    codec = Codec("PQ16", DIM)
    for use in (lambda: codec.encode(sample), lambda: codec.table(), lambda: codec.decode(sample.view(np.uint8))):
        with pytest.raises(CodecError, match="PQ16 must be trained"):
            use()
    with pytest.raises(CodecError, match="255 states, PQ16 trains on at least 256"):
        codec.train(sample[:255])
    with pytest.raises(CodecError, match="not finite"):
        codec.train(np.full((300, DIM), np.inf, dtype=np.float32))
    with pytest.raises(CodecError, match=r"31 states, SQ8 trains on at least 32; \S+ needs no training"):
        Codec("SQ8", DIM).train(sample[:31])


def test_wrong_arrays_name_what_was_expected(sample):
    codec = Codec("SQfp16", DIM)
    with pytest.raises(CodecError, match=r"states: float64 \(2000, 64\), expected float32 \(n, 64\)"):
        codec.encode(sample.astype(np.float64))
    with pytest.raises(CodecError, match=r"codes: uint8 \(1, 127\), expected uint8 \(n, 128\)"):
        codec.decode(np.zeros((1, 127), dtype=np.uint8))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("block", [16, 24, 64, 1000])
def test_block_scaling_is_the_naive_loop(sample, block, bits):
    """Per block a float16 scale, the largest magnitude in it; then even steps from -scale to scale, one of them 0."""
    codec = Codec(f"B{block},SQ{bits}", DIM)
    decoded = codec.decode(codec.encode(sample[:20]))
    steps = 2 ** (bits - 1) - 1
    for row, got in zip(sample[:20], decoded, strict=True):
        for start in range(0, DIM, block):
            part = row[start : start + block].astype(np.float64)
            scale = np.float64(np.float16(np.abs(part).max()))
            expected = np.round(part / scale * steps) / steps * scale
            # A number on the border of two steps may be rounded into either.
            assert np.abs(got[start : start + block] - expected).max() <= 1.001 * scale / steps
            assert np.abs(got[start : start + block] - part).max() <= (0.501 / steps + 0.001) * scale


def test_an_outlier_costs_its_block_and_nothing_is_cut_off(sample):
    states = sample[:40].copy()
    states[:, 5] *= 300.0  # beyond whatever a sample of the others has seen
    trained = Codec("SQ8", DIM)
    trained.train(sample)
    blocks = Codec("B16,SQ8", DIM)
    error = np.abs(blocks.decode(blocks.encode(states)) - states)
    assert (error / np.abs(states[:, 5:6]).max(axis=1, keepdims=True)).max() < 1 / 200
    assert error[:, 16:].max() < 0.02
    assert np.abs(trained.decode(trained.encode(states)) - states).max() > 100


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_zeros_stay_zero(bits):
    codec = Codec(f"B16,SQ{bits}", DIM)
    states = np.zeros((2, DIM), dtype=np.float32)
    states[1, 3], states[1, 20] = 1.0, -2.5
    assert np.abs(codec.decode(codec.encode(states)) - states).max() <= 1e-6


def test_standardising_codecs_check_their_table(sample):
    codec = Codec("Z,B16,SQ8", DIM)
    with pytest.raises(CodecError, match="must be trained"):
        codec.encode(sample)
    codec.train(sample)
    table = np.frombuffer(codec.table(), dtype="<f4").copy()
    table[DIM + 3] = 0.0
    with pytest.raises(CodecError, match="codec_table: a standard deviation of 0, expected more than 0"):
        Codec.from_table("Z,B16,SQ8", DIM, table.tobytes())


def test_scales_do_not_overflow_silently():
    for factory in ("B16,SQ8", "B16,SQ4"):
        states = np.full((2, DIM), 65504.0, dtype=np.float32)
        codec = Codec(factory, DIM)
        assert np.isfinite(codec.decode(codec.encode(states))).all()
        states[1, 3] = -70000.0
        with pytest.raises(CodecError, match=r"70000.*SQbf16"):
            codec.encode(states)


def test_float16_does_not_overflow_silently():
    states = np.full((2, DIM), 65504.0, dtype=np.float32)
    codec = Codec("SQfp16", DIM)
    assert np.array_equal(codec.decode(codec.encode(states)), states)
    states[1, 3] = -70000.0
    with pytest.raises(CodecError, match=r"70000.*SQbf16"):
        codec.encode(states)
    assert np.isfinite(Codec("SQbf16", DIM).decode(Codec("SQbf16", DIM).encode(states))).all()
