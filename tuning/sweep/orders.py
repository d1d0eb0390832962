"""Margins to one ordering of a query's candidates, for one reading or several stages. Pure functions.

Later stages outrank earlier ones: whoever went on stands before whoever did not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from decoder_server.plan import Plan
from preread.client.stages import Stage
from tuning.ranking import order, rank


def compose(stages: Sequence[Stage], margins: Sequence[NDArray[np.floating]]) -> NDArray[np.intp]:
    """Rows of the candidates, best first, after all stages.

    Args:
        margins: (num_candidates,) per stage, of all candidates; a stage uses those that came that far.
    """
    rows = order(margins[0])
    for before, own in zip(stages, margins[1:], strict=False):
        going = np.sort(rows[: before.keep])  # in candidate order, so that equal margins stay in it
        rows = np.concatenate([going[order(own[going])], rows[before.keep :]])
    return rows


def num_read(stages: Sequence[Stage], num_candidates: int) -> list[int]:
    """How many candidates each stage reads."""
    return [count for count, _ in Plan(tuple(stages), cascade=len(stages) > 1).reads(num_candidates)]


def ranking(
    candidates: Sequence[str], stages: Sequence[Stage], margins: Sequence[NDArray[np.floating]]
) -> list[tuple[str, float]]:
    """A run's entry for one query. Margins of stages do not compare, so a cascade's scores count down to 1."""
    if len(stages) == 1:
        return rank(candidates, margins[0])
    rows = compose(stages, margins)
    return [(candidates[row], float(len(rows) - place)) for place, row in enumerate(rows.tolist())]


def places(rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """The inverse of an order: each candidate's place in it, 0 for the best."""
    inverse = np.empty_like(rows)
    inverse[rows] = np.arange(len(rows))
    return inverse
