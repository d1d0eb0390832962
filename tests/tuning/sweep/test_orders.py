"""Orders of one reading and of cascades, against the plain loop."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from preread.values import Stage
from tuning.sweep.settings import Reading
from tuning.trec import order

MARGINS = st.one_of(st.integers(-3, 3).map(float), st.just(math.nan))


def naive(stages: list[Stage], margins: list[list[float]]) -> list[int]:
    """Stage by stage: sort who is here, set the tail aside, go on with the rest."""
    here, tail = list(range(len(margins[0]))), []
    for stage, own in zip(stages, margins, strict=True):
        here.sort()
        here.sort(key=lambda row: (math.isnan(own[row]), 0 if math.isnan(own[row]) else -own[row]))
        last = stage is stages[-1]
        if not last:
            here, tail = here[: stage.keep], here[stage.keep :] + tail
    return here + tail


@given(st.data(), st.integers(1, 9), st.integers(1, 3))
def test_later_stages_outrank_earlier_ones(data: st.DataObject, num: int, num_stages: int) -> None:
    margins = [data.draw(st.lists(MARGINS, min_size=num, max_size=num)) for _ in range(num_stages)]
    keeps = sorted((data.draw(st.integers(1, 9)) for _ in range(num_stages)), reverse=True)
    stages = [Stage(2 ** (num_stages - i), keep) for i, keep in enumerate(keeps)]
    reading = Reading(tuple(stages))
    rows = reading.order([np.array(own) for own in margins])
    assert rows.tolist() == naive(stages, margins)
    listed = reading.ranking([str(row) for row in range(num)], [np.array(own) for own in margins])
    assert [int(p) for p, _ in listed] == rows.tolist()
    scores = np.array([score for _, score in listed], dtype=np.float32)
    assert (np.diff(scores) < 0).all()


def test_a_cascade_by_hand() -> None:
    coarse, fine = np.array([0.9, 0.8, 0.7, 0.1]), np.array([0.1, 0.2, 0.9, 1.0])
    reading = Reading((Stage(32, 2), Stage(4)))
    # 0 and 1 go on and change places; 3 would win at ratio 4 and never got there
    assert reading.order([coarse, fine]).tolist() == [1, 0, 2, 3]
    assert reading.num_read(4) == [4, 2]
    assert Reading((Stage(32, 100), Stage(4, 20), Stage(1, 5))).num_read(50) == [50, 50, 20]


def test_a_cascade_that_keeps_everything_is_its_last_stage() -> None:
    coarse, fine = np.array([3.0, 2.0, 1.0]), np.array([1.0, np.nan, 2.0])
    assert Reading((Stage(8, 3), Stage(4))).order([coarse, fine]).tolist() == order(fine).tolist() == [2, 0, 1]
