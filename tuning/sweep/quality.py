"""Margins to one ordering of a query's candidates, for one reading or several stages. Pure functions.

Later stages outrank earlier ones: whoever went on stands before whoever did not.

How good each configuration's orders are, query by query, and how sure that is, against the reference.

The reference is r = 1: the states as the encoder gave them, no codec, read by the decoder in float32. Where nobody
judged, its own ranking is the judgement. Does not know states or costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from decoder_server.engine.plan import Plan
from preread.types import Stage
from tuning.metrics import HEADLINE, Bootstrap, Difference, Interval, Share, per_query
from tuning.progress import SILENT, Progress
from tuning.sweep.margins import Margins, Pairs
from tuning.sweep.settings import Configuration
from tuning.trec import Qrels, Run, order, rank


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


STAGE = "measure (configurations)"
TAU = "Kendall tau"
AUC = "ROC-AUC"
NUM_TAUGHT = 10  # of the reference's ranking, the places that count as relevant where nobody judged

PerQuery = dict[str, NDArray[np.float64]]  # by measure, (num_queries,); NaN where it is not defined


def overlap_name(k: int) -> str:
    return f"top-{k} overlap"


@dataclass(frozen=True)
class Judgements:
    """What counts as relevant, and from which grade on for each measure that wants a line drawn."""

    qrels: Qrels
    taught: bool  # by the reference, not by people
    min_grade: int

    @property
    def first_grade(self) -> int:
        """For MRR: of the reference's judgements only its best passage counts."""
        return NUM_TAUGHT if self.taught else self.min_grade


@dataclass(frozen=True)
class Quality:
    """One order of every query's candidates, measured.

    change, kept: against the reference, paired by query; None for the reference itself. kept: share of its mean.
    """

    run: Run = field(repr=False)
    per_query: PerQuery = field(repr=False)
    measures: dict[str, Interval]
    change: dict[str, Difference] | None = None
    kept: dict[str, Share | None] | None = None

    @property
    def headline(self) -> float:
        return self.measures[HEADLINE].mean

    @property
    def loss(self) -> float:
        """Share of the reference's nDCG@10 that is lost; below 0 where it is better."""
        share = self.kept[HEADLINE] if self.kept is not None else None
        return 1 - share.mean if share is not None else 0.0

    @property
    def gain(self) -> float:
        """The same the other way round, for people: a change, and never -0."""
        return round(-self.loss, 9) + 0.0

    @property
    def loss_bounds(self) -> tuple[float, float]:
        """The 95% interval of `loss`."""
        share = self.kept[HEADLINE] if self.kept is not None else None
        return (1 - share.high, 1 - share.low) if share is not None else (0.0, 0.0)


def taught_by(reference: NDArray[np.float32], pairs: Pairs) -> Qrels:
    """The reference's best ten as grades 10 down to 1; queries without a scored candidate have none."""
    qrels: Qrels = {}
    for query_id, own in pairs.split(reference).items():
        found = pairs.candidates[query_id]
        best = [row for row in order(own).tolist() if np.isfinite(own[row])][:NUM_TAUGHT]
        if best:
            qrels[query_id] = {found[row]: NUM_TAUGHT - place for place, row in enumerate(best)}
    return qrels


def measure(
    judgements: Judgements,
    first: Run,
    reference: NDArray[np.float32],
    margins: Margins,
    configurations: Sequence[Configuration],
    *,
    overlap_k: int,
    seed: int,
    num_resamples: int,
    progress: Progress = SILENT,
) -> tuple[Quality, Quality, dict[Configuration, Quality]]:
    """The first stage, the reference, and every configuration whose margins are there."""
    pairs = margins.pairs
    measured = [one for one in configurations if all(unit in margins.values for unit in one.units())]
    progress.begin(STAGE, len(measured) + 2)
    by_query = pairs.split(reference)
    best = {q: places(order(own)) for q, own in by_query.items()}
    whole = (Stage(1),)
    rows: list[tuple[Run, PerQuery]] = []

    def add(run: Run, orders: Mapping[str, NDArray[np.intp]]) -> None:
        rows.append((run, _per_query(judgements, run, orders, best, pairs, overlap_k)))
        progress.advance(STAGE, 1)

    add(first, {q: np.arange(len(found)) for q, found in pairs.candidates.items()})
    add({q: ranking(pairs.candidates[q], whole, [own]) for q, own in by_query.items()},
        {q: order(own) for q, own in by_query.items()})  # fmt: skip
    for one in measured:
        own = [pairs.split(margins.values[unit]) for unit in one.units()]
        staged = {q: [values[q] for values in own] for q in pairs.query_ids}
        add({q: ranking(pairs.candidates[q], one.stages, values) for q, values in staged.items()},
            {q: compose(one.stages, values) for q, values in staged.items()})  # fmt: skip
    first_stage, finest, *others = _with_intervals(rows, seed, num_resamples)
    return first_stage, finest, dict(zip(measured, others, strict=True))


