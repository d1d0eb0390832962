"""What every model must do by itself, whatever it is compared with. Knows models by what they answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuning.health.compare import Margins, finite
from tuning.health.limits import DOUBLE_SIGMOID, MAX_BATCH_DELTA_SPREADS, SATURATED_SCORE
from tuning.health.pairs import TextTriple
from tuning.health.report import Finding, Section, State
from tuning.health.scorer import Scorer
from tuning.health.statistics import max_delta

TITLE = "by itself"
SATURATION = "scores use their range"
BATCH = "alone or beside others"
SWAP = "the query counts"
NUM_TOGETHER = 12  # of the pairs, shortest and longest in turn, so that the short ones are padded
# Unrelated to each other and to the over-long passage: a model that reads them cannot but differ.
SWAPPED_QUERIES = ("how tides follow the moon", "세금 신고는 언제까지 해야 하나요?")


def behaviour(scorer: Scorer, pairs: Sequence[TextTriple], margins: Margins) -> Section:
    """Findings about `margins`, which `scorer` gave for `pairs`, and about a few more passes of it."""
    scores = scorer.scores(margins)
    return Section(TITLE, [finite(margins, scores), saturation(margins, scores), batch(scorer, pairs), swapped(scorer)])


def all_tiny(values: Margins) -> bool:
    """As a softmax over a hidden vector gives them."""
    return bool(((values >= 0) & (values < SATURATED_SCORE)).all())


def all_doubled(values: Margins) -> bool:
    """As a sigmoid of a sigmoid gives them."""
    low, high = DOUBLE_SIGMOID
    return bool(((values >= low) & (values <= high)).all())


def saturation(margins: Margins, scores: Margins) -> Finding:
    """Whether scores lie where only a fault puts all of them."""
    expected = f"not all < {SATURATED_SCORE:g} or in {DOUBLE_SIGMOID[0]:.2f}..{DOUBLE_SIGMOID[1]:.2f}"
    numbers = scores[np.isfinite(scores)]
    if not len(numbers):
        return Finding(SATURATION, State.SKIP, None, expected, "not finite")
    stuck = any(all_tiny(values) or all_doubled(values) for values in (margins, scores))
    shown = f"here {numbers.min():.3g} to {numbers.max():.3g}"
    return Finding(SATURATION, State.FAIL if stuck else State.PASS, None, expected, shown)


def mixed(pairs: Sequence[TextTriple]) -> list[TextTriple]:
    """A few pairs whose lengths differ as much as they can: shortest, longest, next shortest, ..."""
    by_length = sorted(pairs, key=lambda pair: len(pair.passage.encode()))
    half = min(NUM_TOGETHER, len(by_length)) // 2
    return [pair for two in zip(by_length[:half], reversed(by_length[-half:]), strict=True) for pair in two]


def batch(scorer: Scorer, pairs: Sequence[TextTriple]) -> Finding:
    """A pair's margin alone against the same beside pairs of other lengths."""
    if scorer.listwise:
        return Finding(BATCH, State.SKIP, detail="a listwise model's scores depend on the other candidates")
    some = mixed(pairs)
    alone, together = (np.asarray(one, dtype=np.float64) for one in (one_by_one(scorer, some), scorer.together(some)))
    missing = int((~(np.isfinite(alone) & np.isfinite(together))).sum())
    if missing:
        return Finding(BATCH, State.FAIL, detail=f"{missing} of {len(some)} pairs are not finite")
    spread = float(alone.std())
    most = MAX_BATCH_DELTA_SPREADS["float32" if scorer.number_format == "float32" else "bfloat16"] * spread
    delta = max_delta(alone, together)
    state = State.PASS if delta <= most else State.FAIL
    return Finding(BATCH, state, delta, f"at most {most:.2g}", f"{len(some)} pairs in one pass")


def one_by_one(scorer: Scorer, pairs: Sequence[TextTriple]) -> Margins:
    """Each in a pass of its own: nothing is padded."""
    return np.concatenate([scorer.together([pair]) for pair in pairs])


def swapped(scorer: Scorer) -> Finding:
    """Whether two queries score one over-long passage differently: cutting must never reach the query."""
    passage = scorer.overlong()
    if passage is None:
        return Finding(SWAP, State.SKIP, detail="the limit is too long to fill here")
    given = one_by_one(scorer, [TextTriple(query, None, passage) for query in SWAPPED_QUERIES])
    first, second = (float(margin) for margin in given)
    if not np.isfinite(given).all():
        return Finding(SWAP, State.FAIL, None, "not 0", "the margins are not finite")
    # Equal to the last bit, or to what a float32 sum may lose: the same text was read.
    same = abs(first - second) <= 1e-6 * max(abs(first), abs(second))
    state = State.FAIL if same else State.PASS
    return Finding(SWAP, state, abs(first - second), "not 0", "two queries, one passage over the limit")
