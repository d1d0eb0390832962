"""A sweep's outcome: measured rows, Pareto fronts and the choice, as values, JSON, TREC files, TOML and a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tuning import EvaluationError
from tuning.config import Limits, SweepSettings
from tuning.metrics import HEADLINE, Quality
from tuning.report import format_json, plain_table, print_parts
from tuning.sweep.costs import IndexingCost, Latency, StoredSize
from tuning.sweep.margins import AUC, TAU
from tuning.sweep.settings import Configuration
from tuning.trec import Qrels, write_runs

_FORMAT_VERSION = 1
_MIN_WIDTH = 120
_SMALL, _FAST, _CHOSEN = "●", "◆", "▶"


def _quality_json(quality: Quality) -> dict[str, Any]:
    return quality.measures_json(change=quality.change, kept=quality.share)


@dataclass(frozen=True)
class SweepRow:
    """One configuration, measured."""

    configuration: Configuration
    quality: Quality
    size: StoredSize
    timing: Latency | None
    indexing: IndexingCost

    def to_json(self) -> dict[str, Any]:
        one = self.configuration
        return {
            "name": one.name,
            "stored_ratio": one.stored_ratio,
            "codec": one.codec,
            "stages": [asdict(stage) for stage in one.reading.stages],
            "quality": _quality_json(self.quality),
            "size": asdict(self.size),
            "timing": asdict(self.timing) if self.timing is not None else None,
            "indexing": asdict(self.indexing),
        }


@dataclass(frozen=True)
class Choice:
    """`row` keeps all limits, or is the nearest to doing so."""

    row: SweepRow
    broken: dict[str, float]  # by limit that it does not keep: value over limit, less 1; a loss in points of a percent
    explanation: str  # its values over those limits

    @classmethod
    def among(cls, limits: Limits, rows: Sequence[SweepRow]) -> "Choice":
        """The preferred that keeps all limits, or whose worst excess is least. Raises EvaluationError without rows."""
        if not rows:
            raise EvaluationError("no configuration could be measured; the notes say why")
        ranked: list[tuple[tuple[float, ...], Choice]] = []
        for row in rows:
            loss = row.quality.loss.high if limits.sure else row.quality.loss.mean
            size, broken, told = row.size.bytes_per_passage, dict[str, float](), []
            if limits.max_loss is not None and loss > limits.max_loss:
                broken["max_loss"] = (loss - limits.max_loss) * 100
                up_to = "up to " if limits.sure else ""
                told.append(f"it loses {up_to}{loss:.2%}, expected at most {limits.max_loss:.2%}")
            if limits.max_bytes is not None and size > limits.max_bytes:
                broken["max_bytes"] = size / max(limits.max_bytes, 1e-9) - 1
                told.append(f"{size:,.0f} bytes a passage, expected at most {limits.max_bytes:,.0f}")
            if (most := limits.max_latency_seconds) is not None:
                assert row.timing is not None  # the command refuses such a limit where nothing is timed
                p99 = row.timing.p99_seconds
                if p99 > most:
                    broken["max_latency"] = p99 / max(most, 1e-9) - 1
                    told.append(f"p99 {p99 * 1000:.1f} ms, expected at most {most * 1000:g} ms")
            p50 = row.timing.p50_seconds if row.timing is not None else 0.0
            keys = {"bytes": size, "latency": p50, "quality": -row.quality.headline}
            excess, first = max(broken.values(), default=-1.0), keys.pop(limits.decides_by)
            order = (excess, first, keys.get("quality", 0.0), *keys.values())
            ranked.append((order, cls(row, broken, "; ".join(told))))
        return min(ranked, key=itemgetter(0))[1]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, quality) points none beats: as cheap and better, or cheaper and as good; of equal ones the first."""
    on, best = [False] * len(points), float("-inf")
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            on[i], best = True, points[i][1]
    return on


