"""Laws of the duplicate check, of reading ahead, and of the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest

from cache.store import Store
from encoder_worker.indexing import IndexOptions, Progress, Speedometer, index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.reading import ReadLimits, SeenIds, ahead
from encoder_worker.sources import Place, SourcePassage


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


async def test_items_come_in_order_and_an_error_after_them() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    ready = ahead(items(), threading.Event())
    assert [await anext(ready) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="the sixth"):
        await anext(ready)


async def test_leaving_early_ends_the_thread() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(1_000_000):
            made.append(i)
            yield i

    async with aclosing(ahead(items(), threading.Event(), name="early")) as ready:
        await anext(ready)
    assert len(made) <= 3
    assert "early" not in {thread.name for thread in threading.enumerate()}


def test_time_left_is_told_by_the_part_of_the_source_that_is_done() -> None:
    meter = Speedometer()
    time.sleep(0.2)
    quarter = meter.read(50, 50, 0.25)
    assert (quarter.fraction, quarter.num_done) == (0.25, 50)
    assert quarter.eta_seconds == pytest.approx(3 * quarter.seconds, rel=0.05)
    assert quarter.passages_per_second == pytest.approx(50 / quarter.seconds, rel=0.05)
    assert meter.read(100, 100, None).eta_seconds is None


def test_the_part_that_is_done_grows_with_every_pass(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Callable[..., list[SourcePassage]]
) -> None:
    class Sized(list[SourcePassage]):
        num_read = 0

        def __iter__(self) -> Iterator[SourcePassage]:
            for item in super().__iter__():
                self.num_read += 1
                yield item

        def fraction(self) -> float:
            return self.num_read / len(self)

    told: list[Progress] = []
    small = IndexOptions(read=ReadLimits(max_passages=30))
    index(Sized(passages(real_texts[:120])), encoder, store, "docs", options=small, on_progress=told.append)
    fractions = [now.fraction for now in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len({*fractions} - {0, 0.25, 0.5, 0.75, 1}) > 8
    assert all(abs(now.fraction - now.num_done / 120) < 0.01 for now in told)
