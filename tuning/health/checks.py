"""Checks of one model's scores, as sections of lines: comparisons of two passes, behaviour alone, published scores.

Differences are in spreads, the reference's standard deviation over the pairs: models' logits do not compare.
"""

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoder_server.models.cross_encoder.profiles import Profile
from tuning.health.report import CheckLine, Section, Verdict
from tuning.health.scorers import Margins, Scorer, TextTriple
from tuning.metrics import kendall_tau

Scores = Callable[[Sequence[TextTriple]], Margins]
TAU, DELTA, SPREAD = "order (Kendall tau)", "largest difference", "spread ratio"
BATCH, SWAP = "alone or batched", "the query counts"


@dataclass(frozen=True)
class Tolerance:
    """Limits of a comparison of two passes over the same weights."""

    min_tau: float
    max_delta_spreads: float | None  # None: the largest difference is shown and not judged
    min_spread_ratio: float = 0.8  # outside of these two a lost template shows, which the order does not
    max_spread_ratio: float = 1.25
    min_distinct: float = 0.5  # share of the reference's distinct values; bfloat16 keeps about 0.85 of 100

    @classmethod
    def of(cls, number_format: str) -> "Tolerance":
        """By dtype or runtime name: float32, bfloat16, or anything with int8 in it."""
        return INT8 if "int8" in number_format else BFLOAT16 if number_format == "bfloat16" else FLOAT32

    def compare(self, title: str, served: Margins, reference: Margins) -> Section:
        """How well `served` keeps order, distances, spread and resolution of `reference`, where both are finite."""
        both = np.isfinite(served) & np.isfinite(reference)
        if both.sum() < 2:
            detail = f"not finite: {int(both.sum())} of {len(both)} pairs have a number in both"
            return Section(title, [CheckLine("comparison", Verdict.FAIL, detail=detail)])
        # Differences of float32 may overflow.
        served, reference = served[both].astype(np.float64), reference[both].astype(np.float64)
        tau, ratio = kendall_tau(served, reference), spread_ratio(served, reference)
        low, high = self.min_spread_ratio, self.max_spread_ratio
        delta, spread, most = float(np.abs(served - reference).max()), float(reference.std()), self.max_delta_spreads
        distinct, possible = (len(np.unique(values)) / len(values) for values in (served, reference))
        least = self.min_distinct * possible
        delta_line = CheckLine(DELTA, Verdict.NOTE, delta)
        if most is not None:
            allowed = f"at most {most * spread:.2g}, {most:g} spreads"
            delta_line = CheckLine(DELTA, Verdict.of(delta <= most * spread), delta, allowed)
        resolution = f"at least {least:.2f}, {self.min_distinct:g} of the reference's"
        lines = [
            # NaN does not pass: scores that do not differ have no order.
            CheckLine(TAU, Verdict.of(tau >= self.min_tau), tau, f"at least {self.min_tau:g}"),
            delta_line,
            CheckLine(SPREAD, Verdict.of(low <= ratio <= high), ratio, f"{low:g} to {high:g}"),
            CheckLine("distinct values", Verdict.of(distinct >= least), distinct, resolution),
        ]
        return Section(title, lines)

    def agree_alone(self, scorer: Scorer, reference: Scores, pairs: Sequence[TextTriple]) -> bool:
        """Whether unpadded passes over pairs of mixed lengths give the reference's margins."""
        some = _mixed(pairs)
        alone, expected = scorer.one_by_one(some), reference(some)
        finite = np.isfinite(alone).all() and np.isfinite(expected).all()
        return bool(finite and np.abs(alone - expected).max() <= (self.max_delta_spreads or 1.0) * expected.std())


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


def spread_ratio(a: Margins, b: Margins) -> float:
    """Standard deviation of `a` over that of `b`; NaN where `b` is constant."""
    spread = float(b.std())
    return float(a.std()) / spread if spread > 0 else float("nan")


# Every score below: a softmax over the hidden vector stands where the head should.
_SATURATED_SCORE = 1e-6
# Every score between: a sigmoid of a sigmoid, whose range is sigmoid(0) to sigmoid(1).
_DOUBLE_SIGMOID = (0.5, 0.7311)
# One pair alone and batched, in spreads: float32 sums in another order.
_MAX_BATCH_DELTA = {"float32": 0.01, "bfloat16": 0.25}
_MAX_FILLED_TOKENS = 8192  # attention over more takes minutes on a CPU
_NUM_TOGETHER = 12  # of the pairs, shortest and longest in turn, so that the short ones are padded
# Unrelated to each other and to the over-long passage: a model that reads them cannot but differ.
_SWAPPED_QUERIES = ("how tides follow the moon", "세금 신고는 언제까지 해야 하나요?")


def behaviour(scorer: Scorer, pairs: Sequence[TextTriple], margins: Margins) -> Section:
    """Lines about `margins`, which `scorer` gave for `pairs`, and about a few more passes of it."""
    scores = scorer.scores(margins)
    good = np.isfinite(margins) & np.isfinite(scores)
    missing = int((~good).sum())
    detail = f"{missing} are not finite; the first is pair {int(np.flatnonzero(~good)[0]) + 1}" if missing else ""
    if missing == len(good):
        detail = "not finite: no pair has a number"
    finite = CheckLine("finite", Verdict.of(not missing), float(good.mean()), "all", detail)
    # Whether scores lie where only a fault puts all of them.
    verdict, shown, numbers = Verdict.SKIP, "not finite", scores[np.isfinite(scores)]
    if len(numbers):
        verdict = Verdict.of(saturation(margins) is None and saturation(scores) is None)
        shown = f"here {numbers.min():.3g} to {numbers.max():.3g}"
    expected = f"not all < {_SATURATED_SCORE:g} or in {_DOUBLE_SIGMOID[0]:.2f}..{_DOUBLE_SIGMOID[1]:.2f}"
    used = CheckLine("scores use their range", verdict, None, expected, shown)
    return Section("the model alone", [finite, used, _batch(scorer, pairs), _swapped(scorer)])


