"""Measures and intervals, against numbers that can be worked out by hand."""

from __future__ import annotations

from math import log2

import ir_measures
import numpy as np
import pytest

from tuning.metrics import Bootstrap, per_query
from tuning.trec import Qrels, Run, rank

QRELS: Qrels = {"a": {"x": 2, "y": 1, "z": 0}, "b": {"x": 1}, "c": {"w": 1}}
RUN: Run = {
    "a": rank(["y", "n", "x"], [3.0, 2.0, 1.0]),
    "b": rank([f"n{i}" for i in range(10)] + ["x"], np.arange(11, 0, -1.0)),  # found, at 11
    "c": [],
    "d": rank(["x"], [1.0]),  # not judged
}


def test_measures_equal_hand_worked_numbers() -> None:
    values = per_query(QRELS, RUN, top_k=50)
    assert list(values) == ["nDCG@10", "MRR@10", "R@10", "R@50"]
    ideal = 2 / log2(2) + 1 / log2(3)
    assert values["nDCG@10"] == pytest.approx([(1 / log2(2) + 2 / log2(4)) / ideal, 0, 0])
    assert values["MRR@10"] == pytest.approx([1, 0, 0])
    assert values["R@10"] == pytest.approx([1, 0, 0])
    assert values["R@50"] == pytest.approx([1, 1, 0])


def test_a_higher_grade_may_be_asked_for() -> None:
    values = per_query(QRELS, RUN, top_k=50, min_grade=2)
    assert values["MRR@10"] == pytest.approx([1 / 3, 0, 0])
    assert values["R@10"] == pytest.approx([1, 0, 0])


def test_means_equal_those_of_ir_measures() -> None:
    values = per_query(QRELS, RUN, top_k=20)
    scored = {q: dict(ranking) for q, ranking in RUN.items()}
    names = {"nDCG@10": ir_measures.nDCG @ 10, "MRR@10": ir_measures.RR @ 10, "R@20": ir_measures.R @ 20}
    theirs = ir_measures.calc_aggregate(list(names.values()), QRELS, scored)
    for name, measure in names.items():
        assert values[name].mean() == pytest.approx(theirs[measure])


def test_ties_go_by_candidate_order_and_not_by_id() -> None:
    tied = {"b": rank(["n", "x"], [1.0, 1.0])}
    assert per_query({"b": {"x": 1}}, tied, top_k=5)["MRR@10"] == pytest.approx([0.5])
    tied = {"b": rank(["x", "n"], [1.0, 1.0])}
    assert per_query({"b": {"x": 1}}, tied, top_k=5)["MRR@10"] == pytest.approx([1.0])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).random((40, 2))
    first, again, other = (Bootstrap(values, seed=seed, num_resamples=500) for seed in (7, 7, 8))
    assert first.interval(0) == again.interval(0)
    assert first.difference(0, 1) == again.difference(0, 1)
    assert first.interval(0) != other.interval(0)


def test_an_interval_agrees_with_the_naive_loop() -> None:
    values = np.random.default_rng(2).random((30, 1))
    interval = Bootstrap(values, seed=0, num_resamples=10_000).interval(0)
    generator = np.random.default_rng(3)
    naive = [values[generator.integers(30, size=30)].mean() for _ in range(10_000)]
    assert interval.mean == pytest.approx(values.mean())
    assert [interval.low, interval.high] == pytest.approx(np.percentile(naive, [2.5, 97.5]), abs=0.01)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(300):
        interval = Bootstrap(generator.random((50, 1)), seed=trial, num_resamples=400).interval(0)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_pairing_finds_a_small_steady_difference() -> None:
    base = np.random.default_rng(5).random(60)  # queries differ far more than systems
    bootstrap = Bootstrap(np.stack([base, base + 0.02, base], axis=1), seed=0, num_resamples=1000)
    gain = bootstrap.difference(1, 0)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.02, 0.02, 0.02))
    assert gain.significant
    assert gain.p_value < 0.01
    none = bootstrap.difference(2, 0)
    assert (none.mean, none.low, none.high, none.p_value, none.significant) == (0, 0, 0, 1, False)
    share = bootstrap.share(1, 0)
    assert share is not None
    assert share.mean == pytest.approx((base.mean() + 0.02) / base.mean())
    assert share.low < share.mean < share.high


def test_a_share_of_nothing_is_no_number() -> None:
    assert Bootstrap(np.array([[0.0, 0.5], [0.0, 1.0]]), seed=0, num_resamples=200).share(1, 0) is None
