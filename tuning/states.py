"""Where passage states come from, a chunk at a time: encoded here, or read from a collection.

Chunks bound memory: a whole collection's unpooled states do not fit. Does not know queries, and pools
nothing beyond the ratio it is asked for; whoever reads re-pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from cache.collection import Collection
from cache.states import PassageStates, text_digest
from checkpoint import Checkpoint, TokenizedPassage
from encoder_worker.encoder import Encoder
from tuning.batches import by_length
from tuning.progress import SILENT, Progress

CHUNK_BYTES = 256 << 20
ENCODE_TOKENS = {"cpu": 4096, "cuda": 65_536}  # padded tokens a batch
STORE_READ_PASSAGES = 64


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
    """States of texts, encoded when they are asked for."""

    stage = "encode"

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: Encoder,
        texts: Mapping[str, str],
        ratio: int,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.ratio = ratio
        self._checkpoint = checkpoint
        self._encoder = encoder
        self._texts = texts
        self._chunk_bytes = chunk_bytes
        self._max_batch_tokens = ENCODE_TOKENS[encoder.device_name.split(":")[0]]

    def chunks(self, passage_ids: Sequence[str], progress: Progress = SILENT) -> Iterator[Mapping[str, PassageStates]]:
        known = [p for p in passage_ids if p in self._texts]
        tokens = dict(zip(known, self._checkpoint.text.passages([self._texts[p] for p in known]), strict=True))
        progress.begin(self.stage, len(known))
        chunk: dict[str, PassageStates] = {}
        num_bytes = 0
        for batch in by_length(known, lambda p: len(tokens[p].ids), self._max_batch_tokens):
            encoded = self._encode({p: tokens[p] for p in batch})
            progress.advance(self.stage, len(batch))
            chunk |= encoded
            num_bytes += sum(states.nbytes for states in encoded.values())
            if num_bytes >= self._chunk_bytes:
                yield chunk
                chunk, num_bytes = {}, 0
        if chunk:
            yield chunk

    def _encode(self, batch: Mapping[str, TokenizedPassage]) -> dict[str, PassageStates]:
        states = self._encoder.encode([passage.ids for passage in batch.values()], self.ratio)
        return {
            p: PassageStates(own, (len(passage.ids),), self.ratio, passage.truncated, text_digest(self._texts[p]))
            for (p, passage), own in zip(batch.items(), states, strict=True)
        }


class StoredStates:
    """States of an indexed collection; a damaged passage counts as one it does not have."""

    stage = "read"

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
