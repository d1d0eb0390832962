"""What a check found, as values: findings in sections, likely causes in words. Measures nothing, prints nothing.

A health report for the eyes: findings by section, causes in words, the pairs farthest apart. Computes nothing.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

FORMAT_VERSION = 1


class State(enum.Enum):
    """What became of one check."""

    PASS = "pass"
    FAIL = "FAIL"
    SKIP = "skip"
    NOTE = "note"  # shown, not judged


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    state: State
    value: float | None = None
    expected: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """Findings about one comparison."""

    title: str
    findings: Sequence[Finding]

    @property
    def failed(self) -> bool:
        return any(finding.state is State.FAIL for finding in self.findings)


@dataclass(frozen=True)
class Farthest:
    """A pair whose two margins differ most."""

    query: str
    passage: str
    margin: float
    expected: float


@dataclass(frozen=True)
class HealthReport:
    """Everything `preread check` shows."""

    model: str
    backend: str
    served: str  # runtime, number format and device
    against: str
    pairs: str
    num_pairs: int
    sections: Sequence[Section]
    causes: Sequence[str] = ()
    farthest: Sequence[Farthest] = ()
    notes: Sequence[str] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        return not any(section.failed for section in self.sections)

    def finding(self, section: str, name: str) -> Finding:
        """Raises KeyError."""
        return {(s.title, f.name): f for s in self.sections for f in s.findings}[section, name]

    def summary(self) -> str:
        """One line: what failed first, or that nothing did."""
        failed = [f"{s.title}: {f.name}" for s in self.sections for f in s.findings if f.state is State.FAIL]
        if not failed:
            return f"{self.model}: scores are healthy"
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        cause = f"; likely cause: {self.causes[0]}" if self.causes else ""
        return f"{self.model}: scores are NOT healthy: {failed[0]}{more}{cause}"

    def to_json(self) -> str:
        """One JSON document; a value that is not finite becomes null."""
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "backend": self.backend,
            "served": self.served,
            "against": self.against,
            "pairs": self.pairs,
            "num_pairs": self.num_pairs,
            "passed": self.passed,
            "causes": list(self.causes),
            "sections": [
                {"title": section.title, "findings": [_finding_json(finding) for finding in section.findings]}
                for section in self.sections
            ],
            "farthest": [vars(one) for one in self.farthest],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }
        return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _finding_json(finding: Finding) -> dict[str, Any]:
    finite = finding.value is not None and math.isfinite(finding.value)
    return {
        "name": finding.name,
        "state": finding.state.value.lower(),
        "value": finding.value if finite else None,
        "expected": finding.expected,
        "detail": finding.detail,
    }


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
