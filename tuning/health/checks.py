"""How far scores may be from what they are compared with. Numbers only, each with its reason.

Differences are measured in spreads, the standard deviation of the reference's margins over the pairs: a logit
of one model means nothing to another.

How like each other two lists of scores of the same pairs are. Pure functions; knows no models.

Margins of the same pairs by two ways, judged by limits. Pure; knows no models.

The seam between checks and models: texts go in, margins come out. Knows no model.

What the checks of both kinds of model do alike: stages, comparisons of what has a number, notes.

What every model must do by itself, whatever it is compared with. Knows models by what they answer.

Scores that publishers give for their own weights, and whether these weights give them. Knows texts and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decoder_server.models.cross_encoder.profiles import named_profile
from tuning.health.pairs import FEW_PAIRS, PairSet, TextTriple
from tuning.health.report import Farthest, Finding, Section, State
from tuning.metrics import kendall_tau
from tuning.progress import Advance, ignore


@dataclass(frozen=True)
class Tolerance:
    """What a comparison of two passes over the same weights must keep."""

    min_tau: float
    max_delta_spreads: float | None  # None: the largest difference is shown and not judged
    min_spread_ratio: float = 0.8  # outside of these two a lost template shows, which the order does not
    max_spread_ratio: float = 1.25
    min_distinct: float = 0.5  # share of the reference's distinct values; bfloat16 keeps about 0.85 of 100


# Two float32 passes differ by the order of their sums: 1e-6 of a spread was measured. The room is for pairs
# that stand a rounding apart.
FLOAT32 = Tolerance(min_tau=0.999, max_delta_spreads=0.01)
# 0.98: published experience with bfloat16 rerankers. preread-mini moves a pair by 0.03 of a spread at most; the limit
# leaves room for deeper models.
BFLOAT16 = Tolerance(min_tau=0.98, max_delta_spreads=0.25)
# 0.9: published experience; a collapsed int8 model was at 0.42, with its down projections in float32 at 0.94.
INT8 = Tolerance(min_tau=0.9, max_delta_spreads=1.0)
# Pooling loses on purpose and the order moves; below this it says little about the unpooled one's.
POOLED = Tolerance(min_tau=0.5, max_delta_spreads=None)
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


def tolerance_for(number_format: str) -> Tolerance:
    """By dtype or runtime name: float32, bfloat16, or anything with int8 in it."""
    if "int8" in number_format:
        return INT8
    return BFLOAT16 if "bfloat16" in number_format or "bf16" in number_format else FLOAT32


Scores = NDArray[np.floating[Any]]


def rank_agreement(a: Scores, b: Scores) -> float:
    """Share of places that the same pair holds in both rankings, best first; equal scores stay in input order."""
    return float((np.argsort(-a, kind="stable") == np.argsort(-b, kind="stable")).mean())


def max_delta(a: Scores, b: Scores) -> float:
    """The largest difference of one pair's two scores."""
    return float(np.abs(a - b).max())


def spread_ratio(a: Scores, b: Scores) -> float:
    """Standard deviation of `a` over that of `b`; NaN where `b` is constant."""
    spread = float(b.std())
    return float(a.std()) / spread if spread > 0 else float("nan")


def distinct_share(a: Scores) -> float:
    """Different values per value."""
    return len(np.unique(a)) / len(a)


Margins = NDArray[np.float32]

FINITE = "finite"
TAU = "order (Kendall tau)"
DELTA = "largest difference"
SPREAD = "spread ratio"
DISTINCT = "distinct values"
NUM_FARTHEST = 3


