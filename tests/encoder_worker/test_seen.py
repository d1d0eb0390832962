"""Laws of the duplicate check, of reading ahead, and of the time that is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest

from cache.store import Store
from encoder_worker.config import IndexOptions, PipelineLimits
from encoder_worker.indexing import Progress, index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.reading import ahead
from encoder_worker.sources import Place, Refused, SeenIds, SourcePassage


def test_an_id_is_new_once_and_later_tells_where_it_came_first() -> None:
    """Enough ids for several merges of sorted arrays."""
    seen = SeenIds()
    ids = [f"id-{i}" for i in range(150_000)]
    half = len(ids) // 2
    places = [Place("one", i + 1) if i < half else Place("two", i - half + 1) for i in range(len(ids))]
    first = [SourcePassage(id_, "", place) for id_, place in zip(ids, places, strict=True)]
    assert all(seen.once(passage) is passage for passage in first)
    for i in range(0, len(ids), 97):
        again = seen.once(SourcePassage(ids[i], "", Place("three", 1)))
        assert isinstance(again, Refused)
        assert again.message == f"id {ids[i]!r} came before, at {places[i]}; the first one counts"
    assert ids[0] in seen
    assert ids[-1] in seen
    assert "id" not in seen


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
    small = IndexOptions(limits=PipelineLimits(batch_passages=30))
    index(Sized(passages(real_texts[:120])), encoder, store, "docs", options=small, on_progress=told.append)
    fractions = [now.fraction for now in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len({*fractions} - {0, 0.25, 0.5, 0.75, 1}) > 8
    assert all(abs(now.fraction - now.num_done / 120) < 0.01 for now in told)
    for now in told:  # the time that is left, and the speed, by the part of the source that is done
        if now.fraction and now.seconds:
            assert now.eta_seconds == pytest.approx((1 - now.fraction) / now.fraction * now.seconds, rel=0.01)
            assert now.passages_per_second == pytest.approx(now.num_encoded / now.seconds, rel=0.01)


def test_no_time_is_told_where_the_size_of_the_source_is_not_known(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Callable[..., list[SourcePassage]]
) -> None:
    told: list[Progress] = []
    index(passages(real_texts[:20]), encoder, store, "docs", on_progress=told.append)
    assert {now.eta_seconds for now in told if now.num_done} == {None}
