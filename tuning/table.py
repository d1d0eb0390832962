"""An evaluation for the eyes: one table in the terminal. Computes nothing."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuning.bootstrap import Difference, Share
from tuning.metrics import HEADLINE
from tuning.report import EvaluationReport, System

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
