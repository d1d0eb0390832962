"""Models that read text, behind the same requests as those that read states, in one server."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from benchmarks.synthetic import make_cross_encoder
from cache.collection import Collection
from cache.open import open_store
from decoder_server.config import DecoderConfig, ModelConfig
from decoder_server.models.cross_encoder.backend import CrossEncoder
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.server import DecoderServer
from preread.tei.v1 import tei_pb2, tei_pb2_grpc
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc
from preread.values import Stage

HIT, ENCODED = common_pb2.CANDIDATE_STATUS_HIT, common_pb2.CANDIDATE_STATUS_ENCODED
MISSING, TOO_LONG = common_pb2.CANDIDATE_STATUS_MISSING, common_pb2.CANDIDATE_STATUS_TOO_LONG
FAILED = common_pb2.CANDIDATE_STATUS_FAILED
QUERY = "what is read once?"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cross_encoder(tmp_path_factory.mktemp("cross") / "reader")


@pytest.fixture(scope="module")
def model(directory: Path) -> CrossEncoder:
    return open_cross_encoder(directory, device="cpu", dtype="float32")


@pytest.fixture
def ask(tiny, directory, store):
    """Starts a server of both kinds of model; gives its stub."""

    @contextlib.asynccontextmanager
    async def start(**config):
        compute = {"device": "cpu", "dtype": "float32"}
        models = (ModelConfig(str(tiny), "states", **compute), ModelConfig(str(directory), "texts", **compute))
        server = DecoderServer(DecoderConfig(models, port=0, max_staleness_seconds=0.0, **config), store=store)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield rerank_pb2_grpc.RerankServiceStub(channel)
        finally:
            await server.stop(5)

    return start


async def test_one_request_two_models(ask, make_request, model, texts, by_hand) -> None:
    ids = ["p1", "p2", "p3"]
    async with ask() as stub:
        by_text = await stub.Rerank(make_request(QUERY, ids, model="texts"))
        by_states = await stub.Rerank(make_request(QUERY, ids, model="states"))
        default = await stub.Rerank(make_request(QUERY, ids))
    expected = model.score_texts([(QUERY, None, texts[i]) for i in ids])
    got = {r.passage_id: r for r in by_text.results}
    np.testing.assert_allclose([got[i].margin for i in ids], expected, atol=1e-5)
    np.testing.assert_allclose([got[i].score for i in ids], model.bounded(expected), atol=1e-5)
    assert [r.margin for r in by_text.results] == sorted((r.margin for r in by_text.results), reverse=True)
    assert {(r.status, r.num_states, r.compression_ratio) for r in by_text.results} == {(HIT, 0, 0)}
    assert (by_text.model, by_states.model, default.model) == ("texts", "states", "states")
    assert {r.passage_id: r.margin for r in by_states.results} == pytest.approx(
        {i: by_hand(texts[i]) for i in ids}, abs=1e-4
    )


async def test_a_text_of_the_request_is_read_before_the_stored_one(ask, make_request, model) -> None:
    candidates = [rerank_pb2.Candidate(passage_id="p1", text="another text"), rerank_pb2.Candidate(text="a text")]
    async with ask() as stub:
        answer = await stub.Rerank(make_request(QUERY, candidates=candidates, model="texts", return_text=True))
    expected = model.score_texts([(QUERY, None, "another text"), (QUERY, None, "a text")])
    got = sorted(answer.results, key=lambda r: r.index)
    np.testing.assert_allclose([r.margin for r in got], expected, atol=1e-5)
    assert [(r.status, r.text) for r in got] == [(ENCODED, "another text"), (ENCODED, "a text")]


async def test_a_bad_candidate_costs_itself_only(ask, make_request) -> None:
    async with ask(max_text_bytes=100) as stub:
        answer = await stub.Rerank(make_request(QUERY, ["p1", "nobody"], ["good", "x" * 101, ""], model="texts"))
    found = {r.index: (r.status, r.message) for r in answer.results}
    assert [found[i][0] for i in range(5)] == [HIT, MISSING, ENCODED, TOO_LONG, FAILED]
    assert "no text is stored" in found[1][1]
    assert answer.num_scored == 2


async def test_a_passage_that_the_query_leaves_no_room_for_is_too_long(tmp_path, store) -> None:
    """No later attempt finds room, so it is the request's fault and not the server's."""
    directory = make_cross_encoder(tmp_path / "list", "JinaForRanking")  # whose template has the query twice
    compute = {"device": "cpu", "dtype": "float32", "profile": "jinaai/jina-reranker-v3"}
    server = DecoderServer(DecoderConfig((ModelConfig(str(directory), "list", **compute),), port=0), store=store)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = rerank_pb2_grpc.RerankServiceStub(channel)
            candidates = [rerank_pb2.Candidate(text="a passage")]
            answer = await stub.Rerank(rerank_pb2.RerankRequest(query="a b " * 2000, candidates=candidates))
            assert [result.status for result in answer.results] == [TOO_LONG]
            assert "leave no room for a passage" in answer.results[0].message
            request = tei_pb2.RerankRequest(query="a b " * 2000, texts=["a passage"])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await tei_pb2_grpc.RerankStub(channel).Rerank(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        await server.stop(5)


async def test_a_collection_that_keeps_no_texts_says_so(ask, make_request, encoding, texts, store) -> None:
    import dataclasses

    from cache.collection import StoredPassage

    bare = Collection.create(store, dataclasses.replace(encoding.manifest("bare"), stores_text=False))
    bare.put_many([StoredPassage("p1", encoding.encode(texts["p1"], 4))])
    async with ask() as stub:
        answer = await stub.Rerank(make_request(QUERY, ["p1"], ["a text"], model="texts", collection="bare"))
        assert {r.index: r.status for r in answer.results} == {0: MISSING, 1: ENCODED}
        assert "keeps no texts" in answer.results[-1].message
        fail = make_request(QUERY, ["p1"], model="texts", collection="bare", on_miss=common_pb2.ON_MISS_FAIL)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Rerank(fail)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_collection_of_another_encoder_has_texts_all_the_same(
    ask, make_request, encoding, texts, store
) -> None:
    from cache.collection import StoredPassage

    other = Collection.create(store, encoding.manifest("other", fingerprint="0" * 64))
    other.put_many([StoredPassage("p1", encoding.encode(texts["p1"], 4), texts["p1"])])
    async with ask() as stub:
        answer = await stub.Rerank(make_request(QUERY, ["p1"], model="texts", collection="other"))
        assert answer.num_scored == 1
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Rerank(make_request(QUERY, ["p1"], model="states", collection="other"))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_streamed_results_are_those_of_the_plain_call(ask, make_request, texts) -> None:
    request = make_request(QUERY, list(texts), model="texts")
    async with ask(max_batch_tokens=300) as stub:
        whole = await stub.Rerank(request)
        events = [event async for event in stub.RerankStream(rerank_pb2.RerankStreamRequest(request=request))]
    parts = [result for event in events for result in event.batch.results]
    assert len(events) > 2
    assert {r.index: r.margin for r in parts} == pytest.approx({r.index: r.margin for r in whole.results}, abs=1e-5)
    assert events[-1].summary.num_scored == len(texts)


async def test_both_models_answer_while_the_other_works(ask, make_request, texts) -> None:
    async with ask() as stub:
        requests = [make_request(QUERY, list(texts), model=name) for name in ("texts", "states") * 4]
        answers = await asyncio.gather(*(stub.Rerank(one) for one in requests))
    assert [a.model for a in answers] == ["texts", "states"] * 4
    assert all(a.num_scored == len(texts) for a in answers)


async def test_a_listwise_model_sees_each_request_whole_and_alone(tmp_path, store, make_request, texts) -> None:
    directory = make_cross_encoder(tmp_path / "list", "JinaForRanking")
    profile = "jinaai/jina-reranker-v3"
    model = open_cross_encoder(directory, device="cpu", dtype="float32", profile=profile)
    config = ModelConfig(str(directory), "list", device="cpu", dtype="float32", profile=profile)
    server = DecoderServer(DecoderConfig((config,), port=0, max_batch_tokens=50), store=store)
    await server.start()
    queries = {QUERY: ["p1", "p2", "p3"], "another question": ["p2", "p4", "p1", "p5"]}
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = rerank_pb2_grpc.RerankServiceStub(channel)
            answers = await asyncio.gather(*(stub.Rerank(make_request(q, ids)) for q, ids in queries.items()))
    finally:
        await server.stop(5)
    for (query, ids), answer in zip(queries.items(), answers, strict=True):
        expected = model.score_texts([(query, None, texts[i]) for i in ids])
        margins = {r.passage_id: r.margin for r in answer.results}
        np.testing.assert_allclose([margins[i] for i in ids], expected, atol=1e-5)


async def test_a_listwise_model_reads_equal_passages_as_often_as_they_were_sent(tmp_path, store, texts) -> None:
    directory = make_cross_encoder(tmp_path / "list", "JinaForRanking")
    profile = "jinaai/jina-reranker-v3"
    model = open_cross_encoder(directory, device="cpu", dtype="float32", profile=profile)
    config = ModelConfig(str(directory), "list", device="cpu", dtype="float32", profile=profile)
    server = DecoderServer(DecoderConfig((config,), port=0), store=store)
    await server.start()
    text, by_id = rerank_pb2.Candidate, {i: rerank_pb2.Candidate(passage_id=i) for i in ("p1", "p2")}
    both = text(passage_id="p1", text=texts["p1"])
    lists = [
        ([text(text=one) for one in ("cat", "moon", "cat")], ["cat", "moon", "cat"]),
        ([by_id["p1"], by_id["p2"], by_id["p1"]], [texts["p1"], texts["p2"], texts["p1"]]),
        ([both, text(text="moon"), both, by_id["p1"]], [texts["p1"], "moon", texts["p1"], texts["p1"]]),
        ([text(text="cat"), text(text=""), text(text="cat")], ["cat", None, "cat"]),  # an empty text is not read
    ]
    score = server.engines["list"].backend.score
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = rerank_pb2_grpc.RerankServiceStub(channel)
            for candidates, sent in lists:
                request = rerank_pb2.RerankRequest(query=QUERY, candidates=candidates, collection="docs")
                answer = await stub.Rerank(request)
                read = [one for one in sent if one is not None]
                expected = model.score_texts([(QUERY, None, one) for one in read])
                got = [r.margin for r in sorted(answer.results, key=lambda r: r.index) if r.HasField("margin")]
                np.testing.assert_allclose(got, expected, atol=1e-5)
            # A list that cannot be read as a whole has no scores: alone each passage would have another.
            backend = server.engines["list"].backend

            def broken(items):
                if len(items) > 1:
                    raise ZeroDivisionError("a secret")
                return score(items)

            backend.score = broken
            answer = await stub.Rerank(rerank_pb2.RerankRequest(query=QUERY, candidates=lists[0][0]))
            assert [r.status for r in answer.results] == [FAILED] * 3
            assert not any("secret" in r.message for r in answer.results)
    finally:
        await server.stop(5)


async def test_a_deadline_that_passes_ends_the_call(ask, make_request, texts) -> None:
    async with ask() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.Rerank(make_request(QUERY, list(texts) * 10, model="texts"), timeout=0.02)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await stub.Rerank(make_request(QUERY, ["p1"], model="texts"))).num_scored == 1


async def test_an_unknown_model_is_named_with_those_there_are(ask, make_request, refused, detail) -> None:
    async with ask() as stub:
        error = await refused(stub.Rerank(make_request(QUERY, ["p1"], model="mine")), grpc.StatusCode.NOT_FOUND)
    assert "states, texts" in error.details()
    assert detail(error, error_details_pb2.ResourceInfo).resource_name == "mine"


async def test_models_are_listed_with_what_they_read(ask) -> None:
    async with ask() as stub:
        models = (await stub.ListModels(rerank_pb2.ListModelsRequest())).models
    assert [(m.name, m.backend, m.HasField("encoder")) for m in models] == [
        ("states", "fbnl", True),
        ("texts", "cross_encoder", False),
    ]
    assert models[1].default_compression_ratio == 0
    assert models[1].max_passage_tokens > 0


def test_two_models_of_one_name_are_refused(directory) -> None:
    with pytest.raises(ValueError, match="two models are called 'reader'"):
        DecoderConfig((ModelConfig(str(directory)), ModelConfig(str(directory))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "x"}, "backend is 'x'"),
        ({"runtime": "x"}, "runtime is 'x'"),
        ({"max_passage_tokens": 0}, "at least 1"),
    ],
)
def test_a_model_is_checked_before_it_is_loaded(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig("x", **fields)


async def test_a_store_that_went_away_costs_what_is_stored_there(
    redis_server, directory, encoding, texts, make_request
) -> None:
    store = open_store(redis_server.url, read_budget_seconds=20.0)
    encoding.fill(store, "docs", {"p1": texts["p1"]})
    model = ModelConfig(str(directory), device="cpu", dtype="float32")
    server = DecoderServer(DecoderConfig((model,), port=0, max_store_cache_bytes=0), store=store)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = rerank_pb2_grpc.RerankServiceStub(channel)
            assert (await stub.Rerank(make_request(QUERY, ["p1"]))).num_scored == 1
            redis_server.stop()
            answer = await stub.Rerank(make_request(QUERY, ["p1"], ["a text"]))
    finally:
        await server.stop(5)
        store.close()
    assert {r.index: r.status for r in answer.results} == {0: FAILED, 1: ENCODED}
    assert "store could not be read" in answer.results[-1].message


async def test_stages_are_for_models_that_read_states(ask, make_request, refused, detail) -> None:
    stages = [rerank_pb2.Stage(compression_ratio=8, keep=1), rerank_pb2.Stage(compression_ratio=4)]
    async with ask(stages=(Stage(8, 1), Stage(4)), degrade=True, degrade_queue_share=0.0) as stub:
        by_states, *by_text = await asyncio.gather(
            stub.Rerank(make_request(QUERY, ["p1", "p2"], model="states")),
            *(stub.Rerank(make_request(QUERY, ["p1", "p2"], model="texts")) for _ in range(3)),
        )
        assert list(by_states.stages) == stages
        for answer in by_text:  # the server's default is not for them, and there is nothing to read coarser
            assert (list(answer.stages), answer.compression_ratio, answer.HasField("degraded")) == ([], 0, False)
        asked = make_request(QUERY, ["p1"], model="texts", stages=stages)
        error = await refused(stub.Rerank(asked), grpc.StatusCode.INVALID_ARGUMENT)
        (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
        assert (violation.field, "reads text" in violation.description) == ("stages", True)
