"""Laws of the duplicate check, of reading ahead, and of the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from encoder_worker.reading import Ahead, SeenIds
from encoder_worker.report import IndexReport, Speedometer
from encoder_worker.sources import Place


def test_an_id_is_new_once_and_later_tells_where_it_came_first() -> None:
    """Enough ids for several merges of sorted arrays."""
    seen = SeenIds()
    ids = [f"id-{i}" for i in range(150_000)]
    half = len(ids) // 2
    places = [Place("one", i + 1) if i < half else Place("two", i - half + 1) for i in range(len(ids))]
    assert all(seen.first_place(id_, place) is None for id_, place in zip(ids, places, strict=True))
    again = Place("three", 1)
    for i in range(0, len(ids), 97):
        assert seen.first_place(ids[i], again) == places[i]


def test_items_come_in_order_and_an_error_after_them() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    got = []
    with pytest.raises(ValueError, match="the sixth"), Ahead(items(), stop=threading.Event()) as ready:
        got.extend(ready)
    assert got == list(range(5))


def test_leaving_early_ends_the_thread() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(1_000_000):
            made.append(i)
            yield i

    with Ahead(items(), stop=threading.Event(), depth=2, name="early") as ready:
        next(ready)
    assert len(made) <= 4
    assert "early" not in {thread.name for thread in threading.enumerate()}


def test_time_left_is_told_by_the_part_of_the_source_that_is_done() -> None:
    report = IndexReport("docs")
    meter = Speedometer(report)
    report.take(100, 0, [])
    time.sleep(0.2)
    report.num_encoded = 50
    half_of_first = meter.read(0.5, 100)
    assert half_of_first.fraction == pytest.approx(0.25)
    assert half_of_first.num_done == 50
    assert half_of_first.eta_seconds == pytest.approx(3 * half_of_first.seconds, rel=0.05)
    assert half_of_first.passages_per_second == pytest.approx(50 / half_of_first.seconds, rel=0.05)
    report.num_encoded = 100
    meter.next_window(0.5)
    assert meter.read(0.5, 0).fraction == pytest.approx(0.5)
    report.take(10, 10, [])
    assert meter.read(None, 0).eta_seconds is None
