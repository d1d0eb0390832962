"""Scores of candidates to one ranking that every tool reads alike. Does not know where scores come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# trec_eval compares scores as float32 and breaks ties by passage id. Neighbours are kept at least this far
# apart, relative to their size: two units in the last place of a float32.
_STEP = 2.0**-22


def order(scores: NDArray[np.floating]) -> NDArray[np.intp]:
    """Rows by falling score; equal ones stay in place, rows without a score (NaN) come last."""
    values = np.asarray(scores, dtype=np.float64)
    missing = np.isnan(values)
    return np.lexsort((np.where(missing, 0.0, -values), missing))  # stable, last key first


def rank(candidates: Sequence[str], scores: NDArray[np.floating] | Sequence[float]) -> list[tuple[str, float]]:
    """Candidates by falling score; equal scores stay in candidate order, candidates without a score come last.

    The scores given back fall strictly, even in float32, so that no tool reorders them; they are
    the scores themselves, but where two are equal or nearly so.

    Args:
        scores: (num_candidates,); NaN where there is none.
    """
    values = np.asarray(scores, dtype=np.float64)
    ranking: list[tuple[str, float]] = []
    ceiling = np.inf
    for row in order(values).tolist():
        score = min(ceiling, values[row]) if not np.isnan(values[row]) else min(ceiling, 0.0)
        ranking.append((candidates[row], float(score)))
        ceiling = score - _STEP * max(1.0, abs(score))
    return ranking
