"""Laws of the score cache: a request that is sent again runs no forward pass, and no margin is ever another pair's."""

from __future__ import annotations

import os
import random

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.synthetic import make_cross_encoder
from cache.collection import Collection, StoredPassage
from decoder_server.config import DecoderConfig
from decoder_server.engine.score_cache import _ENTRY, _MAX_CLOCK, WAYS, ScoreCache
from decoder_server.server import DecoderServer
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc
from preread_edge.access import ApiKeys

PLACE_BYTES = WAYS * _ENTRY.itemsize
ON = {"max_score_cache_bytes": 1 << 20}


def margins(answer) -> dict[int, float]:
    return {one.index: one.margin for one in answer.results}


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=12), max_size=30), st.integers(0, 5)
)
def test_a_margin_is_its_pairs_or_not_known(calls, num_places) -> None:
    cache = ScoreCache(num_places * PLACE_BYTES)
    identities = [random.Random(i).randbytes(i) for i in range(61)]  # the first is of no pair
    scopes = [b"", b"docs", b"docs,faq"]
    expected: dict[tuple[int, int], float] = {}
    for number, call in enumerate(calls):
        for scope in range(3):
            pairs = [pair for pair, own in call if own == scope]
            expected |= {(pair, scope): float(number) for pair in pairs}
            cache.put([identities[pair] for pair in pairs], [float(number)] * len(pairs), scopes[scope])
            for pair, margin in zip(range(61), cache.get(identities, scopes[scope]), strict=True):
                assert margin is None or (pair and margin == expected[pair, scope])
        assert cache.num_bytes <= num_places * PLACE_BYTES


def test_what_fits_is_kept_whatever_place_it_has() -> None:
    cache = ScoreCache(PLACE_BYTES)  # one place: all entries share it
    pairs = [os.urandom(16) for _ in range(WAYS + 1)]
    cache.put(pairs[:WAYS], [float(i) for i in range(WAYS)])
    assert cache.get(pairs[:WAYS]) == list(range(WAYS))
    cache.get(pairs[1:WAYS])  # the first is read least recently
    cache.put(pairs[WAYS:], [8.0])
    assert cache.get(pairs) == [None, *range(1, WAYS + 1)]
    assert (cache.num_entries, cache.num_bytes) == (WAYS, PLACE_BYTES)


def test_nothing_is_kept_that_is_no_margin() -> None:
    cache = ScoreCache(1 << 12)
    pairs = [os.urandom(16) for _ in range(4)]
    cache.put([*pairs, b""], [1.0, None, float("nan"), float("inf"), 2.0])
    assert cache.get([*pairs, b""]) == [1.0, None, None, None, None]
    assert (cache.num_hits, cache.num_misses) == (1, 4)


def test_without_a_budget_nothing_is_kept() -> None:
    cache = ScoreCache(PLACE_BYTES - 1)
    cache.put([bytes(16)], [1.0])
    assert (cache.enabled, cache.get([bytes(16)]), cache.num_bytes) == (False, [None], 0)


def test_the_clock_may_run_over() -> None:
    cache = ScoreCache(PLACE_BYTES)
    cache._clock = _MAX_CLOCK - 1
    pair = os.urandom(16)
    for _ in range(3):
        cache.put([pair], [1.0])
        assert cache.get([pair]) == [1.0]
    assert cache._clock == 2


async def test_a_request_that_is_sent_again_runs_no_forward_pass(serve, gated, texts) -> None:
    cascade = {"stages": [rerank_pb2.Stage(compression_ratio=16, keep=5), rerank_pb2.Stage(compression_ratio=4)]}
    requests = [
        {"ids": list(texts)},
        {"inline": [texts["p3"], texts["p17"]], "collection": ""},
        {"ids": list(texts), "compression_ratio": 8, "top_n": 3, "return_text": True},
        {"ids": list(texts), **cascade},
        {"ids": ["p1", "p1", "nowhere"], "instruction": "another"},
    ]
    async with serve(backend=gated, **ON) as serving:
        for fields in requests:
            first = await serving.rerank(**fields)
            num_passes = len(gated.passes)
            again = await serving.rerank(**fields)
            for answer in (first, again):
                answer.ClearField("timings")
            assert again == first
            assert len(gated.passes) == num_passes
        # Of a request that shares some of its passages with others, the rest alone is scored.
        await serving.rerank(ids=["p1", "p2"], query="shared")
        await serving.rerank(ids=["p1", "p2", "p3"], query="shared")
        assert [len(pairs) for pairs in gated.passes[-2:]] == [2, 1]


