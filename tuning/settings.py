"""What an evaluation is asked to do; checked once, passed down."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuning.bootstrap import NUM_RESAMPLES
from tuning.errors import EvaluationError
from tuning.teacher import check_teacher

COARSEST = 32  # what published checkpoints are trained for


@dataclass(frozen=True)
class EvaluationSettings:
    """
    ratios: compression ratios to read passages at; None for 1, 2, 4 ... 32, from the stored ratio on
    top_k: candidates per query
    split: passages over the limit become windows, the best of which counts, instead of being cut
    instruction: instead of the checkpoint's own; "": none
    teacher: another model on the same candidates (tuning.teacher.TEACHERS)
    max_queries: draw that many queries; None takes all
    min_grade: lowest grade that counts as relevant for MRR and recall
    seed: of the drawn queries and the bootstrap

    Raises EvaluationError naming the setting.
    """

    ratios: tuple[int, ...] | None = None
    top_k: int = 50
    split: bool = False
    instruction: str | None = None
    teacher: str | None = None
    max_queries: int | None = None
    min_grade: int = 1
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        if self.ratios is not None:
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

    def with_ratios(self, stored: int) -> EvaluationSettings:
        """The same with the ratios that None stands for, fine to coarse; each can be read from states at `stored`.

        Raises:
            EvaluationError: a ratio asked for cannot be.
        """
        if self.ratios is None:
            doublings = range(max(1, (COARSEST // stored).bit_length()))
            return replace(self, ratios=tuple(stored << i for i in doublings))
        for ratio in self.ratios:
            if ratio % stored:
                raise EvaluationError(f"ratio is {ratio}; the states are at {stored}, expected a multiple of it")
        return replace(self, ratios=tuple(sorted(self.ratios)))
