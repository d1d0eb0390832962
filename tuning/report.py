"""What an evaluation found: systems, their measures and how sure they are, and what was odd about the data.

Values only: how they come about is tuning.evaluate, how they look tuning.table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder_worker.sources import Refused
from tuning.bootstrap import Bootstrap, Difference, Interval, Share
from tuning.metrics import HEADLINE
from tuning.settings import EvaluationSettings
from tuning.trec import Qrels, Run, write_qrels, write_run

FORMAT_VERSION = 1

Measured = tuple[str, int | None, Run, dict[str, NDArray[np.float64]]]  # name, ratio, run, per-query values


@dataclass(frozen=True)
class System:
    """One ranking of the candidates of every query.

    measures, gain, kept: by measure name. gain: over the first stage, None for the first stage itself.
    relative: mean as a share of the first stage's mean. kept: as a share of the finest ratio's, for reranking.
    """

    name: str
    ratio: int | None  # None unless it is the checkpoint
    run: Run = field(repr=False)
    per_query: dict[str, NDArray[np.float64]] = field(repr=False)  # (num_queries,) each
    measures: dict[str, Interval]
    gain: dict[str, Difference] | None = None
    relative: dict[str, Share | None] | None = None
    kept: dict[str, Share | None] | None = None
    seconds: float | None = None  # of the decoder, all queries

    @property
    def file_stem(self) -> str:
        """A name for its run file: bm25, r4, minilm."""
        return f"r{self.ratio}" if self.ratio is not None else "".join(filter(str.isalnum, self.name.lower()))


@dataclass(frozen=True)
class Counts:
    """Sizes, and what could not be used as it was."""

    num_queries: int
    num_passages: int
    num_candidates: int  # pairs of a query and a passage
    num_judgements: int
    num_judgements_of_unknown_queries: int
    num_unknown_queries: int
    num_judgements_of_unknown_passages: int
    num_queries_without_relevant: int
    num_queries_without_candidates: int
    num_run_queries_ignored: int
    num_missing_passages: int
    num_changed_passages: int
    num_truncated_passages: int
    num_unscored_pairs: int
    num_refused_lines: int

    def notes(self) -> list[str]:
        """One sentence for each thing a reader of the numbers should know."""
        told = (
            (self.num_refused_lines, "lines of the judged files cannot be used: left out"),
            (
                self.num_judgements_of_unknown_queries,
                f"judgements name queries without a text ({self.num_unknown_queries} of them): left out",
            ),
            (
                self.num_judgements_of_unknown_passages,
                "judgements name passages that the collection does not have: relevant, and never found",
            ),
            (self.num_run_queries_ignored, "queries of the run are not evaluated: left out"),
            (self.num_queries_without_relevant, "queries have no relevant passage: they count 0"),
            (self.num_queries_without_candidates, "queries have no candidates: they count 0"),
            (self.num_missing_passages, "candidate passages have no text or states: ranked last"),
            (self.num_changed_passages, "candidate passages were stored with another text than the corpus has"),
            (self.num_truncated_passages, "candidate passages were read up to the passage limit only"),
            (self.num_unscored_pairs, "scores were not finite: those candidates are ranked last"),
        )
        return [f"{number:,} {text}" for number, text in told if number]


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
    query_ids: list[str]
    qrels: Qrels = field(repr=False)
    systems: list[System]
    refused: tuple[Refused, ...] = ()  # lines of the judged files that were left out

    @property
    def baseline(self) -> System:
        """The first stage."""
        return self.systems[0]

    def system(self, name: str) -> System:
        """Raises KeyError."""
        return {system.name: system for system in self.systems}[name]

    def reranked(self, ratio: int | None = None) -> System:
        """The checkpoint at `ratio`, or at its finest. Raises KeyError."""
        at = {system.ratio: system for system in self.systems if system.ratio is not None}
        return at[ratio if ratio is not None else min(at)]

    def to_json(self) -> str:
        """One JSON document; the same evaluation gives the same text, but for `decoder_seconds`."""
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in ("collection", "checkpoint", "fingerprint", "stored_as", "codec")},
            **{name: getattr(self, name) for name in ("dtype", "device", "instruction")},
            "settings": asdict(self.settings),
            "counts": asdict(self.counts),
            "notes": self.counts.notes(),
            "refused": [refused_json(item) for item in self.refused],
            "query_ids": self.query_ids,
            "systems": [_system_json(system) for system in self.systems],
        }
        return lists_on_one_line(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)) + "\n"

    def write_runs(self, folder: str | Path) -> list[Path]:
        """TREC files: a run per system, and the judgements they were measured with as qrels.txt."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "qrels.txt"]
        write_qrels(paths[0], self.qrels)
        for system in self.systems:
            paths.append(folder / f"{system.file_stem}.run")
            write_run(paths[-1], system.run, tag=f"preread-{system.file_stem}")
        return paths


