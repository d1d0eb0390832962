"""Laws of the queue: order, budget, fairness, and that nobody's absence or bad pair costs another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder_server.engine.admission import Admission
from decoder_server.engine.scheduler import FREE_CELLS, MAX_PADDING, Scheduler, SchedulerStats, split_by_length
from decoder_server.models.backend import Backend
from decoder_server.models.fbnl.backend import FbnlBackend
from decoder_server.models.fbnl.kv_cache import StatePair
from preread.errors import Overloaded, Unavailable


@asynccontextmanager
async def running(backend: Backend, max_batch_tokens: int) -> AsyncIterator[Scheduler]:
    with ThreadPoolExecutor(1) as executor:
        scheduler = Scheduler(backend, executor, max_batch_tokens)
        task = asyncio.create_task(scheduler.run())
        try:
            yield scheduler
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def make_pairs(
    backend: Backend, sizes: Sequence[int], query: str = "what is read once?", seed: int = 0
) -> list[StatePair]:
    rng = np.random.default_rng(seed)
    prompt = backend.prompt(query)
    return [StatePair(prompt, rng.standard_normal((size, 64), dtype=np.float32)) for size in sizes]


async def score(
    scheduler: Scheduler, pairs: list[StatePair], on_done: Callable[[], None] | None = None
) -> list[float | None]:
    """One request, start to end."""
    with scheduler.queued(sum(p.num_tokens for p in pairs)) as queue:
        margins = [margin for one in [scheduler.submit(queue, [pair]) for pair in pairs] for margin in await one]
    if on_done is not None:
        on_done()
    return margins


async def entered(backend) -> None:
    while not backend.entered.is_set():
        await asyncio.sleep(0.001)


async def test_many_requests_at_once_get_what_one_by_one_gives(fbnl: FbnlBackend) -> None:
    rng = np.random.default_rng(1)
    requests = [make_pairs(fbnl, rng.integers(1, 40, 12).tolist(), "word " * n, seed=n) for n in range(1, 25)]
    async with running(fbnl, 1500) as scheduler:
        together = await asyncio.gather(*(score(scheduler, pairs) for pairs in requests))
    for pairs, margins in zip(requests, together, strict=True):
        alone = [float(fbnl.score([pair])[0]) for pair in pairs]
        np.testing.assert_allclose(margins, alone, atol=1e-5)
    assert scheduler.stats.num_pairs == 24 * 12
    assert scheduler.stats.num_passes < 24 * 12 / 2


async def test_a_batch_keeps_its_token_budget_unless_one_pair_is_over_it(gated) -> None:
    pairs = make_pairs(gated, [10, 30, 50, 900, 20, 10])
    budget = 3 * pairs[2].num_tokens
    async with running(gated, budget) as scheduler:
        await score(scheduler, pairs)
    for batch in gated.passes:
        assert len(batch) == 1 or sum(pair.num_tokens for pair in batch) <= budget
    assert sum(map(len, gated.passes)) == len(pairs)


def test_a_budget_that_is_not_fixed_follows_the_measured_rate(gated) -> None:
    with ThreadPoolExecutor(1) as executor:
        scheduler = Scheduler(gated, executor, 8192, 1024)
        for tokens_per_second, budget in ((0, 1024), (4000, 1024), (40_000, 4000), (1_000_000, 8192)):
            scheduler.stats = SchedulerStats(num_tokens=tokens_per_second, compute_seconds=1.0)
            assert scheduler.batch_tokens == budget
        assert Scheduler(gated, executor, 500).batch_tokens == 500


async def test_where_much_waits_a_budget_takes_a_share_of_it_up_to_a_bound(gated) -> None:
    """At 10,000 tokens a second: 1,000 in a tenth of a second, a quarter of what waits, at most 6,000."""
    (pair,) = make_pairs(gated, [60])
    with ThreadPoolExecutor(1) as executor:
        scheduler = Scheduler(gated, executor, 8192, 100)
        scheduler.stats = SchedulerStats(num_tokens=10_000, compute_seconds=1.0)
        with scheduler.queued(0) as queue:
            for num_queued, budget in ((0, 1000), (4000, 1000), (8000, 2000), (100_000, 6000)):
                queue.clear()
                for _ in range(num_queued // pair.num_tokens):
                    scheduler.submit(queue, [pair])
                assert budget - pair.num_tokens <= scheduler.batch_tokens <= budget


async def test_a_small_request_does_not_wait_behind_a_large_one(gated) -> None:
    large, small = make_pairs(gated, [20] * 300), make_pairs(gated, [20])
    budget = 10 * small[0].num_tokens
    async with running(gated, budget) as scheduler:
        gated.gate.clear()
        first = asyncio.create_task(score(scheduler, large))
        await entered(gated)
        second = asyncio.create_task(score(scheduler, small))
        await asyncio.sleep(0.01)
        gated.gate.set()
        await second
        # One batch was under way when it came; the next one had it.
        assert scheduler.stats.num_passes <= 3
        assert not first.done()
        await first


async def test_equal_requests_finish_first_come_first_served(fbnl: FbnlBackend) -> None:
    order: list[int] = []
    async with running(fbnl, 800) as scheduler:
        pairs = make_pairs(fbnl, [20] * 30)
        await asyncio.gather(*(score(scheduler, pairs, lambda n=n: order.append(n)) for n in range(6)))
    assert order == sorted(order)


async def test_a_large_request_is_not_starved_by_a_stream_of_small_ones(gated) -> None:
    large, small = make_pairs(gated, [20] * 60), make_pairs(gated, [20] * 5)
    finished_small = 0
    async with running(gated, 10 * small[0].num_tokens) as scheduler:
        stop = asyncio.Event()

        async def client() -> None:
            nonlocal finished_small
            while not stop.is_set():
                await score(scheduler, small)
                finished_small += 1

        clients = [asyncio.create_task(client()) for _ in range(4)]  # always 20 small pairs: two batches' worth
        await asyncio.sleep(0.02)
        before = finished_small
        await asyncio.wait_for(score(scheduler, large), 20)
        stop.set()
        await asyncio.gather(*clients)
    # An equal share among five is twelve rounds of one small request each; give it twice that.
    assert finished_small - before <= 4 * 12 * 2


async def test_who_left_is_dropped_before_the_next_pass(gated) -> None:
    pairs = make_pairs(gated, [20] * 40)
    async with running(gated, 10 * pairs[0].num_tokens) as scheduler:
        gated.gate.clear()
        leaver = asyncio.create_task(score(scheduler, pairs))
        await entered(gated)
        leaver.cancel()
        await asyncio.wait([leaver])
        assert scheduler.stats.num_dropped_pairs == 30
        gated.gate.set()
        await score(scheduler, pairs[:1])
        assert sum(map(len, gated.passes)) == 10 + 1


async def test_pairs_past_their_deadline_are_never_computed(gated) -> None:
    pairs = make_pairs(gated, [20] * 30)
    async with running(gated, 10 * pairs[0].num_tokens) as scheduler:
        gated.gate.clear()
        with scheduler.queued(1.0, deadline=time.monotonic() + 3600) as queue:
            for pair in pairs:
                scheduler.submit(queue, [pair])
            await entered(gated)
            queue.deadline = time.monotonic()  # passes while the first pairs are computed
            gated.gate.set()
            await score(scheduler, pairs[:1])
            assert scheduler.stats.num_dropped_pairs == 20
            assert sum(map(len, gated.passes)) == 10 + 1


class RaisesOn:
    """A real backend that cannot bear pairs of one size, as a device short of memory."""

    listwise = False

    def __init__(self, real: FbnlBackend, size: int) -> None:
        self.real, self.size = real, size

    def score(self, pairs: Sequence[StatePair]) -> NDArray[np.float32]:
        if any(len(pair.states) == self.size for pair in pairs):
            raise RuntimeError("out of memory")
        return self.real.score(pairs)


async def test_a_pair_that_cannot_be_scored_costs_itself_only(fbnl: FbnlBackend) -> None:
    pairs = make_pairs(fbnl, [10, 13, 10])
    async with running(RaisesOn(fbnl, 13), 10_000) as scheduler:  # type: ignore[arg-type]  # all that the loop uses
        margins = await score(scheduler, pairs)
    assert margins[1] is None
    np.testing.assert_allclose([margins[0], margins[2]], fbnl.score([pairs[0], pairs[2]]), atol=1e-5)


async def test_states_that_are_not_finite_cost_their_pair_only(fbnl: FbnlBackend) -> None:
    pairs = make_pairs(fbnl, [10, 11, 12])
    pairs[1].states[3, 5] = np.inf
    async with running(fbnl, 10_000) as scheduler:
        margins = await score(scheduler, pairs)
    assert np.isfinite(margins).tolist() == [True, False, True]


def test_passes_hold_similar_lengths_and_lose_nothing(fbnl: FbnlBackend) -> None:
    pairs = make_pairs(fbnl, [4] * 200 + [2000] * 3)
    passes = split_by_length(pairs)
    assert sorted(i for one in passes for i in one) == list(range(len(pairs)))
    for rows in passes:
        one = [pairs[i] for i in rows]
        prompt, states = max(p.num_prompt_tokens for p in one), max(p.num_states for p in one)
        padded = len(one) * prompt * (prompt + states)
        real = sum(p.num_prompt_tokens * (p.num_prompt_tokens + p.num_states) for p in one)
        assert padded <= max(FREE_CELLS, MAX_PADDING * real)
    assert len(passes) == 2


def test_admission_says_when_to_come_back() -> None:
    counts = SchedulerStats(num_tokens=1000, compute_seconds=2.0)  # 500 tokens a second
    admission = Admission(counts, max_requests=2, max_tokens=10_000)
    # 256 expected passage tokens at ratio 4, and 36 of prompt: 100 a candidate.
    with admission.admit([(50, 4)], 36):
        says = "about 5000 tokens wait and this request has about 6000"
        with pytest.raises(Overloaded, match=says) as caught:
            admission.admit([(60, 4)], 36).__enter__()
        assert caught.value.retry_after_seconds == pytest.approx(1000 / 500)
        with admission.admit([(10, 4)], 36), pytest.raises(Overloaded, match="2 requests wait") as caught:
            admission.admit([(1, 4)], 36).__enter__()
        assert caught.value.retry_after_seconds == pytest.approx(3000 / 500)
    assert admission.num_tokens == 0
    # Larger than the whole queue, and nobody else there.
    with admission.admit([(500, 4)], 36) as place:
        place.finished(499)
        assert admission.num_tokens == pytest.approx(100)
    assert (admission.num_requests, admission.num_tokens) == (0, pytest.approx(0))


def test_the_rate_that_bounds_the_queue_follows_what_happened_of_late() -> None:
    """A calm hour does not let a flooded process promise what it cannot keep."""
    counts = SchedulerStats(num_tokens=3_600_000, compute_seconds=3600.0)
    assert counts.drain_rate == counts.tokens_per_second == 1000
    for _ in range(1000):
        counts.drained(100, 0.1)
    assert counts.drain_rate == pytest.approx(1000)
    for _ in range(200):  # as much a pass, half of the time spent on other things
        counts.drained(100, 0.2)
    assert counts.drain_rate == pytest.approx(500, rel=0.02)
    admission = Admission(counts, max_requests=10, max_tokens=1_000_000, max_seconds=2.0)
    with admission.admit([(1, 1)], 10), pytest.raises(Overloaded, match=f"the limit is {2 * counts.drain_rate:.0f}"):
        admission.admit([(3, 1)], 10).__enter__()


def test_admission_by_time_holds_what_the_measured_rate_reads_in_it() -> None:
    counts = SchedulerStats(num_tokens=1000, compute_seconds=1.0)  # 1000 tokens a second
    admission = Admission(counts, max_requests=10, max_tokens=1_000_000, max_seconds=2.0)
    each = 3 * (10 + 256)  # three passages of the first guess and their prompts: 798 tokens

    with admission.admit([(3, 1)], 10), admission.admit([(3, 1)], 10):
        with pytest.raises(Overloaded, match="the limit is 2000") as refused:
            admission.admit([(3, 1)], 10).__enter__()
        assert refused.value.retry_after_seconds == pytest.approx((3 * each - 2000) / 1000)
    counts.num_tokens = 10_000  # a faster machine lets more in
    with admission.admit([(3, 1)], 10), admission.admit([(3, 1)], 10), admission.admit([(3, 1)], 10):
        pass


class Ends:
    """A real backend whose second pass gives too few margins: a bug that ends the loop."""

    listwise = False

    def __init__(self, real: FbnlBackend) -> None:
        self.real = real

    def score(self, pairs: Sequence[StatePair]) -> NDArray[np.float32]:
        return self.real.score(pairs)[: 1 if len(pairs) == 1 else 0]


async def test_a_loop_that_ends_fails_what_waits_and_what_comes(fbnl: FbnlBackend) -> None:
    pairs = make_pairs(fbnl, [20] * 30)
    with ThreadPoolExecutor(1) as executor:
        scheduler = Scheduler(Ends(fbnl), executor, 10 * pairs[0].num_tokens)  # type: ignore[arg-type]
        loop = asyncio.create_task(scheduler.run())
        assert np.isfinite(await score(scheduler, pairs[:1])).all()
        waiting = [asyncio.create_task(score(scheduler, pairs)) for _ in range(3)]
        async with asyncio.timeout(10):
            for one in waiting:
                with pytest.raises(Unavailable, match="batching loop has ended"):
                    await one
        with pytest.raises(Unavailable, match="batching loop has ended"):
            await score(scheduler, pairs[:1])
        with pytest.raises(AssertionError):
            await loop
