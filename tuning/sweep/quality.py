"""How good each configuration's orders are, query by query, and how sure that is, against the reference.

The reference is r = 1: the states as the encoder gave them, no codec, read by the decoder in float32. Where there are
no judgements, its ranking replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preread.values import Stage
from tuning import EvaluationError
from tuning.metrics import HEADLINE, Bootstrap, PerQuery, Quality, kendall_tau, per_query
from tuning.progress import SILENT, StageProgress
from tuning.rerank import Pairs
from tuning.sweep.margins import Margins
from tuning.sweep.settings import Configuration, Reading, SweepSettings
from tuning.trec import Qrels, Run, order

TAU = "Kendall tau"
AUC = "ROC-AUC"
_NUM_TAUGHT = 10  # of the reference's ranking, the places that count as relevant where there are no judgements


@dataclass(frozen=True)
class Judgements:
    """Relevance grades, and the grade that counts as relevant for measures without grades."""

    qrels: Qrels
    taught: bool  # by the reference, not by people
    min_grade: int

    @classmethod
    def of(cls, qrels: Qrels, min_grade: int, reference: NDArray[np.float32], pairs: Pairs) -> Judgements:
        """People's; where there are none, the reference's best ten as 10 down to 1. EvaluationError: none scored."""
        if qrels:
            return cls(qrels, False, min_grade)
        taught: Qrels = {}
        for query_id, own in pairs.split(reference).items():
            found = pairs.candidates[query_id]
            best = [row for row in order(own).tolist() if np.isfinite(own[row])][:_NUM_TAUGHT]
            if best:
                taught[query_id] = {found[row]: _NUM_TAUGHT - place for place, row in enumerate(best)}
        if not taught:
            raise EvaluationError("the reference scored no candidate: every margin is NaN")
        return cls(taught, True, 1)

    def measure(
        self,
        first: Run,
        reference: NDArray[np.float32],
        margins: Margins,
        configurations: Iterable[Configuration],
        settings: SweepSettings,
        progress: StageProgress = SILENT,
    ) -> tuple[Quality, Quality, dict[Configuration, Quality]]:
        """The first stage, the reference, and every configuration whose margins are there, against the reference."""
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
            values.append(self._per_query(run, runs[1], settings))
            advance(1)
        boots = Bootstrap.by_measure(values, seed=settings.seed, num_resamples=settings.num_resamples)
        first_stage, finest, *others = (Quality.of(run, values[i], boots, i, 1) for i, run in enumerate(runs))
        return first_stage, finest, dict(zip(measured, others, strict=True))

    def _per_query(self, run: Run, reference: Run, settings: SweepSettings) -> PerQuery:
        # For MRR only the best passage of the reference's judgements counts.
        values = per_query(self.qrels, run, 10, _NUM_TAUGHT if self.taught else self.min_grade)
        others: list[tuple[float, float, float]] = []
        k = settings.overlap_k
        for query_id, grades in self.qrels.items():
            best = [p for p, _ in reference[query_id]]
            place = {p: place for place, (p, _) in enumerate(run[query_id])}
            mine = np.array([place[p] for p in best], dtype=np.intp)  # 0 for the best, in the reference's order
            relevant = np.array([grades.get(p, 0) >= self.min_grade for p in best], dtype=bool)
            # Of the reference's top k, the share that is in this one's; not defined of nothing.
            overlap = float((mine[:k] < k).sum() / min(k, len(mine))) if len(mine) else float("nan")
            others.append((kendall_tau(mine, np.arange(len(mine))), overlap, _auc(mine, relevant)))
        columns = np.array(others).T
        named = dict(zip((TAU, settings.overlap_name, AUC), columns, strict=True))
        return {name: values[name] for name in (HEADLINE, "MRR@10")} | named


def _auc(mine: NDArray[np.intp], relevant: NDArray[np.bool_]) -> float:
    """Share of (relevant, other) pairs in right order, Mann and Whitney's U over its most; NaN without such pairs."""
    num_relevant = int(relevant.sum())
    num_others = len(relevant) - num_relevant
    if not num_relevant or not num_others:
        return float("nan")
    num_wrong = int(mine[relevant].sum()) - num_relevant * (num_relevant - 1) // 2  # others before each, summed
    return 1 - num_wrong / (num_relevant * num_others)
