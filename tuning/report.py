"""An evaluation as values, as JSON, as TREC files and as a table: systems, measures, intervals, notes."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from encoder_worker.sources import Refused
from preread_edge.tables import TEXT, Column, Table, print_parts
from tuning.config import EvaluationSettings
from tuning.judged import JudgedCollection
from tuning.metrics import HEADLINE, Interval, Quality
from tuning.trec import Qrels, Run, write_runs

_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class System(Quality):
    """A ranking against the first stage's, and where it is the checkpoint's, against that of its finest ratio."""

    name: str
    ratio: int | None  # None unless it is the checkpoint
    kept: dict[str, Interval | None] | None  # share of the finest ratio's mean, by measure
    seconds: float | None  # of the decoder, all queries

    @property
    def file_stem(self) -> str:
        """The stem of its run file: bm25, r4, minilm."""
        return f"r{self.ratio}" if self.ratio is not None else "".join(filter(str.isalnum, self.name.lower()))

    def to_json(self) -> dict[str, Any]:
        own = {"name": self.name, "ratio": self.ratio, "headline": HEADLINE, "decoder_seconds": self.seconds}
        return own | self.measures_json(gain=self.change, relative=self.share, kept=self.kept)


def _noted(note: str) -> Any:
    """A count that, where it is not 0, the reader of the numbers is told of."""
    return field(default=0, metadata={"note": note})


@dataclass(frozen=True)
class Counts:
    """Sizes, and data that could not be used as it was."""

    num_queries: int
    num_passages: int
    num_candidates: int  # pairs of a query and a passage
    num_judgements: int
    num_refused_lines: int = _noted("lines of the judged files cannot be used: left out")
    num_judgements_of_unknown_queries: int = _noted(
        "judgements name queries without a text ({num_unknown_queries} of them): left out"
    )
    num_unknown_queries: int = 0
    num_judgements_of_unknown_passages: int = _noted(
        "judgements name passages that the collection does not have: relevant, and never found"
    )
    num_run_queries_ignored: int = _noted("queries of the run are not evaluated: left out")
    num_queries_without_relevant: int = _noted("queries have no relevant passage: they count 0")
    num_queries_without_candidates: int = _noted("queries have no candidates: {fate}")
    num_unknown_candidates: int = _noted("passages of the run are not in the collection: they take their places")
    num_missing_passages: int = _noted("candidate passages have no text or states: ranked last")
    num_changed_passages: int = _noted("candidate passages were stored with another text than the corpus has")
    num_truncated_passages: int = _noted("candidate passages were read up to the passage limit only")
    num_unscored_pairs: int = _noted("scores were not finite: those candidates are ranked last")

    @classmethod
    def of(cls, judged: JudgedCollection, first: Run, min_grade: int, **of_candidates: int) -> Self:
        """Of the judged data; counts of candidates, which depend on the scoring, are added as they are."""
        grades, stored, given = list(judged.qrels.values()), judged.stored, judged.candidates
        known = set(judged.passages)
        if not known:  # a store without texts, or nothing to compare with
            ids = sorted({p for own in grades for p in own})
            digests = stored.digests(ids) if stored is not None else ids
            known = {p for p, digest in zip(ids, digests, strict=True) if digest is not None}
        return cls(
            num_queries=len(judged.queries),
            num_passages=len(judged.passages) if stored is None else stored.stats().num_passages,
            num_candidates=sum(map(len, first.values())),
            num_judgements=sum(map(len, grades)),
            num_refused_lines=len(judged.refused),
            num_judgements_of_unknown_queries=judged.num_judgements_of_unknown_queries,
            num_unknown_queries=len(judged.unknown_queries),
            num_judgements_of_unknown_passages=sum(p not in known for own in grades for p in own),
            num_run_queries_ignored=len(given.run.keys() - judged.queries.keys()) if given is not None else 0,
            num_queries_without_relevant=sum(max(own.values()) < min_grade for own in grades),
            num_queries_without_candidates=sum(not ranking for ranking in first.values()),
            **of_candidates,
        )

    def notes(self, *, taught: bool = False) -> list[str]:
        """One sentence for each thing a reader of the numbers should know; `taught`: judged by the model's ranking."""
        values = asdict(self) | {"fate": "left out" if taught else "they count 0"}
        noted = ((values[one.name], one.metadata["note"]) for one in fields(self) if "note" in one.metadata)
        return [f"{number:,} {note.format(**values)}" for number, note in noted if number]


