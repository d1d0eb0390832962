"""BM25 through bm25s: first-stage candidates for evaluation, hard negatives for training."""

from __future__ import annotations

from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray


class Bm25:
    """An index over a fixed list of texts (bm25s defaults: Lucene's BM25, k1 1.5, b 0.75, English stop words)."""

    def __init__(self, texts: list[str]) -> None:
        self._index: Any = bm25s.BM25()
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
        self.num_texts = len(texts)

    def top(self, queries: list[str], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and scores, best first. -> (num_queries, k) twice; rows with score 0 did not match."""
        tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False)
        rows, scores = self._index.retrieve(tokens, k=min(k, self.num_texts), show_progress=False)
        return np.asarray(rows, dtype=np.int64), np.asarray(scores, dtype=np.float32)

    def scores(self, query: str) -> NDArray[np.float32]:
        """-> (num_texts,)"""
        tokens: Any = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)
        known = [word for word in tokens[0] if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self.num_texts, dtype=np.float32)
        return np.asarray(self._index.get_scores(known), dtype=np.float32)
