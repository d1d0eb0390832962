"""Scores of candidates to one ranking that every tool reads alike. Does not know where scores come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# trec_eval compares scores as float32 and breaks ties by passage id. Neighbours are kept at least this far
# apart, relative to their size: two units in the last place of a float32.
_STEP = 2.0**-22
_LARGEST = 1e38  # below float32's largest number, with room for the steps


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
    rows = order(values)
    return [
        (candidates[row], score)
        for row, score in zip(
            rows.tolist(), falling(np.nan_to_num(values[rows], posinf=np.inf, neginf=-np.inf)), strict=True
        )
    ]


def falling(scores: Iterable[float]) -> list[float]:
    """Scores of a ranking, best first, made to fall strictly: one that is not below the one before is lowered.

    Read as float32 they still differ. Beyond float32's range none of them could, so there ranks take their place.
    """
    lowered: list[float] = []
    ceiling = np.inf
    for score in scores:
        lowered.append(min(ceiling, float(score)))
        ceiling = lowered[-1] - _STEP * max(1.0, abs(lowered[-1]))
    if lowered and not (lowered[-1] > -_LARGEST and lowered[0] < _LARGEST):
        return [float(-rank) for rank in range(1, len(lowered) + 1)]
    return lowered
