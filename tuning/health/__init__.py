"""Checks whether a served model's scores are the right ones for its weights.

    report = check("preread/models/preread-mini")
    report.passed, report.causes

A model served in the wrong way usually still returns numbers; these are compared with a plain float32 pass
over the same weights, and with the symptoms of known faults.
"""

from tuning.health.gate import check, health_gate
from tuning.health.pairs import PairSet, TextTriple
from tuning.health.report import CheckLine, HealthReport, Section, Verdict

__all__ = ["CheckLine", "HealthReport", "PairSet", "Section", "TextTriple", "Verdict", "check", "health_gate"]
