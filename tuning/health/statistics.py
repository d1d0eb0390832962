"""How like each other two lists of scores of the same pairs are. Pure functions; knows no models."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]


def kendall_tau(a: Scores, b: Scores) -> float:
    """Kendall's tau-b of two (n,) arrays: 1 the same order, 0 unrelated, -1 reversed; NaN where one is constant.

    tau-b because bfloat16 makes ties: a tie in one list alone counts neither for nor against the order.
    Source: Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945).
    """
    agreeing = told_a = told_b = 0
    for i in range(len(a) - 1):  # a row at a time: memory grows with n, not with its square
        sign_a, sign_b = np.sign(a[i] - a[i + 1 :]), np.sign(b[i] - b[i + 1 :])
        agreeing += int((sign_a * sign_b).sum())
        told_a += int(np.count_nonzero(sign_a))
        told_b += int(np.count_nonzero(sign_b))
    return agreeing / (told_a * told_b) ** 0.5 if told_a and told_b else float("nan")


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
