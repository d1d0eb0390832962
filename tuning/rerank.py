"""Every candidate of every query scored at every ratio, from states that are made, or read, once per passage.

States come a chunk at a time, because the unpooled states of a whole collection do not fit into memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache.collection import Collection
from cache.states import PassageStates
from decoder_server.engine.scheduler import split_by_length
from decoder_server.models.backend import Backend, Pair, Prompt
from decoder_server.models.loading import BATCH_TOKENS
from encoder_worker.passage_encoder import PassageEncoder, Tokenized
from tuning.progress import SILENT, Advance, StageProgress, ignore
from tuning.trec import Run, rank

CHUNK_BYTES = 256 << 20
STORE_READ_PASSAGES = 64

States = Mapping[str, PassageStates]  # by passage id


class StateSource(Protocol):
    """Gives each passage's states once."""

    @property
    def ratio(self) -> int:
        """The compression ratio of the states; they can be read at any multiple."""
        ...

    def chunks(self, passage_ids: Sequence[str], progress: StageProgress = SILENT) -> Iterator[States]:
        """States in the source's own order; ids that it does not have are absent."""
        ...


class EncodedStates:
    """States of texts, encoded on demand; empty texts and those that do not encode have none."""

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

    def chunks(self, passage_ids: Sequence[str], progress: StageProgress = SILENT) -> Iterator[States]:
        known = [p for p in passage_ids if p in self._texts]
        tokenized = self._encoder.tokenize([self._texts[p] for p in known], split=self._split)
        passages = {p: passage for p, passage in zip(known, tokenized, strict=True) if passage.failed is None}
        advance = progress.begin("encode (tokens)", sum(passage.num_tokens for passage in tokenized))
        state_bytes = 4 * self._encoder.dim
        chunk: dict[str, Tokenized] = {}
        num_bytes = 0
        # The longest first, so that memory runs out at once or not at all, and the time left is
        # estimated too high rather than too low.
        for p in sorted(passages, key=lambda p: -passages[p].num_tokens):
            chunk[p] = passages[p]
            num_bytes += passages[p].num_states(self.ratio) * state_bytes
            if num_bytes >= self._chunk_bytes:
                yield self._encode(chunk, advance)
                chunk, num_bytes = {}, 0
        if chunk:
            yield self._encode(chunk, advance)

    def _encode(self, chunk: Mapping[str, Tokenized], advance: Advance) -> States:
        encoded, ids = {}, list(chunk)
        for i, states in self._encoder.encode_all(list(chunk.values()), self.ratio):
            advance(chunk[ids[i]].num_tokens)
            if isinstance(states, PassageStates):
                encoded[ids[i]] = states
        return encoded


