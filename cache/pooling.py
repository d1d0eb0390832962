"""MEP pooling: the mean of every r token states, as a pure function over numpy arrays.

Groups start at token 0 of a window; the last group may be short and is divided by its own count (KaLM-Reranker's
`MEP`, model card and reference/kalm.md). Does not know windows of a passage, encoders or stores: see `states.py`.
"""

import numpy as np
from numpy.typing import NDArray

from cache.errors import RatioError

# A float32 sum of up to 8 rows is off by at most 7 half-ulps, under 5e-7 of the largest value; beyond that the sum is
# taken in float64, which costs a conversion per element, and rounded once.
_MAX_FLOAT32_SUM_ROWS = 8


def num_pooled(num_tokens: int, ratio: int) -> int:
    """Number of pooled states of `num_tokens` tokens: the last group may be short, so rounded up."""
    _check_ratio("compression_ratio", ratio)
    return -(-num_tokens // ratio)


def pool(states: NDArray[np.float32], ratio: int) -> NDArray[np.float32]:
    """Mean of every `ratio` rows.

    states: (num_tokens, dim), valid tokens only. Returns float32 (ceil(num_tokens / ratio), dim), C-contiguous; the
    input itself when ratio is 1.
    """
    return repool(states, states.shape[0], 1, ratio)


def repool(states: NDArray[np.float32], num_tokens: int, stored_ratio: int, ratio: int) -> NDArray[np.float32]:
    """Pool states of `stored_ratio` on to `ratio`, a multiple of it; equal to pooling the tokens themselves.

    states: (ceil(num_tokens / stored_ratio), dim). Every stored row stands for `stored_ratio` tokens but the last,
    which stands for the rest, so a count-weighted mean is exact. Raises RatioError where `ratio` is not a multiple.
    """
    _check_ratio("stored_ratio", stored_ratio)
    _check_ratio("compression_ratio", ratio)
    if ratio % stored_ratio:
        raise RatioError(f"compression_ratio: {ratio} is not a multiple of the stored ratio {stored_ratio}")
    num_states = num_pooled(num_tokens, stored_ratio)
    if states.ndim != 2 or states.shape[0] != num_states:
        raise ValueError(
            f"states: shape {states.shape}, expected {num_states} rows for {num_tokens} tokens at ratio {stored_ratio}"
        )
    states = np.ascontiguousarray(states, dtype=np.float32)
    factor = ratio // stored_ratio
    if factor == 1 or num_states == 0:
        return states
    # Groups of equal weights first; the one that holds the last stored row is weighted by its token counts.
    num_even = (num_states - 1) // factor
    dim = states.shape[1]
    pooled = np.empty((-(-num_states // factor), dim), dtype=np.float32)
    groups = states[: num_even * factor].reshape(num_even, factor, dim)
    sum_dtype = np.float32 if factor <= _MAX_FLOAT32_SUM_ROWS else np.float64
    pooled[:num_even] = np.add.reduce(groups, axis=1, dtype=sum_dtype) / sum_dtype(factor)
    rest = states[num_even * factor :]  # (1..factor, dim)
    counts = np.full(rest.shape[0], stored_ratio, dtype=np.float64)
    counts[-1] = num_tokens - (num_states - 1) * stored_ratio
    pooled[num_even] = (counts @ rest) / counts.sum()
    return pooled


def _check_ratio(field: str, ratio: int) -> None:
    if ratio < 1:
        raise RatioError(f"{field}: {ratio} is not a ratio, expected an integer of at least 1")
