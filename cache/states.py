"""MEP pooling: the mean of every r token states, as a pure function over numpy arrays.

Groups start at token 0 of a window; the last group may be short and is divided by its own count (KaLM-Reranker's
`MEP`, model card and reference/kalm.md). Does not know windows of a passage, encoders or stores: see `states.py`.

PassageStates: the token states of one passage, pooled, with what is needed to pool them further.

Does not know how they were encoded, under which id they are kept, or in which codec.

EncodedPassage: a stored passage as its codec wrote it, decoded when somebody needs numbers and not before.

It can do what PassageStates can, so that whoever carries passages need not care which it has. Does not know stores, nor
where decoded numbers go.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
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


def text_digest(text: str) -> bytes:
    """SHA-256 of the UTF-8 text, 32 bytes: tells whether a passage changed since it was encoded."""
    return hashlib.sha256(text.encode()).digest()


def window_ends(window_tokens: tuple[int, ...], ratio: int) -> NDArray[np.intp]:
    """Per window of a passage, where its states end among the passage's."""
    return np.cumsum([num_pooled(tokens, ratio) for tokens in window_tokens], dtype=np.intp)


def check_rows(num_states: int, window_tokens: tuple[int, ...], ratio: int) -> None:
    """Raises ValueError unless windows of so many tokens have `num_states` states at `ratio`."""
    if not window_tokens or min(window_tokens) < 1:
        raise ValueError(f"window_tokens: {window_tokens}, expected at least one window of at least one token")
    expected = sum(num_pooled(tokens, ratio) for tokens in window_tokens)
    if num_states != expected:
        raise ValueError(
            f"states: {num_states} rows, expected {expected} for windows of {window_tokens} tokens "
            f"at compression_ratio {ratio}"
        )


@dataclass(frozen=True, eq=False, slots=True)
class PassageStates:
    """Pooled token states of one passage.

    A passage longer than the encoder's limit may have been split into windows; each was encoded and pooled on its own
    and their states lie one after the other.

    states: float32 (num_states, dim), C-contiguous; possibly a view into a larger batch, so do not write to it
    window_tokens: valid tokens of each window before pooling; one entry unless the passage was split
    compression_ratio: tokens per state
    truncated: the text was cut at the encoder's limit
    text_digest: SHA-256 of the text, 32 bytes
    key: names these states, at any ratio they are pooled to: what was computed of them may serve whoever comes with the
        same key; empty where nothing may
    """

    states: NDArray[np.float32] = field(repr=False)
    window_tokens: tuple[int, ...]
    compression_ratio: int
    truncated: bool
    text_digest: bytes
    key: bytes = b""

    def __post_init__(self) -> None:
        if self.states.dtype != np.float32 or self.states.ndim != 2 or not self.states.flags.c_contiguous:
            raise ValueError(
                f"states: {self.states.dtype} {self.states.shape}, expected C-contiguous float32 (num_states, dim)"
            )
        if len(self.text_digest) != 32:
            raise ValueError(f"text_digest: {len(self.text_digest)} bytes, expected the 32 of a SHA-256")
        check_rows(self.states.shape[0], self.window_tokens, self.compression_ratio)

    @property
    def num_tokens(self) -> int:
        """Valid tokens before pooling, over all windows."""
        return sum(self.window_tokens)

    @property
    def num_states(self) -> int:
        return int(self.states.shape[0])

    @property
    def dim(self) -> int:
        return int(self.states.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.states.nbytes)

    def windows(self) -> list[NDArray[np.float32]]:
        """The states of each window: views of (ceil(window_tokens / compression_ratio), dim)."""
        if len(self.window_tokens) == 1:
            return [self.states]
        return np.split(self.states, window_ends(self.window_tokens, self.compression_ratio)[:-1])

    def decoded(self) -> "PassageStates":
        """Itself: these are numbers already."""
        return self

    def at_ratio(self, ratio: int) -> "PassageStates":
        """The same passage at a multiple of the stored ratio; every window is pooled on its own.

        Raises RatioError (a ValueError) naming both ratios where `ratio` is no multiple.
        """
        if ratio == self.compression_ratio:
            return self
        if ratio < 1 or ratio % self.compression_ratio:
            raise RatioError(
                f"compression_ratio: {ratio} is not a multiple of the stored ratio {self.compression_ratio}"
            )
        pooled = [
            repool(window, tokens, self.compression_ratio, ratio)
            for window, tokens in zip(self.windows(), self.window_tokens, strict=True)
        ]
        states = pooled[0] if len(pooled) == 1 else np.concatenate(pooled)
        return PassageStates(states, self.window_tokens, ratio, self.truncated, self.text_digest, self.key)


