"""What a check found, as values: findings in sections, likely causes in words. Measures nothing, prints nothing."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
