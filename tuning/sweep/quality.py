"""How good each configuration's orders are, query by query, and how sure that is, against the reference.

The reference is r = 1: the states as the encoder gave them, no codec, read by the decoder in float32. Where there are
no judgements, its ranking replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preread.values import Stage
from tuning.metrics import HEADLINE, Difference, Interval, PerQuery, bootstraps, kendall_tau, per_query
from tuning.progress import SILENT, StageProgress
from tuning.report import measures_json
from tuning.rerank import Pairs
from tuning.sweep.margins import Margins
from tuning.sweep.settings import Configuration, Reading, SweepSettings
from tuning.trec import Qrels, Run, order

TAU = "Kendall tau"
AUC = "ROC-AUC"
_NUM_TAUGHT = 10  # of the reference's ranking, the places that count as relevant where there are no judgements


@dataclass(frozen=True)
class Quality:
    """One order of every query's candidates, measured.

    change, kept: against the reference, paired by query; None for the reference itself. kept: share of its mean.
    """

    run: Run = field(repr=False)
    per_query: PerQuery = field(repr=False)  # NaN where a measure is not defined
    measures: dict[str, Interval]
    change: dict[str, Difference] | None
    kept: dict[str, Interval | None] | None

    def to_json(self) -> dict[str, Any]:
        return measures_json(self.measures, self.per_query, change=self.change, kept=self.kept)

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
        """The loss with its sign reversed, for people: a change, and never -0."""
        return round(-self.loss, 9) + 0.0

    @property
    def loss_bounds(self) -> tuple[float, float]:
        """The 95% interval of `loss`."""
        share = self.kept[HEADLINE] if self.kept is not None else None
        return (1 - share.high, 1 - share.low) if share is not None else (0.0, 0.0)


@dataclass(frozen=True)
class Judgements:
    """Relevance grades, and the grade that counts as relevant for measures without grades."""

    qrels: Qrels
    taught: bool  # by the reference, not by people
    min_grade: int

    @classmethod
    def taught_by(cls, reference: NDArray[np.float32], pairs: Pairs) -> Judgements:
        """The reference's best ten as grades 10 down to 1; queries without a scored candidate have none."""
        qrels: Qrels = {}
        for query_id, own in pairs.split(reference).items():
            found = pairs.candidates[query_id]
            best = [row for row in order(own).tolist() if np.isfinite(own[row])][:_NUM_TAUGHT]
            if best:
                qrels[query_id] = {found[row]: _NUM_TAUGHT - place for place, row in enumerate(best)}
        return cls(qrels, True, 1)

    def measure(
        self,
        first: Run,
        reference: NDArray[np.float32],
        margins: Margins,
        configurations: Iterable[Configuration],
        settings: SweepSettings,
        progress: StageProgress = SILENT,
    ) -> tuple[Quality, Quality, dict[Configuration, Quality]]:
        """The first stage, the reference, and every configuration whose margins are there."""
        pairs = margins.pairs
        measured = [one for one in configurations if all(unit in margins.values for unit in one.units())]
        advance = progress.begin("measure (configurations)", len(measured) + 2)
        readings = [(Reading((Stage(1),)), [reference])]
        readings += [(one.reading, [margins.values[unit] for unit in one.units()]) for one in measured]
        runs = [first]
        for reading, flats in readings:
            split = [pairs.split(flat) for flat in flats]
            runs.append({q: reading.ranking(found, [own[q] for own in split]) for q, found in pairs.candidates.items()})
        values = []
        for run in runs:
            values.append(_per_query(self, run, runs[1], settings))
            advance(1)
        boots = bootstraps(values, seed=settings.seed, num_resamples=settings.num_resamples)
        first_stage, finest, *others = [
            Quality(
                run,
                own,
                measures={name: boot.interval(row) for name, boot in boots.items()},
                change={name: boot.difference(row, 1) for name, boot in boots.items()} if row != 1 else None,
                kept={name: boot.share(row, 1) for name, boot in boots.items()} if row != 1 else None,
            )
            for row, (run, own) in enumerate(zip(runs, values, strict=True))
        ]
        return first_stage, finest, dict(zip(measured, others, strict=True))


def _per_query(judgements: Judgements, run: Run, reference: Run, settings: SweepSettings) -> PerQuery:
    # For MRR only the best passage of the reference's judgements counts.
    values = per_query(judgements.qrels, run, 10, _NUM_TAUGHT if judgements.taught else judgements.min_grade)
    others: dict[str, list[float]] = {TAU: [], settings.overlap_name: [], AUC: []}
    for query_id, grades in judgements.qrels.items():
        best = [p for p, _ in reference[query_id]]
        place = {p: place for place, (p, _) in enumerate(run[query_id])}
        mine = np.array([place[p] for p in best], dtype=np.intp)  # 0 for the best, in the reference's order
        relevant = np.array([grades.get(p, 0) >= judgements.min_grade for p in best], dtype=bool)
        others[TAU].append(kendall_tau(mine, np.arange(len(mine))))
        others[settings.overlap_name].append(_overlap(mine, settings.overlap_k))
        others[AUC].append(_auc(mine, relevant))
    return {name: values[name] for name in (HEADLINE, "MRR@10")} | {name: np.array(v) for name, v in others.items()}


def _overlap(mine: NDArray[np.intp], k: int) -> float:
    """Share of the reference's top k that is in this one's; not defined of nothing."""
    return float((mine[:k] < k).sum() / min(k, len(mine))) if len(mine) else float("nan")


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
