"""Which ids came already, and where. Some 20 bytes an id, so that a hundred million fit."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from encoder_worker.sources import Passage, Place, Reason, Refused

_MERGE_AT = 1 << 16
_LINE_BITS = 40


class SeenIds:
    """Ids by 64-bit hash: a dict of the latest, merged into sorted arrays of doubling size.

    Two different ids share a hash once in some three hundred thousand runs of ten million ids; the
    second one is then refused as a duplicate, visibly.
    """

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._latest: dict[int, int] = {}  # hash -> number of the source and line in one
        self._sorted: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []  # the same, large to small

    def once(self, passage: Passage) -> Passage | Refused:
        """The passage, or why it is refused where its id came before."""
        first = self.first_place(passage.passage_id, passage.place)
        if first is None:
            return passage
        message = f"id {passage.passage_id!r} came before, at {first}; the first one counts"
        return Refused(passage.place, passage.passage_id, Reason.DUPLICATE_ID, message)

    def first_place(self, passage_id: str, place: Place) -> Place | None:
        """Where the id came first, or None where this is the first time; remembers it then."""
        key = int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")
        found = self._latest.get(key)
        if found is None:
            found = self._search(key)
        if found is not None:
            return Place(self._sources[found >> _LINE_BITS], found & ((1 << _LINE_BITS) - 1))
        if not self._sources or self._sources[-1] != place.source:
            self._sources.append(place.source)
        self._latest[key] = (len(self._sources) - 1) << _LINE_BITS | place.line
        if len(self._latest) >= _MERGE_AT:
            self._merge()
        return None

    def _search(self, key: int) -> int | None:
        wanted = np.uint64(key)
        for hashes, places in self._sorted:
            at = int(np.searchsorted(hashes, wanted))
            if at < len(hashes) and hashes[at] == wanted:
                return int(places[at])
        return None

    def _merge(self) -> None:
        hashes = np.fromiter(self._latest.keys(), np.uint64, len(self._latest))
        places = np.fromiter(self._latest.values(), np.uint64, len(self._latest))
        self._latest = {}
        while self._sorted and len(self._sorted[-1][0]) <= len(hashes):
            more_hashes, more_places = self._sorted.pop()
            hashes, places = np.concatenate([more_hashes, hashes]), np.concatenate([more_places, places])
        order = np.argsort(hashes)
        self._sorted.append((hashes[order], places[order]))
