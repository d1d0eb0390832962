"""How far scores may be from what they are compared with. Numbers only, each with its reason.

Differences are measured in spreads, the standard deviation of the reference's margins over the pairs: a logit
of one model means nothing to another.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a comparison of two passes over the same weights must keep."""

    min_tau: float
    max_delta_spreads: float | None  # None: the largest difference is shown and not judged
    min_spread_ratio: float = 0.8  # outside of these two a lost template shows, which the order does not
    max_spread_ratio: float = 1.25
    min_distinct: float = 0.5  # share of the reference's distinct values; bfloat16 keeps about 0.85 of 100


# Two float32 passes differ by the order of their sums: 1e-6 of a spread was measured. The room is for pairs
# that stand a rounding apart.
FLOAT32 = Limits(min_tau=0.999, max_delta_spreads=0.01)
# 0.98: published experience with bfloat16 rerankers. preread-mini moves a pair by 0.03 of a spread at most; the limit
# leaves room for deeper models.
BFLOAT16 = Limits(min_tau=0.98, max_delta_spreads=0.25)
# 0.9: published experience; a collapsed int8 model was at 0.42, with its down projections in float32 at 0.94.
INT8 = Limits(min_tau=0.9, max_delta_spreads=1.0)
# Pooling loses on purpose and the order moves; below this it says little about the unpooled one's.
POOLED = Limits(min_tau=0.5, max_delta_spreads=None)
# One pair alone and beside others: float32 sums in another order.
MAX_BATCH_DELTA_SPREADS = {"float32": 0.01, "bfloat16": 0.25}

# Of a published score between 0 and 1, and of a published logit; the publishers computed in bfloat16, whose steps
# at a logit of 8 are 0.06, and allow 0.01 themselves between machines in the same format.
MAX_GOLDEN_SCORE_DELTA = 0.02
MAX_GOLDEN_LOGIT_DELTA = 0.15

# Every score below: a softmax over the hidden vector stands where the head should.
SATURATED_SCORE = 1e-6
# Every score between: a sigmoid of a sigmoid, whose range is sigmoid(0) to sigmoid(1).
DOUBLE_SIGMOID = (0.5, 0.7311)


def limits_for(number_format: str) -> Limits:
    """By dtype or runtime name: float32, bfloat16, or anything with int8 in it."""
    if "int8" in number_format:
        return INT8
    return BFLOAT16 if "bfloat16" in number_format or "bf16" in number_format else FLOAT32
