"""States of one passage, as float32 numbers or as a codec wrote them, and MEP pooling: the mean of every r tokens.

Groups start at token 0 of a window; the last may be short and is divided by its count (KaLM-Reranker's `MEP`, model
card and reference/kalm.md).
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.errors import RatioError

_T = TypeVar("_T")
_Array = NDArray[np.float32]

# A float32 sum of up to 8 rows is off by at most 7 half-ulps, under 5e-7 of the largest value; beyond that the sum is
# taken in float64, which costs a conversion per element, and rounded once.
_MAX_FLOAT32_SUM_ROWS = 8


def text_digest(text: str) -> bytes:
    """SHA-256 of the UTF-8 text, 32 bytes: tells whether a passage changed since it was encoded."""
    return hashlib.sha256(text.encode()).digest()


def num_pooled(num_tokens: int, ratio: int) -> int:
    """States of so many tokens, the last of which may stand for fewer."""
    if ratio < 1:
        raise RatioError(f"compression_ratio: {ratio}; expected an integer of at least 1")
    return -(-num_tokens // ratio)


def pool(states: _Array, ratio: int, *, num_tokens: int | None = None, stored_ratio: int = 1) -> _Array:
    """Mean of every `ratio` tokens, from token states or from states pooled at a divisor of `ratio`, else RatioError.

    states: (ceil(num_tokens / stored_ratio), dim), of valid tokens only; `num_tokens` None: one per row. Every row
    stands for `stored_ratio` tokens but the last, which stands for the rest, so a count-weighted mean equals pooling
    the tokens themselves. Returns float32 (ceil(num_tokens / ratio), dim), C-contiguous, perhaps the input itself.
    """
    num_tokens = len(states) if num_tokens is None else num_tokens
    num_states = num_pooled(num_tokens, stored_ratio)
    if ratio < 1 or ratio % stored_ratio:
        raise RatioError(f"compression_ratio: {ratio} is not a multiple of the stored ratio {stored_ratio}")
    if states.ndim != 2 or states.shape[0] != num_states:
        expected = f"{num_states} rows for {num_tokens} tokens at ratio {stored_ratio}"
        raise ValueError(f"states: shape {states.shape}, expected {expected}")
    states = np.ascontiguousarray(states, dtype=np.float32)
    factor = ratio // stored_ratio
    if factor == 1 or num_states == 0:
        return states
    # Groups of equal weights first; the one that holds the last stored row is weighted by its token counts.
    num_even = (num_states - 1) // factor
    dim = states.shape[1]
    pooled = np.empty((num_pooled(num_states, factor), dim), dtype=np.float32)
    groups = states[: num_even * factor].reshape(num_even, factor, dim)
    sum_dtype = np.float32 if factor <= _MAX_FLOAT32_SUM_ROWS else np.float64
    pooled[:num_even] = np.add.reduce(groups, axis=1, dtype=sum_dtype) / sum_dtype(factor)
    rest = states[num_even * factor :]  # (1..factor, dim)
    counts = np.full(rest.shape[0], stored_ratio, dtype=np.float64)
    counts[-1] = num_tokens - (num_states - 1) * stored_ratio
    pooled[num_even] = (counts @ rest) / counts.sum()
    return pooled


@dataclass(frozen=True, eq=False, slots=True)
class Codes:
    """Consecutive states in a codec's bytes: uint8 (num_states, code_size_bytes), often a view into a larger buffer."""

    codec: Codec = field(repr=False)
    rows: NDArray[np.uint8] = field(repr=False)

    def __post_init__(self) -> None:
        width = self.codec.code_size_bytes
        if self.rows.dtype != np.uint8 or self.rows.ndim != 2 or self.rows.shape[1] != width:
            raise ValueError(f"rows: {self.rows.dtype} {self.rows.shape}, expected uint8 (num_states, {width})")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> "Codes":
        return Codes(self.codec, self.rows[part])


