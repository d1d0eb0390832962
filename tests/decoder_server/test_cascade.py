"""A cascade gives what the plain loop gives: the stages' margins, one order, and each candidate as far as it came."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from cache.collection import Collection, StoredPassage
from cache.states import PassageStates, text_digest
from decoder_server.engine.fetch import FetchedPassage
from decoder_server.engine.plan import Plan
from decoder_server.engine.request_run import CascadeState
from preread.v1 import common_pb2, rerank_pb2
from preread.values import Candidate, Result, Stage, parse_stages

QUERY = "what is read once?"


def stages(*pairs: tuple[int, int]) -> list[rerank_pb2.Stage]:
    return [rerank_pb2.Stage(compression_ratio=ratio, keep=keep) for ratio, keep in pairs]


def naive(candidates: list[str], plan: list[rerank_pb2.Stage], margin) -> list[tuple[int, list[float]]]:
    """Index and the margin of every stage, best first. `margin`: of a candidate at a ratio."""
    going, order = list(range(len(candidates))), []
    margins: dict[int, list[float]] = {i: [] for i in going}
    for n, stage in enumerate(plan):
        for i in going:
            margins[i].append(margin(candidates[i], stage.compression_ratio))
        ranking = sorted(going, key=lambda i: (-margins[i][-1], i))
        keep = len(ranking) if n == len(plan) - 1 else stage.keep
        order = ranking[keep:] + order
        going = ranking[:keep]
    return [(i, margins[i]) for i in going + order]


def check(answer: rerank_pb2.RerankResponse, expected: list[tuple[int, list[float]]], plan) -> None:
    assert [result.index for result in answer.results] == [index for index, _ in expected]
    for result, (_, margins) in zip(answer.results, expected, strict=True):
        assert [s.margin for s in result.stages] == pytest.approx(margins, abs=1e-5)
        assert [s.compression_ratio for s in result.stages] == [s.compression_ratio for s in plan][: len(margins)]
        last = result.stages[-1]
        assert (result.margin, result.score) == (last.margin, last.score)
        assert (result.compression_ratio, result.num_states) == (last.compression_ratio, last.num_states)
    assert list(answer.stages) == plan
    assert (answer.compression_ratio, answer.stopped_early) == (0, False)


@pytest.mark.parametrize(
    "pairs",
    [
        [(32, 20), (8, 5), (4, 2)],
        [(16, 1), (4, 0)],
        [(12, 30), (8, 30), (4, 0)],  # 12 is no multiple of 8: states are fetched at 4
        [(32, 1000), (4, 7)],  # more may go on than there are
        [(8, 0)],
    ],
)
async def test_order_and_margins_are_those_of_the_plain_loop(serve, texts, by_hand, pairs) -> None:
    plan = stages(*pairs)
    async with serve(max_batch_tokens=1000) as serving:
        answer = await serving.rerank(ids=texts, stages=plan)
        expected = naive(list(texts), plan, lambda i, ratio: by_hand(texts[i], ratio))
        check(answer, expected, plan)
        assert answer.num_scored == len(texts)
        best = await serving.rerank(ids=texts, stages=plan, top_n=3)
        assert [result.index for result in best.results] == [index for index, _ in expected[:3]]


async def test_requests_at_several_ratios_share_passes(serve, gated, texts, by_hand) -> None:
    async with serve(backend=gated) as serving:
        gated.gate.clear()
        first = asyncio.create_task(serving.rerank(ids=["p1"]))
        await gated.wait_entered()
        ratios = [4, 8, 12, 16, 32] * 2
        asked = [asyncio.create_task(serving.rerank(ids=["p2", "p3"], compression_ratio=ratio)) for ratio in ratios]
        while serving.engine.admission.num_requests < 11:
            await asyncio.sleep(0.001)
        while sum(len(queue.waiting) for queue in serving.engine.scheduler.queues) < 20:
            await asyncio.sleep(0.001)
        gated.gate.set()
        await first
        for ratio, answer in zip(ratios, await asyncio.gather(*asked), strict=True):
            assert answer.compression_ratio == ratio
            for result in answer.results:
                assert result.margin == pytest.approx(by_hand(texts[result.passage_id], ratio), abs=1e-5)
        assert len(gated.passes) - 1 < len(ratios)


async def test_concurrent_cascades_share_passes_and_are_each_answered_as_alone(serve, texts, by_hand) -> None:
    plans = [stages((32, 10), (4, 3)), stages((16, 12), (8, 6), (4, 0)), stages((8, 0))]
    async with serve(max_batch_tokens=4000) as serving:

        async def one(n: int) -> None:
            ids, plan = list(texts)[n : n + 20], plans[n % 3]
            if n % 4 == 3:
                answer = await serving.rerank(query=f"question {n}", ids=ids, compression_ratio=16)
                assert {result.compression_ratio for result in answer.results} == {answer.compression_ratio} == {16}
                return
            answer = await serving.rerank(query=f"question {n}", ids=ids, stages=plan)
            expected = naive(ids, plan, lambda i, ratio: by_hand(texts[i], ratio, query=f"question {n}"))
            check(answer, expected, plan)

        await asyncio.gather(*(one(n) for n in range(24)))
        counts = serving.engine.scheduler.stats
        assert counts.num_passes < counts.num_pairs / 5
        assert serving.engine.admission.num_tokens == pytest.approx(0, abs=1e-6)
        assert serving.engine.admission.num_requests == 0


async def test_windows_ties_and_candidates_without_states(serve, store, encoding, texts, by_hand) -> None:
    windows = [encoding.encode(texts[i], 4) for i in ("p1", "p2", "p3")]
    states = np.concatenate([window.states for window in windows])
    counts = tuple(window.num_tokens for window in windows)
    long = PassageStates(states, counts, 4, False, text_digest("all three"))
    same = encoding.encode(texts["p4"], 4)
    Collection.open(store, "docs").put_many(
        [StoredPassage("long", long, None), *(StoredPassage(f"same{i}", same, None) for i in range(3))]
    )

    def margin(name: str, ratio: int) -> float:
        windows = ("p1", "p2", "p3") if name == "long" else ("p4",) if name.startswith("same") else (name,)
        return max(by_hand(texts[i], ratio) for i in windows)

    ids = ["nobody", "same2", "p9", "long", "same0", "nowhere", "p4", "same1"]
    plan = stages((16, 4), (8, 4), (4, 1))
    async with serve() as serving:
        answer = await serving.rerank(ids=ids, stages=plan)
        scored = [result for result in answer.results if result.HasField("margin")]
        others = [result for result in answer.results if not result.HasField("margin")]
        assert [(result.index, result.status) for result in others] == [
            (0, common_pb2.CANDIDATE_STATUS_MISSING),
            (5, common_pb2.CANDIDATE_STATUS_MISSING),
        ]
        found = [i for i in ids if i not in ("nobody", "nowhere")]
        expected = naive(found, plan, margin)

        # Equal states tie up to rounding: on some processors a row's place in a pass moves its last bit.
        def text(name: str) -> str:
            return "p4" if name.startswith("same") else name

        assert [text(result.passage_id) for result in scored] == [text(found[i]) for i, _ in expected]
        for result, (_, margins) in zip(scored, expected, strict=True):
            assert [s.margin for s in result.stages] == pytest.approx(margins, abs=1e-5)


async def test_a_passage_named_twice_is_read_once_and_takes_one_place(serve) -> None:
    async with serve() as serving:
        answer = await serving.rerank(ids=["p1", "p9", "p1", "p5"], stages=stages((16, 2), (4, 0)))
        reached = {}
        for result in answer.results:
            reached.setdefault(result.passage_id, set()).add(len(result.stages))
        assert sorted(map(tuple, reached.values())) == [(1,), (2,), (2,)]
        assert serving.engine.scheduler.stats.num_pairs == 3 + 2


async def test_a_stream_brings_each_candidate_once_as_far_as_it_came(serve, texts) -> None:
    plan = stages((32, 9), (8, 4), (4, 0))
    async with serve(max_batch_tokens=600) as serving, asyncio.timeout(30):
        unary = await serving.rerank(ids=[*texts, "nobody"], stages=plan)
        request = rerank_pb2.RerankRequest(
            query=QUERY,
            collection="docs",
            stages=plan,
            candidates=[rerank_pb2.Candidate(passage_id=i) for i in [*texts, "nobody"]],
        )
        events = [event async for event in serving.stub.RerankStream(rerank_pb2.RerankStreamRequest(request=request))]
        results = [result for event in events[:-1] for result in event.batch.results]
        streamed = {result.index: result for result in results}
        assert len(results) == len(streamed) == len(unary.results)
        for result in unary.results:
            assert [s.margin for s in streamed[result.index].stages] == pytest.approx(
                [s.margin for s in result.stages], abs=1e-5
            )
        # Those that fall out early come before those that go on.
        assert len(results[0].stages) <= 1
        assert len(results[-1].stages) == 3
        assert list(events[-1].summary.stages) == plan


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"stages": stages((8, 5), (8, 1))}, "stages[1].compression_ratio", "less than 8"),
        ({"stages": stages((8, 0), (4, 0))}, "stages[0].keep", "1 or more"),
        ({"stages": stages((8, 5), (4, 6))}, "stages[1].keep", "at most 5"),
        ({"stages": stages((-8, 5), (4, 1))}, "stages[0].compression_ratio", "1 or more"),
        ({"stages": stages(*((2 ** (12 - i), 1) for i in range(9)))}, "stages", "1..8"),
        ({"stages": stages((8, 5)), "compression_ratio": 8}, "compression_ratio", "stages"),
    ],
)
async def test_bad_stages_name_field_value_and_expectation(
    serve, fields, field: str, says: str, refused, detail
) -> None:
    async with serve() as serving:
        error = await refused(serving.rerank(ids=["p1"], **fields), grpc.StatusCode.INVALID_ARGUMENT)
        (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == field
        assert says in violation.description


async def test_served_defaults_are_read_where_a_request_says_nothing(serve, texts) -> None:
    async with serve(read_ratio=16) as serving:
        answer = await serving.rerank(ids=["p1", "p2"])
        assert {result.compression_ratio for result in answer.results} == {answer.compression_ratio} == {16}
        assert (await serving.rerank(ids=["p1"], compression_ratio=8)).compression_ratio == 8
    async with serve(read_ratio=2) as serving:  # stored at 4: that is the finest there is
        assert (await serving.rerank(ids=["p1"])).compression_ratio == 4
    async with serve(stages=(Stage(32, 3), Stage(4))) as serving:
        answer = await serving.rerank(ids=list(texts)[:6])
        assert list(answer.stages) == stages((32, 3), (4, 0))
        assert not (await serving.rerank(ids=["p1"], compression_ratio=8)).stages


@pytest.mark.parametrize(
    ("planned", "used"),  # of a collection stored at 4
    [
        ("32:3, 4:2, 1", "32:3, 4"),
        ("32:3, 8:2, 4", "32:3, 8:2, 4"),
        ("6:3, 5:2, 1:1", "8:2, 4:1"),  # 6 and 5 both become 8
        ("3:3, 2:2, 1", "4"),
        ("2147483647:3, 1", "2147483644:3, 4"),  # no message holds the next multiple
    ],
)
async def test_one_cascade_means_the_same_in_a_request_and_as_the_default(serve, texts, planned, used) -> None:
    """Every ratio goes to the next that the collection can give, and of equal ones the later one stays."""
    ids, used = list(texts)[:6], [(one.compression_ratio, one.keep) for one in parse_stages(used)]
    async with serve() as serving, serve(stages=parse_stages(planned)) as by_default:
        asked = stages(*((one.compression_ratio, one.keep) for one in parse_stages(planned)))
        answer, default = await serving.rerank(ids=ids, stages=asked), await by_default.rerank(ids=ids)
        assert list(answer.stages) == list(default.stages) == stages(*used)
        assert list(answer.results) == list(default.results)
        assert list(answer.results) == list((await serving.rerank(ids=ids, stages=answer.stages)).results)
        # Texts that come with a request are encoded as asked: nothing is stored that could not give it.
        assert list((await serving.rerank(ids=[], inline=["a text"], collection="", stages=asked)).stages) == asked


async def test_a_deadline_cuts_and_what_is_finished_comes_marked(serve, gated, texts, by_hand) -> None:
    plan = stages((16, 10), (4, 0))
    score = gated.score

    def score_and_hold(pairs):
        margins = score(pairs)
        if any(len(pair.states) > 24 for pair in pairs):  # more than any passage has at 16
            gated.gate.clear()
        return margins

    gated.score = score_and_hold
    async with serve(backend=gated, max_batch_tokens=300) as serving:
        ids = sorted(texts, key=lambda i: -len(texts[i]))[:30]
        answer = await serving.rerank(ids=ids, stages=plan, timeout=3)
        assert answer.stopped_early
        assert list(answer.stages) == plan
        reached = [len(result.stages) for result in answer.results]
        assert reached == sorted(reached, reverse=True)
        assert 0 < reached.count(2) < 10
        assert answer.num_scored == len(ids)
        for result in answer.results:
            for stage in result.stages:
                alone = by_hand(texts[result.passage_id], stage.compression_ratio)
                assert stage.margin == pytest.approx(alone, abs=1e-5)
        assert serving.engine.admission.num_requests == 0


def outcome(index: int, margin: float | None, ratio: int = 4) -> tuple[FetchedPassage, Result]:
    status, message = ("failed", "bad") if margin is None else ("hit", "")
    result = Result(index, "", status, margin, margin, message=message, compression_ratio=ratio)
    return FetchedPassage(index, str(index), "hit", str(index)), result


@pytest.mark.parametrize("seed", range(20))
def test_a_top_holds_the_best_and_lets_the_rest_go_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    margins = rng.integers(-3, 3, 30).astype(float)  # with ties
    keep = int(rng.integers(1, 35))
    cascade, out = held(30, keep), set()
    for n, index in enumerate(rng.permutation(30).tolist(), 1):
        out |= {one.index for one in cascade.settle([outcome(index, margins[index], 8)])}
        assert len(out) == max(0, n - keep)
    ranking = sorted(range(30), key=lambda i: (-margins[i], i))
    assert [one.index for one in cascade.advance()] == ranking[:keep]
    assert out == set(ranking[keep:])


def held(num_candidates: int, keep: int = 2) -> CascadeState:
    """A cascade of two stages, of which the second reads `keep`."""
    return CascadeState(Plan((Stage(8, keep), Stage(4)), cascade=True), range(num_candidates))


def test_a_finer_reading_that_failed_leaves_what_the_coarser_said() -> None:
    cascade = held(3)
    settled = cascade.settle([outcome(i, margin, 8) for i, margin in enumerate([1.0, None, 3.0])])
    assert [(one.index, one.margin) for one in settled] == [(1, None)]
    assert len(cascade.advance()) == 2
    first, second = cascade.settle([outcome(2, None), outcome(0, -1.0)])
    assert (first.index, first.margin, first.status, first.message, len(first.stages)) == (2, 3.0, "hit", "bad", 1)
    assert (second.index, second.margin, len(second.stages)) == (0, -1.0, 2)
    assert not cascade.owed
    assert cascade.advance() == []


def test_a_cascade_that_is_stopped_settles_everyone_once() -> None:
    cascade = held(5)
    settled = cascade.settle([outcome(i, float(i), 8) for i in range(4)])
    stopped = cascade.stop([Candidate(str(i)) for i in range(5)])
    assert sorted(one.index for one in [*settled, *stopped]) == [0, 1, 2, 3, 4]
    assert [one.message for one in stopped if one.margin is None] == ["the deadline came before it was scored"]
    assert not cascade.owed
    assert cascade.advance() == []
