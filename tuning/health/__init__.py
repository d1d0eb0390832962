"""Checks whether a served model's scores are the right ones for its weights.

A model served in the wrong way usually still returns numbers; these are compared with a plain float32 pass over the
same weights, and with the symptoms of known faults. `check("preread/models/preread-mini").passed`
"""

from tuning.health.gate import check, health_gate
from tuning.health.report import HealthReport, Verdict
from tuning.health.scorers import PairSet

__all__ = ["HealthReport", "PairSet", "Verdict", "check", "health_gate"]
