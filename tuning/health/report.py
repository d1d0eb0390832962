"""The outcome of a check, as values, as JSON and as a table: lines in sections, likely causes in words."""

import enum
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from preread_edge.tables import LINE, NUMBER, TEXT, WHOLE, Cell, Column, Table, print_parts

_FORMAT_VERSION = 1


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

    def print(self, *, err: bool = False) -> None:
        """Title, lines by section, causes, farthest pairs and verdict, on standard output or standard error."""
        parts: list[Cell | Table] = [
            (f"{self.model} ({self.backend}: {self.served})", "bold"),
            f"{self.num_pairs} pairs ({self.pairs}) against {self.against}, {self.seconds:.0f} s",
        ]
        for section in self.sections:
            parts += [(f"\n{section.title}", "bold"), _table(section)]
        if self.farthest:
            table = Table([Column("margin"), Column("expected"), Column("query", LINE), Column("passage", LINE)], 2, 2)
            for pair in self.farthest:
                texts = (" ".join(pair[name].split()) for name in ("query", "passage"))
                table.add(f"{pair['margin']:+.3f}", f"{pair['expected']:+.3f}", *texts)
            parts += [("\nfarthest apart", "bold"), table]
        if self.notes:
            parts += ["", *(f"Note: {note}." for note in self.notes)]
        if self.causes:
            parts.append((f"\nlikely cause{'s' * (len(self.causes) > 1)}", "bold"))
            parts += [f"  {cause}" for cause in self.causes]
        parts.append(("\npassed", "bold green") if self.passed else ("\nFAILED", "bold red"))
        print_parts(*parts, err=err)


_STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.SKIP: "dim", Verdict.NOTE: "dim"}


def _table(section: Section) -> Table:
    columns = (Column("", TEXT, 22), Column("", WHOLE, 4), Column("", NUMBER, 9), Column("", TEXT))
    table = Table(columns, num_keys=3, indent=2)
    for line in section.lines:
        value = "" if line.value is None else f"{line.value:{'.3g' if abs(line.value) < 0.1 else '.3f'}}"
        told = "; ".join(filter(None, (line.expected, line.detail)))
        table.add(line.name, (line.state.value, _STYLES[line.state]), value, told)
    return table
