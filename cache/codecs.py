"""Codec: float32 states to bytes and back, by FAISS standalone codecs and block scaling.

A codec is named by its FAISS factory string, optionally behind a scaling. `B<n>,SQ8` keeps a float16 scale for every n
consecutive numbers of a state, their largest magnitude: an outlier costs its block, and nothing is ever clipped.
`Z,B<n>,SQ8` first subtracts each dimension's trained mean and divides by its standard deviation. Trained numbers travel
as a raw float32 table whose length is checked, never as a FAISS index: a table may come from a shared store.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from cache import DEFAULT_CODEC, KNOWN_CODECS
from cache.errors import CodecError

_FLOAT16_MAX = 65504.0
_OVER_FLOAT16 = f"float16's {_FLOAT16_MAX:g}; use SQbf16 or Flat"
_SCALED = re.compile(r"(?P<standard>Z,)?B(?P<block>[1-9]\d{0,4}),SQ(?P<bits>[864])")
# Codecs whose codes are the numbers themselves, one after another, and the format of those.
_NUMBERS = {"Flat": "float32", "SQfp16": "float16", "SQbf16": "bfloat16"}
_SCALAR = ("SQ8", "SQ6", "SQ4")
_MIN_TRAINING_STATES = 32  # fewer say nothing about a range: whatever lies outside it is cut off
_PQ = re.compile(r"PQ(?P<num_parts>[1-9]\d{0,3})(?:x(?P<bits>[1-9]\d?))?")
_RQ = re.compile(r"RQ(?P<num_parts>[1-9]\d{0,2})x(?P<bits>[1-9]\d?)")
# 4,096 centroids per part: beyond that a codec trains for hours and its table outweighs a small collection.
_MAX_BITS = 12
_MANY_CENTROIDS = 64  # so many codes of a part reach as far as what they stand for, also where they are coarse

_T = TypeVar("_T", bound=np.generic)
_States = NDArray[np.float32]


class Codec:
    """One of `KNOWN_CODECS` (else raises CodecError) for vectors of `dim` numbers. Thread-safe once trained."""

    def __init__(self, factory: str, dim: int) -> None:
        self.factory = factory
        self.dim = dim
        self.number_format = _NUMBERS.get(factory, "")  # of codes that are numbers, little-endian
        self._table_length, self.min_training_states, self.num_centroids = _shape_of(factory, dim)
        self.needs_training = self._table_length > 0
        self._base = factory.rpartition(",")[2]
        index: Any = faiss.index_factory(dim, self._base)  # the stubs know only the base class
        self._index = index
        # Whether a sample is large enough is train()'s own check; FAISS would print a warning per sub-codebook.
        if self._base.startswith("PQ"):
            index.pq.cp.min_points_per_centroid = 1
            # Reorders centroids for Hamming search, which is not used, and takes far longer than the training.
            index.do_polysemous_training = False
        elif self._base.startswith("RQ"):
            index.rq.cp.min_points_per_centroid = 1
        scaled = _SCALED.fullmatch(factory)
        self._scaling = None if scaled is None else _BlockScaling(dim, scaled)
        self._num_scale_bytes = 0 if self._scaling is None else self._scaling.num_bytes  # of one state
        self.code_size_bytes = int(index.sa_code_size()) + self._num_scale_bytes
        if self._scaling is not None and not self.needs_training:
            self._set_trained(self._scaling.table)

    @classmethod
    def from_table(cls, factory: str, dim: int, table: bytes) -> "Codec":
        """A trained codec from its table. Raises CodecError when the length or a number is wrong."""
        codec = cls(factory, dim)
        if len(table) != (expected := codec._table_length * 4):
            raise CodecError(f"codec_table: {len(table)} bytes, expected {expected} for {factory} at dim {dim}")
        numbers = np.frombuffer(table, dtype="<f4").astype(np.float32)
        if not np.isfinite(numbers).all():
            raise CodecError(f"codec_table: of {factory} holds a number that is not finite")
        if codec.needs_training:
            codec._set_trained(numbers)
        return codec

    def train(self, sample: NDArray[np.float32]) -> None:
        """Learn the table from a sample (num_states, dim); does nothing for a codec that needs none."""
        if not self.needs_training:
            return
        sample = self._checked(sample, np.float32, self.dim, "sample")
        if not np.isfinite(sample).all():
            raise CodecError("sample: holds a number that is not finite")
        if sample.shape[0] < self.min_training_states:
            needed = f"{self.factory} trains on at least {self.min_training_states}; {DEFAULT_CODEC} needs no training"
            raise CodecError(f"sample: {sample.shape[0]} states, {needed}")
        if self._scaling is None:
            self._index.train(sample)
        else:
            self._set_trained(self._scaling.trained_on(sample))

    def table(self) -> bytes:
        """The trained numbers, little-endian float32; empty for a codec that needs no training."""
        self._check_trained()
        if not self.needs_training:
            return b""
        numbers = faiss.vector_to_array(self._trained) if self._scaling is None else self._scaling.table
        return numbers.astype("<f4").tobytes()

    def encode(self, states: NDArray[np.float32]) -> NDArray[np.uint8]:
        """float32 (n, dim) to uint8 (n, code_size_bytes). Raises CodecError at a value not finite or too large."""
        self._check_trained()
        states = self._checked(states, np.float32, self.dim, "states")
        if states.shape[0] == 0:
            return np.empty((0, self.code_size_bytes), dtype=np.uint8)
        largest = max(float(states.max()), -float(states.min()))
        if not np.isfinite(largest):  # NaN goes through max and min
            raise CodecError("states: hold NaN or infinity")
        if self._base == "SQfp16" and largest > _FLOAT16_MAX:
            raise CodecError(f"states: a value of magnitude {largest:.6g} is over {_OVER_FLOAT16}")
        if self._scaling is None:
            return np.asarray(self._index.sa_encode(states), dtype=np.uint8)
        scaled, scales = self._scaling.scale(states)
        return np.concatenate([scales, self._index.sa_encode(scaled)], axis=1)

    def count_outside(self, states: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Numbers of each state, float32 (n, dim), outside the range the table was trained for: (n,).

        SQ8, SQ6, SQ4: numbers more than half a step outside their dimension's range, which decode to its border.
        PQ, RQ: all numbers of a part (of RQ: of the state) that is farther from its decoded value than any code reaches
        from the mean of the codes; with less than 6 bits also farther than such coarse codes have to be.
        """
        if not self.needs_training or self._scaling is not None:
            return np.zeros(len(states), dtype=np.int64)  # fixed-point numbers, or scales that follow each block
        if self.factory in _SCALAR:
            low, width = faiss.vector_to_array(self._trained).reshape(2, self.dim)
            half_step = width / 2 ** (1 + int(self.factory.removeprefix("SQ")))
            outside = states < low - half_step
            outside |= states > low + width + half_step
            return np.asarray(np.count_nonzero(outside, axis=1), dtype=np.int64)
        radius = self._squared_radius
        error = (states - self.decode(codes)).reshape(len(states), len(radius), -1)  # (n, num_parts, dim / num_parts)
        outside = np.einsum("npd,npd->np", error, error) > radius
        return np.asarray(np.count_nonzero(outside, axis=1) * error.shape[2], dtype=np.int64)

    @cached_property
    def _squared_radius(self) -> NDArray[np.float32]:
        """How far the codes of each part (num_parts,) reach from their mean."""
        self._check_trained()
        # Each codebook (PQ has one per part) adds one centroid to the decoded part (RQ has one part).
        num_parts = 1 if self._base.startswith("RQ") else int(self._index.pq.M)
        # (num_parts, num_books, num_centroids, dim / num_parts)
        shape = num_parts, -1, self.num_centroids, self.dim // num_parts
        centroids = faiss.vector_to_array(self._trained).reshape(shape)
        apart = centroids - centroids.mean(axis=2, keepdims=True)
        squares = np.einsum("pbcd,pbcd->pbc", apart, apart)  # (num_parts, num_books, num_centroids)
        radius = np.square(np.sqrt(squares.max(axis=2)).sum(axis=1))
        if self.num_centroids < _MANY_CENTROIDS:
            # A few coarse codes lie nearer to their mean than to the values they encode. The best code of a normal
            # distribution with their spread has this mean squared error, by its rate-distortion function.
            kept = float(self.num_centroids) ** (-2 * centroids.shape[1] / centroids.shape[3])
            radius += 2 * squares.mean(axis=2).sum(axis=1) * kept / (1 - kept)
        return np.asarray(radius, dtype=np.float32)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, code_size_bytes) to a new float32 (n, dim)."""
        return self.decode_many([codes])

    def decode_many(self, parts: Sequence[NDArray[np.uint8]], out: _States | None = None) -> _States:
        """Codes of many passages, uint8 (n, code_size_bytes) each, decoded into one buffer, float32 (sum of n, dim)."""
        self._check_trained()
        parts = [self._checked(codes, np.uint8, self.code_size_bytes, "codes") for codes in parts]
        shape = (sum(codes.shape[0] for codes in parts), self.dim)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise CodecError(f"out: {out.dtype} {out.shape}, expected C-contiguous float32 {shape}")
        # Concatenated first, so that FAISS is called once: a call costs more than decoding a short passage.
        if self.number_format == "float32":
            np.concatenate([np.empty((0, out.shape[1] * 4), np.uint8), *parts], out=out.view(np.uint8))
        elif shape[0]:
            codes, num_bytes = parts[0] if len(parts) == 1 else np.concatenate(parts), self._num_scale_bytes
            # On this thread alone: a server decodes next to a forward pass, and is done before a second thread has
            # begun to help, which then spins on a core that the pass needs. OpenMP keeps the number per thread.
            num_threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)
            try:
                self._index.sa_decode(np.ascontiguousarray(codes[:, num_bytes:]), x=out)
            finally:
                faiss.omp_set_num_threads(num_threads)
            if self._scaling is not None:
                self._scaling.unscale(out, codes[:, :num_bytes])
        return out

    def new_index(self) -> faiss.Index:
        """An empty trained FAISS index of this codec for a segment; codes of a scaling go into it as plain bytes."""
        self._check_trained()
        if self._scaling is not None:
            return faiss.IndexScalarQuantizer(self.code_size_bytes, faiss.ScalarQuantizer.QT_8bit_direct)
        return faiss.clone_index(self._index)

    def _set_trained(self, table: NDArray[np.float32]) -> None:
        faiss.copy_array_to_vector(table if self._scaling is None else self._scaling.load(table), self._trained)
        if self._base.startswith("RQ"):
            self._index.rq.is_trained = True
        self._index.is_trained = True

    @property
    def _trained(self) -> Any:
        return attrgetter({"PQ": "pq.centroids", "RQ": "rq.codebooks"}.get(self._base[:2], "sq.trained"))(self._index)

    def _check_trained(self) -> None:
        if not self._index.is_trained:
            raise CodecError(f"codec: {self.factory} must be trained on a sample before it is used")

    @staticmethod
    def _checked(array: NDArray[_T], dtype: type[_T], width: int, field: str) -> NDArray[_T]:
        if array.ndim != 2 or array.shape[1] != width or array.dtype != dtype:
            raise CodecError(f"{field}: {array.dtype} {array.shape}, expected {dtype.__name__} (n, {width})")
        return np.ascontiguousarray(array)


def _shape_of(factory: str, dim: int) -> tuple[int, int, int]:
    """Numbers in the trained table, states needed to train, and centroids of a part, or 0."""
    if not 1 <= dim <= 65536:
        raise CodecError(f"dim: {dim}, expected 1 to 65536")
    scaled = _SCALED.fullmatch(factory)
    if factory in _SCALAR or (scaled and scaled["standard"]):  # minimum and range, or mean and deviation, per dimension
        return 2 * dim, _MIN_TRAINING_STATES, 0
    if scaled or factory in _NUMBERS:
        return 0, 0, 0
    for pattern in (_PQ, _RQ):
        if match := pattern.fullmatch(factory):
            num_parts, bits = int(match["num_parts"]), int(match["bits"] or 8)
            if bits > _MAX_BITS:
                raise CodecError(f"codec: {factory} has {bits} bits per part, at most {_MAX_BITS} are supported")
            if pattern is _RQ:
                # FAISS starts from the principal directions of the sample, and fails where they are fewer than dim.
                return num_parts * 2**bits * dim, max(2**bits, dim), 2**bits
            if dim % num_parts:
                raise CodecError(f"codec: {factory} cannot cut {dim} dimensions into {num_parts} equal parts")
            return 2**bits * dim, 2**bits, 2**bits
    raise CodecError(f"codec: {factory!r} is unknown, expected one of {KNOWN_CODECS}")


class _BlockScaling:
    """Scales of the blocks of each state, stored before its codes as little-endian float16; the last may be short."""

    def __init__(self, dim: int, named: re.Match[str]) -> None:
        self.dim = dim
        self.block = min(int(named["block"]), dim)
        self._middle = 2 ** (int(named["bits"]) - 1)
        self._standardises = named["standard"] is not None
        self.table = np.repeat(np.array([0, 1], np.float32), dim)  # means and standard deviations
        self._starts = np.arange(0, dim, self.block)
        self.num_bytes = 2 * len(self._starts)  # of the scales of one state

    def trained_on(self, sample: NDArray[np.float32]) -> NDArray[np.float32]:
        """A table from states (num_states, dim); a nearly constant dimension gets 1/1000 of the usual deviation."""
        deviation = sample.std(axis=0, dtype=np.float64)
        floor = 1e-3 * float(np.median(deviation)) or 1e-3 * float(deviation.max()) or 1.0
        means = sample.mean(axis=0, dtype=np.float64)
        return np.concatenate([means, np.maximum(deviation, floor)]).astype(np.float32)

    def load(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """Use a table; returns minimum and range per dimension, as FAISS' scalar quantizer is trained.

        Its levels lie even from -1 to 1 about 0. FAISS cuts [minimum, minimum + range] into 2^bits - 1 steps and
        decodes to the middle of one. Here the middle of step 2^(bits - 1) is 0 itself: a constant dimension would
        otherwise always be off to the same side.
        """
        deviations, middle = table[self.dim :], self._middle
        if not (deviations > 0).all():
            raise CodecError(f"codec_table: a standard deviation of {deviations.min():g}, expected more than 0")
        self.table = table
        minimum, spread = -(middle + 0.5) / (middle - 1), (2 * middle - 1) / (middle - 1)
        return np.concatenate([deviations * np.float32(minimum), deviations * np.float32(spread)])

    def scale(self, states: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """States (n, dim) divided by their scales, and the scales (n, num_bytes)."""
        centred = states - self.table[: self.dim]
        magnitudes = np.abs(centred)
        magnitudes /= self.table[self.dim :]
        largest = np.maximum.reduceat(magnitudes, self._starts, axis=1)  # (n, num_blocks)
        if float(largest.max()) > _FLOAT16_MAX:
            magnitude = float(np.abs(states).max())
            raise CodecError(f"states: a value of magnitude {magnitude:.6g} needs a scale over {_OVER_FLOAT16}")
        scales = largest.astype("<f2")
        divisors = scales.astype(np.float32)
        divisors[divisors == 0] = 1.0
        self._by_blocks(centred, 1.0 / divisors)
        return centred, scales.view(np.uint8)

    def unscale(self, states: NDArray[np.float32], scales: NDArray[np.uint8]) -> None:
        with np.errstate(invalid="ignore"):  # forged scales may be infinite; the decoded states are checked elsewhere
            self._by_blocks(states, np.ascontiguousarray(scales).view("<f2").astype(np.float32))
            if self._standardises:
                states += self.table[: self.dim]

    def _by_blocks(self, states: NDArray[np.float32], factors: NDArray[np.float32]) -> None:
        """states (n, dim) times factors (n, num_blocks), in place."""
        if self.dim % self.block:
            states *= np.repeat(factors, self.block, axis=1)[:, : self.dim]
        else:
            blocks = states.reshape(len(states), -1, self.block)  # a view: rows are contiguous
            blocks *= factors[:, :, None]