def saturation(values: Margins) -> str | None:
    """`tiny`, as all values of a softmax over a hidden vector; `doubled`, as of a sigmoid of a sigmoid; else None."""
    low, high = _DOUBLE_SIGMOID
    if ((values >= 0) & (values < _SATURATED_SCORE)).all():
        return "tiny"
    return "doubled" if ((values >= low) & (values <= high)).all() else None


def _mixed(pairs: Sequence[TextTriple]) -> list[TextTriple]:
    """A few pairs whose lengths differ as much as they can: shortest, longest, next shortest, ..."""
    by_length = sorted(pairs, key=lambda pair: len(pair.passage.encode()))
    half = min(_NUM_TOGETHER, len(by_length)) // 2
    return [pair for two in zip(by_length[:half], reversed(by_length[-half:]), strict=True) for pair in two]


def _batch(scorer: Scorer, pairs: Sequence[TextTriple]) -> CheckLine:
    if scorer.listwise:
        return CheckLine(BATCH, Verdict.SKIP, detail="a listwise model's scores depend on the other candidates")
    some = _mixed(pairs)
    alone, together = (np.asarray(one, dtype=np.float64) for one in (scorer.one_by_one(some), scorer.together(some)))
    if missing := int((~(np.isfinite(alone) & np.isfinite(together))).sum()):
        return CheckLine(BATCH, Verdict.FAIL, detail=f"{missing} of {len(some)} pairs are not finite")
    most = _MAX_BATCH_DELTA.get(scorer.number_format, _MAX_BATCH_DELTA["bfloat16"]) * float(alone.std())
    delta = float(np.abs(alone - together).max())
    return CheckLine(BATCH, Verdict.of(delta <= most), delta, f"at most {most:.2g}", f"{len(some)} pairs in one batch")


def _swapped(scorer: Scorer) -> CheckLine:
    """Whether two queries score one over-long passage differently: cutting must never reach the query."""
    if scorer.max_passage_tokens > _MAX_FILLED_TOKENS:
        return CheckLine(SWAP, Verdict.SKIP, detail="the limit is too long to fill here")
    # Every tokenizer here spells each word in at least one token.
    passage = "the water of the sea rises and falls twice a day " * (scorer.max_passage_tokens // 2 + 1)
    given = scorer.one_by_one([TextTriple(query, None, passage) for query in _SWAPPED_QUERIES])
    first, second = given.tolist()
    if not np.isfinite(given).all():
        return CheckLine(SWAP, Verdict.FAIL, None, "not 0", "the margins are not finite")
    # Equal to the last bit, or as nearly as a float32 sum may lose: the same text was read.
    differ = abs(first - second) > 1e-6 * max(abs(first), abs(second))
    return CheckLine(SWAP, Verdict.of(differ), abs(first - second), "not 0", "two queries, one passage over the limit")


@dataclass(frozen=True)
class _Published:
    texts: list[TextTriple]
    source: str
    expected: Sequence[float]
    are_margins: bool
    max_delta: float

    def line(self, scorer: Scorer) -> CheckLine:
        margins = scorer.margins(self.texts)
        got = margins if self.are_margins else scorer.scores(margins)
        delta = float(np.abs(got - np.array(self.expected, dtype=np.float32)).max())
        shown, expected = (", ".join(f"{value:.4g}" for value in values) for values in (got, self.expected))
        most, detail = f"at most {self.max_delta:g}", f"{shown}; published {expected}"
        return CheckLine(self.source, Verdict.of(delta <= self.max_delta), delta, most, detail)


def published(name: str) -> list[_Published]:
    """Scores published for exactly this hub id, or a directory `owner/name`; none for others."""
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", name)  # a hub cache's snapshot
    hub_id = f"{cached[1]}/{cached[2]}" if cached is not None else "/".join(name.rstrip("/").split("/")[-2:])
    document = tomllib.loads((Path(__file__).parent / "published.toml").read_text())
    own = [row for row in document["published"] if row["model"] == hub_id]
    if own:
        return [_Published(_texts(row), row["source"], row["margins"], True, row["max_delta"]) for row in own]
    profile = Profile.named(hub_id)
    if profile is None or not profile.golden:
        return []
    # Scores between 0 and 1, or logits. Publishers computed in bfloat16, whose steps at a logit of 8 are 0.06, and
    # allow 0.01 themselves between machines in the same format.
    logits = profile.golden_are_margins or any(not 0 <= score <= 1 for score in profile.golden)
    texts, most = _texts(document["planets"]), 0.15 if logits else 0.02
    return [_Published(texts, "four passages", profile.golden, profile.golden_are_margins, most)]


def _texts(row: dict[str, Any]) -> list[TextTriple]:
    return [TextTriple(row["query"], row.get("instruction"), passage) for passage in row["passages"]]
