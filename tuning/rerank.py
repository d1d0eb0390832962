"""Every candidate of every query scored at every ratio, each passage's states made once.

Knows the seam to the model (decoder_server.backend) and no model; does not know judgements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.states import PassageStates
from decoder_server.backend import Backend, Item, Prompt
from decoder_server.lengths import split_by_length
from decoder_server.loading import BATCH_TOKENS
from tuning.progress import SILENT, Progress
from tuning.ranking import rank
from tuning.states import StateSource
from tuning.trec import Run

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
