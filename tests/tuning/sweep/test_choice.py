"""The front and the choice, against the definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning import EvaluationError
from tuning.config import Limits
from tuning.metrics import Interval
from tuning.sweep.report import SweepRow, front
from tuning.sweep.summary import Choice

POINTS = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12)


@given(POINTS)
def test_on_the_front_is_what_no_other_beats(points: list[tuple[float, float]]) -> None:
    on = front(points)
    for i, (cost, quality) in enumerate(points):
        beaten = any(
            (c <= cost and q > quality) or (c < cost and q >= quality) or (j < i and (c, q) == (cost, quality))
            for j, (c, q) in enumerate(points)
        )
        assert on[i] == (not beaten)


def row(quality: float, loss: float, num_bytes: float, ms: float, worst: float | None = None) -> SweepRow:
    """The fields that a choice looks at."""
    lost = Interval(loss, 0.0, worst if worst is not None else loss)
    shape: Any = SimpleNamespace(
        quality=SimpleNamespace(headline=quality, loss=lost),
        size=SimpleNamespace(bytes_per_passage=num_bytes),
        timing=SimpleNamespace(p50_seconds=ms / 1000, p99_seconds=2 * ms / 1000),
    )
    return cast(SweepRow, shape)


EXACT = row(0.70, 0.0, 100_000, 90)
GOOD = row(0.695, 0.007, 20_000, 40, worst=0.03)
SMALL = row(0.68, 0.03, 4_000, 30)
ROWS = [EXACT, GOOD, SMALL]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(max_loss=0.01), GOOD),  # the smallest that loses no more
        (Limits(max_loss=0.01, sure=True), EXACT),
        (Limits(max_loss=0.05), SMALL),
        (Limits(max_loss=0.05, prefer="quality"), EXACT),
        (Limits(max_bytes=30_000), GOOD),  # the best that is small enough
        (Limits(max_bytes=30_000, prefer="latency"), SMALL),
        (Limits(max_latency_seconds=0.06), SMALL),  # of the p99
        (Limits(max_loss=0.05, max_bytes=30_000, max_latency_seconds=0.08), SMALL),
    ],
)
def test_the_choice_keeps_every_limit(limits: Limits, expected: SweepRow) -> None:
    choice = Choice.among(limits, ROWS)
    assert choice.row is expected
    assert not choice.broken


def test_where_none_keeps_them_the_nearest_is_named() -> None:
    choice = Choice.among(Limits(max_loss=0.001, max_bytes=19_000), ROWS)
    assert choice.row is GOOD
    assert choice.broken == {"max_loss": pytest.approx(0.6), "max_bytes": pytest.approx(1 / 19)}
    with pytest.raises(EvaluationError, match="no configuration could be measured"):
        Choice.among(Limits(), [])


def test_bad_limits_are_named() -> None:
    with pytest.raises(EvaluationError, match="max_loss is -1"):
        Limits(max_loss=-1)
    with pytest.raises(EvaluationError, match="prefer is 'speed'; expected bytes, latency, quality"):
        Limits(prefer="speed")
