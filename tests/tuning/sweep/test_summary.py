"""What a sweep says in sentences: signs in words, what its queries can tell, where the reference lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tuning.config import Limits
from tuning.metrics import HEADLINE, Bootstrap, Quality
from tuning.sweep.report import SweepReport
from tuning.sweep.summary import Choice, SweepSummary

MakeSummary = Callable[..., SweepSummary]
LOSES_ONE_PERCENT = Limits(max_loss=0.01)


def qualities(*systems: list[float]) -> list[Quality]:
    """Of nDCG@10 by query; the first is the reference."""
    values = [{HEADLINE: np.array(one)} for one in systems]
    boots = Bootstrap.by_measure(values, seed=0, num_resamples=2000)
    return [Quality.of({}, one, boots, i, 0) for i, one in enumerate(values)]


@pytest.fixture
def summary(sweep: Callable[..., SweepReport]) -> MakeSummary:
    """Of a reference, one configuration and a first stage, by the nDCG@10 of their queries."""
    measured = sweep(codecs=("SQ8",), read_ratios=(2,), cascades=())

    def make(reference: list[float], own: list[float], limits: Limits = LOSES_ONE_PERCENT) -> SweepSummary:
        finest, row, first = qualities(reference, own, [0.6] * len(own))
        rows = [replace(measured.rows[0], quality=row)]
        report = replace(measured, rows=rows, reference=finest, first_stage=first, num_queries=len(own))
        return SweepSummary(report, limits, Choice.among(limits, rows) if limits.given else None)

    return make


@pytest.mark.parametrize(
    ("before", "after", "words", "interval"),
    [
        (0.5, 0.53, "gains 6.0%", "a gain of 6.0%"),
        (0.5, 0.498, "loses 0.4%", "a loss of 0.4%"),
        (0.5, 0.49999, "loses nothing", "no change"),
    ],
)
def test_changes_are_words(before: float, after: float, words: str, interval: str) -> None:
    _, one = qualities([before] * 20, [after] * 20)
    assert (one.change_words, one.range_words) == (words, interval)


def test_an_interval_on_both_sides_of_nothing_names_both() -> None:
    _, one = qualities([0.5, 0.5] * 10, [0.3, 0.7] * 10)
    loss = one.loss
    assert one.range_words == f"from a loss of {loss.high:.1%} to a gain of {-loss.low:.1%}"


def test_too_few_queries_for_the_limit_say_so_and_how_many_would_do(summary: MakeSummary) -> None:
    few = summary([0.5, 0.6, 0.7] * 4, [0.3, 0.6, 0.9] * 4)
    assert few.tells_max_loss is False
    assert few.is_uncertain
    assert few.half_width is not None
    assert few.num_queries_needed == pytest.approx(12 * (few.half_width / 0.01) ** 2, rel=0.1)
    told = few.cautions[0]
    assert told.startswith(f"12 queries cannot tell 1%: the 95% interval is ±{100 * few.half_width:.2g} points")
    assert told.endswith(f"use --sure or more queries (about {few.num_queries_needed:,}).")
    assert few.to_json()["sentences"] == few.sentences
    sure = summary([0.5, 0.6, 0.7] * 4, [0.3, 0.6, 0.9] * 4, Limits(max_loss=0.01, sure=True))
    assert "--sure" not in sure.cautions[0]
    assert "more queries" in sure.cautions[0]


def test_enough_queries_say_on_which_side_of_the_limit_it_lies(summary: MakeSummary) -> None:
    within = summary([0.5, 0.7] * 50, [0.499, 0.699] * 50)
    assert within.tells_max_loss
    assert within.cautions[0].startswith("100 queries tell that it loses no more than 1%")
    beyond = summary([0.7] * 50, [0.5] * 50)
    assert beyond.cautions[0].startswith("50 queries tell that it loses more than 1%")
    assert not summary([0.7] * 50, [0.7] * 50).is_uncertain


def test_a_handful_of_queries_tells_nothing_even_where_all_agree(summary: MakeSummary) -> None:
    one = summary([0.7] * 3, [0.7] * 3)
    assert one.tells_max_loss is False
    assert one.cautions[0].startswith("3 queries cannot tell a loss from a gain")


def test_without_limits_it_says_that_nothing_is_chosen(summary: MakeSummary) -> None:
    one = summary([0.5, 0.7] * 10, [0.6, 0.6] * 10, Limits())
    assert one.outcome.startswith("Nothing is chosen: no limit was given")
    assert one.cost == ""
    assert one.tells_max_loss is None


@pytest.mark.parametrize(
    ("reference", "where", "significant"),
    [(0.5, "below", True), (0.7, "above", True), (0.6, "level with", False)],
)
def test_the_reference_is_placed_against_the_first_stage(
    summary: MakeSummary, reference: float, where: str, significant: bool
) -> None:
    one = summary([reference] * 20, [reference] * 20)
    told = one.cautions[1]
    assert told.startswith(
        f"The reference r = 1 lies {where} the first stage BM25 (nDCG@10 {reference:.3f} against 0.600)"
    )
    assert ("losses against it say little" in told) == (where == "below") == one.is_uncertain
    position = one.to_json()["reference_against_first_stage"]
    assert position == {"position": where.split()[0], "significant": significant}
