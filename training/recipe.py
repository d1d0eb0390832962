"""The recipe of a training run: TOML fields and flags of the same names."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Recipe:
    """Checked once at construction; every field may be set in TOML or as a flag of the same name."""

    seed: int = 0
    steps: int = 2000
    queries_per_step: int = 24
    batches_per_step: int = 1  # a step takes the mean gradient of so many batches; on CPU each has its own thread
    num_negatives: int = 4  # the group's own
    num_shared: int = 3  # passages of other groups each query is also scored against
    max_passage_tokens: tuple[int, ...] = (96, 128, 192)  # one drawn per step
    ratios_low: tuple[int, ...] = (1, 2, 4)  # each step sums the loss over one ratio of each list
    ratios_high: tuple[int, ...] = (8, 16, 32)
    learning_rate: float = 5e-4
    embedding_rate: float = 0.1  # factor on the learning rate of the tied embedding
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay_share: float = 0.4  # last part of the run, where the rate falls linearly to zero
    max_grad_norm: float = 1.0
    distil: float = 0.5
    distil_temperature: float = 0.05
    leaf: int = 8  # groups on one subject that stay together in a step, where teacher vectors tell the subject
    binary: float = 0.1
    lora_rank: int = 0  # 0 trains every weight
    lora_alpha: int = 16
    mean_with: tuple[int, ...] = ()  # earlier steps: the exported weights are the mean of theirs and the last step's
    save_every: int = 200
    evaluate_every: int = 500
    evaluate_queries: int = 100
    precision: str = "bf16"  # or fp32
    compile: bool = False  # every layer, once (a minute or more): RMSNorm and GELU passes dominate a small model on CPU

    def __post_init__(self) -> None:
        for name in ("steps", "queries_per_step", "batches_per_step", "save_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision is {self.precision!r}, expected bf16 or fp32")
        if any(r < 1 for r in self.ratios_low + self.ratios_high):
            raise ValueError(f"ratios are {self.ratios_low + self.ratios_high}, expected positive integers")

    @classmethod
    def read(cls, path: Path | None, overrides: dict[str, Any]) -> Self:
        """Read a TOML file, with `overrides` that are not None over it. ValueError names an unknown field."""
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
        if unknown := values.keys() - (known := {f.name for f in dataclasses.fields(cls)}):
            raise ValueError(f"{path}: unknown fields {sorted(unknown)}, expected some of {sorted(known)}")
        values |= {name: value for name, value in overrides.items() if value is not None}
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values)

    def rate(self, step: int) -> float:
        """Share of the learning rate: warm-up, plateau, linear decay to zero over the last `decay_share`."""
        left = (self.steps - step) / max(1.0, self.steps * self.decay_share)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), left)
