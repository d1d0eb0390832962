"""MEP pooling against the naive loop, and the law that pooling nests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cache.errors import RatioError
from cache.states import PassageStates, num_pooled, pool, text_digest

ratios = st.integers(1, 40)


@st.composite
def token_states(draw, max_tokens=90):
    num_tokens, dim = draw(st.integers(1, max_tokens)), draw(st.integers(1, 6))
    values = st.floats(-1000, 1000, width=32, allow_nan=False)
    return draw(arrays(np.float32, (num_tokens, dim), elements=values))


def naive(states: np.ndarray, ratio: int) -> np.ndarray:
    """The definition, one group at a time, in float64."""
    groups = [states[start : start + ratio] for start in range(0, len(states), ratio)]
    return np.stack([group.astype(np.float64).sum(axis=0) / len(group) for group in groups])


def assert_equal(got: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> None:
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert got.shape == expected.shape
    # Relative to the largest input: a mean of values that cancel has no digits left.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * max(1.0, float(np.abs(scale).max())))


@given(token_states(), ratios)
def test_pooling_is_the_mean_of_each_group(states, ratio):
    assert_equal(pool(states, ratio), naive(states, ratio), states)


@given(token_states(), st.integers(1, 12), st.integers(1, 12))
def test_pooling_nests(states, stored_ratio, factor):
    stored = pool(states, stored_ratio)
    again = pool(stored, stored_ratio * factor, num_tokens=len(states), stored_ratio=stored_ratio)
    assert_equal(again, naive(states, stored_ratio * factor), states)


@given(token_states(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_pooling_nests_three_deep(states, first, second, third):
    num_tokens = len(states)
    step = pool(pool(states, first), first * second, num_tokens=num_tokens, stored_ratio=first)
    last = pool(step, first * second * third, num_tokens=num_tokens, stored_ratio=first * second)
    assert_equal(last, naive(states, first * second * third), states)


@settings(max_examples=50)
@given(st.lists(token_states(max_tokens=30), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 6))
def test_every_window_is_pooled_on_its_own(windows, stored_ratio, factor):
    dim = min(window.shape[1] for window in windows)
    windows = [np.ascontiguousarray(window[:, :dim]) for window in windows]
    stored = np.concatenate([pool(window, stored_ratio) for window in windows])
    lengths = tuple(map(len, windows))
    passage = PassageStates(stored, lengths, stored_ratio, False, text_digest("t")).at_ratio(stored_ratio * factor)
    assert passage.compression_ratio == stored_ratio * factor
    assert passage.num_tokens == sum(lengths)
    for got, window in zip(passage.windows(), windows, strict=True):
        assert_equal(got, naive(window, stored_ratio * factor), window)


def test_numbers_checkable_by_hand():
    states = np.array([[1.0], [2.0], [3.0], [4.0], [10.0]], dtype=np.float32)
    assert pool(states, 2).tolist() == [[1.5], [3.5], [10.0]]
    assert pool(states, 5).tolist() == [[4.0]]
    assert pool(states, 99).tolist() == [[4.0]]
    assert pool(pool(states, 2), 4, num_tokens=5, stored_ratio=2).tolist() == [[2.5], [10.0]]
    assert pool(pool(states, 2), 6, num_tokens=5, stored_ratio=2).tolist() == [
        [4.0]
    ]  # (2 * 1.5 + 2 * 3.5 + 10) / 5, not the plain mean
    assert pool(states, 1) is states
    assert [num_pooled(tokens, 4) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("ratio", [1, 2, 3, 7, 8, 9, 32, 64, 1024])
def test_a_full_size_passage_stays_within_1e6(ratio):
    states = np.random.default_rng(0).standard_normal((1024, 640)).astype(np.float32) * 50
    assert_equal(pool(states, ratio), naive(states, ratio), states)
    for stored_ratio in (2, 3, 5):
        both = stored_ratio * ratio
        assert_equal(
            pool(pool(states, stored_ratio), both, num_tokens=1024, stored_ratio=stored_ratio),
            naive(states, both),
            states,
        )


@pytest.mark.parametrize(("stored", "asked"), [(4, 6), (4, 2), (4, 0), (4, -4), (0, 4)])
def test_an_unreachable_ratio_names_both(stored, asked):
    states = np.zeros((3, 2), dtype=np.float32)
    with pytest.raises(RatioError, match=rf"{asked}|{stored}"):
        pool(states, asked, num_tokens=12, stored_ratio=stored)
    if stored:
        passage = PassageStates(states, (12,), stored, False, text_digest("t"))
        with pytest.raises(ValueError, match=rf"{asked} is not a multiple of the stored ratio {stored}"):
            passage.at_ratio(asked)


def test_states_that_do_not_fit_their_counts_are_refused():
    states = np.zeros((3, 2), dtype=np.float32)
    digest = text_digest("t")
    with pytest.raises(ValueError, match=r"states: shape \(3, 2\), expected 4 rows for 13 tokens"):
        pool(states, 8, num_tokens=13, stored_ratio=4)
    with pytest.raises(ValueError, match="3 rows, expected 4 for windows"):
        PassageStates(states, (13,), 4, False, digest)
    with pytest.raises(ValueError, match="expected 2 for windows"):
        PassageStates(states, (4, 4), 4, False, digest)
    with pytest.raises(ValueError, match="float64"):
        PassageStates(states.astype(np.float64), (12,), 4, False, digest)
    with pytest.raises(ValueError, match="C-contiguous"):
        PassageStates(np.zeros((2, 3), dtype=np.float32).T, (12,), 4, False, digest)
    with pytest.raises(ValueError, match="window_tokens"):
        PassageStates(np.zeros((0, 2), dtype=np.float32), (0,), 4, False, digest)
    with pytest.raises(ValueError, match="text_digest"):
        PassageStates(states, (12,), 4, False, b"short")
