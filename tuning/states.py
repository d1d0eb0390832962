"""Where passage states come from, a chunk at a time: encoded here, or read from a collection.

Chunks bound memory: a whole collection's unpooled states do not fit. Does not know queries, and pools
nothing beyond the ratio it is asked for; whoever reads re-pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache.collection import Collection
from cache.states import PassageStates, text_digest
from encoder_worker.batching import plan
from encoder_worker.passage_encoder import EncodingFailed, PassageEncoder, Tokenized
from tuning.progress import SILENT, Progress

CHUNK_BYTES = 256 << 20
STORE_READ_PASSAGES = 64
_NOT_YET = EncodingFailed("not_encoded", "not encoded")


class StateSource(Protocol):
    """Gives each passage's states once."""

    @property
    def ratio(self) -> int:
        """The compression ratio the states come at; they can be read at any multiple."""
        ...

    def chunks(self, passage_ids: Sequence[str], progress: Progress = SILENT) -> Iterator[Mapping[str, PassageStates]]:
        """States by passage id, in an order that suits the source; ids that it does not have are absent."""
        ...


class EncodedStates:
    """States of texts, encoded when they are asked for; empty texts and those that do not encode have none."""

    stage = "encode (tokens)"

    def __init__(
        self,
        encoder: PassageEncoder,
        texts: Mapping[str, str],
        ratio: int,
        *,
        split: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """
        Args:
            split: texts over the passage limit become windows instead of being cut.
        """
        self.ratio = ratio
        self._encoder = encoder
        self._texts = texts
        self._split = split
        self._chunk_bytes = chunk_bytes

    def chunks(self, passage_ids: Sequence[str], progress: Progress = SILENT) -> Iterator[Mapping[str, PassageStates]]:
        known = [p for p in passage_ids if p in self._texts]
        tokenized = self._encoder.tokenize([self._texts[p] for p in known], split=self._split)
        passages = {p: passage for p, passage in zip(known, tokenized, strict=True) if passage.failed is None}
        progress.begin(self.stage, sum(passage.num_tokens for passage in tokenized))
        state_bytes = 4 * self._encoder.dim
        chunk: dict[str, Tokenized] = {}
        num_bytes = 0
        # The longest first, so that memory runs out at once or not at all, and the time left is
        # guessed too high rather than too low.
        for p in sorted(passages, key=lambda p: -passages[p].num_tokens):
            chunk[p] = passages[p]
            num_bytes += passages[p].num_states(self.ratio) * state_bytes
            if num_bytes >= self._chunk_bytes:
                yield self._encode(chunk, progress)
                chunk, num_bytes = {}, 0
        if chunk:
            yield self._encode(chunk, progress)

    def _encode(self, chunk: Mapping[str, Tokenized], progress: Progress) -> dict[str, PassageStates]:
        windows = [window for passage in chunk.values() for window in passage.windows]
        owners = [p for p, passage in chunk.items() for _ in passage.windows]
        encoded: list[NDArray[np.float32] | EncodingFailed] = [_NOT_YET] * len(windows)
        for rows in plan([len(window) for window in windows], self._encoder.limits):
            batch = [windows[row] for row in rows]
            for row, states in zip(rows, self._encoder.encode(batch, self.ratio), strict=True):
                encoded[row] = states
            progress.advance(self.stage, sum(map(len, batch)))
        parts: dict[str, list[NDArray[np.float32] | EncodingFailed]] = {p: [] for p in chunk}
        for p, states in zip(owners, encoded, strict=True):
            parts[p].append(states)
        joined = {p: chunk[p].join(own, self.ratio, text_digest(self._texts[p])) for p, own in parts.items()}
        return {p: states for p, states in joined.items() if isinstance(states, PassageStates)}


class StoredStates:
    """States of an indexed collection; a damaged passage counts as one it does not have."""

    stage = "read (passages)"

    def __init__(self, collection: Collection, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._collection = collection
        self._chunk_bytes = chunk_bytes

    @property
    def ratio(self) -> int:
        return self._collection.manifest.compression_ratio

    def chunks(self, passage_ids: Sequence[str], progress: Progress = SILENT) -> Iterator[Mapping[str, PassageStates]]:
        progress.begin(self.stage, len(passage_ids))
        chunk: dict[str, PassageStates] = {}
        num_bytes = 0
        for start in range(0, len(passage_ids), STORE_READ_PASSAGES):
            part = passage_ids[start : start + STORE_READ_PASSAGES]
            read = zip(part, self._collection.get_many(part), strict=True)
            found = {p: states for p, states in read if isinstance(states, PassageStates)}
            progress.advance(self.stage, len(part))
            chunk |= found
            num_bytes += sum(states.nbytes for states in found.values())
            if num_bytes >= self._chunk_bytes:
                yield chunk
                chunk, num_bytes = {}, 0
        if chunk:
            yield chunk