@dataclass(frozen=True, eq=False, slots=True)
class _PooledPassage:
    """A passage over the encoder's limit may be split into windows, each pooled separately; their states follow on."""

    states: Any = field(repr=False)
    window_tokens: tuple[int, ...]  # valid tokens of each window before pooling
    compression_ratio: int  # tokens per state
    truncated: bool  # the text was cut at the encoder's limit
    text_digest: bytes  # SHA-256 of the text
    key: bytes = b""  # names these states, at any ratio they are pooled to, for the caches behind; empty: not cacheable

    def __post_init__(self) -> None:
        if len(self.text_digest) != 32:
            raise ValueError(f"text_digest: {len(self.text_digest)} bytes, expected the 32 of a SHA-256")
        if not self.window_tokens or min(self.window_tokens) < 1:
            raise ValueError(f"window_tokens: {self.window_tokens}, expected at least one window of at least one token")
        if len(self.states) != (expected := sum(num_pooled(one, self.compression_ratio) for one in self.window_tokens)):
            windows = f"windows of {self.window_tokens} tokens at compression_ratio {self.compression_ratio}"
            raise ValueError(f"states: {len(self.states)} rows, expected {expected} for {windows}")

    @property
    def num_tokens(self) -> int:
        return sum(self.window_tokens)

    @property
    def num_states(self) -> int:
        return len(self.states)

    def windows(self) -> list[Any]:
        """The states of each window: views of ceil(window_tokens / compression_ratio) rows."""
        ends = accumulate((num_pooled(one, self.compression_ratio) for one in self.window_tokens), initial=0)
        return [self.states[start:end] for start, end in pairwise(ends)]


@dataclass(frozen=True, eq=False, slots=True)
class PassageStates(_PooledPassage):
    """Pooled token states of one passage: float32 (num_states, dim), C-contiguous; perhaps a view, so read-only."""

    states: NDArray[np.float32] = field(repr=False)

    def __post_init__(self) -> None:
        states = self.states
        if states.dtype != np.float32 or states.ndim != 2 or not states.flags.c_contiguous:
            raise ValueError(f"states: {states.dtype} {states.shape}, expected C-contiguous float32 (num_states, dim)")
        _PooledPassage.__post_init__(self)

    @property
    def dim(self) -> int:
        return int(self.states.shape[1])

    def at_ratio(self, ratio: int) -> "PassageStates":
        """The same passage at a multiple of the stored ratio, else RatioError; every window is pooled separately."""
        if ratio == self.compression_ratio:
            return self
        windows = zip(self.windows(), self.window_tokens, strict=True)
        pooled = [pool(one, ratio, num_tokens=n, stored_ratio=self.compression_ratio) for one, n in windows]
        states = pooled[0] if len(pooled) == 1 else np.concatenate(pooled)
        return PassageStates(states, self.window_tokens, ratio, self.truncated, self.text_digest, self.key)

    def encoded(self, codes: Codes) -> "EncodedPassage":
        """The same passage in a codec's bytes."""
        return EncodedPassage(codes, self.window_tokens, self.compression_ratio, self.truncated, self.text_digest)


@dataclass(frozen=True, eq=False, slots=True)
class EncodedPassage(_PooledPassage):
    """Pooled token states of one passage in its codec's bytes, decoded when numbers are needed and not before."""

    states: Codes = field(repr=False)


AnyStates = PassageStates | EncodedPassage


def decode_all(entries: Sequence[EncodedPassage | _T]) -> list[PassageStates | _T]:
    """Encoded passages as float32, all of one codec decoded in one call into one buffer; other entries as they are."""
    by_codec: dict[Codec, list[int]] = defaultdict(list)  # a collection opened twice has two codecs
    for i, one in enumerate(entries):
        if isinstance(one, EncodedPassage):
            by_codec[one.states.codec].append(i)
    decoded: list[Any] = list(entries)
    for codec, indices in by_codec.items():
        passages = [decoded[i] for i in indices]
        ends = np.cumsum([one.num_states for one in passages])
        states = codec.decode_many([one.states.rows for one in passages])  # (sum of num_states, dim)
        for i, one, part in zip(indices, passages, np.split(states, ends[:-1]), strict=True):
            ratio, digest = one.compression_ratio, one.text_digest
            decoded[i] = PassageStates(part, one.window_tokens, ratio, one.truncated, digest, one.key)
    return decoded


def all_at_ratio(passages: Sequence[AnyStates], ratio: int) -> list[AnyStates]:
    """Each at a multiple of its ratio, else RatioError; encoded passages that must be pooled are decoded together."""
    decoded = iter(decode_all([one for one in passages if one.compression_ratio != ratio]))
    return [one if one.compression_ratio == ratio else next(decoded).at_ratio(ratio) for one in passages]
