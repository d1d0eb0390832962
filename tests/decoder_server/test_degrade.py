"""Coarser only under pressure, only as far as needed, and told in the answer, the metrics and the log."""

from __future__ import annotations

import asyncio
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from decoder_server.engine import admission
from decoder_server.engine.plan import Plan
from decoder_server.engine.scheduler import SchedulerStats
from preread.v1 import rerank_pb2
from preread.values import Degraded, Stage, format_stages


@pytest.mark.parametrize(
    ("plan", "ratios"),
    [
        (Plan((Stage(4),)), ["4", "8", "16", "32"]),
        (Plan((Stage(12),)), ["12", "24"]),
        (Plan((Stage(32),)), ["32"]),
        (Plan((Stage(40),)), ["40"]),
        (Plan((Stage(0),)), ["0"]),  # text
        (
            Plan((Stage(16, 50), Stage(8, 9), Stage(4)), cascade=True),
            ["16:50,8:9,4", "16:50,8:9", "16:50", "32"],
        ),
    ],
)
def test_options_are_multiples_and_ever_coarser(plan: Plan, ratios: list[str]) -> None:
    found = plan.coarser()
    assert [format_stages(one.stages) for one in found] == ratios
    assert {one.cascade for one in found} == {plan.cascade}


# Tokens of each option, which take a hundredth as many seconds.
COSTS = [800, 400, 200, 100]


@pytest.mark.parametrize(
    ("seconds_left", "queued", "limit", "chosen", "reason"),
    [
        (None, 0, 0, 0, ""),  # nobody waits and nothing presses
        (None, 1, 801, 0, ""),
        (None, 1, 800, 1, "queue"),
        (None, 700, 800, 3, "queue"),
        (None, 900, 800, 3, "queue"),  # nothing would do: the least there is
        (10.0, 0, 0, 0, ""),
        (9.9, 0, 0, 1, "deadline"),
        (2.5, 0, 0, 2, "deadline"),
        (0.1, 0, 0, 3, "deadline"),
        (-1.0, 0, 0, 3, "deadline"),
        (5.0, 700, 900, 2, "queue"),  # the tighter of the two
        (1.25, 700, 900, 3, "deadline"),
    ],
)
def test_the_finest_option_that_both_pressures_let_pass(
    monkeypatch: pytest.MonkeyPatch, seconds_left, queued: int, limit: int, chosen: int, reason: str
) -> None:
    now = 100.0
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(admission, "FIRST_PASSAGE_TOKENS", 32.0)
    # A hundred states a second, and none that have to be waited for.
    stats = SimpleNamespace(knows_pass_time=True, drain_rate=math.inf, pass_seconds=lambda prompt, states: states / 100)
    queue = admission.Admission(stats, max_requests=2, max_tokens=1024)
    plan, deadline = Plan((Stage(4),)), None if seconds_left is None else now + seconds_left
    with queue.admit([(queued, 32)], 0) if queued else nullcontext():
        found, degraded = queue.degrade(plan, 100, 0, deadline, limit / 1024)
    assert found == plan.coarser()[chosen]
    assert sum(num * 32 / ratio for num, ratio in found.reads(100)) == COSTS[chosen]
    assert degraded == (Degraded(reason, 4, ()) if chosen else None)


def test_a_times_tells_prompt_tokens_from_states() -> None:
    rng, times = np.random.default_rng(3), SchedulerStats()
    assert not times.knows_pass_time
    assert times.pass_seconds(100, 100) == 0
    for _ in range(200):
        prompt, states = rng.integers(500, 3000), rng.integers(100, 4000)
        times.learn(int(prompt), int(states), float(1e-4 * prompt + 1e-5 * states) * rng.uniform(0.95, 1.05))
    assert times.pass_seconds(1000, 0) == pytest.approx(0.1, rel=0.1)
    assert times.pass_seconds(0, 1000) == pytest.approx(0.01, rel=0.3)


