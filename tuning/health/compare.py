"""Margins of the same pairs by two ways, judged by limits. Pure; knows no models."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tuning.health.limits import Limits
from tuning.health.pairs import PairSet
from tuning.health.report import Farthest, Finding, Section, State
from tuning.health.statistics import distinct_share, kendall_tau, max_delta, spread_ratio

Margins = NDArray[np.float32]

FINITE = "finite"
TAU = "order (Kendall tau)"
DELTA = "largest difference"
SPREAD = "spread ratio"
DISTINCT = "distinct values"
NUM_FARTHEST = 3


def compare(title: str, served: Margins, reference: Margins, limits: Limits) -> Section:
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
