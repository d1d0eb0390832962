"""How sure a mean over queries is: the percentile bootstrap (Efron & Tibshirani 1993; for retrieval Sakai, SIGIR 2006).

Queries are drawn with replacement; all systems see the same draws, so differences are paired.
Does not know metrics.

nDCG, MRR and recall of a run, query by query, through ir_measures. No metric is computed here.

ir_measures takes nDCG and recall from pytrec_eval and RR with a cutoff from MS MARCO's own script, because
trec_eval has no cutoff for it. Does not know passages or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuning import MissingExtra
from tuning.trec import Qrels, Run

LEVEL = 0.95
NUM_RESAMPLES = 10_000
_BLOCK = 1 << 24  # counts drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean over queries with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference over queries, system minus baseline."""

    mean: float
    low: float
    high: float
    p_value: float  # two-sided, that the true difference is 0

    @property
    def significant(self) -> bool:
        """The 95% interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Share:
    """A mean as a share of the baseline's mean, with its interval."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Resampled means of columns of per-query values."""

    def __init__(self, values: NDArray[np.float64], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> None:
        """
        Args:
            values: (num_queries, num_columns), at least one query.
        """
        self._means = values.mean(axis=0)  # (num_columns,)
        self._resampled = _resampled_means(values, np.random.default_rng(seed), num_resamples)

    def interval(self, column: int) -> Interval:
        return Interval(float(self._means[column]), *_percentiles(self._resampled[:, column]))

    def difference(self, column: int, baseline: int) -> Difference:
        """Paired: every draw compares both columns on the same queries."""
        drawn = self._resampled[:, column] - self._resampled[:, baseline]
        below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
        p_value = min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))
        return Difference(float(self._means[column] - self._means[baseline]), *_percentiles(drawn), p_value)

    def share(self, column: int, baseline: int) -> Share | None:
        """column / baseline, paired, over draws where the baseline is not 0; None where its mean is."""
        some = self._resampled[:, baseline] > 0
        if self._means[baseline] <= 0:
            return None
        drawn = self._resampled[some, column] / self._resampled[some, baseline]
        return Share(float(self._means[column] / self._means[baseline]), *_percentiles(drawn))


def _resampled_means(
    values: NDArray[np.float64], generator: np.random.Generator, num_resamples: int
) -> NDArray[np.float64]:
    """(num_resamples, num_columns). A draw is how often each query comes up, so a mean is a matrix product."""
    num_queries = len(values)
    block = max(1, _BLOCK // num_queries)
    rows = []
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        picked = generator.integers(num_queries, size=(size, num_queries))
        picked += np.arange(size)[:, None] * num_queries
        counts = np.bincount(picked.ravel(), minlength=size * num_queries).reshape(size, num_queries)
        rows.append(counts @ values / num_queries)
    return np.concatenate(rows)


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


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
