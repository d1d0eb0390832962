"""What an evaluation is asked to do; checked once, passed down.

What an evaluation found: systems, their measures and how sure they are, and what was odd about the data.

Values only: how they come about is tuning.evaluate, how they look tuning.report.

An evaluation for the eyes: one table in the terminal. Computes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from encoder_worker.sources import Refused
from tuning import EvaluationError
from tuning.baselines import check_teacher
from tuning.metrics import HEADLINE, NUM_RESAMPLES, Bootstrap, Difference, Interval, Share
from tuning.trec import Qrels, Run, write_qrels, write_run

COARSEST = 32  # what published checkpoints are trained for


@dataclass(frozen=True)
class EvaluationSettings:
    """
    ratios: compression ratios to read passages at; None for 1, 2, 4 ... 32, from the stored ratio on
    top_k: candidates per query
    split: passages over the limit become windows, the best of which counts, instead of being cut
    instruction: instead of the checkpoint's own; "": none
    teacher: another model on the same candidates (tuning.baselines.TEACHERS)
    max_queries: draw that many queries; None takes all
    min_grade: lowest grade that counts as relevant for MRR and recall
    seed: of the drawn queries and the bootstrap

    Raises EvaluationError naming the setting.
    """

    ratios: tuple[int, ...] | None = None
    top_k: int = 50
    split: bool = False
    instruction: str | None = None
    teacher: str | None = None
    max_queries: int | None = None
    min_grade: int = 1
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        if self.ratios is not None:
            if not self.ratios or min(self.ratios) < 1:
                raise EvaluationError(f"ratios is {self.ratios}; expected integers of at least 1")
            if len(set(self.ratios)) != len(self.ratios):
                raise EvaluationError(f"ratios is {self.ratios}; expected each once")
        for name, least in (("top_k", 1), ("max_queries", 1), ("min_grade", 1), ("num_resamples", 100)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} is {value}; expected at least {least}")
        if self.teacher is not None:
            check_teacher(self.teacher)

    def with_ratios(self, stored: int) -> EvaluationSettings:
        """The same with the ratios that None stands for, fine to coarse; each can be read from states at `stored`.

        Raises:
            EvaluationError: a ratio asked for cannot be.
        """
        if self.ratios is None:
            doublings = range(max(1, (COARSEST // stored).bit_length()))
            return replace(self, ratios=tuple(stored << i for i in doublings))
        for ratio in self.ratios:
            if ratio % stored:
                raise EvaluationError(f"ratio is {ratio}; the states are at {stored}, expected a multiple of it")
        return replace(self, ratios=tuple(sorted(self.ratios)))


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


MIN_WIDTH = 80  # cells are never cut: a narrow terminal wraps lines by itself


def render(report: EvaluationReport) -> RenderableType:
    """Title, table, how to read it, and what was odd about the data."""
    counts, settings = report.counts, report.settings
    origin = f"states of {report.stored_as} ({report.codec})" if report.stored_as else "encoded now"
    head = Text(
        f"{report.collection}: {counts.num_queries:,} queries, {counts.num_passages:,} passages, "
        f"{counts.num_judgements:,} judgements; {report.baseline.name} top {settings.top_k}\n"
        f"{report.checkpoint}: {origin}, {report.dtype} on {report.device}"
    )
    best = report.baseline.measures[f"R@{settings.top_k}"].mean
    lines = [
        "[low, high]: 95% bootstrap over queries. ▲ ▼: the paired difference in nDCG@10 from "
        f"{report.baseline.name} leaves 0 out ({settings.num_resamples:,} resamples, seed {settings.seed}).",
        f"The candidates hold {best:.1%} of the relevant passages; no reranking finds more.",
        *(f"Note: {note}." for note in counts.notes()),
    ]
    return Group(head, _table(report), *(Text(line) for line in lines))


def print_report(report: EvaluationReport, console: Console | None = None) -> None:
    """To standard output unless told otherwise."""
    console = console or Console()
    console.print(render(report), width=max(console.width, MIN_WIDTH))


def _table(report: EvaluationReport) -> Table:
    finest = report.reranked()
    ceiling = f"R@{report.settings.top_k}"  # the same for all of them: said below the table
    others = [name for name in report.baseline.measures if name not in (HEADLINE, ceiling)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("system", no_wrap=True)
    table.add_column(HEADLINE, justify="right", no_wrap=True)
    table.add_column(f"over {report.baseline.name}", justify="right", no_wrap=True)
    table.add_column(f"of {finest.name}", justify="right", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for system in report.systems:
        table.add_row(system.name, *_headline(system), *(f"{system.measures[name].mean:.3f}" for name in others))
    return table


def _headline(system: System) -> tuple[str, str, str]:
    own = system.measures[HEADLINE]
    interval = f"{own.mean:.3f} \\[{own.low:.3f}, {own.high:.3f}]"  # an open bracket would be markup
    gain = system.gain[HEADLINE] if system.gain is not None else None
    relative = system.relative[HEADLINE] if system.relative is not None else None
    kept = system.kept[HEADLINE] if system.kept is not None else None
    return interval, _gain(gain, relative), f"{kept.mean:.1%}" if kept is not None else ""


def _gain(gain: Difference | None, relative: Share | None) -> str:
    if gain is None:
        return ""
    mark = " " if not gain.significant else "▲" if gain.mean > 0 else "▼"
    if relative is None:  # the first stage found nothing: no share to speak of
        return f"{gain.mean:+.3f} {mark}"
    low, high = relative.low - 1, relative.high - 1
    return f"{relative.mean - 1:+.1%} \\[{low:+.1%}, {high:+.1%}] {mark}"
