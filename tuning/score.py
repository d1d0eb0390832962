"""A finished run on one screen: measured against judgements, and against the first stage's run where there is one.

No model is loaded, and torch is not imported: measures and intervals are those of `evaluate`.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from encoder_worker.sources import Refused
from preread_edge.tables import TEXT, Column, Table, print_parts
from tuning.baselines import first_stage
from tuning.config import EvaluationSettings
from tuning.judged import JudgedCollection
from tuning.metrics import HEADLINE, Bootstrap, per_query
from tuning.report import Counts, System, format_json, gain_cell, refused_rows
from tuning.trec import Qrels, Run, RunFile

_FORMAT_VERSION = 1
_SETTINGS = ("top_k", "min_grade", "max_queries", "seed", "num_resamples")  # the others are of reranking


@dataclass(frozen=True)
class RunReport:
    """The first stage if it is given, then the run."""

    collection: str
    settings: EvaluationSettings
    counts: Counts
    qrels: Qrels = field(repr=False)
    systems: list[System]
    refused: tuple[Refused, ...] = ()  # lines of the judged files that were left out

    def to_json(self) -> str:
        """One JSON document; the same run gives the same text."""
        return format_json(
            {
                "format_version": _FORMAT_VERSION,
                "collection": self.collection,
                "settings": {name: getattr(self.settings, name) for name in _SETTINGS},
                "counts": asdict(self.counts),
                "notes": self.counts.notes(),
                "refused": refused_rows(self.refused),
                "query_ids": list(self.qrels),
                "systems": [system.to_json() for system in self.systems],
            }
        )

    def print(self) -> None:
        """Title, table, how to read it, and notes about the data, on standard output."""
        counts, settings, (first, *more) = self.counts, self.settings, self.systems
        others = [name for name in first.measures if name != HEADLINE]
        table = Table([Column("run", TEXT), *map(Column, (HEADLINE, *(["change"] if more else []), *others))])
        for system in self.systems:
            gain = [gain_cell(system)] if more else []
            means = (f"{system.measures[name].mean:.3f}" for name in others)
            table.add(system.name, str(system.measures[HEADLINE]), *gain, *means)
        marks = f" ▲ ▼: the paired difference in {HEADLINE} from {first.name} excludes 0." if more else ""
        print_parts(
            f"{self.collection}: {counts.num_queries:,} queries, {counts.num_judgements:,} judgements; the best "
            f"{settings.top_k} of each query, {counts.num_candidates:,} in all",
            table,
            f"[low, high]: 95% bootstrap over queries ({settings.num_resamples:,} resamples, seed {settings.seed})."
            + marks,
            *(f"Note: {note}." for note in counts.notes()),
        )


def score_run(judged: JudgedCollection, run: RunFile, settings: EvaluationSettings | None = None) -> RunReport:
    """Measures of a run, and of `judged.candidates`, the first stage's, where there is one.

    Raises EvaluationError: a run that ranks nothing for any of the judged queries.
    """
    settings = settings or EvaluationSettings()
    judged = judged.sample(settings.max_queries, settings.seed)
    finished = replace(judged, candidates=run)
    named: list[tuple[str, Run]] = [first_stage(finished, settings.top_k)]
    if judged.candidates is not None:
        named.insert(0, first_stage(judged, settings.top_k))
    values = [per_query(judged.qrels, ranking, settings.top_k, settings.min_grade) for _, ranking in named]
    boots = Bootstrap.by_measure(values, seed=settings.seed, num_resamples=settings.num_resamples)
    own: dict[str, Any] = {"ratio": None, "kept": None, "seconds": None}  # of a checkpoint
    systems = [System.of(ranking, values[i], boots, i, 0, name=name, **own) for i, (name, ranking) in enumerate(named)]
    ranked = {passage_id for ranking in named[-1][1].values() for passage_id, _ in ranking}
    num_unknown = len(ranked - judged.passages.keys()) if judged.passages else 0
    counts = Counts.of(finished, named[-1][1], settings.min_grade, num_unknown_candidates=num_unknown)
    return RunReport(judged.name, settings, counts, judged.qrels, systems, judged.refused)
