"""Tables a person reads in a terminal. Knows rich and the values; asks nobody anything."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from preread import Reranking, Summary, format_stages

MAX_TEXT_CHARACTERS = 400


def print_reranking(query: str, answer: Reranking, num_candidates: int) -> None:
    """The ranking, then what could not be scored, then where the time went."""
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    scored = [result for result in answer if result.margin is not None]
    staged = any(result.stages for result in scored)
    for heading in ("#", "score", "margin", *(["ratio"] if staged else [])):
        table.add_column(heading, justify="right")
    table.add_column("passage")
    for rank, result in enumerate(scored, 1):
        passage = Text(result.passage_id, style="bold")
        if result.text:
            passage.append(("  " if result.passage_id else "") + shorten(result.text), style="not bold")
        ratio = [str(result.compression_ratio)] if staged else []
        table.add_row(str(rank), f"{result.score:.4f}", f"{result.margin:+.2f}", *ratio, passage)
    console.print(Text(query, style="bold"))
    console.print(table)
    others = [result for result in answer if result.margin is None]
    for result in others:
        console.print(Text(f"not scored: {result.passage_id or result.index}  {result.status}  {result.message}"))
    times = answer.summary.timings
    console.print(
        Text(
            f"{answer.summary.num_scored} of {num_candidates} scored by {answer.summary.model} "
            f"in {times.total_seconds * 1000:,.0f} ms (compute {times.compute_seconds * 1000:,.0f} ms)"
            + _read(answer.summary)
            + (", the query was cut" if answer.summary.query_truncated else ""),
            style="dim",
        )
    )
    for line in reading_notes(answer.summary):
        console.print(Text(line, style="yellow"))


def _read(summary: Summary) -> str:
    if summary.stages:
        return f", read in stages {format_stages(summary.stages)}"
    return f", read at ratio {summary.compression_ratio}" if summary.compression_ratio else ""


def reading_notes(summary: Summary) -> list[str]:
    """What a person should know who compares these scores with others."""
    notes = []
    if summary.degraded is not None:
        asked = format_stages(summary.degraded.stages) or str(summary.degraded.compression_ratio)
        notes.append(f"read coarser than {asked}: the server was under pressure ({summary.degraded.reason})")
    if summary.stopped_early:
        notes.append("the deadline came before the last stage was through: this is what was finished")
    return notes


def print_facts(facts: Mapping[str, object]) -> None:
    """One fact per line, values under one another."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    Console(soft_wrap=False).print(table)


def shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[: 2 * MAX_TEXT_CHARACTERS].split())
    return line if len(line) <= MAX_TEXT_CHARACTERS else line[: MAX_TEXT_CHARACTERS - 1] + "…"


def human_bytes(size: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError
