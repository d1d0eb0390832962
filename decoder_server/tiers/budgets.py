"""How much a model's tiers may hold, and how. Plain values; loads nothing."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("auto", "bfloat16", "int8")
MIB = 1 << 20


@dataclass(frozen=True)
class TierBudgets:
    """Of one model."""

    max_keys_bytes: int = 256 * MIB  # keys and values of passages; 0: none are kept
    max_prefix_bytes: int = 256 * MIB  # keys and values of the beginnings of prompts over them
    form: str = "auto"  # at rest: as computed, bfloat16 or int8

    def __post_init__(self) -> None:
        for name in ("max_keys_bytes", "max_prefix_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.form not in FORMATS:
            raise ValueError(f"form is {self.form!r}; expected {', '.join(FORMATS)}")


NO_TIERS = TierBudgets(0, 0)
