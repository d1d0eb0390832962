"""Margins to scores, windows to passages, outcomes to an order."""

from __future__ import annotations

import numpy as np
import pytest

from cache.states import PassageStates, text_digest
from checkpoint import TokenizedPrompt
from decoder_server.engine.fetch import Found
from decoder_server.engine.plan import Indexed
from decoder_server.engine.request_run import Tally, ranked
from decoder_server.engine.scheduler import Scored
from decoder_server.models.backend import sigmoid
from decoder_server.models.fbnl.batch_states import StatePair
from preread.types import Result


def found(index: int, windows: tuple[int, ...]) -> Found:
    states = PassageStates(np.zeros((sum(windows), 4), np.float32), windows, 1, False, text_digest("x"))
    return Found(Indexed(index, f"p{index}", None), "hit", states)


def expect(tally: Tally, one: Found) -> None:
    prompt = TokenizedPrompt([1, 2, 3], 1, False)
    assert one.states is not None
    tally.expect(one, [StatePair(prompt, window) for window in one.states.windows()])


# P(yes) of published margins, reference of KaLM-Reranker-V1-Nano.
@pytest.mark.parametrize(("margin", "score"), [(8.78125, 0.99984646), (-14.1875, 6.8936e-07), (0.0, 0.5)])
def test_score_is_the_sigmoid_of_the_margin(margin: float, score: float) -> None:
    assert sigmoid(margin) == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("margin", [1e4, -1e4, 88.8, -88.8, -103.9])
def test_sigmoid_never_overflows(margin: float) -> None:
    assert 0.0 <= sigmoid(margin) <= 1.0


def test_the_best_window_counts_and_only_when_all_are_in() -> None:
    tally = Tally(sigmoid, 3)
    expect(tally, found(3, (2, 5)))
    assert tally.add([Scored(3, -1.0)]) == []
    (outcome,) = tally.add([Scored(3, 2.0)])
    assert (outcome.index, outcome.margin, outcome.num_states) == (3, 2.0, 7)


def test_a_window_that_is_not_finite_fails_its_passage_only() -> None:
    tally = Tally(sigmoid, 3)
    expect(tally, found(0, (2, 5)))
    expect(tally, found(1, (2,)))
    bad, good = tally.add([Scored(0, 1.0), Scored(0, float("nan"), "not finite"), Scored(1, 1.0)])
    assert (bad.status, bad.margin, bad.message) == ("failed", None, "not finite")
    assert (good.status, good.margin) == ("hit", 1.0)


def test_ties_keep_request_order_and_unscored_come_last_whatever_top_n_says() -> None:
    margins = [1.0, None, 2.0, 1.0, 2.0, None]
    outcomes = [Result(i, f"p{i}", "missing" if m is None else "hit", margin=m) for i, m in enumerate(margins)]
    assert [o.index for o in ranked(reversed(outcomes), 0)] == [2, 4, 0, 3, 1, 5]
    assert [o.index for o in ranked(outcomes, 3)] == [2, 4, 0, 1, 5]
