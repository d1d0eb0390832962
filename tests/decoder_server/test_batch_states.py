"""A batch's states are those of each pair decoded alone, end to end, whatever they are kept in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache.codecs import Codec
from cache.states import Codes, EncodedPassage, PassageStates, all_at_ratio, num_pooled, text_digest
from checkpoint import TokenizedPrompt
from decoder_server.models.fbnl.kv_cache import StatePair, batch_states

DIM = 24
CPU = torch.device("cpu")
PROMPT = TokenizedPrompt([1, 2, 3], 1, False)
FACTORIES = ["Flat", "SQfp16", "SQbf16", "SQ8", "SQ6", "SQ4", "B8,SQ8", "Z,B8,SQ4", "PQ8x4", "RQ2x4"]
DTYPES = [torch.float32, torch.bfloat16]


def naive(pairs: list[StatePair], dtype: torch.dtype) -> torch.Tensor:
    """Each decoded alone, concatenated, converted."""
    rows = [p.states.codec.decode(p.states.rows) if isinstance(p.states, Codes) else p.states for p in pairs]
    return torch.from_numpy(np.concatenate(rows)).to(dtype)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def numbers(num_states: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_states, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def codecs() -> dict[str, Codec]:
    made = {factory: Codec(factory, DIM) for factory in FACTORIES}
    for codec in made.values():
        codec.train(numbers(400, 0))
    return made


def encoded(codec: Codec, windows: tuple[int, ...], seed: int, ratio: int = 4) -> EncodedPassage:
    """A passage whose codes are a read-only view, as a store gives them."""
    rows = codec.encode(numbers(sum(num_pooled(n, ratio) for n in windows), seed))
    view = np.frombuffer(b"before" + rows.tobytes(), np.uint8, offset=6).reshape(rows.shape)
    return EncodedPassage(Codes(codec, view), windows, ratio, False, text_digest(str(seed)))


def pairs_of(passage: EncodedPassage | PassageStates) -> list[StatePair]:
    return [StatePair(PROMPT, window) for window in passage.windows()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factory", FACTORIES)
def test_passages_of_one_codec(codecs: dict[str, Codec], factory: str, dtype: torch.dtype) -> None:
    lengths = [(1,), (9, 4, 1), (40,), (4,), (100, 3)]  # split ones among them
    pairs = [pair for i, n in enumerate(lengths) for pair in pairs_of(encoded(codecs[factory], n, i))]
    batch = batch_states(pairs, CPU, dtype)
    assert batch.shape == (sum(pair.num_states for pair in pairs), DIM)
    assert same_bits(batch, naive(pairs, dtype))
    batch[0, 0] = 7.0  # memory of its own: no store's
    assert same_bits(batch_states(pairs[1:], CPU, dtype), naive(pairs[1:], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_shares_a_batch(codecs: dict[str, Codec], dtype: torch.dtype) -> None:
    """Every codec, one of them opened twice, numbers that came with the request, passages pooled further."""
    again = Codec.from_table("SQ8", DIM, codecs["SQ8"].table())
    stored = [encoded(codec, (5 * i + 1,), i) for i, codec in enumerate([*codecs.values(), again])]
    inline = [PassageStates(numbers(n, n), (n,), 1, False, text_digest("x")) for n in (3, 11)]
    pooled = all_at_ratio(stored, 12)
    passages = [*stored, *inline, *pooled]
    order = np.random.default_rng(1).permutation(2 * len(passages)) % len(passages)  # every one twice
    pairs = [pair for i in order for pair in pairs_of(passages[i])]
    assert same_bits(batch_states(pairs, CPU, dtype), naive(pairs, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "SQbf16"])
def test_numbers_that_are_none_arrive_where_they_are(
    codecs: dict[str, Codec], factory: str, dtype: torch.dtype
) -> None:
    """Forged codes may stand for NaN or infinity: the model is to see them, and no other row."""
    code_size = codecs[factory].code_size_bytes
    rows = np.random.default_rng(2).integers(0, 256, (300, code_size), dtype=np.uint8)
    rows[:2] = 0xFF  # NaN in each of these formats
    pairs = [StatePair(PROMPT, Codes(codecs[factory], rows)), StatePair(PROMPT, numbers(5, 1))]
    batch, expected = batch_states(pairs, CPU, dtype), naive(pairs, dtype)
    assert torch.isnan(batch[:2]).all()
    torch.testing.assert_close(batch, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(batch[300:]).all()


def test_nothing() -> None:
    assert batch_states([], CPU, torch.bfloat16).shape[0] == 0
