"""Every candidate of every query scored at every ratio, from states that are made, or read, once per passage.

States come a chunk at a time, because the unpooled states of a whole collection do not fit into memory.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.collection import Collection
from cache.states import PassageStates
from decoder_server.engine.scheduler import split_by_length
from decoder_server.models.backend import Backend, Pair, Prompt
from decoder_server.models.loading import BATCH_TOKENS
from encoder_worker.passage_encoder import PassageEncoder
from tuning.progress import SILENT, Advance, StageProgress, ignore
from tuning.trec import Run, rank

CHUNK_BYTES = 256 << 20
STORE_READ_PASSAGES = 64

States = Mapping[str, PassageStates]  # by passage id
T = TypeVar("T")


def chunked(items: Iterable[tuple[T, int]], chunk_bytes: int) -> Iterator[list[T]]:
    """Items, each given with its bytes, in lists that end with the item that reaches `chunk_bytes`."""
    chunk: list[T] = []
    num_bytes = 0
    for item, size in items:
        chunk.append(item)
        num_bytes += size
        if num_bytes >= chunk_bytes:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class EncodedStates:
    """States of texts, encoded on demand; empty texts and those that do not encode have none."""

    encoder: PassageEncoder
    texts: Mapping[str, str]  # by passage id
    ratio: int
    split: bool = False  # texts over the passage limit become windows instead of being cut
    chunk_bytes: int = CHUNK_BYTES

    def chunks(self, passage_ids: Sequence[str], progress: StageProgress = SILENT) -> Iterator[States]:
        known = [p for p in passage_ids if p in self.texts]
        tokenized = self.encoder.tokenize([self.texts[p] for p in known], split=self.split)
        passages = [(p, passage) for p, passage in zip(known, tokenized, strict=True) if passage.failed is None]
        advance = progress.begin("encode", sum(passage.num_tokens for passage in tokenized), "tokens")
        # The longest first: memory runs out at once or not at all, and the time left is estimated high, not low.
        passages.sort(key=lambda one: -one[1].num_tokens)
        sized = ((one, one[1].num_states(self.ratio) * 4 * self.encoder.dim) for one in passages)
        for chunk in chunked(sized, self.chunk_bytes):
            encoded = {}
            for i, states in self.encoder.encode_all([passage for _, passage in chunk], self.ratio):
                passage_id, passage = chunk[i]
                advance(passage.num_tokens)
                if isinstance(states, PassageStates):
                    # Named, so that a pass computes the passage once for the queries that share it.
                    encoded[passage_id] = replace(states, key=states.text_digest)
            yield encoded


@dataclass(frozen=True)
class StoredStates:
    """States of an indexed collection; a corrupt passage counts as absent."""

    collection: Collection
    chunk_bytes: int = CHUNK_BYTES

    @property
    def ratio(self) -> int:
        return self.collection.manifest.compression_ratio

    def chunks(self, passage_ids: Sequence[str], progress: StageProgress = SILENT) -> Iterator[States]:
        advance = progress.begin("read", len(passage_ids), "passages")

        def sized() -> Iterator[tuple[tuple[str, PassageStates], int]]:
            for start in range(0, len(passage_ids), STORE_READ_PASSAGES):
                part = passage_ids[start : start + STORE_READ_PASSAGES]
                for passage_id, states in zip(part, self.collection.get_many(part), strict=True):
                    if isinstance(states, PassageStates):
                        yield (passage_id, states), states.states.nbytes
                advance(len(part))

        return map(dict, chunked(sized(), self.chunk_bytes))


StateSource = EncodedStates | StoredStates  # gives each passage's states once, in its own order


class Pairs:
    """Every query with its candidates, in one flat order that margins keep."""

    def __init__(self, first: Run) -> None:
        self.candidates = {q: [p for p, _ in ranking] for q, ranking in first.items()}
        # passage_id -> its (query_id, flat index), in order of first appearance
        self.places: dict[str, list[tuple[str, int]]] = {}
        self.num = 0
        for query_id, found in self.candidates.items():
            for p in found:
                self.places.setdefault(p, []).append((query_id, self.num))
                self.num += 1

    def rows(self, passage_ids: Iterable[str]) -> list[tuple[str, str, int]]:
        """(passage id, query id, flat index) of every pair of these passages."""
        return [(p, query_id, index) for p in passage_ids for query_id, index in self.places[p]]

    def split(self, flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
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
    """Each query's candidates ranked at each ratio; equal margins stay in first-stage order. Raises RatioError."""
    prompts = {q: backend.prompt(queries[q], instruction) for q in candidates}
    pairs = Pairs(candidates)
    margins = {ratio: np.full(pairs.num, np.nan, dtype=np.float32) for ratio in ratios}
    result = Reranked({}, missing_passages=set(pairs.places), seconds=dict.fromkeys(ratios, 0.0))
    advance = progress.begin("score", pairs.num * len(ratios), "pairs")
    for chunk in source.chunks(list(pairs.places), progress):
        result.missing_passages -= chunk.keys()
        result.truncated_passages |= {p for p, states in chunk.items() if states.truncated}
        rows = pairs.rows(chunk)
        for ratio in ratios:
            start = time.perf_counter()
            pooled = {p: states.at_ratio(ratio) for p, states in chunk.items()}
            best = score_passages(backend, [(prompts[query_id], pooled[p]) for p, query_id, _ in rows], advance)
            margins[ratio][[index for *_, index in rows]] = best
            result.num_unscored_pairs += int(np.isnan(best).sum())
            result.seconds[ratio] += time.perf_counter() - start
    for ratio, flat in margins.items():
        result.runs[ratio] = {q: rank(pairs.candidates[q], own) for q, own in pairs.split(flat).items()}
    return result


def score_passages(
    backend: Backend, passages: Sequence[tuple[Prompt, PassageStates]], advance: Advance = ignore
) -> NDArray[np.float32]:
    """Margins (len(passages),): the best window counts, NaN where one is not finite; batches mix queries, by length."""
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
