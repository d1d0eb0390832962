"""Which ids of an input came already. Without the model: `preread evaluate --score-only` reads a corpus as well."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from encoder_worker.sources import Place, Reason, Refused, SourcePassage

_MERGE_AT = 1 << 16
_LINE_BITS = 40


class SeenIds:
    """Ids that came already, and where, in some 20 bytes each, so that a hundred million fit.

    By 64-bit hash: a dict of the latest, merged into sorted arrays of doubling size. Two different ids share a hash
    once in some three hundred thousand runs of ten million ids; the second one is then refused, visibly.
    """

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._latest: dict[int, int] = {}  # hash -> number of the source and line in one
        self._sorted: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []  # the same, large to small

    def once(self, passage: SourcePassage) -> SourcePassage | Refused:
        """The passage, or the reason it is refused where its id came before."""
        key = int.from_bytes(hashlib.blake2b(passage.passage_id.encode(), digest_size=8).digest(), "little")
        found = self._latest.get(key)
        wanted = np.uint64(key)
        for hashes, places in self._sorted if found is None else ():
            at = int(np.searchsorted(hashes, wanted))
            if at < len(hashes) and hashes[at] == wanted:
                found = int(places[at])
                break
        if found is not None:
            first = Place(self._sources[found >> _LINE_BITS], found & ((1 << _LINE_BITS) - 1))
            message = f"id {passage.passage_id!r} came before, at {first}; the first one counts"
            return Refused(passage.place, passage.passage_id, Reason.DUPLICATE_ID, message)
        if not self._sources or self._sources[-1] != passage.place.source:
            self._sources.append(passage.place.source)
        self._latest[key] = (len(self._sources) - 1) << _LINE_BITS | passage.place.line
        if len(self._latest) >= _MERGE_AT:
            hashes = np.fromiter(self._latest.keys(), np.uint64, len(self._latest))
            places = np.fromiter(self._latest.values(), np.uint64, len(self._latest))
            self._latest = {}
            while self._sorted and len(self._sorted[-1][0]) <= len(hashes):
                more_hashes, more_places = self._sorted.pop()
                hashes, places = np.concatenate([more_hashes, hashes]), np.concatenate([more_places, places])
            order = np.argsort(hashes)
            self._sorted.append((hashes[order], places[order]))
        return passage