def compare(title: str, served: Margins, reference: Margins, limits: Tolerance) -> Section:
    """How well `served` keeps order, distances, spread and resolution of `reference`; both (n,) and finite."""
    served, reference = served.astype(np.float64), reference.astype(np.float64)  # differences of float32 may overflow
    tau, ratio = kendall_tau(served, reference), spread_ratio(served, reference)
    delta, spread = max_delta(served, reference), float(reference.std())
    distinct, possible = distinct_share(served), distinct_share(reference)
    most = limits.max_delta_spreads
    findings = [
        # NaN is no pass: scores that do not differ have no order.
        Finding(TAU, _state(tau >= limits.min_tau), tau, f"at least {limits.min_tau:g}"),
        Finding(
            DELTA,
            State.NOTE if most is None else _state(delta <= most * spread),
            delta,
            "" if most is None else f"at most {most * spread:.2g}, {most:g} spreads",
        ),
        Finding(
            SPREAD,
            _state(limits.min_spread_ratio <= ratio <= limits.max_spread_ratio),
            ratio,
            f"{limits.min_spread_ratio:g} to {limits.max_spread_ratio:g}",
        ),
        Finding(
            DISTINCT,
            _state(distinct >= limits.min_distinct * possible),
            distinct,
            f"at least {limits.min_distinct * possible:.2f}, {limits.min_distinct:g} of the reference's",
        ),
    ]
    return Section(title, findings)


def finite(margins: Margins, scores: Margins) -> Finding:
    """Whether every pair has a number."""
    good = np.isfinite(margins) & np.isfinite(scores)
    missing = int((~good).sum())
    detail = f"{missing} are not finite; the first is pair {int(np.flatnonzero(~good)[0]) + 1}" if missing else ""
    if missing == len(good):
        detail = "not finite: no pair has a number"
    return Finding(FINITE, _state(missing == 0), float(good.mean()), "all", detail)


def farthest(pairs: PairSet, served: Margins, reference: Margins) -> list[Farthest]:
    """The pairs that differ most, most first, of those that both have a number for."""
    both = np.flatnonzero(np.isfinite(served) & np.isfinite(reference))
    delta = np.abs(served[both].astype(np.float64) - reference[both])
    return [
        Farthest(pairs.pairs[i].query, pairs.pairs[i].passage, float(served[i]), float(reference[i]))
        for i in both[np.argsort(-delta, kind="stable")[:NUM_FARTHEST]]
    ]


def _state(good: bool | np.bool_) -> State:
    return State.PASS if good else State.FAIL


class Scorer(Protocol):
    """One way of serving one model."""

    number_format: str  # float32, bfloat16, or a runtime's name with int8 in it
    listwise: bool  # a score depends on the other pairs that are scored with it

    def margins(self, pairs: Sequence[TextTriple], advance: Advance = ignore) -> Margins:
        """Margins (len(pairs),) as a server computes them: pairs of like length share a pass."""
        ...

    def together(self, pairs: Sequence[TextTriple]) -> Margins:
        """Margins (len(pairs),) of one padded pass over all of them."""
        ...

    def scores(self, margins: Margins) -> Margins:
        """What a client is given for these margins."""
        ...

    def overlong(self) -> str | None:
        """A passage that does not fit the model's limit and is cut; None: too long a limit to try."""
        ...


def judged(title: str, served: Margins, reference: Margins, limits: Tolerance) -> Section:
    """A comparison over the pairs that both have a number for."""
    both = np.isfinite(served) & np.isfinite(reference)
    if both.sum() < 2:
        detail = f"not finite: {int(both.sum())} of {len(both)} pairs have a number in both"
        return Section(title, [Finding("comparison", State.FAIL, detail=detail)])
    return compare(title, served[both], reference[both], limits)


def failed(sections: Sequence[Section], name: str) -> bool:
    """Whether a finding of that name failed."""
    return any(f.state is State.FAIL for section in sections for f in section.findings if f.name == name)


def notes(pairs: PairSet) -> list[str]:
    """What a reader of the numbers should know."""
    few = f"only {len(pairs)} pairs: below {FEW_PAIRS} one pair out of order decides"
    return [few] if len(pairs) < FEW_PAIRS else []


ALONE = "by itself"
SATURATION = "scores use their range"
BATCH = "alone or beside others"
SWAP = "the query counts"
NUM_TOGETHER = 12  # of the pairs, shortest and longest in turn, so that the short ones are padded
# Unrelated to each other and to the over-long passage: a model that reads them cannot but differ.
SWAPPED_QUERIES = ("how tides follow the moon", "세금 신고는 언제까지 해야 하나요?")


def behaviour(scorer: Scorer, pairs: Sequence[TextTriple], margins: Margins) -> Section:
    """Findings about `margins`, which `scorer` gave for `pairs`, and about a few more passes of it."""
    scores = scorer.scores(margins)
    return Section(ALONE, [finite(margins, scores), saturation(margins, scores), batch(scorer, pairs), swapped(scorer)])


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


