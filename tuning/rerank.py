"""Where passage states come from, a chunk at a time: encoded here, or read from a collection.

Chunks bound memory: a whole collection's unpooled states do not fit. Does not know queries, and pools
nothing beyond the ratio it is asked for; whoever reads re-pools.

Every candidate of every query scored at every ratio, each passage's states made once.

Knows the seam to the model (decoder_server.models.backend) and no model; does not know judgements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache.collection import Collection
from cache.states import PassageStates, text_digest
from decoder_server.engine.scheduler import split_by_length
from decoder_server.models.backend import Backend, Item, Prompt
from decoder_server.models.loading import BATCH_TOKENS
from encoder_worker.passage_encoder import EncodingFailed, PassageEncoder, Tokenized, plan_batches
from tuning.progress import SILENT, Progress
from tuning.trec import Run, rank

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
        for rows in plan_batches([len(window) for window in windows], self._encoder.limits):
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


STAGE = "score (pairs)"


@dataclass
class Reranked:
    """One run per ratio, and what did not go as it should."""

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
    progress: Progress = SILENT,
) -> Reranked:
    """Ranks the candidates of each query at each ratio; equal margins stay in candidate order.

    Args:
        candidates: in first-stage order; their scores are not used.

    Raises:
        RatioError: a ratio that the source's states cannot be read at.
    """
    prompts = {q: backend.prompt(queries[q], instruction) for q in candidates}
    wanted: dict[str, list[tuple[str, int]]] = {}  # passage_id -> its places (query_id, rank) among candidates
    for query_id, ranking in candidates.items():
        for place, (passage_id, _) in enumerate(ranking):
            wanted.setdefault(passage_id, []).append((query_id, place))
    margins = {r: {q: np.full(len(found), np.nan) for q, found in candidates.items()} for r in ratios}
    result = Reranked({}, missing_passages=set(wanted), seconds=dict.fromkeys(ratios, 0.0))
    progress.begin(STAGE, sum(map(len, wanted.values())) * len(ratios))

    for chunk in source.chunks(list(wanted), progress):
        result.missing_passages -= chunk.keys()
        result.truncated_passages |= {p for p, states in chunk.items() if states.truncated}
        places = [(p, query_id, place) for p in chunk for query_id, place in wanted[p]]
        for ratio in ratios:
            start = time.perf_counter()
            pooled = {p: states.at_ratio(ratio) for p, states in chunk.items()}
            best = score_passages(
                backend,
                [(prompts[query_id], pooled[p]) for p, query_id, _ in places],
                lambda num: progress.advance(STAGE, num),
            )
            for (_, query_id, place), margin in zip(places, best.tolist(), strict=True):
                margins[ratio][query_id][place] = margin
            result.num_unscored_pairs += int(np.isnan(best).sum())
            result.seconds[ratio] += time.perf_counter() - start

    result.runs = {
        ratio: {q: rank([p for p, _ in candidates[q]], values) for q, values in own.items()}
        for ratio, own in margins.items()
    }
    return result


@dataclass(frozen=True, slots=True)
class _Work:
    """One window of one of the passages to score."""

    index: int
    item: Item

    @property
    def num_prompt_tokens(self) -> int:
        return self.item.num_prompt_tokens

    @property
    def num_states(self) -> int:
        return self.item.num_states


def score_passages(
    backend: Backend,
    passages: Sequence[tuple[Prompt, PassageStates]],
    advance: Callable[[int], None] = lambda num: None,
) -> NDArray[np.float32]:
    """Margins (len(passages),), the best window of a passage counts, NaN where one is not finite.

    Pairs of all queries are batched together by length, each batch up to the device's token budget.

    Args:
        advance: is told how many passages were begun.
    """
    works = [_Work(i, item) for i, (prompt, states) in enumerate(passages) for item in backend.items(prompt, states)]
    works.sort(key=lambda work: (work.num_states, work.num_prompt_tokens))
    best = np.full(len(passages), -np.inf, dtype=np.float32)
    seen: set[int] = set()
    for batch in _budgeted(works, BATCH_TOKENS[backend.device_name.split(":")[0]]):
        for part in split_by_length(batch):
            for work, margin in zip(part, backend.score([work.item for work in part]), strict=True):
                best[work.index] = np.maximum(best[work.index], margin)  # NaN stays, as in the server
        begun = {work.index for work in batch} - seen
        seen |= begun
        advance(len(begun))
    return best


def _budgeted(works: Sequence[_Work], max_tokens: int) -> list[list[_Work]]:
    """In their order, cut where the tokens of a batch would exceed the budget."""
    batches: list[list[_Work]] = []
    num_tokens = max_tokens + 1
    for work in works:
        num_tokens += work.item.num_tokens
        if num_tokens > max_tokens:
            batches.append([])
            num_tokens = work.item.num_tokens
        batches[-1].append(work)
    return batches
