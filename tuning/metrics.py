"""Quality of a ranking, and how sure it is: nDCG, MRR and recall by ir_measures, intervals by the bootstrap.

ir_measures takes nDCG and recall from pytrec_eval and RR with a cutoff from MS MARCO's own script, because trec_eval
has no cutoff for it. The percentile bootstrap (Efron & Tibshirani 1993; for retrieval Sakai, SIGIR 2006) draws queries
with replacement; all systems see the same draws, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuning import MissingExtra
from tuning.config import NUM_RESAMPLES
from tuning.trec import Qrels, Run

PerQuery = dict[str, NDArray[np.float64]]  # by measure, (num_queries,)

HEADLINE = "nDCG@10"

_BLOCK = 1 << 24  # counts drawn at a time


def per_query(qrels: Qrels, run: Run, top_k: int, min_grade: int = 1) -> PerQuery:
    """{measure name: (num_queries,)}, in the order of `qrels`; a query without ranked passages counts 0.

    Args:
        top_k: candidates that were reranked; recall there is the ceiling.
        min_grade: the lowest grade that counts as relevant for MRR and recall; nDCG uses the grades.
    """
    try:
        from ir_measures import RR, R, iter_calc, nDCG
    except ImportError as exc:
        raise MissingExtra("measuring", "evaluate", exc) from exc
    measures = {
        HEADLINE: nDCG @ 10,
        "MRR@10": RR(rel=min_grade) @ 10,
        "R@10": R(rel=min_grade) @ 10,
        f"R@{top_k}": R(rel=min_grade) @ top_k,
    }
    # rank() and the run reader order passages; ids only break ties where a foreign run has some.
    scored = {query_id: dict(run.get(query_id, ())) for query_id in qrels}
    row = {query_id: index for index, query_id in enumerate(qrels)}
    values = {name: np.zeros(len(qrels)) for name in measures}
    names = {measure: name for name, measure in measures.items()}
    for metric in iter_calc(list(measures.values()), qrels, scored):
        values[names[metric.measure]][row[metric.query_id]] = metric.value
    return values


def kendall_tau(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Kendall's tau-b of two (n,) arrays: 1 the same order, 0 unrelated, -1 reversed; NaN where one is constant.

    tau-b because bfloat16 makes ties: a tie in one list alone counts neither for nor against the order.
    Source: Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945).
    """
    agreeing = told_a = told_b = 0
    for i in range(len(a) - 1):  # a row at a time: memory grows with n, not with its square
        sign_a, sign_b = np.sign(a[i] - a[i + 1 :]), np.sign(b[i] - b[i + 1 :])
        agreeing += int((sign_a * sign_b).sum())
        told_a += int(np.count_nonzero(sign_a))
        told_b += int(np.count_nonzero(sign_b))
    return agreeing / (told_a * told_b) ** 0.5 if told_a and told_b else float("nan")


@dataclass(frozen=True)
class Interval:
    """A mean over queries, or a share of two means, with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference over queries, system minus baseline."""

    p_value: float  # two-sided, that the true difference is 0

    @property
    def significant(self) -> bool:
        """The 95% interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def mark(self) -> str:
        """For the eyes: ▲ ▼ where the difference is significant."""
        return " " if not self.significant else "▲" if self.mean > 0 else "▼"

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"significant": self.significant}


class Bootstrap:
    """Resampled means of columns of per-query values."""

    def __init__(self, values: NDArray[np.float64], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> None:
        """`values`: (num_queries, num_columns), at least one query."""
        self._means = values.mean(axis=0)  # (num_columns,)
        self._resampled = _resampled_means(values, np.random.default_rng(seed), num_resamples)

    def interval(self, column: int) -> Interval:
        return Interval(float(self._means[column]), *_bounds(self._resampled[:, column]))

    def difference(self, column: int, baseline: int) -> Difference:
        """Paired: every draw compares both columns on the same queries."""
        drawn = self._resampled[:, column] - self._resampled[:, baseline]
        below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
        p_value = min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))
        return Difference(float(self._means[column] - self._means[baseline]), *_bounds(drawn), p_value)

    def share(self, column: int, baseline: int) -> Interval | None:
        """column / baseline, paired, over draws where the baseline is not 0; None where its mean is."""
        some = self._resampled[:, baseline] > 0
        if self._means[baseline] <= 0:
            return None
        drawn = self._resampled[some, column] / self._resampled[some, baseline]
        return Interval(float(self._means[column] / self._means[baseline]), *_bounds(drawn))


def bootstraps(rows: Sequence[PerQuery], *, seed: int, num_resamples: int) -> dict[str, Bootstrap]:
    """By measure, with a column for each row, over the queries where it is defined (not NaN) for all of them."""
    found = {}
    for name in rows[0]:
        columns = np.stack([row[name] for row in rows], axis=1)  # (num_queries, num_rows)
        defined = np.isfinite(columns).all(axis=1)
        if defined.any():
            found[name] = Bootstrap(columns[defined], seed=seed, num_resamples=num_resamples)
    return found


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


def _bounds(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Of the 95% interval."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
