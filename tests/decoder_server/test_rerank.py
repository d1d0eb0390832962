"""Laws of an answer, over real gRPC and the embedded store: scores, order, statuses, ratios, limits."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from cache.collection import Collection, StoredPassage
from cache.states import PassageStates, text_digest
from preread.v1 import common_pb2, rerank_pb2

HIT, MISSING = common_pb2.CANDIDATE_STATUS_HIT, common_pb2.CANDIDATE_STATUS_MISSING
TOO_LONG, FAILED = common_pb2.CANDIDATE_STATUS_TOO_LONG, common_pb2.CANDIDATE_STATUS_FAILED


async def test_scores_are_those_of_the_stored_states_scored_alone(serve, texts, by_hand) -> None:
    async with serve() as serving:
        answer = await serving.rerank(ids=texts)
        assert answer.num_scored == len(texts)
        for result in answer.results:
            assert result.status == HIT
            assert result.passage_id == f"p{result.index}"
            assert result.margin == pytest.approx(by_hand(texts[result.passage_id]), abs=1e-5)
            assert result.score == pytest.approx(1 / (1 + np.exp(-result.margin)), rel=1e-5)
        margins = [result.margin for result in answer.results]
        assert margins == sorted(margins, reverse=True)
        timings = answer.timings
        assert timings.total_seconds >= max(timings.fetch_seconds, timings.compute_seconds, timings.queue_seconds) > 0


async def test_concurrent_requests_of_many_queries_are_each_answered_as_alone(serve, texts, by_hand) -> None:
    async with serve(max_batch_tokens=1000) as serving:

        async def one(n: int) -> None:
            query, told = f"question {'word ' * n}", {"instruction": "Find it."} if n % 2 else {}
            ids = list(texts)[n : n + 1 + n % 7]
            answer = await serving.rerank(query=query, ids=ids, **told)
            for result in answer.results:
                alone = by_hand(texts[result.passage_id], query=query, **told)
                assert result.margin == pytest.approx(alone, abs=1e-5)

        await asyncio.gather(*(one(n) for n in range(40)))
        counts = serving.engine.scheduler.stats
        assert counts.num_passes < counts.num_pairs / 2
        assert serving.engine.admission.num_tokens == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ratio", [4, 8, 12, 32])
async def test_a_request_may_read_at_any_multiple_of_the_stored_ratio(serve, texts, by_hand, ratio: int) -> None:
    async with serve() as serving:
        answer = await serving.rerank(ids=["p1", "p2"], compression_ratio=ratio)
        for result in answer.results:
            assert result.compression_ratio == ratio
            assert result.margin == pytest.approx(by_hand(texts[result.passage_id], ratio), abs=1e-5)


async def test_a_bad_candidate_costs_itself_only(serve, texts) -> None:
    candidates = [
        rerank_pb2.Candidate(passage_id="p3"),
        rerank_pb2.Candidate(passage_id="nobody"),
        rerank_pb2.Candidate(text="never seen"),
        rerank_pb2.Candidate(text="x" * 5001),
        rerank_pb2.Candidate(text=""),
        rerank_pb2.Candidate(passage_id="i" * 600),
        rerank_pb2.Candidate(passage_id="p4", text=texts["p4"]),
        rerank_pb2.Candidate(passage_id="p5", text="not what was stored"),
        rerank_pb2.Candidate(passage_id="p6", text=""),
    ]
    async with serve(max_text_bytes=5000) as serving:
        answer = await serving.rerank(candidates=candidates, top_n=1)
        results = {result.index: result for result in answer.results}
        # One scored, for top_n; the unscored after it in request order.
        assert [result.index for result in answer.results][1:] == [1, 2, 3, 4, 5, 7]
        assert answer.num_scored == 3
        assert {i: results[i].status for i in (1, 2, 3, 4, 5, 7)} == {
            1: MISSING, 2: MISSING, 3: TOO_LONG, 4: FAILED, 5: MISSING, 7: MISSING,
        }  # fmt: skip
        assert "5001 bytes" in results[3].message
        assert "another text" in results[7].message
        assert not any(result.HasField("score") for result in answer.results[1:])
        alone = await serving.rerank(ids=["p3", "p4", "p6"])
        assert answer.results[0].margin == pytest.approx(alone.results[0].margin, abs=1e-5)


async def test_ties_keep_the_order_of_the_request(serve) -> None:
    async with serve() as serving:
        answer = await serving.rerank(ids=["p1", "p9", "p1", "p9", "p1"])
        best = answer.results[0].passage_id
        indexes = [result.index for result in answer.results]
        assert indexes == ([0, 2, 4, 1, 3] if best == "p1" else [1, 3, 0, 2, 4])


async def test_texts_come_back_when_asked_for(serve, texts) -> None:
    async with serve() as serving:
        answer = await serving.rerank(ids=["p1", "p2"], return_text=True, top_n=1)
        (result,) = answer.results
        assert result.text == texts[result.passage_id]
        assert not (await serving.rerank(ids=["p1"])).results[0].HasField("text")


async def test_a_stream_brings_what_the_unary_call_brings(serve, texts) -> None:
    ids = [*texts, "nobody"]
    async with serve(max_batch_tokens=600) as serving, asyncio.timeout(30):
        unary = await serving.rerank(ids=ids, return_text=True)
        call = serving.stub.RerankStream(
            rerank_pb2.RerankStreamRequest(
                request=rerank_pb2.RerankRequest(
                    query="what is read once?",
                    collection="docs",
                    candidates=[rerank_pb2.Candidate(passage_id=i) for i in ids],
                    return_text=True,
                )
            )
        )
        events = [event async for event in call]
        assert [event.WhichOneof("event") for event in events] == ["batch"] * (len(events) - 1) + ["summary"]
        assert len(events) > 3
        assert all(event.batch.results for event in events[:-1])
        streamed = {result.index: result for event in events for result in event.batch.results}
        assert len(streamed) == len(ids)
        for result in unary.results:
            other = streamed[result.index]
            assert other.margin == pytest.approx(result.margin, abs=1e-5)
            assert (other.status, other.text, other.num_states) == (result.status, result.text, result.num_states)
        assert events[-1].summary.num_scored == unary.num_scored


async def test_the_best_window_of_a_split_passage_counts(serve, store, encoding, texts, by_hand) -> None:
    windows = [encoding.encode(texts[i], 4) for i in ("p1", "p2", "p3")]
    states = PassageStates(
        np.concatenate([window.states for window in windows]),
        tuple(window.num_tokens for window in windows),
        4,
        False,
        text_digest("all three"),
    )
    Collection.open(store, "docs").put_many([StoredPassage("long", states, None)])
    async with serve() as serving:
        for ratio in (4, 8):
            (result,) = (await serving.rerank(ids=["long"], compression_ratio=ratio)).results
            assert result.margin == pytest.approx(max(by_hand(texts[i], ratio) for i in ("p1", "p2", "p3")), abs=1e-5)


async def test_on_miss_fail_refuses_the_whole_request(serve, refused, detail) -> None:
    async with serve() as serving:
        call = serving.rerank(ids=["p1", "nobody"], on_miss=common_pb2.ON_MISS_FAIL)
        error = await refused(call, grpc.StatusCode.FAILED_PRECONDITION)
        assert "candidates[1] ('nobody')" in error.details()
        assert detail(error, error_details_pb2.ErrorInfo).reason == "PASSAGE_MISSING"
        assert (await serving.rerank(ids=["p1"], on_miss=common_pb2.ON_MISS_FAIL)).num_scored == 1


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"query": ""}, "query", "not empty"),
        ({"query": "q" * 2001}, "query", "2001 bytes"),
        ({"ids": []}, "candidates", "1..50"),
        ({"ids": ["p1"] * 51}, "candidates", "51 of them"),
        ({"top_n": -1}, "top_n", "-1"),
        ({"compression_ratio": 6}, "compression_ratio", "multiple of 4"),
        ({"compression_ratio": -4}, "compression_ratio", "-4"),
        ({"instruction": "many words " * 60}, "instruction", "at most 100 tokens"),
        ({"collection": ""}, "collection", "candidate at index 0"),
        ({"candidates": [rerank_pb2.Candidate()]}, "candidates[0]", "passage_id"),
    ],
)
async def test_bad_input_names_field_value_and_expectation(
    serve, fields, field: str, says: str, refused, detail
) -> None:
    async with serve(max_query_bytes=2000, max_candidates=50, max_instruction_tokens=100) as serving:
        error = await refused(serving.rerank(**({"ids": ["p1"]} | fields)), grpc.StatusCode.INVALID_ARGUMENT)
        (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == field
        assert says in violation.description


async def test_an_instruction_at_its_limit_passes(serve) -> None:
    async with serve(max_instruction_tokens=100) as serving:
        instruction = "a" * 95  # one byte may be one token, never two
        assert (await serving.rerank(ids=["p1"], instruction=instruction)).num_scored == 1


async def test_unknown_names_are_not_found(serve, refused, detail) -> None:
    async with serve() as serving:
        error = await refused(serving.rerank(ids=["p1"], collection="other"), grpc.StatusCode.NOT_FOUND)
        assert detail(error, error_details_pb2.ResourceInfo).resource_name == "other"
        await refused(serving.rerank(ids=["p1"], collection="no such / name"), grpc.StatusCode.NOT_FOUND)
        error = await refused(serving.rerank(ids=["p1"], model="other"), grpc.StatusCode.NOT_FOUND)
        assert detail(error, error_details_pb2.ResourceInfo).resource_type == "model"
        assert "tiny" in error.details()


@pytest.mark.parametrize("query", ["word " * 1500, "word " * 100_000, "字" * 300_000])
async def test_a_query_over_the_limit_is_cut_and_told(serve, query: str) -> None:
    async with serve() as serving:
        answer = await serving.rerank(query=query, ids=["p1"])
        assert answer.query_truncated
        assert answer.num_query_tokens == 512
