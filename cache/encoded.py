"""EncodedPassage: a stored passage as its codec wrote it, decoded when somebody needs numbers and not before.

It can do what PassageStates can, so that whoever carries passages need not care which it has. Does not know stores, nor
where decoded numbers go.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.states import PassageStates, check_rows, window_ends


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