def compare(
    rows: Sequence[Measured],
    settings: EvaluationSettings,
    seconds: dict[int, float],
) -> list[System]:
    """Systems with intervals, each against the first row, reranked ones against the finest ratio too.

    Args:
        rows: the first is the first stage; at least one has a ratio.
    """
    names = list(rows[0][3])
    columns = np.stack([values[name] for *_, values in rows for name in names], axis=1)
    bootstrap = Bootstrap(columns, seed=settings.seed, num_resamples=settings.num_resamples)
    finest = min((row for row in range(len(rows)) if rows[row][1] is not None), key=lambda row: rows[row][1] or 0)

    def column(row: int, name: str) -> int:
        return row * len(names) + names.index(name)

    systems = []
    for row, (name, ratio, run, values) in enumerate(rows):
        own = {measure: column(row, measure) for measure in names}
        first = {measure: column(0, measure) for measure in names}
        best = {measure: column(finest, measure) for measure in names}
        systems.append(
            System(
                name,
                ratio,
                run,
                values,
                measures={m: bootstrap.interval(own[m]) for m in names},
                gain={m: bootstrap.difference(own[m], first[m]) for m in names} if row else None,
                relative={m: bootstrap.share(own[m], first[m]) for m in names} if row else None,
                kept={m: bootstrap.share(own[m], best[m]) for m in names} if ratio is not None else None,
                seconds=seconds.get(ratio) if ratio is not None else None,
            )
        )
    return systems


def _system_json(system: System) -> dict[str, Any]:
    measures: dict[str, Any] = {}
    for name, interval in system.measures.items():
        measures[name] = asdict(interval)
        if system.gain is not None and system.relative is not None:
            gain = system.gain[name]
            measures[name]["gain"] = asdict(gain) | {"significant": gain.significant}
            measures[name]["relative"] = share_json(system.relative[name])
        if system.kept is not None:
            measures[name]["kept"] = share_json(system.kept[name])
    return {
        "name": system.name,
        "ratio": system.ratio,
        "headline": HEADLINE,
        "measures": measures,
        "decoder_seconds": system.seconds,
        "per_query": {name: [round(v, 6) for v in values.tolist()] for name, values in system.per_query.items()},
    }


def refused_json(item: Refused) -> dict[str, Any]:
    """As in the report of `preread index`."""
    place = {"source": item.place.source, "line": item.place.line, "passage_id": item.passage_id}
    return place | {"reason": item.reason.value, "message": item.message}


def share_json(share: Share | None) -> dict[str, float] | None:
    """As JSON values."""
    return asdict(share) if share is not None else None


def lists_on_one_line(text: str) -> str:
    """Indented JSON with lists of plain values on one line each; JSON strings hold no line breaks."""
    plain_list = re.compile(r"\[\n\s+[^\[\]{}]*?\n\s+\]")
    return plain_list.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