class StoredStates:
    """States of an indexed collection; a corrupt passage counts as absent."""

    def __init__(self, collection: Collection, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.ratio = collection.manifest.compression_ratio
        self._collection = collection
        self._chunk_bytes = chunk_bytes

    def chunks(self, passage_ids: Sequence[str], progress: StageProgress = SILENT) -> Iterator[States]:
        advance = progress.begin("read (passages)", len(passage_ids))
        chunk: dict[str, PassageStates] = {}
        num_bytes = 0
        for start in range(0, len(passage_ids), STORE_READ_PASSAGES):
            part = passage_ids[start : start + STORE_READ_PASSAGES]
            read = zip(part, self._collection.get_many(part), strict=True)
            found = {p: states for p, states in read if isinstance(states, PassageStates)}
            advance(len(part))
            chunk |= found
            num_bytes += sum(states.nbytes for states in found.values())
            if num_bytes >= self._chunk_bytes:
                yield chunk
                chunk, num_bytes = {}, 0
        if chunk:
            yield chunk


class Pairs:
    """Every query with its candidates, in one flat order that margins keep."""

    def __init__(self, candidates: Mapping[str, Sequence[str]]) -> None:
        self.candidates = {q: list(found) for q, found in candidates.items()}
        # passage_id -> its (query_id, flat index), in order of first appearance
        self.places: dict[str, list[tuple[str, int]]] = {}
        self.num = 0
        for query_id, found in self.candidates.items():
            for p in found:
                self.places.setdefault(p, []).append((query_id, self.num))
                self.num += 1

    def split(self, flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """By query, the values of its candidates."""
        ends = np.cumsum([len(found) for found in self.candidates.values()])
        return dict(zip(self.candidates, np.split(flat, ends[:-1]), strict=True))


@dataclass
class Reranked:
    """One run per ratio, and candidates that could not be scored as usual."""

    runs: dict[int, Run]
    missing_passages: set[str] = field(default_factory=set)  # candidates without states: ranked last
    truncated_passages: set[str] = field(default_factory=set)  # read up to the encoder's limit
    num_unscored_pairs: int = 0  # over all ratios: margins that are not finite, ranked last
    seconds: dict[int, float] = field(default_factory=dict)  # of the model, per ratio


def rerank(
    backend: Backend,
    source: StateSource,
    queries: Mapping[str, str],
    candidates: Run,
    ratios: Sequence[int],
    instruction: str | None = None,
    progress: StageProgress = SILENT,
) -> Reranked:
    """Ranks the candidates of each query at each ratio; equal margins stay in candidate order.

    Args:
        candidates: in first-stage order; their scores are not used.

    Raises:
        RatioError: a ratio that the source's states cannot be read at.
    """
    prompts = {q: backend.prompt(queries[q], instruction) for q in candidates}
    pairs = Pairs({q: [p for p, _ in ranking] for q, ranking in candidates.items()})
    margins = {ratio: np.full(pairs.num, np.nan, dtype=np.float32) for ratio in ratios}
    result = Reranked({}, missing_passages=set(pairs.places), seconds=dict.fromkeys(ratios, 0.0))
    advance = progress.begin("score (pairs)", pairs.num * len(ratios))

    for chunk in source.chunks(list(pairs.places), progress):
        result.missing_passages -= chunk.keys()
        result.truncated_passages |= {p for p, states in chunk.items() if states.truncated}
        rows = [(p, query_id, index) for p in chunk for query_id, index in pairs.places[p]]
        indices = [index for *_, index in rows]
        for ratio in ratios:
            start = time.perf_counter()
            pooled = {p: states.at_ratio(ratio) for p, states in chunk.items()}
            best = score_passages(backend, [(prompts[query_id], pooled[p]) for p, query_id, _ in rows], advance)
            margins[ratio][indices] = best
            result.num_unscored_pairs += int(np.isnan(best).sum())
            result.seconds[ratio] += time.perf_counter() - start

    for ratio, flat in margins.items():
        result.runs[ratio] = {q: rank(pairs.candidates[q], own) for q, own in pairs.split(flat).items()}
    return result


def score_passages(
    backend: Backend, passages: Sequence[tuple[Prompt, PassageStates]], advance: Advance = ignore
) -> NDArray[np.float32]:
    """Margins (len(passages),), the best window of a passage counts, NaN where one is not finite.

    Pairs of all queries are batched together by length, each batch up to the device's token budget.
    """
    pairs: list[Pair] = []
    owners: list[int] = []
    for index, (prompt, states) in enumerate(passages):
        windows = backend.pairs(prompt, [states])[0]
        pairs += windows
        owners += [index] * len(windows)
    best = np.full(len(passages), -np.inf, dtype=np.float32)
    begun: set[int] = set()
    for batch in split_by_length(pairs, BATCH_TOKENS[backend.device_name.split(":")[0]][1]):
        rows = [owners[i] for i in batch]
        with np.errstate(invalid="ignore"):  # NaN stays, as in the server
            np.maximum.at(best, rows, backend.score([pairs[i] for i in batch]))
        advance(len(set(rows) - begun))
        begun.update(rows)
    return best
