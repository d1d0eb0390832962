"""Score cache: margins of earlier requests, so that a prompt and passage that come again cost no forward pass.

Never stale: a pair is known by all that its margin depends on besides the model, and each model has its own cache. An
entry takes 24 bytes of an array, in which many pairs are looked up in one step.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

WAYS = 8  # entries of one place, which the digest decides; there the one that was read least recently is replaced
_ENTRY = np.dtype([("digest", "<u8", 2), ("margin", "<f4"), ("read", "<u4")])  # read: when; 0 in an entry that is free
_MAX_CLOCK = 0xFFFF_FFFF  # then it begins again: for a while the wrong entries are replaced

_Digests = NDArray[np.uint64]  # (num_pairs, 2)


class ScoreCache:
    """Margins within a byte budget. For one thread. Memory is taken as entries fill it."""

    def __init__(self, max_bytes: int) -> None:
        """Under 192 bytes, one place, nothing is kept."""
        self.num_hits = self.num_misses = self.num_entries = 0
        self._entries = np.zeros((max_bytes // (WAYS * _ENTRY.itemsize), WAYS), _ENTRY)
        self._clock = 0

    @property
    def enabled(self) -> bool:
        return len(self._entries) > 0

    @property
    def num_bytes(self) -> int:
        return self.num_entries * _ENTRY.itemsize

    def get(self, pairs: Sequence[bytes], scope: bytes = b"") -> list[float | None]:
        """Margins by the identity of their pairs, None where it is not known; each scope has its own."""
        if not self.enabled or not pairs:
            return [None] * len(pairs)
        places, ways, found = self._find(_digests(pairs, scope))
        found &= [pair != b"" for pair in pairs]
        self._clock = self._clock % _MAX_CLOCK + 1
        self._entries["read"][places[found], ways[found]] = self._clock
        self.num_hits += (num_found := int(found.sum()))
        self.num_misses += len(pairs) - num_found
        margins = self._entries["margin"][places, ways].tolist()
        return [margin if known else None for margin, known in zip(margins, found.tolist(), strict=True)]

    def put(self, pairs: Sequence[bytes], margins: Sequence[float | None], scope: bytes = b"") -> None:
        """Keeps the margins that are finite, of pairs that have an identity."""
        given = zip(pairs, margins, strict=True)
        known = {pair: margin for pair, margin in given if pair and margin is not None and math.isfinite(margin)}
        if not self.enabled or not known:
            return
        rows = np.zeros(len(known), _ENTRY)
        rows["digest"], rows["margin"], rows["read"] = _digests([*known], scope), [*known.values()], max(1, self._clock)
        for _ in range(WAYS):  # one of each place at a time
            if not len(rows):
                break
            places, ways, found = self._find(rows["digest"])
            places, first = np.unique(places, return_index=True)
            ways = np.where(found[first], ways[first], self._entries["read"][places].argmin(1))
            self.num_entries += int((self._entries["read"][places, ways] == 0).sum())
            self._entries[places, ways] = rows[first]
            rows = np.delete(rows, first)

    def _find(self, digests: _Digests) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Of each pair its place, the way where it is, and whether it is there."""
        places = (digests[:, 0] % np.uint64(len(self._entries))).astype(np.int64)
        same = (self._entries["digest"][places] == digests[:, None]).all(2)
        return places, same.argmax(1), same.any(1)


def _digests(pairs: Sequence[bytes], scope: bytes) -> _Digests:
    key = blake2b(scope).digest() if scope else b""
    digests = b"".join(blake2b(pair, digest_size=16, key=key).digest() for pair in pairs)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)
