"""Quality of a ranking, and how sure it is: nDCG, MRR and recall by ir_measures, intervals by the bootstrap.

ir_measures takes nDCG and recall from pytrec_eval and RR with a cutoff from MS MARCO's own script, because trec_eval
has no cutoff for it. The percentile bootstrap (Efron & Tibshirani 1993; for retrieval Sakai, SIGIR 2006) draws queries
with replacement; all systems see the same draws, so differences are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tuning import MissingExtra
from tuning.config import NUM_RESAMPLES
from tuning.trec import Qrels, Run

PerQuery = dict[str, NDArray[np.float64]]  # by measure, (num_queries,)

HEADLINE = "nDCG@10"

_BLOCK = 1 << 24  # counts drawn at a time
_BOUNDS = (2.5, 97.5)  # percentiles, of the 95% interval


def per_query(qrels: Qrels, run: Run, top_k: int, min_grade: int = 1) -> PerQuery:
    """{measure name: (num_queries,)}, in the order of `qrels`; a query without ranked passages counts 0.

    Recall at `top_k`, of the candidates reranked, is the ceiling. `min_grade` counts as relevant for MRR and recall.
    """
    try:
        from ir_measures import RR, R, iter_calc, nDCG
    except ImportError as exc:
        raise MissingExtra("measuring", "evaluate", exc) from exc
    recall = R(rel=min_grade)
    names = {nDCG @ 10: HEADLINE, RR(rel=min_grade) @ 10: "MRR@10", recall @ 10: "R@10", recall @ top_k: f"R@{top_k}"}
    # rank() and the run reader order passages; ids only break ties where a foreign run has some.
    scored = {query_id: dict(run.get(query_id, ())) for query_id in qrels}
    row = {query_id: index for index, query_id in enumerate(qrels)}
    values = {name: np.zeros(len(qrels)) for name in names.values()}
    for metric in iter_calc(list(names), qrels, scored):
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


@dataclass(frozen=True)
class _Difference(Interval):
    """A mean difference over queries, system minus baseline."""

    p_value: float  # two-sided, that the true difference is 0
    significant: bool  # the 95% interval excludes 0

    @property
    def mark(self) -> str:
        return " " if not self.significant else "▲" if self.mean > 0 else "▼"


class Bootstrap:
    """Resampled means of columns of per-query values."""

    def __init__(self, values: NDArray[np.float64], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> None:
        """`values`: (num_queries, num_columns), at least one query."""
        generator, num_queries = np.random.default_rng(seed), len(values)
        block = max(1, _BLOCK // num_queries)
        resampled = []
        for start in range(0, num_resamples, block):
            size = min(block, num_resamples - start)
            picked = generator.integers(num_queries, size=(size, num_queries))
            picked += np.arange(size)[:, None] * num_queries
            # A draw is how often each query comes up, so a mean is a matrix product.
            counts = np.bincount(picked.ravel(), minlength=size * num_queries).reshape(size, num_queries)
            resampled.append(counts @ values / num_queries)
        self._means = values.mean(axis=0)  # (num_columns,)
        self._resampled = np.concatenate(resampled)  # (num_resamples, num_columns)

    @classmethod
    def by_measure(cls, rows: Sequence[PerQuery], *, seed: int, num_resamples: int) -> dict[str, Self]:
        """With a column for each row, over the queries where a measure is defined (not NaN) for all of them."""
        found = {}
        for name in rows[0]:
            columns = np.stack([row[name] for row in rows], axis=1)  # (num_queries, num_rows)
            if (defined := np.isfinite(columns).all(axis=1)).any():
                found[name] = cls(columns[defined], seed=seed, num_resamples=num_resamples)
        return found

    def interval(self, column: int) -> Interval:
        return Interval(float(self._means[column]), *np.percentile(self._resampled[:, column], _BOUNDS).tolist())

    def difference(self, column: int, baseline: int) -> _Difference:
        """Paired: every draw compares both columns on the same queries."""
        drawn = self._resampled[:, column] - self._resampled[:, baseline]
        below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
        low, high = np.percentile(drawn, _BOUNDS).tolist()
        p_value = min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))
        mean = float(self._means[column] - self._means[baseline])
        return _Difference(mean, low, high, p_value, low > 0 or high < 0)

    def share(self, column: int, baseline: int) -> Interval | None:
        """column / baseline, paired, over draws where the baseline is not 0; None where its mean is."""
        if self._means[baseline] <= 0:
            return None
        some = self._resampled[:, baseline] > 0
        drawn = self._resampled[some, column] / self._resampled[some, baseline]
        mean = float(self._means[column] / self._means[baseline])
        return Interval(mean, *np.percentile(drawn, _BOUNDS).tolist())


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A ranking of every query's candidates, measured; by measure name, and None where it is the baseline itself."""

    run: Run = field(repr=False)
    per_query: PerQuery = field(repr=False)  # NaN where a measure is not defined
    measures: dict[str, Interval]
    change: dict[str, _Difference] | None  # from the baseline, paired by query
    share: dict[str, Interval | None] | None  # of the baseline's mean

    @classmethod
    def of(
        cls, run: Run, values: PerQuery, boots: Mapping[str, Bootstrap], column: int, baseline: int, **more: Any
    ) -> Self:
        """Of the run in `column` of the bootstraps; `more`: fields of a subclass."""
        own = column == baseline
        return cls(
            run=run,
            per_query=values,
            measures={name: boot.interval(column) for name, boot in boots.items()},
            change=None if own else {name: boot.difference(column, baseline) for name, boot in boots.items()},
            share=None if own else {name: boot.share(column, baseline) for name, boot in boots.items()},
            **more,
        )

    @property
    def headline(self) -> float:
        return self.measures[HEADLINE].mean

    @property
    def loss(self) -> Interval:
        """Share of the baseline's nDCG@10 that is lost; below 0 where it is better."""
        kept = (self.share[HEADLINE] if self.share is not None else None) or Interval(1.0, 1.0, 1.0)
        return Interval(1 - kept.mean, 1 - kept.high, 1 - kept.low)

    @property
    def change_words(self) -> str:
        """Of nDCG@10, relative to the baseline: `gains 4.1%`, `loses 0.4%`, `loses nothing`."""
        loss = round(self.loss.mean, 3)
        return f"{'loses' if loss > 0 else 'gains'} {abs(loss):.1%}" if loss else "loses nothing"

    @property
    def range_words(self) -> str:
        """The interval of that change: `from a loss of 11.3% to a gain of 19.5%`, `a gain of 1.0% to 3.0%`."""
        low, high = round(-self.loss.high, 3), round(-self.loss.low, 3)
        if low < 0 < high:
            return f"from a loss of {-low:.1%} to a gain of {high:.1%}"
        near, far = sorted((abs(low), abs(high)))
        side, end = "loss" if low < 0 else "gain", f" to {far:.1%}" if far > near else ""
        return f"a {side} of {near:.1%}{end}" if far else "no change"

    def measures_json(self, **compared: Mapping[str, Interval | None] | None) -> dict[str, Any]:
        """`measures`, each with its comparisons by key, None left out, and `per_query`, null where undefined."""
        found = {name: asdict(interval) for name, interval in self.measures.items()}
        for key, intervals in compared.items():
            for name, interval in intervals.items() if intervals is not None else ():
                found[name][key] = asdict(interval) if interval is not None else None
        rounded = {
            name: [round(v, 6) if v == v else None for v in own.tolist()] for name, own in self.per_query.items()
        }
        return {"measures": found, "per_query": rounded}