@dataclass(frozen=True)
class EvaluationReport:
    """Systems in order: the first stage, the teacher if any, then the checkpoint from fine to coarse."""

    collection: str
    checkpoint: str
    fingerprint: str
    stored_as: str | None  # the collection whose stored states were read; None where they were encoded
    codec: str | None  # of stored states
    dtype: str
    device: str
    instruction: str
    settings: EvaluationSettings
    counts: Counts
    qrels: Qrels = field(repr=False)
    systems: list[System]
    refused: tuple[Refused, ...] = ()  # lines of the judged files that were left out

    @property
    def baseline(self) -> System:
        """The first stage."""
        return self.systems[0]

    def reranked(self, ratio: int | None = None) -> System:
        """The checkpoint at `ratio`, or at its finest. Raises KeyError."""
        at = {system.ratio: system for system in self.systems if system.ratio is not None}
        return at[ratio if ratio is not None else min(at)]

    def to_json(self) -> str:
        """One JSON document; the same evaluation gives the same text, but for `decoder_seconds`."""
        plain = ("collection", "checkpoint", "fingerprint", "stored_as", "codec", "dtype", "device", "instruction")
        return format_json(
            {
                "format_version": _FORMAT_VERSION,
                **{name: getattr(self, name) for name in plain},
                "settings": asdict(self.settings),
                "counts": asdict(self.counts),
                "notes": self.counts.notes(),
                "refused": refused_rows(self.refused),
                "query_ids": list(self.qrels),
                "systems": [system.to_json() for system in self.systems],
            }
        )

    def write_runs(self, folder: str | Path) -> list[Path]:
        return write_runs(folder, self.qrels, {system.file_stem: system.run for system in self.systems})

    def print(self) -> None:
        """Title, table, how to read it, and notes about the data, on standard output."""
        counts, settings, ceiling = self.counts, self.settings, f"R@{self.settings.top_k}"
        first, finest = self.baseline, self.reranked()
        origin = f"states of {self.stored_as} ({self.codec})" if self.stored_as else "encoded now"
        best = first.measures[ceiling].mean
        # The ceiling is the same for all of them: it stands below the table.
        others = [name for name in first.measures if name not in (HEADLINE, ceiling)]
        named = (HEADLINE, f"over {first.name}", f"of {finest.name}", *others)
        table = Table([Column("system", TEXT), *map(Column, named)])
        for system in self.systems:
            kept = system.kept[HEADLINE] if system.kept is not None else None
            table.add(
                system.name,
                str(system.measures[HEADLINE]),
                gain_cell(system),
                f"{kept.mean:.1%}" if kept is not None else "",
                *(f"{system.measures[name].mean:.3f}" for name in others),
            )
        print_parts(
            f"{self.collection}: {counts.num_queries:,} queries, {counts.num_passages:,} passages, "
            f"{counts.num_judgements:,} judgements; {first.name} top {settings.top_k}\n"
            f"{self.checkpoint}: {origin}, {self.dtype} on {self.device}",
            table,
            "[low, high]: 95% bootstrap over queries. ▲ ▼: the paired difference in nDCG@10 from "
            f"{first.name} excludes 0 ({settings.num_resamples:,} resamples, seed {settings.seed}).",
            f"The candidates hold {best:.1%} of the relevant passages; no reranking finds more.",
            *(f"Note: {note}." for note in counts.notes()),
        )


def gain_cell(system: System) -> str:
    """The relative change of the headline from the first stage, with its interval and mark; "" of the first stage."""
    if system.change is None:
        return ""
    change, share = system.change[HEADLINE], system.share[HEADLINE] if system.share is not None else None
    if share is None:  # the first stage found nothing: no share exists
        return f"{change.mean:+.3f} {change.mark}"
    return f"{share.mean - 1:+.1%} [{share.low - 1:+.1%}, {share.high - 1:+.1%}] {change.mark}"


def refused_rows(refused: Sequence[Refused]) -> list[dict[str, Any]]:
    """Lines that were left out, as JSON values."""
    return [
        asdict(item.place) | {"passage_id": item.passage_id, "reason": item.reason, "message": item.message}
        for item in refused
    ]


def format_json(document: dict[str, Any]) -> str:
    """Indented, with lists of plain values on one line each; JSON strings hold no line breaks."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
    plain_list = re.compile(r"\[\n\s+[^\[\]{}]*?\n\s+\]")
    return plain_list.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"