async def test_all_that_changes_a_margin_is_scored_again(serve, gated, store, encoding, texts, by_hand) -> None:
    fresh = Collection.create(store, encoding.manifest("fresh"))
    fresh.put_many([StoredPassage("a", encoding.encode(texts["p1"], 4), texts["p1"])])
    store.set_alias("live", "docs")
    async with serve(backend=gated, **ON) as serving:

        async def margin(**fields: object) -> float:
            """Of one candidate that must be scored."""
            num_passes = len(gated.passes)
            answer = await serving.rerank(**fields)
            assert len(gated.passes) == num_passes + 1, fields
            return answer.results[0].margin

        await margin(ids=["p1"])
        assert await margin(ids=["p1"], query="other") == pytest.approx(by_hand(texts["p1"], query="other"), abs=1e-4)
        told = await margin(ids=["p1"], instruction="other")
        assert told == pytest.approx(by_hand(texts["p1"], instruction="other"), abs=1e-4)
        assert await margin(ids=["p1"], compression_ratio=8) == pytest.approx(by_hand(texts["p1"], 8), abs=1e-4)
        # Another record of the same text, which might have been written by another codec.
        assert await margin(ids=["a"], collection="fresh") == pytest.approx(by_hand(texts["p1"]), abs=1e-4)
        # A moved alias.
        assert await margin(ids=["p2"], collection="live") == pytest.approx(by_hand(texts["p2"]), abs=1e-4)
        encoding.fill(store, "docs-2", {"p2": texts["p4"]})
        store.set_alias("live", "docs-2")
        assert await margin(ids=["p2"], collection="live") == pytest.approx(by_hand(texts["p4"]), abs=1e-4)
        # A passage that was written again under its id.
        docs = Collection.open(store, "docs")
        docs.put_many([StoredPassage("p1", encoding.encode(texts["p9"], 4), texts["p9"])])
        assert await margin(ids=["p1"]) == pytest.approx(by_hand(texts["p9"]), abs=1e-4)
        docs.delete_many(["p1"])
        assert (await serving.rerank(ids=["p1"])).results[0].status == common_pb2.CANDIDATE_STATUS_MISSING


async def test_a_collection_in_another_codec_is_scored_again(serve, gated, store, encoding, texts) -> None:
    """Equal texts, ids and ratio, behind one alias; the margins differ by what the codec loses."""
    for name, codec in (("exact", "Flat"), ("rounded", "SQbf16")):
        collection = Collection.create(store, encoding.manifest(name, codec=codec))
        collection.put_many([StoredPassage(i, encoding.encode(text, 4)) for i, text in texts.items()])
    answers = []
    async with serve(backend=gated, **ON) as serving:
        for name in ("exact", "rounded"):
            store.set_alias("live", name)
            answers += [margins(await serving.rerank(ids=list(texts), collection="live")) for _ in range(2)]
    exact, exact_again, rounded, rounded_again = answers
    assert (exact_again, rounded_again) == (exact, rounded)
    assert all(rounded[i] != exact[i] for i in exact)
    assert rounded == pytest.approx(exact, abs=0.05)


