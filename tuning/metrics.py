"""nDCG, MRR and recall of a run, query by query, through ir_measures. No metric is computed here.

ir_measures takes nDCG and recall from pytrec_eval and RR with a cutoff from MS MARCO's own script, because
trec_eval has no cutoff for it. Does not know passages or models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuning.errors import MissingExtra
from tuning.trec import Qrels, Run

HEADLINE = "nDCG@10"


def measure_names(top_k: int) -> list[str]:
    """What is measured of a reranking of `top_k` candidates; recall at `top_k` is its ceiling."""
    return list(dict.fromkeys((HEADLINE, "MRR@10", "R@10", f"R@{top_k}")))


def per_query(qrels: Qrels, run: Run, top_k: int, min_grade: int = 1) -> dict[str, NDArray[np.float64]]:
    """{measure name: (num_queries,)}, in the order of `qrels`; a query without ranked passages counts 0.

    Args:
        min_grade: the lowest grade that counts as relevant for MRR and recall; nDCG uses the grades.

    Raises:
        MissingExtra: ir_measures is not installed.
    """
    measures = _measures(top_k, min_grade)
    import ir_measures

    # rank() and the run reader order passages; ids only break ties where a foreign run has some.
    scored = {query_id: dict(run.get(query_id, ())) for query_id in qrels}
    row = {query_id: index for index, query_id in enumerate(qrels)}
    values = {name: np.zeros(len(qrels)) for name in measures}
    names = {measure: name for name, measure in measures.items()}
    for metric in ir_measures.iter_calc(list(measures.values()), qrels, scored):
        values[names[metric.measure]][row[metric.query_id]] = metric.value
    return values


def _measures(top_k: int, min_grade: int) -> dict[str, Any]:
    try:
        from ir_measures import RR, R, nDCG
    except ImportError as exc:
        raise MissingExtra("measuring", "evaluate", exc) from exc
    known = {
        HEADLINE: nDCG @ 10,
        "MRR@10": RR(rel=min_grade) @ 10,
        "R@10": R(rel=min_grade) @ 10,
        f"R@{top_k}": R(rel=min_grade) @ top_k,
    }
    return {name: known[name] for name in measure_names(top_k)}