def test_a_times_without_variety_has_one_rate_for_both() -> None:
    times = SchedulerStats()
    for _ in range(5):
        times.learn(1000, 1000, 0.2)
    assert times.pass_seconds(1, 0) == pytest.approx(1e-4, rel=0.01)
    assert times.pass_seconds(0, 1) == pytest.approx(1e-4, rel=0.01)


def test_a_times_is_never_negative() -> None:
    rng, times = np.random.default_rng(4), SchedulerStats()
    for _ in range(50):
        times.learn(int(rng.integers(1, 100)), int(rng.integers(1, 100)), float(rng.uniform(0.0, 1.0)))
        assert times.pass_seconds(1, 0) >= 0
        assert times.pass_seconds(0, 1) >= 0


def counted(serving, name: str) -> dict[tuple[str, ...], float]:
    from prometheus_client import generate_latest

    families = text_string_to_metric_families(generate_latest(serving.server.metrics.registry).decode())
    return {
        tuple(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


async def test_a_full_queue_is_read_coarser_and_everyone_is_told(serve, gated, texts, by_hand) -> None:
    async with serve(backend=gated, degrade=True, degrade_queue_share=0.0) as serving:
        alone = await serving.rerank(ids=["p1", "p2"])  # no pass before, nobody beside
        assert not alone.HasField("degraded")
        gated.gate.clear()
        gated.entered.clear()
        first = asyncio.create_task(serving.rerank(ids=["p3"]))
        await gated.wait_entered()
        plain_one = asyncio.create_task(serving.rerank(ids=["p1", "p2"], compression_ratio=8))
        staged = [rerank_pb2.Stage(compression_ratio=16, keep=2), rerank_pb2.Stage(compression_ratio=4)]
        cascade = asyncio.create_task(serving.rerank(ids=["p1", "p2", "p3"], stages=staged))
        while serving.engine.admission.num_requests < 3:
            await asyncio.sleep(0.001)
        gated.gate.set()
        assert not (await first).HasField("degraded")
        answer = await plain_one
        assert (answer.degraded.reason, answer.degraded.compression_ratio) == ("queue", 8)
        assert {result.compression_ratio for result in answer.results} == {answer.compression_ratio} == {32}
        for result in answer.results:
            assert result.margin == pytest.approx(by_hand(texts[result.passage_id], 32), abs=1e-5)
        answer = await cascade
        assert (answer.degraded.reason, list(answer.degraded.stages)) == ("queue", staged)
        assert [[s.compression_ratio for s in result.stages] for result in answer.results] == [[32]] * 3
        assert counted(serving, "preread_degraded_requests_total") == {("tiny", "queue"): 2}


async def test_a_deadline_that_would_be_missed_is_met_coarser(serve, gated) -> None:
    gated.seconds_per_pass = 0.3
    async with serve(backend=gated, degrade=True, max_batch_tokens=150) as serving:
        await serving.rerank(ids=["p1", "p2"])
        ids = [f"p{i}" for i in range(12)]
        with_time = await serving.rerank(ids=ids)
        assert not with_time.HasField("degraded")
        seconds = with_time.timings.total_seconds
        gated.seconds_per_pass = 0.0
        answer = await serving.rerank(ids=ids, timeout=seconds)
        assert answer.degraded.reason == "deadline"
        assert answer.degraded.compression_ratio == 4
        assert answer.compression_ratio > 4
        assert counted(serving, "preread_degraded_requests_total") == {("tiny", "deadline"): 1}


async def test_without_the_flag_nothing_is_read_coarser(serve, gated) -> None:
    async with serve(backend=gated, degrade_queue_share=0.0) as serving:
        answers = await asyncio.gather(*(serving.rerank(ids=["p1", "p2"]) for _ in range(5)))
        assert {answer.compression_ratio for answer in answers} == {4}
        assert not any(answer.HasField("degraded") for answer in answers)