@dataclass(frozen=True)
class SweepReport:
    """Everything that a table, a page and a choice are made of."""

    collection: str
    checkpoint: str
    fingerprint: str
    dtype: str
    device: str
    hardware: dict[str, Any]
    instruction: str
    settings: SweepSettings
    reference_ratio: int  # 1, or the ratio of the stored states
    taught: bool  # the reference's ranking is the judgement
    first_stage_name: str
    num_queries: int
    num_passages: int
    num_candidates: int  # pairs
    mean_tokens: float  # of a passage
    notes: list[str]
    first_stage: Quality
    reference: Quality
    rows: list[SweepRow]
    qrels: Qrels = field(repr=False)
    queries: dict[str, str] = field(repr=False)
    passages: dict[str, str] = field(repr=False)  # texts of candidates, where there are any

    @property
    def timed(self) -> bool:
        return bool(self.rows) and all(row.timing is not None for row in self.rows)

    @property
    def model(self) -> str:
        """The checkpoint's name without its parent folder; a hub id is one as it is."""
        return Path(self.checkpoint).name if Path(self.checkpoint).is_dir() else self.checkpoint

    @property
    def machine(self) -> str:
        threads = self.hardware["threads"]
        where = self.hardware.get("gpu") if self.device != "cpu" else None
        where = where or f"{self.hardware['processor']}, {threads} thread{'s' * (threads != 1)}"
        return f"{where}, {self.dtype}"

    @property
    def codecs(self) -> list[str]:
        return list(dict.fromkeys(row.configuration.codec for row in self.rows))

    @cached_property
    def marked(self) -> list[tuple[SweepRow, bool, bool]]:
        """Each row, whether it is on the front in bytes, and whether on that in latency: none is where none is timed"""
        smallest = front([(row.size.bytes_per_passage, row.quality.headline) for row in self.rows])
        times = [(row.timing.p50_seconds, row.quality.headline) for row in self.rows if row.timing is not None]
        fastest = front(times) if self.timed else [False] * len(self.rows)
        return list(zip(self.rows, smallest, fastest, strict=True))

    def to_json(self, limits: Limits, choice: Choice | None) -> str:
        """One JSON document; with the same seed only `hardware` and values under `timing` and `indexing` differ."""
        plain = "collection checkpoint fingerprint dtype device hardware instruction num_queries num_passages"
        plain += " num_candidates mean_tokens reference_ratio taught"
        chosen: dict[str, Any] | None = None
        if choice is not None:
            name, broken = choice.row.configuration.name, choice.broken
            chosen = {"name": name, "keeps_all_limits": not broken, "broken": broken}
        return format_json(
            {
                "format_version": _FORMAT_VERSION,
                **{name: getattr(self, name) for name in plain.split()},
                "settings": asdict(self.settings),
                "notes": self.notes,
                "query_ids": list(self.qrels),
                "first_stage": {"name": self.first_stage_name, "quality": _quality_json(self.first_stage)},
                "reference": {"quality": _quality_json(self.reference)},
                "limits": asdict(limits),
                "choice": chosen,
                "configurations": [
                    row.to_json() | {"on_size_front": small, "on_latency_front": fast}
                    for row, small, fast in self.marked
                ],
            }
        )

    def write_runs(self, folder: Path) -> list[Path]:
        runs = {"first-stage": self.first_stage.run, "reference": self.reference.run}
        return write_runs(folder, self.qrels, runs | {r.configuration.file_stem: r.quality.run for r in self.rows})

    def print(self, choice: Choice | None, *, show_all: bool = False) -> None:
        """Title, table with the fronts marked, how to read it, and notes about the data, on standard output."""
        settings, finest = self.settings, f"r = {self.reference_ratio}"
        judged = f"judged by {finest} itself" if self.taught else "judged"
        chosen = choice.row if choice is not None else None
        shown = [one for one in self.marked if show_all or any(one[1:]) or one[0] is chosen]
        left = len(self.rows) - len(shown)
        print_parts(
            _MIN_WIDTH,
            f"{self.collection}: {self.num_queries:,} queries, {judged}; {self.num_passages:,} passages of "
            f"{self.mean_tokens:,.0f} tokens in the mean; {self.first_stage_name} top {settings.top_k}\n"
            f"{self.model}: {self.machine}",
            _table(self, shown, chosen),
            f"{_SMALL} {_FAST}: no other is as small ({_SMALL}) or as fast ({_FAST}) and better in nDCG@10. "
            f"▲ ▼: the paired difference from {finest} excludes 0 "
            f"(95% bootstrap, {settings.num_resamples:,} resamples, seed {settings.seed}).",
            f"tau, top-{settings.overlap_k}: Kendall's tau and overlap with {finest}. "
            "bytes: of a stored passage, without its text. "
            f"ms: one query's {settings.top_k} candidates, in this process.",
            *([f"{left} configurations are on neither front and not shown (--all shows them)."] if left else []),
            *(f"Note: {note}." for note in self.notes),
        )

    def config_toml(self, row: SweepRow, model: str | None = None, *, control_tokens: bool = False) -> str:
        """A configuration as the file that `preread index --config` and `preread serve --config` take.

        `model`: where it is not preread's own. `control_tokens`: whether the measured encoder read them in texts.
        """
        one, quality, split = row.configuration, row.quality, self.settings.split
        loss = quality.loss
        head = (
            f"# {one.name}: chosen by preread tune on {self.num_queries} queries of {self.collection}.\n"
            f"# nDCG@10 {quality.headline:.4f}, {loss.mean:.2%} below r = {self.reference_ratio} "
            f"[{loss.low:.2%}, {loss.high:.2%}]; {row.size.bytes_per_passage:,.0f} bytes a passage."
        )
        if row.timing is not None:
            head += (
                f"\n# A rerank of {self.settings.top_k}: p50 {row.timing.p50_seconds * 1000:.1f} ms, "
                f"p99 {row.timing.p99_seconds * 1000:.1f} ms on {self.hardware['processor']} ({self.dtype})."
            )
        index = {"compression-ratio": one.stored_ratio, "codec": one.codec, **({"split": True} if split else {})}
        reading = one.reading
        serve = {"stages": str(reading)} if reading.is_cascade else {"read-ratio": reading.ratios[0]}
        blocks = [head, *([f"model = {json.dumps(model)}"] if model is not None else [])]
        blocks += ["read-control-tokens = true"] if control_tokens else []
        for name, values in (("index", index), ("serve", serve)):
            # JSON's strings, integers and booleans are TOML's.
            blocks.append("\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]))
        return "\n\n".join(blocks) + "\n"


def _table(report: SweepReport, shown: list[tuple[SweepRow, bool, bool]], chosen: SweepRow | None) -> Table:
    overlap, finest = report.settings.overlap_name, str(report.reference_ratio)
    compared = (f"to r = {finest}", "MRR@10", "tau", f"top-{report.settings.overlap_k}", "AUC")
    columns = ("", "stored", "codec", "read", HEADLINE, *compared, "bytes", "p50 ms", "p99 ms")
    table = plain_table(*columns, left=["codec"])
    table.add_row("", "", report.first_stage_name[:8], "", *_quality(report.first_stage, overlap), "", "", "")
    table.add_row("", finest, "none", finest, *_quality(report.reference, overlap), "", "", "")
    for row, small, fast in sorted(shown, key=lambda one: one[0].size.bytes_per_passage):
        one, is_chosen = row.configuration, row is chosen
        marks = "".join(mark if on else " " for on, mark in ((is_chosen, _CHOSEN), (small, _SMALL), (fast, _FAST)))
        times = ["–", "–"]
        if row.timing is not None:
            times = [f"{seconds * 1000:,.1f}" for seconds in (row.timing.p50_seconds, row.timing.p99_seconds)]
        cells = (marks, str(one.stored_ratio), one.codec, str(one.reading), *_quality(row.quality, overlap))
        table.add_row(*cells, f"{row.size.bytes_per_passage:,.0f}", *times, style="bold" if is_chosen else None)
    return table


def _quality(quality: Quality, overlap: str) -> list[str | Text]:
    mark = quality.change[HEADLINE].mark if quality.change is not None else " "
    others = [quality.measures.get(name) for name in ("MRR@10", TAU, overlap, AUC)]
    return [
        Text(str(quality.measures[HEADLINE])),
        f"{quality.gain:+.1%} {mark}" if quality.share is not None else "",
        *(f"{one.mean:.3f}" if one is not None else "–" for one in others),
    ]