@dataclass(frozen=True, eq=False, slots=True)
class Codes:
    """Consecutive states in a codec's bytes.

    rows: uint8 (num_states, code_size_bytes), C-contiguous; often a read-only view into a larger buffer
    """

    codec: Codec = field(repr=False)
    rows: NDArray[np.uint8] = field(repr=False)

    def __post_init__(self) -> None:
        width = self.codec.code_size_bytes
        if self.rows.dtype != np.uint8 or self.rows.ndim != 2 or self.rows.shape[1] != width:
            raise ValueError(f"rows: {self.rows.dtype} {self.rows.shape}, expected uint8 (num_states, {width})")

    def __len__(self) -> int:
        return int(self.rows.shape[0])


@dataclass(frozen=True, eq=False, slots=True)
class EncodedPassage:
    """Pooled token states of one passage, encoded; the fields are those of PassageStates."""

    states: Codes = field(repr=False)
    window_tokens: tuple[int, ...]
    compression_ratio: int
    truncated: bool
    text_digest: bytes
    key: bytes = b""

    def __post_init__(self) -> None:
        check_rows(len(self.states), self.window_tokens, self.compression_ratio)

    @property
    def num_tokens(self) -> int:
        """Valid tokens before pooling, over all windows."""
        return sum(self.window_tokens)

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def dim(self) -> int:
        return self.states.codec.dim

    @property
    def nbytes(self) -> int:
        return int(self.states.rows.nbytes)

    def windows(self) -> list[Codes]:
        """The codes of each window: views of (ceil(window_tokens / compression_ratio), code_size_bytes)."""
        if len(self.window_tokens) == 1:
            return [self.states]
        ends = window_ends(self.window_tokens, self.compression_ratio)
        return [Codes(self.states.codec, rows) for rows in np.split(self.states.rows, ends[:-1])]

    def decoded(self) -> PassageStates:
        """The same passage as float32 numbers of its own."""
        (passage,) = decode_all([self])
        return passage

    def at_ratio(self, ratio: int) -> "EncodedPassage | PassageStates":
        """The same passage at a multiple of the stored ratio: still encoded where it is that ratio, else pooled.

        Raises RatioError (a ValueError) naming both ratios where `ratio` is no multiple.
        """
        return self if ratio == self.compression_ratio else self.decoded().at_ratio(ratio)


AnyStates = PassageStates | EncodedPassage  # a passage's states, however they are kept


def decode_all(passages: Sequence[EncodedPassage]) -> list[PassageStates]:
    """Passages as float32, in order: all of one codec by one call of it, as views into one buffer."""
    numbers: list[NDArray[np.float32]] = [np.empty((0, 0), dtype=np.float32)] * len(passages)
    for codec, indices in by_codec(passage.states for passage in passages).items():
        ends = np.cumsum([passages[i].num_states for i in indices])
        states = codec.decode_many([passages[i].states.rows for i in indices])  # (sum of num_states, dim)
        for i, rows in zip(indices, np.split(states, ends[:-1]), strict=True):
            numbers[i] = rows
    return [
        PassageStates(states, one.window_tokens, one.compression_ratio, one.truncated, one.text_digest, one.key)
        for one, states in zip(passages, numbers, strict=True)
    ]


def all_at_ratio(passages: Sequence[AnyStates], ratio: int) -> list[AnyStates]:
    """Each at a multiple of its ratio, in order; what is encoded and must be pooled is decoded together.

    Raises RatioError where `ratio` is no multiple of a passage's own.
    """
    result = list(passages)
    encoded = {
        i: one for i, one in enumerate(passages) if isinstance(one, EncodedPassage) and one.compression_ratio != ratio
    }
    for i, decoded in zip(encoded, decode_all(list(encoded.values())), strict=True):
        result[i] = decoded
    return [one.at_ratio(ratio) for one in result]


def by_codec(codes: Iterable[Codes]) -> dict[Codec, list[int]]:
    """Places in `codes` by the codec that reads them; a collection opened twice has two."""
    places: dict[Codec, list[int]] = {}
    for i, one in enumerate(codes):
        places.setdefault(one.codec, []).append(i)
    return places
