"""PassageStates: the token states of one passage, pooled, with what is needed to pool them further.

Does not know how they were encoded, under which id they are kept, or in which codec.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.errors import RatioError
from cache.pooling import num_pooled, repool


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
