"""A health report for the eyes: findings by section, causes in words, the pairs farthest apart. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tuning.health.report import Farthest, Finding, HealthReport, Section, State

MIN_WIDTH = 80
MAX_CELLS = 52  # of a text beside its margins; a Korean character takes two
_STYLES = {State.PASS: "green", State.FAIL: "bold red", State.SKIP: "dim", State.NOTE: "dim"}


def print_health(report: HealthReport, console: Console | None = None) -> None:
    """To standard output unless told otherwise."""
    console = console or Console()
    console.print(render(report), width=max(console.width, MIN_WIDTH))


def render(report: HealthReport) -> RenderableType:
    """Title, findings by section, causes, farthest pairs, verdict."""
    head = Text(f"{report.model} ({report.backend}: {report.served})", style="bold")
    about = Text(f"{report.num_pairs} pairs ({report.pairs}) against {report.against}, {report.seconds:.0f} s")
    parts: list[RenderableType] = [head, about]
    for section in report.sections:
        parts += [Text(f"\n{section.title}", style="bold"), _table(section)]
    if report.farthest:
        parts += [Text("\nfarthest apart", style="bold"), _farthest(report.farthest)]
    if report.notes:
        parts.append(Text())
    parts += [Text(f"Note: {note}.") for note in report.notes]
    if report.causes:
        parts.append(Text("\nlikely cause" + ("s" if len(report.causes) > 1 else ""), style="bold"))
        parts += [Padding(Text(cause), (0, 0, 0, 2)) for cause in report.causes]
    verdict = Text("\npassed", style="bold green") if report.passed else Text("\nFAILED", style="bold red")
    return Group(*parts, verdict)


def _table(section: Section) -> Table:
    """Columns of the same widths in every section."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(min_width=24, no_wrap=True)
    table.add_column(min_width=4, no_wrap=True)
    table.add_column(min_width=9, justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in section.findings:
        table.add_row(
            Text(f"  {finding.name}"),
            Text(finding.state.value, style=_STYLES[finding.state]),
            Text(_value(finding)),
            Text("; ".join(filter(None, (finding.expected, finding.detail)))),
        )
    return table


def _value(finding: Finding) -> str:
    if finding.value is None:
        return ""
    return f"{finding.value:.3g}" if abs(finding.value) < 0.1 else f"{finding.value:.3f}"


def _farthest(pairs: Sequence[Farthest]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    for heading in ("margin", "expected"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=8)
    table.add_column("query / passage", no_wrap=True)
    for pair in pairs:
        table.add_row(f"{pair.margin:+.3f}", f"{pair.expected:+.3f}", _cut(pair.query, MAX_CELLS // 2, pair.passage))
    return table


def _cut(query: str, cells: int, passage: str) -> Text:
    """Both texts on one line, each cut by the cells it takes on a terminal, not by its characters."""
    first, second = Text(" ".join(query.split())), Text(" ".join(passage.split()))
    first.truncate(cells, overflow="ellipsis")
    second.truncate(MAX_CELLS - 3 - cells, overflow="ellipsis")
    return first + Text(" / ") + second
