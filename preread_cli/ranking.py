"""Candidates through a server, whatever their number. Knows the client, not where queries come from.

A request carries at most the server's `max_candidates`; more are sent in several, and merged: a score
does not depend on its company. Of a cascade each of them lets as many go on, so no less is read than in one.
Queries of a file run side by side, so that the server can batch across them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from preread import Candidate, Client, Reranking, RerankOptions, Result


def rerank(
    client: Client, query: str, candidates: Sequence[Candidate], max_candidates: int, options: RerankOptions
) -> Reranking:
    """Every candidate scored, best first, then those that could not be; cut to options' top_n."""
    top_n = options.get("top_n", 0)
    results: list[Result] = []
    parts = []
    for first in range(0, len(candidates), max_candidates):
        part = client.rerank(query, candidates[first : first + max_candidates], **options)
        results += [dataclasses.replace(result, index=result.index + first) for result in part]
        parts.append(part.summary)
    scored = sorted(
        (r for r in results if r.margin is not None), key=lambda r: (-len(r.stages), -(r.margin or 0.0), r.index)
    )
    others = sorted((r for r in results if r.margin is None), key=lambda r: r.index)
    times = [dataclasses.astuple(part.timings) for part in parts]
    summary = dataclasses.replace(
        parts[0],
        timings=type(parts[0].timings)(*(sum(column) for column in zip(*times, strict=True))),
        num_scored=sum(part.num_scored for part in parts),
        stopped_early=any(part.stopped_early for part in parts),
        degraded=next((part.degraded for part in parts if part.degraded is not None), None),
    )
    return Reranking((*scored[: top_n or None], *others), summary)


def rerank_all(
    client: Client,
    queries: Mapping[str, str],
    candidates: Mapping[str, Sequence[Candidate]],
    max_candidates: int,
    options: RerankOptions,
    concurrency: int,
) -> Iterator[tuple[str, Reranking]]:
    """(query id, answer) in the order of `queries`, with `concurrency` requests under way."""
    with ThreadPoolExecutor(concurrency) as pool:
        waiting: deque[tuple[str, Future[Reranking]]] = deque()
        try:
            for query_id, query in queries.items():
                task = pool.submit(rerank, client, query, candidates[query_id], max_candidates, options)
                waiting.append((query_id, task))
                if len(waiting) > 2 * concurrency:
                    done, answer = waiting.popleft()
                    yield done, answer.result()
            while waiting:
                done, answer = waiting.popleft()
                yield done, answer.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_rows(answer: Reranking) -> list[tuple[str, float]]:
    """The scored passages for a TREC run, whose readers sort by score alone and know each passage once.

    Margins of different stages do not compare: what a cascade's earlier stage said last is moved below all
    that came further, by so much that margins keep their order and their distances within a stage.
    """
    rows: dict[str, float] = {}
    moved, stages, lowest = 0.0, 0, 0.0
    for result in answer:
        if result.margin is None:
            continue
        if rows and len(result.stages) < stages:
            moved = min(0.0, lowest - 1.0 - result.margin)
        stages, lowest = len(result.stages), result.margin + moved
        rows.setdefault(result.passage_id or str(result.index), lowest)  # the better of two
    return list(rows.items())