async def test_what_is_known_counts_as_much_as_what_is_scored(serve, texts, refused) -> None:
    """A request over the limit of tokens is rejected, whether its margins are known or not."""
    async with serve(max_request_tokens=400, **ON) as serving:
        for ids in (["p1"], ["p2"], ["p3"]):
            await serving.rerank(ids=ids)
        longer = {"query": "what is read once? " * 12}
        for i in texts:
            await serving.rerank(ids=[i], **longer)
        await refused(serving.rerank(ids=list(texts), **longer), grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_restarted_server_answers_the_same(serve, texts) -> None:
    answers = []
    for _ in range(2):
        async with serve(**ON) as serving:
            answers += [margins(await serving.rerank(ids=list(texts))) for _ in range(2)]
    for answer in answers[1:]:
        assert answer == pytest.approx(answers[0], abs=1e-5)


async def test_keys_that_are_bound_to_other_collections_share_no_margins(tiny, store, gated, encoding, make_request):
    encoding.fill(store, "faq", {"f": "asked frequently"})
    bound = [
        "rerank@docs:bound-to-docs-1-0123",
        "rerank@docs:bound-to-docs-2-0123",
        "rerank@docs,faq:bound-to-both-0123",
    ]
    keys = ApiKeys.parse([*bound, "reads-everything-0123"])
    config = DecoderConfig.of_one(str(tiny), port=0, device="cpu", dtype="float32", **ON)
    server = DecoderServer(config, store=store, load=lambda _: gated, keys=keys)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = rerank_pb2_grpc.RerankServiceStub(channel)

            async def num_passes(key: str) -> int:
                before = len(gated.passes)
                await stub.Rerank(make_request(ids=["p1", "p2"]), metadata=(("authorization", f"Bearer {key}"),))
                return len(gated.passes) - before

            assert await num_passes("reads-everything-0123") == 1
            assert await num_passes("bound-to-docs-1-0123") == 1
            assert await num_passes("bound-to-both-0123") == 1
            assert await num_passes("bound-to-docs-2-0123") == 0  # bound to the same as the first
    finally:
        await server.stop(5)


@pytest.mark.parametrize(
    ("architecture", "profile", "num_kept"),
    [("BertForSequenceClassification", "", 3), ("JinaForRanking", "jinaai/jina-reranker-v3", 0)],
)
async def test_a_cross_encoder_keeps_margins_unless_it_is_listwise(
    tmp_path, store, make_request, architecture, profile, num_kept
) -> None:
    directory = make_cross_encoder(tmp_path / "model", architecture)
    config = DecoderConfig.of_one(str(directory), port=0, device="cpu", dtype="float32", profile=profile)
    server = DecoderServer(config, store=store)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = rerank_pb2_grpc.RerankServiceStub(channel)
            first, again = [await stub.Rerank(make_request(inline=["cat", "moon", "cat", "p1"])) for _ in range(2)]
        (engine,) = server.engines.values()
        assert engine.scheduler.stats.num_pairs == (num_kept or 2 * 4)
        assert (engine.score_cache.num_hits, engine.score_cache.num_entries) == (num_kept, num_kept)
        assert margins(again) == margins(first)
    finally:
        await server.stop(5)


async def test_of_several_queries_the_pairs_that_are_known_are_not_scored(serve, gated, texts) -> None:
    many = rerank_pb2.RerankManyRequest(
        request=rerank_pb2.RerankRequest(
            collection="docs", candidates=[rerank_pb2.Candidate(passage_id=i) for i in ("p1", "p2", "p3")]
        ),
        queries=["what is read once?", "what is new?", "what is read once?"],
    )
    async with serve(backend=gated, **ON) as serving:
        alone = await serving.rerank(ids=["p1", "p3"])
        answers = [one.response async for one in serving.stub.RerankMany(many)]
        assert sum(map(len, gated.passes)) == 2 + 5  # of the twin queries each asks for the passage that is not known
        assert margins(answers[0])[0] == margins(alone)[0]
        assert margins(answers[0])[2] == margins(answers[2])[2] == margins(alone)[1]
        again = [one.response async for one in serving.stub.RerankMany(many)]
        assert sum(map(len, gated.passes)) == 7
        assert [margins(one) for one in again][1] == margins(answers[1])
