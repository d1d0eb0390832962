"""Block scaling: numbers divided by what is large around them, before a scalar quantizer with a fixed range sees them.

`B<n>,SQ8` keeps a float16 scale for every n consecutive numbers of a state, their largest magnitude, so that an outlier
costs its block and nothing is ever cut off, whatever a training sample had seen. `Z,B<n>,SQ8` first subtracts each
dimension's mean and divides by its standard deviation, which a sample has to tell. Does not know FAISS.
"""

import re
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cache.errors import CodecError

FLOAT16_MAX = 65504.0
_NAME = re.compile(r"(?P<standard>Z,)?B(?P<block>[1-9]\d{0,4}),SQ(?P<bits>[864])")


class BlockScaling:
    """Scales of the blocks of each state, stored before its codes as little-endian float16.

    The last block is short where `block` does not divide `dim`. Thread-safe once trained or loaded.
    """

    def __init__(self, dim: int, block: int, *, standardises: bool) -> None:
        self.dim = dim
        self.block = min(block, dim)
        self._standardises = standardises
        self._mean = np.zeros(dim, dtype=np.float32)
        self._deviation = np.ones(dim, dtype=np.float32)
        self._starts = np.arange(0, dim, self.block)

    @classmethod
    def named(cls, factory: str, dim: int) -> Self | None:
        """The scaling of a codec's name; None where it has none."""
        match = _NAME.fullmatch(factory)
        return None if match is None else cls(dim, int(match["block"]), standardises=match["standard"] is not None)

    @property
    def num_bytes(self) -> int:
        """Of the scales of one state."""
        return 2 * len(self._starts)

    @property
    def table_length(self) -> int:
        """Trained numbers: means and deviations, or none."""
        return 2 * self.dim if self._standardises else 0

    def train(self, sample: NDArray[np.float32]) -> None:
        """From states (num_states, dim). A dimension that hardly moves is given a thousandth of the usual deviation."""
        self._mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = sample.std(axis=0, dtype=np.float64)
        floor = 1e-3 * float(np.median(deviation)) or 1e-3 * float(deviation.max()) or 1.0
        self._deviation = np.maximum(deviation, floor).astype(np.float32)

    def table(self) -> NDArray[np.float32]:
        return np.concatenate([self._mean, self._deviation])

    def load(self, table: NDArray[np.float32]) -> None:
        """Raises CodecError for a deviation that is not positive."""
        mean, deviation = table[: self.dim], table[self.dim :]
        if not (deviation > 0).all():
            raise CodecError(f"codec_table: a standard deviation of {deviation.min():g}, expected more than 0")
        self._mean, self._deviation = mean.copy(), deviation.copy()

    def ranges(self, base: str) -> NDArray[np.float32]:
        """What FAISS calls trained, minimum and range per dimension, so that levels lie evenly from -1 to 1 about 0.

        FAISS cuts [minimum, minimum + range] into 2^bits - 1 steps and gives back the middle of one. Here the middle
        of step 2^(bits - 1) is 0 itself: a dimension that never moves would otherwise always be off to the same side.
        """
        middle = 2 ** (int(base.removeprefix("SQ")) - 1)
        minimum, spread = -(middle + 0.5) / (middle - 1), (2 * middle - 1) / (middle - 1)
        return np.concatenate([self._deviation * np.float32(minimum), self._deviation * np.float32(spread)])

    def scale(self, states: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """States (n, dim) over their scales, and the scales (n, num_bytes). Raises CodecError for too large ones."""
        centred = states - self._mean
        magnitudes = np.abs(centred)
        magnitudes /= self._deviation
        largest = np.maximum.reduceat(magnitudes, self._starts, axis=1)  # (n, num_blocks)
        if float(largest.max()) > FLOAT16_MAX:
            raise CodecError(
                f"states: a value of magnitude {float(np.abs(states).max()):.6g} needs a scale over float16's "
                f"{FLOAT16_MAX:g}; use SQbf16 or Flat"
            )
        scales = largest.astype("<f2")
        divisors = scales.astype(np.float32)
        divisors[divisors == 0] = 1.0
        self._by_blocks(centred, 1.0 / divisors)
        return centred, scales.view(np.uint8)

    def unscale(self, states: NDArray[np.float32], scales: NDArray[np.uint8]) -> None:
        """In place, the other way round."""
        with np.errstate(invalid="ignore"):  # forged scales may be infinite; what comes of it is looked for elsewhere
            self._by_blocks(states, np.ascontiguousarray(scales).view("<f2").astype(np.float32))
            if self._standardises:
                states += self._mean

    def _by_blocks(self, states: NDArray[np.float32], factors: NDArray[np.float32]) -> None:
        """states (n, dim) times factors (n, num_blocks), in place."""
        if self.dim % self.block:
            states *= np.repeat(factors, self.block, axis=1)[:, : self.dim]
        else:
            blocks = states.reshape(len(states), -1, self.block)  # a view: rows are contiguous
            blocks *= factors[:, :, None]
