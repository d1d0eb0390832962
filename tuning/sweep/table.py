"""A sweep for the eyes: one table in the terminal, the fronts marked. Computes nothing."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuning.metrics import HEADLINE
from tuning.sweep.choice import Choice, Limits
from tuning.sweep.quality import AUC, TAU, Quality, overlap_name
from tuning.sweep.result import Row, SweepReport

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


def _costs(row: Row) -> list[str]:
    times = ["–", "–"]
    if row.timing is not None:
        times = [f"{row.timing.p50_seconds * 1000:,.1f}", f"{row.timing.p99_seconds * 1000:,.1f}"]
    return [f"{row.size.bytes_per_passage:,.0f}", *times]
