"""Numbers checkable by hand, and scipy's tau where there are ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from tuning.health.checks import BFLOAT16, FLOAT32, INT8, Tolerance, spread_ratio
from tuning.health.parity import ParityRow
from tuning.health.report import Verdict
from tuning.metrics import kendall_tau


def test_tau_by_hand_and_by_scipy() -> None:
    up = np.arange(4.0)
    assert kendall_tau(up, up) == 1
    assert kendall_tau(up, -up) == -1
    assert kendall_tau(up, np.array([0.0, 1, 3, 2])) == pytest.approx(4 / 6)  # 5 of 6 pairs agree, 1 does not
    assert math.isnan(kendall_tau(up, np.zeros(4)))
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 60).astype(float), rng.integers(0, 9, 60).astype(float)
    assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)


def test_the_other_numbers_by_hand() -> None:
    scores = np.array([3.0, 1.0, 2.0, 1.0], dtype=np.float32)
    row = ParityRow.of("float32", scores, scores)
    assert (row.rank_agreement, row.max_delta, row.tau, row.passed) == (1, 0, 1, True)
    other = ParityRow.of("float32", scores, np.array([3.0, 2.0, 1.0, 0.0], dtype=np.float32))
    assert (other.rank_agreement, other.max_delta) == (0.5, 1)  # 0 2 1 3 against 0 1 2 3
    distinct = {line.name: line for line in FLOAT32.compare("x", scores, np.arange(4.0, dtype=np.float32)).lines}
    assert distinct["distinct values"].value == 0.75
    assert spread_ratio(2 * scores, scores) == pytest.approx(2)
    assert math.isnan(spread_ratio(scores, np.ones(4)))


def test_a_lost_template_shows_in_the_spread_and_not_in_the_order() -> None:
    reference = np.linspace(-5, 5, 50, dtype=np.float32)
    section = BFLOAT16.compare("x", reference * np.float32(0.1), reference)
    states = {line.name: line.state for line in section.lines}

    assert states["order (Kendall tau)"] is Verdict.PASS
    assert states["spread ratio"] is Verdict.FAIL


def test_scores_that_do_not_differ_never_pass() -> None:
    same = np.ones(9, dtype=np.float32)
    assert FLOAT32.compare("x", same, same).failed


@pytest.mark.parametrize(
    ("name", "limits"), [("float32", FLOAT32), ("bfloat16", BFLOAT16), ("onnx-int8", INT8), ("onnx", FLOAT32)]
)
def test_limits_go_by_number_format(name: str, limits: object) -> None:
    assert Tolerance.of(name) is limits