def _per_query(
    judgements: Judgements,
    run: Run,
    orders: Mapping[str, NDArray[np.intp]],
    best: Mapping[str, NDArray[np.intp]],
    pairs: Pairs,
    overlap_k: int,
) -> PerQuery:
    qrels = judgements.qrels
    values = per_query(qrels, run, 10, judgements.first_grade)
    result = {HEADLINE: values[HEADLINE], "MRR@10": values["MRR@10"]}
    others: dict[str, list[float]] = {TAU: [], overlap_name(overlap_k): [], AUC: []}
    for query_id, grades in qrels.items():
        mine, theirs = places(orders[query_id]), best[query_id]
        relevant = np.array(
            [grades.get(p, 0) >= judgements.min_grade for p in pairs.candidates[query_id]], dtype=np.bool_
        )
        others[TAU].append(_tau(mine, theirs))
        others[overlap_name(overlap_k)].append(_overlap(mine, theirs, overlap_k))
        others[AUC].append(_auc(mine, relevant))
    return result | {name: np.array(own) for name, own in others.items()}


def _tau(mine: NDArray[np.intp], theirs: NDArray[np.intp]) -> float:
    """Kendall's tau of two orders without ties; not defined of fewer than two."""
    return float(kendalltau(mine, theirs).statistic) if len(mine) > 1 else float("nan")


def _overlap(mine: NDArray[np.intp], theirs: NDArray[np.intp], k: int) -> float:
    """Share of the reference's top k that is in this one's; not defined of nothing."""
    if not len(mine):
        return float("nan")
    return float(((mine < k) & (theirs < k)).sum() / min(k, len(mine)))


def _auc(mine: NDArray[np.intp], relevant: NDArray[np.bool_]) -> float:
    """Of all (relevant, other) pairs of candidates, the share in right order (Mann and Whitney's U over its most).

    Not defined where either kind is absent.
    """
    num_relevant = int(relevant.sum())
    num_others = len(relevant) - num_relevant
    if not num_relevant or not num_others:
        return float("nan")
    num_wrong = int(mine[relevant].sum()) - num_relevant * (num_relevant - 1) // 2  # others before each, summed
    return 1 - num_wrong / (num_relevant * num_others)


def _with_intervals(rows: Sequence[tuple[Run, PerQuery]], seed: int, num_resamples: int) -> list[Quality]:
    """The second row is the reference. Each measure over the queries where it is defined, the same for all rows."""
    names = list(rows[0][1])
    boots: dict[str, Bootstrap | None] = {}
    for name in names:
        columns = np.stack([values[name] for _, values in rows], axis=1)  # (num_queries, num_rows)
        defined = np.isfinite(columns).all(axis=1)
        boots[name] = Bootstrap(columns[defined], seed=seed, num_resamples=num_resamples) if defined.any() else None
    some = {name: boot for name, boot in boots.items() if boot is not None}
    return [
        Quality(
            run,
            values,
            measures={name: boot.interval(row) for name, boot in some.items()},
            change={name: boot.difference(row, 1) for name, boot in some.items()} if row != 1 else None,
            kept={name: boot.share(row, 1) for name, boot in some.items()} if row != 1 else None,
        )
        for row, (run, values) in enumerate(rows)
    ]