PUBLISHED = "published scores"


@dataclass(frozen=True)
class Golden:
    """Texts, what was published for them, and whether that is a logit."""

    source: str
    texts: tuple[TextTriple, ...]
    expected: tuple[float, ...]
    are_margins: bool
    max_delta: float


_PLANETS = tuple(
    TextTriple("Which planet is known as the Red Planet?", None, passage)
    for passage in (
        "Venus is often called Earth's twin because of its similar size and proximity.",
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        "Jupiter, the largest planet in our solar system, has a prominent red spot.",
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    )
)
_CTXL = tuple(
    TextTriple("What are the health benefits of exercise?", "Prioritize recent medical research", passage)
    for passage in (
        "A 2024 study shows exercise enhances cognitive function in older adults.",
        "Regular exercise reduces risk of heart disease and improves mental health.",
        "Ancient Greeks valued physical fitness for military training.",
    )
)
_CHINA = ("The capital of China is Beijing.", "Gravity attracts bodies toward one another.")
_CAPITAL = tuple(TextTriple("What is the capital of China?", None, passage) for passage in _CHINA)
_WEB = "Given a web search query, retrieve passages that answer the query."
_CAPITAL_WEB = tuple(TextTriple("What is the capital of China?", _WEB, passage) for passage in _CHINA)

# The reference differs from itself by 0.06 between batch sizes in bfloat16; twice that for another machine.
_KALM_DELTA = 0.12
_BY_ID = {
    # Its card, bfloat16.
    "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b": [
        Golden("its card", _CTXL, (-2.2969, -4.6875, -12.375), True, MAX_GOLDEN_LOGIT_DELTA)
    ],
    # Their cards, bfloat16 at r = 4; the second of Nano's is the logit of .9972850 and 5.896418e-07.
    "KaLM-Embedding/KaLM-Reranker-V1-Nano": [
        Golden("its card", _CAPITAL, (8.78125, -14.1875), True, _KALM_DELTA),
        Golden("its card, with an instruction", _CAPITAL_WEB, (5.90625, -14.34375), True, _KALM_DELTA),
    ],
    "KaLM-Embedding/KaLM-Reranker-V1-Large": [Golden("its card", _CAPITAL, (8.5625, -12.21875), True, _KALM_DELTA)],
}


def published(name: str) -> list[Golden]:
    """What is published for the model of exactly this hub id, or a directory `owner/name`; nothing for others."""
    own = _owner_and_name(name)
    if own in _BY_ID:
        return _BY_ID[own]
    profile = named_profile(own, None)
    if profile is None or not profile.golden:
        return []
    logits = profile.golden_are_margins or any(not 0 <= score <= 1 for score in profile.golden)
    most = MAX_GOLDEN_LOGIT_DELTA if logits else MAX_GOLDEN_SCORE_DELTA
    return [Golden("four passages", _PLANETS, profile.golden, profile.golden_are_margins, most)]


def golden_section(name: str, scorer: Scorer) -> Section:
    """Published scores against the model's own."""
    found = published(name)
    if not found:
        finding = Finding("scores", State.SKIP, detail="none for a model of this name")
        return Section(PUBLISHED, [finding])
    return Section(PUBLISHED, [_finding(golden, scorer) for golden in found])


def _finding(golden: Golden, scorer: Scorer) -> Finding:
    margins = scorer.margins(golden.texts)
    got = margins if golden.are_margins else scorer.scores(margins)
    delta = float(np.abs(got - np.array(golden.expected, dtype=np.float32)).max())
    state = State.PASS if delta <= golden.max_delta else State.FAIL
    shown = ", ".join(f"{value:.4g}" for value in got)
    wanted = ", ".join(f"{value:.4g}" for value in golden.expected)
    return Finding(golden.source, state, delta, f"at most {golden.max_delta:g}", f"{shown}; published {wanted}")


def _owner_and_name(name: str) -> str:
    """`owner/name` of a hub cache's snapshot or of a directory laid out like the hub; else the name itself."""
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", name)
    return f"{cached[1]}/{cached[2]}" if cached is not None else "/".join(name.rstrip("/").split("/")[-2:])
