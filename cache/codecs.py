"""Codec: float32 states to bytes and back, by FAISS standalone codecs.

A codec is named by its FAISS factory string. Its trained numbers travel as a raw float32 table whose length is checked,
never as a serialised FAISS index: a table may come from a shared store and is not trusted. Does not know passages.
"""

import re
from typing import Any, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from cache.errors import CodecError

DEFAULT_CODEC = "SQfp16"
KNOWN_CODECS = "Flat, SQfp16, SQbf16, SQ8, SQ4, PQ<m>[x<bits>], RQ<m>x<bits>"

_FLOAT16_MAX = 65504.0
_PQ = re.compile(r"PQ(?P<num_parts>[1-9]\d{0,3})(?:x(?P<bits>[1-9]\d?))?")
_RQ = re.compile(r"RQ(?P<num_parts>[1-9]\d{0,2})x(?P<bits>[1-9]\d?)")
# 4,096 centroids per part: beyond that a codec trains for hours and its table outweighs a small collection.
_MAX_BITS = 12

_T = TypeVar("_T", bound=np.generic)


class Codec:
    """One FAISS standalone codec for vectors of `dim` numbers.

    Thread-safe once trained. Raises CodecError for a string that is not one of `KNOWN_CODECS`.
    """

    def __init__(self, factory: str, dim: int) -> None:
        self.factory = factory
        self.dim = dim
        self._table_length, self.min_training_states = _shape_of(factory, dim)
        index: Any = faiss.index_factory(dim, factory)  # the stubs know only the base class
        self._index = index
        # Whether a sample is large enough is train()'s own check; FAISS would print a warning per sub-codebook.
        if factory.startswith("PQ"):
            index.pq.cp.min_points_per_centroid = 1
            # Reorders centroids for Hamming search, which nobody does here, and takes far longer than the training.
            index.do_polysemous_training = False
        elif factory.startswith("RQ"):
            index.rq.cp.min_points_per_centroid = 1

    @classmethod
    def from_table(cls, factory: str, dim: int, table: bytes) -> "Codec":
        """A trained codec from its table. Raises CodecError where the length or a number is wrong."""
        codec = cls(factory, dim)
        if len(table) != codec._table_length * 4:
            raise CodecError(
                f"codec_table: {len(table)} bytes, expected {codec._table_length * 4} for {factory} at dim {dim}"
            )
        numbers = np.frombuffer(table, dtype="<f4").astype(np.float32)
        if not np.isfinite(numbers).all():
            raise CodecError(f"codec_table: of {factory} holds a number that is not finite")
        if codec.needs_training:
            faiss.copy_array_to_vector(numbers, codec._trained_vector())
            if factory.startswith("RQ"):
                codec._index.rq.is_trained = True
            codec._index.is_trained = True
        return codec

    @property
    def needs_training(self) -> bool:
        return self._table_length > 0

    @property
    def is_trained(self) -> bool:
        return bool(self._index.is_trained)

    @property
    def code_size_bytes(self) -> int:
        """Bytes of one state."""
        return int(self._index.sa_code_size())

    def train(self, sample: NDArray[np.float32]) -> None:
        """Learn the table from a sample (num_states, dim); does nothing for a codec that needs none."""
        if not self.needs_training:
            return
        sample = self._checked(sample, np.float32, self.dim, "sample")
        if not np.isfinite(sample).all():
            raise CodecError("sample: holds a number that is not finite")
        if sample.shape[0] < self.min_training_states:
            raise CodecError(
                f"sample: {sample.shape[0]} states, {self.factory} trains on at least {self.min_training_states}"
            )
        self._index.train(sample)

    def table(self) -> bytes:
        """The trained numbers, little-endian float32; empty for a codec that needs no training."""
        self._check_trained()
        if not self.needs_training:
            return b""
        return faiss.vector_to_array(self._trained_vector()).astype("<f4").tobytes()

    def encode(self, states: NDArray[np.float32]) -> NDArray[np.uint8]:
        """float32 (n, dim) to uint8 (n, code_size_bytes).

        Raises CodecError for a value too large for SQfp16, which would come back as infinity.
        """
        self._check_trained()
        states = self._checked(states, np.float32, self.dim, "states")
        if states.shape[0] == 0:
            return np.empty((0, self.code_size_bytes), dtype=np.uint8)
        if self.factory == "SQfp16":
            largest = max(float(states.max()), -float(states.min()))
            if largest > _FLOAT16_MAX:
                raise CodecError(
                    f"states: a value of magnitude {largest:.6g} is over float16's {_FLOAT16_MAX:g}; use SQbf16 or Flat"
                )
        return np.asarray(self._index.sa_encode(states), dtype=np.uint8)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, code_size_bytes) to a new float32 (n, dim)."""
        self._check_trained()
        codes = self._checked(codes, np.uint8, self.code_size_bytes, "codes")
        if codes.shape[0] == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        return np.asarray(self._index.sa_decode(codes), dtype=np.float32)

    def new_index(self) -> faiss.Index:
        """An empty trained FAISS index of this codec, for writing a segment."""
        self._check_trained()
        return faiss.clone_index(self._index)

    def _trained_vector(self) -> Any:
        if self.factory.startswith("PQ"):
            return self._index.pq.centroids
        if self.factory.startswith("RQ"):
            return self._index.rq.codebooks
        return self._index.sq.trained

    def _check_trained(self) -> None:
        if not self.is_trained:
            raise CodecError(f"codec: {self.factory} must be trained on a sample before it is used")

    @staticmethod
    def _checked(array: NDArray[_T], dtype: type[_T], width: int, field: str) -> NDArray[_T]:
        if array.ndim != 2 or array.shape[1] != width or array.dtype != dtype:
            raise CodecError(f"{field}: {array.dtype} {array.shape}, expected {dtype.__name__} (n, {width})")
        return np.ascontiguousarray(array)


def _shape_of(factory: str, dim: int) -> tuple[int, int]:
    """Numbers in the trained table, and states needed to train; both 0 where nothing is trained."""
    if not 1 <= dim <= 65536:
        raise CodecError(f"dim: {dim}, expected 1 to 65536")
    if factory in ("Flat", "SQfp16", "SQbf16"):
        return 0, 0
    if factory in ("SQ8", "SQ4"):
        return 2 * dim, 1  # per dimension: minimum and range
    for pattern in (_PQ, _RQ):
        if match := pattern.fullmatch(factory):
            num_parts, bits = int(match["num_parts"]), int(match["bits"] or 8)
            if bits > _MAX_BITS:
                raise CodecError(f"codec: {factory} has {bits} bits per part, at most {_MAX_BITS} are supported")
            if pattern is _RQ:
                return num_parts * 2**bits * dim, 2**bits
            if dim % num_parts:
                raise CodecError(f"codec: {factory} cannot cut {dim} dimensions into {num_parts} equal parts")
            return 2**bits * dim, 2**bits
    raise CodecError(f"codec: {factory!r} is unknown, expected one of {KNOWN_CODECS}")
