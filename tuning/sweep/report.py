"""The Pareto fronts, and the one configuration that keeps given limits. Pure functions of quality and cost.

What a sweep found, as values and as JSON. How it comes about is tuning.sweep.tune, how it looks table and page.

A chosen configuration as the TOML file that `preread index --config` and `preread serve --config` take.

A sweep for the eyes: one table in the terminal, the fronts marked. Computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuning import EvaluationError
from tuning.metrics import HEADLINE, Difference
from tuning.report import lists_on_one_line, share_json
from tuning.sweep.costs import Latency, StoredSize
from tuning.sweep.quality import AUC, TAU, Quality, overlap_name
from tuning.sweep.settings import Configuration, SweepSettings
from tuning.trec import Qrels, write_qrels, write_run

PREFERENCES = ("bytes", "latency", "quality")


@dataclass(frozen=True)
class Limits:
    """None: no such limit.

    max_loss: share of the reference's nDCG@10 that may be lost
    sure: the worse end of the loss's 95% interval keeps the limit, not only its mean
    max_bytes: of a passage, in the mean
    max_latency_seconds: p99 of a rerank
    prefer: what decides among those that keep all limits; None: bytes where a loss is allowed, else quality
    """

    max_loss: float | None = None
    sure: bool = False
    max_bytes: float | None = None
    max_latency_seconds: float | None = None
    prefer: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_loss", "max_bytes", "max_latency_seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise EvaluationError(f"{name} is {value}; expected at least 0")
        if self.prefer is not None and self.prefer not in PREFERENCES:
            raise EvaluationError(f"prefer is {self.prefer!r}; expected {', '.join(PREFERENCES)}")

    @property
    def given(self) -> bool:
        return any(one is not None for one in (self.max_loss, self.max_bytes, self.max_latency_seconds))

    @property
    def decides_by(self) -> str:
        """What decides among those that keep every limit."""
        return self.prefer or ("bytes" if self.max_loss is not None else "quality")

    def excess(self, row: SweepRow) -> dict[str, float]:
        """By limit that `row` breaks, how far: the value over the limit, less 1; for a loss in points of a percent."""
        broken = {}
        if self.max_loss is not None:
            loss = row.quality.loss_bounds[1] if self.sure else row.quality.loss
            if loss > self.max_loss:
                broken["max_loss"] = (loss - self.max_loss) * 100
        if self.max_bytes is not None and row.size.bytes_per_passage > self.max_bytes:
            broken["max_bytes"] = row.size.bytes_per_passage / max(self.max_bytes, 1e-9) - 1
        if self.max_latency_seconds is not None:
            assert row.timing is not None  # tune() refuses such a limit where nothing is timed
            if row.timing.p99_seconds > self.max_latency_seconds:
                broken["max_latency"] = row.timing.p99_seconds / max(self.max_latency_seconds, 1e-9) - 1
        return broken


@dataclass(frozen=True)
class Choice:
    """`row` keeps all limits, or is the nearest to doing so and `broken` says which it does not."""

    row: SweepRow
    broken: dict[str, float]


def choose(rows: Sequence[SweepRow], limits: Limits) -> Choice:
    """Among those that keep every limit the preferred one; otherwise the one whose worst excess is least.

    Raises:
        EvaluationError: there is no configuration at all.
    """
    if not rows:
        raise EvaluationError("no configuration could be measured; the notes say why")

    def rank(row: SweepRow) -> tuple[float, ...]:
        keys = {
            "bytes": row.size.bytes_per_passage,
            "latency": row.timing.p50_seconds if row.timing is not None else 0.0,
            "quality": -row.quality.headline,
        }
        return (keys.pop(limits.decides_by), keys.get("quality", 0.0), *keys.values())

    broken = [(row, limits.excess(row)) for row in rows]
    kept = [row for row, excess in broken if not excess]
    if kept:
        return Choice(min(kept, key=rank), {})
    row, excess = min(broken, key=lambda one: (max(one[1].values()), rank(one[0])))
    return Choice(row, excess)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, quality) points no other beats: none is as cheap and better, or cheaper and as good.

    Of equal points the first is on it.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    on = [False] * len(points)
    best = float("-inf")
    for i in order:
        if points[i][1] > best:
            on[i], best = True, points[i][1]
    return on


FORMAT_VERSION = 1


@dataclass(frozen=True)
class IndexingCost:
    """One-off cost of the whole collection on this machine, in seconds; None: not measured."""

    encoder_seconds: float | None  # the same for every configuration
    codec_seconds: float | None  # encoding states to codes
    training_seconds: float  # the codec's
    store_seconds: float | None  # writing, codes included

    @property
    def seconds(self) -> float | None:
        """All of it."""
        if self.encoder_seconds is None or self.store_seconds is None:
            return None
        return self.encoder_seconds + self.training_seconds + self.store_seconds


@dataclass(frozen=True)
class SweepRow:
    """One configuration, measured."""

    configuration: Configuration
    quality: Quality
    size: StoredSize
    timing: Latency | None
    indexing: IndexingCost


@dataclass(frozen=True)
class SweepReport:
    """Everything a table, a page and a choice are made of."""

    collection: str
    checkpoint: str
    fingerprint: str
    dtype: str
    device: str
    hardware: dict[str, Any]
    instruction: str
    settings: SweepSettings
    reference_ratio: int  # 1, or what the stored states came at
    taught: bool  # the reference's own ranking is the judgement
    first_stage_name: str
    num_queries: int
    num_passages: int
    num_candidates: int  # pairs
    mean_tokens: float  # of a passage
    notes: list[str]
    first_stage: Quality
    reference: Quality
    rows: list[SweepRow]
    query_ids: list[str]
    qrels: Qrels = field(repr=False)
    queries: dict[str, str] = field(repr=False)
    passages: dict[str, str] = field(repr=False)  # texts of candidates, where there are any

    @property
    def timed(self) -> bool:
        """Every configuration was."""
        return bool(self.rows) and all(row.timing is not None for row in self.rows)

    @property
    def model(self) -> str:
        """The checkpoint's name without the folder it lies in; a hub id is one as it is."""
        return Path(self.checkpoint).name if Path(self.checkpoint).is_dir() else self.checkpoint

    @property
    def machine(self) -> str:
        """Where times come from, in a few words."""
        threads = self.hardware["threads"]
        where = self.hardware.get("gpu") if self.device != "cpu" else None
        where = where or f"{self.hardware['processor']}, {threads} thread{'s' * (threads != 1)}"
        return f"{where}, {self.dtype}"

    @property
    def codecs(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(row.configuration.codec for row in self.rows))

    def on_size_front(self) -> list[bool]:
        return front([(row.size.bytes_per_passage, row.quality.headline) for row in self.rows])

    def on_latency_front(self) -> list[bool]:
        if any(row.timing is None for row in self.rows):
            return [False] * len(self.rows)
        return front([(row.timing.p50_seconds, row.quality.headline) for row in self.rows if row.timing is not None])

    def to_json(self, limits: Limits, choice: Choice | None) -> str:
        """One JSON document; with the same seed only `hardware` and what lies under `timing` and `indexing` differ."""
        small, fast = self.on_size_front(), self.on_latency_front()
        plain = ("collection", "checkpoint", "fingerprint", "dtype", "device", "hardware", "instruction")
        counts = ("num_queries", "num_passages", "num_candidates", "mean_tokens", "reference_ratio", "taught")
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in plain + counts},
            "settings": asdict(self.settings),
            "notes": self.notes,
            "query_ids": self.query_ids,
            "first_stage": {"name": self.first_stage_name, "quality": _quality_json(self.first_stage)},
            "reference": {"quality": _quality_json(self.reference)},
            "limits": asdict(limits),
            "choice": _choice_json(choice) if choice is not None else None,
            "configurations": [
                _row_json(row) | {"on_size_front": on_size, "on_latency_front": on_latency}
                for row, on_size, on_latency in zip(self.rows, small, fast, strict=True)
            ],
        }
        return lists_on_one_line(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)) + "\n"

    def write_runs(self, folder: Path) -> list[Path]:
        """TREC files: the judgements, and a run for the first stage, the reference and each configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "qrels.txt"]
        write_qrels(paths[0], self.qrels)
        runs = {"first-stage": self.first_stage, "reference": self.reference}
        for name, quality in (runs | {row.configuration.file_stem: row.quality for row in self.rows}).items():
            paths.append(folder / f"{name}.run")
            write_run(paths[-1], quality.run, tag=f"preread-{name}")
        return paths


def _row_json(row: SweepRow) -> dict[str, Any]:
    one = row.configuration
    return {
        "name": one.name,
        "stored_ratio": one.stored_ratio,
        "codec": one.codec,
        "stages": [asdict(stage) for stage in one.stages],
        "quality": _quality_json(row.quality),
        "size": asdict(row.size),
        "timing": asdict(row.timing) if row.timing is not None else None,
        "indexing": asdict(row.indexing),
    }


def _quality_json(quality: Quality) -> dict[str, Any]:
    measures: dict[str, Any] = {}
    for name, interval in quality.measures.items():
        measures[name] = asdict(interval)
        if quality.change is not None and quality.kept is not None:
            measures[name]["change"] = _change_json(quality.change[name])
            measures[name]["kept"] = share_json(quality.kept[name])
    return {
        "measures": measures,
        "per_query": {name: [_number(v) for v in values.tolist()] for name, values in quality.per_query.items()},
    }


def _change_json(change: Difference) -> dict[str, Any]:
    return asdict(change) | {"significant": change.significant}


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {"name": choice.row.configuration.name, "keeps_all_limits": not choice.broken, "broken": choice.broken}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if value == value else None


def config_toml(report: SweepReport, row: SweepRow, model: str | None = None, *, control_tokens: bool = False) -> str:
    """Stored ratio and codec for index, how they are read for serve.

    Args:
        model: the checkpoint, where it is not the one that comes with preread.
        control_tokens: whether the measured encoder read control tokens in texts, which its fingerprint says.
    """
    one, quality = row.configuration, row.quality
    low, high = quality.loss_bounds
    lines = [
        f"# {one.name}: chosen by preread tune on {report.num_queries} queries of {report.collection}.",
        f"# nDCG@10 {quality.headline:.4f}, {quality.loss:.2%} below r = {report.reference_ratio} "
        f"[{low:.2%}, {high:.2%}]; {row.size.bytes_per_passage:,.0f} bytes a passage.",
    ]
    if row.timing is not None:
        lines.append(
            f"# A rerank of {report.settings.top_k}: p50 {row.timing.p50_seconds * 1000:.1f} ms, "
            f"p99 {row.timing.p99_seconds * 1000:.1f} ms on {report.hardware['processor']} ({report.dtype})."
        )
    if model is not None:
        lines += ["", _line("model", model)]
    if control_tokens:
        lines += ["", _line("read-control-tokens", True)]
    lines += ["", "[index]", _line("compression-ratio", one.stored_ratio), _line("codec", one.codec)]
    if report.settings.split:
        lines.append(_line("split", True))
    reading = ("stages", one.reading) if one.is_cascade else ("read-ratio", one.stages[0].compression_ratio)
    lines += ["", "[serve]", _line(*reading)]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any) -> str:
    # JSON's strings, integers and booleans are TOML's.
    return f"{key} = {json.dumps(value)}"


MIN_WIDTH = 120  # cells are never cut: a narrow terminal wraps lines by itself
SMALL, FAST, CHOSEN = "●", "◆", "▶"


def print_sweep(
    report: SweepReport, choice: Choice | None, *, show_all: bool = False, console: Console | None = None
) -> None:
    """To standard output unless told otherwise."""
    console = console or Console()
    console.width = max(console.width, MIN_WIDTH)
    console.print(render(report, choice, show_all=show_all))


def render(report: SweepReport, choice: Choice | None, *, show_all: bool = False) -> RenderableType:
    """Title, table, how to read it, and what was odd about the data."""
    judged = f"judged by r = {report.reference_ratio} itself" if report.taught else "judged"
    head = Text(
        f"{report.collection}: {report.num_queries:,} queries, {judged}; {report.num_passages:,} passages of "
        f"{report.mean_tokens:,.0f} tokens in the mean; {report.first_stage_name} top {report.settings.top_k}\n"
        f"{report.model}: {report.machine}"
    )
    shown = [place for place in range(len(report.rows)) if show_all or _is_shown(report, place, choice)]
    left = len(report.rows) - len(shown)
    lines = [
        f"{SMALL} {FAST}: no other is as small ({SMALL}) or as fast ({FAST}) and better in nDCG@10. "
        f"▲ ▼: the paired difference from r = {report.reference_ratio} leaves 0 out "
        f"(95% bootstrap, {report.settings.num_resamples:,} resamples, seed {report.settings.seed}).",
        f"tau, top-{report.settings.overlap_k}: Kendall's tau and overlap with r = {report.reference_ratio}. "
        "bytes: of a stored passage, without its text. "
        f"ms: one query's {report.settings.top_k} candidates, in this process.",
        *([f"{left} configurations are on neither front and not shown (--all shows them)."] if left else []),
        *(f"Note: {note}." for note in report.notes),
    ]
    return Group(head, _table(report, shown, choice), *(Text(line) for line in lines))


def describe_broken(choice: Choice, limits: Limits) -> str:
    """What the nearest configuration has, and what was asked for."""
    row, told = choice.row, []
    if "max_loss" in choice.broken:
        assert limits.max_loss is not None
        loss = row.quality.loss_bounds[1] if limits.sure else row.quality.loss
        told.append(f"it loses {'up to ' if limits.sure else ''}{loss:.2%}, expected at most {limits.max_loss:.2%}")
    if "max_bytes" in choice.broken:
        told.append(f"{row.size.bytes_per_passage:,.0f} bytes a passage, expected at most {limits.max_bytes:,.0f}")
    if "max_latency" in choice.broken:
        assert row.timing is not None
        assert limits.max_latency_seconds is not None
        told.append(
            f"p99 {row.timing.p99_seconds * 1000:.1f} ms, expected at most {limits.max_latency_seconds * 1000:g} ms"
        )
    return "; ".join(told)


def _is_shown(report: SweepReport, place: int, choice: Choice | None) -> bool:
    chosen = choice is not None and report.rows[place] is choice.row
    return chosen or report.on_size_front()[place] or report.on_latency_front()[place]


def _table(report: SweepReport, shown: list[int], choice: Choice | None) -> Table:
    overlap = overlap_name(report.settings.overlap_k)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for heading in ("stored", "codec", "read"):
        table.add_column(heading, justify="left" if heading == "codec" else "right", no_wrap=True)
    columns = (
        HEADLINE,
        f"to r = {report.reference_ratio}",
        "MRR@10",
        "tau",
        f"top-{report.settings.overlap_k}",
        "AUC",
        "bytes",
        "p50 ms",
        "p99 ms",
    )
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("", "", report.first_stage_name[:8], "", *_quality(report.first_stage, overlap), "", "", "")
    table.add_row("", str(report.reference_ratio), "none", str(report.reference_ratio),
                  *_quality(report.reference, overlap), "", "", "")  # fmt: skip
    small, fast = report.on_size_front(), report.on_latency_front()
    for place in sorted(shown, key=lambda place: report.rows[place].size.bytes_per_passage):
        row = report.rows[place]
        chosen = choice is not None and row is choice.row
        marks = (CHOSEN if chosen else " ") + (SMALL if small[place] else " ") + (FAST if fast[place] else " ")
        one = row.configuration
        table.add_row(
            marks, str(one.stored_ratio), one.codec, one.reading, *_quality(row.quality, overlap), *_costs(row),
            style="bold" if chosen else None,
        )  # fmt: skip
    return table


def _quality(quality: Quality, overlap: str) -> list[str]:
    own = quality.measures[HEADLINE]
    change = quality.change[HEADLINE] if quality.change is not None else None
    mark = " " if change is None or not change.significant else "▲" if change.mean > 0 else "▼"
    others = [quality.measures.get(name) for name in ("MRR@10", TAU, overlap, AUC)]
    return [
        f"{own.mean:.3f} \\[{own.low:.3f}, {own.high:.3f}]",  # an open bracket would be markup
        f"{quality.gain:+.1%} {mark}" if quality.kept is not None else "",
        *(f"{one.mean:.3f}" if one is not None else "–" for one in others),
    ]


def _costs(row: SweepRow) -> list[str]:
    times = ["–", "–"]
    if row.timing is not None:
        times = [f"{row.timing.p50_seconds * 1000:,.1f}", f"{row.timing.p99_seconds * 1000:,.1f}"]
    return [f"{row.size.bytes_per_passage:,.0f}", *times]
