"""What an evaluation is asked to do; checked once, passed down."""

from __future__ import annotations

from dataclasses import dataclass

from tuning.bootstrap import NUM_RESAMPLES
from tuning.errors import EvaluationError
from tuning.teacher import check_teacher

DEFAULT_RATIOS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class EvaluationSettings:
    """
    ratios: compression ratios to read passages at
    top_k: candidates per query
    split: passages over the limit become windows, the best of which counts, instead of being cut
    instruction: instead of the checkpoint's own
    teacher: another model on the same candidates (tuning.teacher.TEACHERS)
    max_queries: draw that many queries; None takes all
    min_grade: lowest grade that counts as relevant for MRR and recall
    seed: of the drawn queries and the bootstrap

    Raises EvaluationError naming the setting.
    """

    ratios: tuple[int, ...] = DEFAULT_RATIOS
    top_k: int = 50
    split: bool = False
    instruction: str | None = None
    teacher: str | None = None
    max_queries: int | None = None
    min_grade: int = 1
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) < 1:
            raise EvaluationError(f"ratios is {self.ratios}; expected integers of at least 1")
        if len(set(self.ratios)) != len(self.ratios):
            raise EvaluationError(f"ratios is {self.ratios}; expected each once")
        for name, least in (("top_k", 1), ("max_queries", 1), ("min_grade", 1), ("num_resamples", 100)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} is {value}; expected at least {least}")
        if self.teacher is not None:
            check_teacher(self.teacher)
