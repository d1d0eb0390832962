"""Whether a served model's scores are the ones its weights mean.

    report = check("preread/models/preread-mini")
    report.passed, report.causes

A model served in the wrong way usually still returns numbers; these are compared with a plain float32 pass
over the same weights, and with what faults are known to look like. Knows models by what they answer.
"""

from tuning.health.gate import check, health_gate
from tuning.health.pairs import PairSet, TextTriple, built_in_pairs, read_pairs
from tuning.health.report import Finding, HealthReport, Section, State

__all__ = [
    "Finding",
    "HealthReport",
    "PairSet",
    "Section",
    "State",
    "TextTriple",
    "built_in_pairs",
    "check",
    "health_gate",
    "read_pairs",
]
