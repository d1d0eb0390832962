"""The outcome of a check, as values, as JSON and as a table: lines in sections, likely causes in words."""

import enum
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_FORMAT_VERSION = 1
_MIN_WIDTH = 80
_MAX_CELLS = 52  # of two texts next to their margins; a Korean character takes two


class Verdict(enum.Enum):
    """Outcome of one line; its text is the word in the table."""

    PASS = "pass"
    FAIL = "FAIL"
    SKIP = "skip"
    NOTE = "note"  # shown, not judged

    @classmethod
    def of(cls, good: object) -> Self:
        return cls.PASS if good else cls.FAIL


@dataclass(frozen=True)
class CheckLine:
    """One line of the table."""

    name: str
    state: Verdict
    value: float | None = None
    expected: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        finite = self.value is not None and math.isfinite(self.value)
        return vars(self) | {"state": self.state.value.lower(), "value": self.value if finite else None}


@dataclass(frozen=True)
class Section:
    """Lines about one comparison."""

    title: str
    lines: Sequence[CheckLine]

    @property
    def failed(self) -> bool:
        return self.failed_in()

    def failed_in(self, *names: str) -> bool:
        """Whether a line of one of these names failed; without names, any."""
        return any(line.state is Verdict.FAIL and (not names or line.name in names) for line in self.lines)


@dataclass(frozen=True)
class HealthReport:
    """Everything that `preread check` shows."""

    model: str
    backend: str
    served: str  # runtime, number format and device
    against: str
    pairs: str
    num_pairs: int
    sections: Sequence[Section]
    causes: Sequence[str] = ()
    farthest: Sequence[dict[str, Any]] = ()  # pairs whose margins differ most: query, passage, margin, expected
    notes: Sequence[str] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        return not any(section.failed for section in self.sections)

    def line(self, section: str, name: str) -> CheckLine:
        """Raises KeyError."""
        return {(s.title, line.name): line for s in self.sections for line in s.lines}[section, name]

    def summary(self) -> str:
        """One line: the first failure, or that there is none."""
        failed = [f"{s.title}: {x.name}" for s in self.sections for x in s.lines if x.state is Verdict.FAIL]
        if not failed:
            return f"{self.model}: scores are healthy"
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        cause = f"; likely cause: {self.causes[0]}" if self.causes else ""
        return f"{self.model}: scores are NOT healthy: {failed[0]}{more}{cause}"

    def to_json(self) -> str:
        """One JSON document; a value that is not finite becomes null."""
        document = {
            "format_version": _FORMAT_VERSION,
            **{name: getattr(self, name) for name in ("model", "backend", "served", "against", "pairs", "num_pairs")},
            "passed": self.passed,
            "causes": list(self.causes),
            "sections": [{"title": s.title, "findings": [x.to_json() for x in s.lines]} for s in self.sections],
            "farthest": list(self.farthest),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }
        return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"

    def print(self, console: Console | None = None) -> None:
        """Title, lines by section, causes, farthest pairs and verdict; to standard output by default."""
        console = console or Console()
        parts: list[Any] = [
            Text(f"{self.model} ({self.backend}: {self.served})", style="bold"),
            Text(f"{self.num_pairs} pairs ({self.pairs}) against {self.against}, {self.seconds:.0f} s"),
        ]
        for section in self.sections:
            parts += [Text(f"\n{section.title}", style="bold"), _table(section)]
        if self.farthest:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
            for heading in ("margin", "expected"):
                table.add_column(heading, justify="right", no_wrap=True, min_width=8)
            table.add_column("query / passage", no_wrap=True)
            for pair in self.farthest:
                query, passage = (Text(" ".join(pair[name].split())) for name in ("query", "passage"))
                # Cut by the cells that a text takes on a terminal, not by its characters.
                query.truncate(_MAX_CELLS // 2, overflow="ellipsis")
                passage.truncate(_MAX_CELLS - 3 - _MAX_CELLS // 2, overflow="ellipsis")
                table.add_row(f"{pair['margin']:+.3f}", f"{pair['expected']:+.3f}", query + Text(" / ") + passage)
            parts += [Text("\nfarthest apart", style="bold"), table]
        if self.notes:
            parts += [Text(), *(Text(f"Note: {note}.") for note in self.notes)]
        if self.causes:
            parts.append(Text(f"\nlikely cause{'s' * (len(self.causes) > 1)}", style="bold"))
            parts += [Padding(Text(cause), (0, 0, 0, 2)) for cause in self.causes]
        parts.append(Text("\npassed", style="bold green") if self.passed else Text("\nFAILED", style="bold red"))
        console.print(Group(*parts), width=max(console.width, _MIN_WIDTH))


_STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.SKIP: "dim", Verdict.NOTE: "dim"}


def _table(section: Section) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(min_width=24, no_wrap=True)
    table.add_column(min_width=4, no_wrap=True)
    table.add_column(min_width=9, justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for line in section.lines:
        value = "" if line.value is None else f"{line.value:{'.3g' if abs(line.value) < 0.1 else '.3f'}}"
        state = Text(line.state.value, style=_STYLES[line.state])
        told = "; ".join(filter(None, (line.expected, line.detail)))
        table.add_row(Text(f"  {line.name}"), state, Text(value), Text(told))
    return table
