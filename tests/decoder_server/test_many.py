"""Several queries in one call: each is answered as alone, a passage is read once, others see one request."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

import grpc
import numpy as np
import pytest
import redis
from google.rpc import error_details_pb2

from benchmarks.synthetic import make_cross_encoder
from cache.collection import Collection, StoredPassage
from cache.open import open_store
from cache.states import PassageStates, text_digest
from decoder_server.config import KvCacheConfig
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from preread.v1 import common_pb2, rerank_pb2
from preread.values import MAX_QUERIES

QUERIES = ["what is read once?", "gravity", "what is read once?", "which bodies does gravity attract " * 12, "no"]
PLENTY = KvCacheConfig(max_keys_bytes=1 << 26, max_prefix_bytes=1 << 26)


async def many(serving, queries: Sequence[str], *, timeout: float = 60, **fields) -> list[rerank_pb2.RerankResponse]:
    request = rerank_pb2.RerankManyRequest(request=asked(**fields), queries=queries)
    answers = [answer async for answer in serving.stub.RerankMany(request, timeout=timeout)]
    assert [answer.index for answer in answers] == list(range(len(queries)))
    return [answer.response for answer in answers]


def asked(ids: Sequence[str] = (), **fields: object) -> rerank_pb2.RerankRequest:
    candidates = [rerank_pb2.Candidate(passage_id=i) for i in ids]
    return rerank_pb2.RerankRequest(**{"collection": "docs", "candidates": candidates} | fields)


def check_same(answer: rerank_pb2.RerankResponse, alone: rerank_pb2.RerankResponse) -> None:
    """All but times and the last digits of margins; candidates whose margins are that close may change places."""
    found, expected = ({one.index: one for one in answer.results} for answer in (answer, alone))
    assert found.keys() == expected.keys()
    for index, one in found.items():
        other = expected[index]
        assert one.margin == pytest.approx(other.margin, abs=1e-5)
        assert one.score == pytest.approx(other.score, abs=1e-5)
        scores = [stage.margin for stage in other.stages]
        assert [stage.margin for stage in one.stages] == pytest.approx(scores, abs=1e-5)
        for result in (one, other):
            for scored in (result, *result.stages):
                scored.ClearField("margin")
                scored.ClearField("score")
        assert one == other
    for response in (answer, alone):
        response.ClearField("timings")
        response.ClearField("results")
    assert answer == alone


async def check_as_alone(serving, queries: Sequence[str] = QUERIES, **fields: object) -> None:
    answers = await many(serving, queries, **fields)
    for query, answer in zip(queries, answers, strict=True):
        margins = [(-len(one.stages), -one.margin) for one in answer.results if one.HasField("margin")]
        assert margins == sorted(margins)
        check_same(answer, await serving.stub.Rerank(asked(query=query, **fields), timeout=60))


def candidates_of_every_kind(texts) -> list[rerank_pb2.Candidate]:
    return [
        *(rerank_pb2.Candidate(passage_id=i) for i in [*texts, "p7", "absent", "split", "p7"]),
        rerank_pb2.Candidate(text="never seen"),
        rerank_pb2.Candidate(text=texts["p9"]),
        rerank_pb2.Candidate(passage_id="p3", text="not what was stored"),
        rerank_pb2.Candidate(text=""),
    ]


@pytest.fixture
def split(store, encoding, texts) -> None:
    """A passage of three windows in the collection."""
    windows = [encoding.encode(texts[i], 4) for i in ("p1", "p2", "p3")]
    states, lengths = np.concatenate([one.states for one in windows]), tuple(one.num_tokens for one in windows)
    passage = PassageStates(states, lengths, 4, False, text_digest("all three"))
    Collection.open(store, "docs").put_many([StoredPassage("split", passage, None)])


@pytest.mark.parametrize("caches", ["off", "on", "hot"])
@pytest.mark.parametrize("max_batch_tokens", [None, 500])
async def test_each_query_is_answered_as_alone(
    serve, split, fbnl, texts, caches: str, max_batch_tokens: int | None
) -> None:
    """500 tokens are fewer than the queries over one passage have."""
    backend = fbnl if caches == "off" else fbnl.with_caches(PLENTY)
    candidates = candidates_of_every_kind(texts)
    async with serve(backend=backend, max_batch_tokens=max_batch_tokens) as serving:
        if caches == "hot":
            await many(serving, QUERIES, candidates=candidates)
        for fields in ({}, {"top_n": 3}, {"return_text": True, "top_n": 2}, {"compression_ratio": 8}):
            await check_as_alone(serving, candidates=candidates, **fields)
        assert serving.engine.admission.num_tokens == pytest.approx(0, abs=1e-6)
        assert not serving.engine.scheduler.queues


@pytest.mark.parametrize("pairs", [[(32, 20), (8, 5), (4, 2)], [(16, 1), (4, 0)], [(32, 1000), (4, 7)], [(8, 0)]])
async def test_each_query_keeps_its_own_best_in_a_cascade(serve, texts, pairs) -> None:
    stages = [rerank_pb2.Stage(compression_ratio=ratio, keep=keep) for ratio, keep in pairs]
    async with serve(max_batch_tokens=1000) as serving:
        await check_as_alone(serving, ids=[*texts, "absent", "p1"], stages=stages)
        assert serving.engine.admission.num_tokens == pytest.approx(0, abs=1e-6)


async def test_a_damaged_passage_costs_itself_only(serve, encoding, texts, redis_server) -> None:
    store = open_store(redis_server.url)
    encoding.fill(store, "docs", {i: texts[i] for i in ("p1", "p2", "p3")})
    with redis.Redis.from_url(redis_server.url) as client:
        key = next(key for key in client.scan_iter() if b"docs" in key and key.endswith(b"p2"))
        client.set(key, client.get(key)[:-1] + b"?")
    async with serve(over=store) as serving:
        for answer in await many(serving, QUERIES, ids=["p1", "p2", "p3"]):
            statuses = {one.passage_id: one.status for one in answer.results}
            assert statuses["p2"] == common_pb2.CANDIDATE_STATUS_CORRUPT
            assert answer.num_scored == 2
    store.close()


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "JinaForRanking"])
async def test_a_model_that_reads_text_takes_one_query_after_the_other(serve, tmp_path, texts, kind: str) -> None:
    """The second is listwise: a score depends on all candidates of a request, and on no other query."""
    profile = {"JinaForRanking": "jinaai/jina-reranker-v3"}.get(kind)
    directory = make_cross_encoder(tmp_path / "cross", kind)
    backend = open_cross_encoder(directory, device="cpu", dtype="float32", profile=profile)
    assert backend.listwise is (profile is not None)
    candidates = [rerank_pb2.Candidate(passage_id=i) for i in ("p1", "p2", "absent", "p1")]
    candidates += [rerank_pb2.Candidate(text="a text"), rerank_pb2.Candidate(text="")]
    async with serve(backend=backend) as serving:
        await check_as_alone(serving, QUERIES[:3], candidates=candidates, top_n=2)


async def test_a_passage_is_fetched_once_and_in_one_pass(serve, gated, texts) -> None:
    async with serve(backend=gated) as serving:
        gated.passes.clear()
        await many(serving, [f"query {i}" for i in range(32)], ids=texts)
        assert sum(map(len, gated.passes)) == 32 * len(texts)
        passes = Counter(key for batch in gated.passes for key in {pair.key for pair in batch})
        assert len(passes) == len(texts)
        assert set(passes.values()) == {1}
        sample = serving.server.metrics.registry.get_sample_value
        assert sample("preread_cache_misses_total", {"tier": "store"}) == len(texts)
        assert sample("preread_cache_hits_total", {"tier": "store"}) == 0


async def test_a_single_request_overtakes_a_call_of_many(serve, gated, texts) -> None:
    """It ranks by its tokens, like any request; one batch of the call was in the model when the other came."""
    async with serve(backend=gated, max_batch_tokens=2000) as serving:
        gated.gate.clear()
        call = asyncio.create_task(many(serving, [f"query {i}" for i in range(32)], ids=texts))
        await gated.wait_entered()
        other = asyncio.create_task(serving.rerank(ids=["p1"]))
        while len(serving.engine.scheduler.queues) < 2 or not serving.engine.scheduler.queues[0].num_tokens:
            await asyncio.sleep(0.001)
        gated.gate.set()
        await other
        assert len(gated.passes) <= 3
        assert not call.done()
        assert all(answer.num_scored == len(texts) for answer in await call)


async def test_admission_counts_the_tokens_of_every_query(serve, gated, refused, texts) -> None:
    async with serve(backend=gated, max_queue_tokens=20_000) as serving:
        gated.gate.clear()
        first = asyncio.create_task(serving.rerank(ids=["p1"]))
        await gated.wait_entered()
        await refused(many(serving, [f"query {i}" for i in range(32)], ids=texts), grpc.StatusCode.RESOURCE_EXHAUSTED)
        second = asyncio.create_task(many(serving, ["query 1"], ids=texts))
        gated.gate.set()
        await first
        await second


@pytest.mark.parametrize("leaves", [True, False])
async def test_pairs_of_a_caller_who_left_or_is_late_are_dropped(serve, gated, refused, texts, leaves: bool) -> None:
    async with serve(backend=gated, max_batch_tokens=1000) as serving:
        gated.gate.clear()
        call = asyncio.create_task(many(serving, QUERIES, ids=texts, timeout=60 if leaves else 0.3))
        await gated.wait_entered()
        if leaves:
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        else:
            await refused(call, grpc.StatusCode.DEADLINE_EXCEEDED)
        while serving.engine.scheduler.queues:
            await asyncio.sleep(0.001)
        gated.gate.set()
        await serving.rerank(ids=["p1"])
        assert len(gated.passes) <= 3
        assert serving.engine.scheduler.stats.num_dropped_pairs > 0
        assert serving.engine.admission.num_tokens == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("queries", "fields", "field", "says"),
    [
        ([], {}, "queries", f"'0 of them'; expected 1..{MAX_QUERIES}"),
        (["q"] * (MAX_QUERIES + 1), {}, "queries", f"'{MAX_QUERIES + 1} of them'; expected 1..{MAX_QUERIES}"),
        (["fine", "", "fine"], {}, "queries[1]", "not empty"),
        (["fine", "q" * 2001], {}, "queries[1]", "2001 bytes"),
        (["fine"], {"query": "one"}, "request.query", "'one'; expected none"),
        (["fine"], {"ids": []}, "candidates", "1..50"),
        (["fine"], {"ids": ["p1"] * 51}, "candidates", "51 of them"),
        (["fine"], {"compression_ratio": 6}, "compression_ratio", "multiple of 4"),
        (["fine"] * 9, {"ids": ["p1", "p2"]}, "tokens of the request", "candidates and queries"),
    ],
)
async def test_bad_input_names_field_value_and_expectation(
    serve, refused, detail, queries, fields, field: str, says: str
) -> None:
    async with serve(max_query_bytes=2000, max_candidates=50, max_request_tokens=1000) as serving:
        error = await refused(many(serving, queries, **({"ids": ["p1"]} | fields)), grpc.StatusCode.INVALID_ARGUMENT)
        (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == field
        assert says in violation.description


async def test_a_missing_passage_fails_the_call_where_it_is_to(serve, refused) -> None:
    async with serve() as serving:
        call = many(serving, QUERIES, ids=["p1", "absent"], on_miss=common_pb2.ON_MISS_FAIL)
        assert "candidates[1] ('absent')" in (await refused(call, grpc.StatusCode.FAILED_PRECONDITION)).details()


async def test_the_call_as_a_whole_is_degraded(serve, gated, texts) -> None:
    async with serve(backend=gated, degrade=True, max_queue_tokens=100_000, degrade_queue_share=0.1) as serving:
        await serving.rerank(ids=["p1"])
        gated.gate.clear()
        gated.entered.clear()
        first = asyncio.create_task(serving.rerank(ids=["p1"]))
        await gated.wait_entered()
        call = asyncio.create_task(many(serving, QUERIES, ids=texts))
        await asyncio.sleep(0.1)
        gated.gate.set()
        await first
        answers = await call
    assert {answer.degraded.reason for answer in answers} == {"queue"}
    assert len({answer.compression_ratio for answer in answers}) == 1
    assert answers[0].compression_ratio > 4


async def test_one_record_of_the_call_counts_all_of_it(serve, texts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve() as serving:
        await many(serving, QUERIES, ids=["p1", "p2", "absent"])
        sample = serving.server.metrics.registry.get_sample_value
        assert sample("preread_requests_total", {"model": "tiny", "code": "ok"}) == 1
        assert sample("preread_candidates_total", {"model": "tiny", "status": "hit"}) == 2 * len(QUERIES)
        assert sample("preread_candidates_total", {"model": "tiny", "status": "missing"}) == len(QUERIES)
    (line,) = (record for record in caplog.records if record.getMessage() == "rerank_many")
    said = line.fields
    assert (said["num_queries"], said["num_candidates"], said["num_hit"]) == (len(QUERIES), 3, 2 * len(QUERIES))
