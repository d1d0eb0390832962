"""The candidates that are reranked, and the ranking to beat: a run file's, or BM25's through bm25s.

bm25s' own defaults (Lucene's BM25, k1 1.5, b 0.75; words of two and more letters or digits, lower case, no
stemming) with English stop words. Does not know judgements or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuning.errors import EvaluationError, MissingExtra
from tuning.progress import SILENT, Progress
from tuning.ranking import rank
from tuning.trec import Run, RunFile

NAME = "BM25"


def candidates(
    passages: Mapping[str, str],
    queries: Mapping[str, str],
    given: RunFile | None,
    top_k: int,
    progress: Progress = SILENT,
) -> tuple[str, Run]:
    """The name and the ranking to rerank: the run that is given, or BM25's own.

    Returns:
        An entry for each query, at most `top_k` passages each.

    Raises:
        EvaluationError: no texts to search, or a run of other queries.
    """
    if given is None:
        if not passages:
            raise EvaluationError("no passage texts for BM25: name a corpus, or a run file with the candidates")
        return NAME, search(passages, queries, top_k, progress)
    run: Run = {}
    for query_id in queries:
        found = given.run.get(query_id, [])[:top_k]
        run[query_id] = rank([p for p, _ in found], [score for _, score in found])
    if not any(run.values()):
        raise EvaluationError("the run ranks nothing for any of the queries; are its query ids theirs?")
    return given.tag, run


def search(passages: Mapping[str, str], queries: Mapping[str, str], top_k: int, progress: Progress = SILENT) -> Run:
    """BM25's best `top_k` passages of each query, best first, equal scores in corpus order.

    A passage that shares no word with the query is no candidate, so a query may have few or none.

    Raises:
        MissingExtra: bm25s is not installed.
    """
    index = _index(list(passages.values()))
    passage_ids = list(passages)
    run: Run = {}
    progress.begin(NAME, len(queries))
    for query_id, text in queries.items():
        scores = _scores(index, text) if index is not None else np.empty(0, dtype=np.float32)
        best = _best(scores, top_k)
        run[query_id] = rank([passage_ids[row] for row in best.tolist()], scores[best])
        progress.advance(NAME, 1)
    return run


def _index(texts: list[str]) -> Any:
    """A bm25s index, or None where no text has a word in it."""
    try:
        import bm25s
    except ImportError as exc:
        raise MissingExtra("BM25", "evaluate", exc) from exc
    tokens = bm25s.tokenize(texts, stopwords="english", show_progress=False)
    if not any(tokens.ids):
        return None
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    return index


def _scores(index: Any, query: str) -> NDArray[np.float32]:
    """(num_passages,), 0 where no word is shared."""
    import bm25s

    (words,) = bm25s.tokenize([query], stopwords="english", show_progress=False, return_ids=False)
    scores: NDArray[np.float32] = index.get_scores_from_ids(index.get_tokens_ids(words))
    return scores


def _best(scores: NDArray[np.float32], top_k: int) -> NDArray[np.intp]:
    """Rows of the `top_k` highest positive scores, best first; equal scores by row, also at the border.

    bm25s' own top-k leaves the order of equal scores to a partition, so it is not used.
    """
    if len(scores) > top_k:
        border = np.partition(scores, -top_k)[-top_k]
        rows = np.flatnonzero((scores >= border) & (scores > 0))
    else:
        rows = np.flatnonzero(scores > 0)
    return rows[np.argsort(-scores[rows], kind="stable")][:top_k]
