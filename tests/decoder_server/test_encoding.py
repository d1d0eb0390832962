"""Laws of encoding on demand, against a worker on loopback that counts, waits and, where told to, misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from decoder_server.config import DecoderConfig
from decoder_server.server import DecoderServer
from preread.v1 import common_pb2, encoder_pb2, encoder_pb2_grpc, rerank_pb2

HIT, ENCODED = common_pb2.CANDIDATE_STATUS_HIT, common_pb2.CANDIDATE_STATUS_ENCODED
MISSING, FAILED = common_pb2.CANDIDATE_STATUS_MISSING, common_pb2.CANDIDATE_STATUS_FAILED


class Worker(encoder_pb2_grpc.EncoderServiceServicer):
    """Encodes with the real encoder; remembers what it was asked."""

    def __init__(self, encoding) -> None:
        self.encoding = encoding
        self.fingerprint = encoding.checkpoint.identity.fingerprint
        self.asked: list[str] = []
        self.formats: set[int] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.tamper: Callable[[encoder_pb2.EncodeResponse], None] = lambda answer: None

    async def Describe(self, request, context):  # noqa: N802
        identity = common_pb2.EncoderIdentity(fingerprint=self.fingerprint, dim=64)
        return encoder_pb2.DescribeResponse(encoder=identity)

    async def Encode(self, request, context):  # noqa: N802
        self.asked += request.texts
        self.formats.add(request.format)
        await self.gate.wait()
        answer = encoder_pb2.EncodeResponse(
            dim=64,
            compression_ratio=request.compression_ratio,
            format=request.format,
            fingerprint=self.fingerprint,
        )
        for text in request.texts:
            if text.startswith("refuse"):
                answer.passages.add(message="this text is refused")
                continue
            states = self.encoding.encode(text, request.compression_ratio)
            data = states.states.astype("<f4")
            if request.format == encoder_pb2.STATE_FORMAT_BFLOAT16:
                data = ((data.view("<u4") + 0x8000) >> 16).astype("<u2")
            answer.passages.add(states=data.tobytes(), window_tokens=states.window_tokens, truncated=states.truncated)
        self.tamper(answer)
        return answer


@asynccontextmanager
async def on_loopback(worker: Worker) -> AsyncIterator[str]:
    server = grpc.aio.server()
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        worker.gate.set()
        await server.stop(0)


@pytest.fixture
async def worker(encoding) -> AsyncIterator[Worker]:
    worker = Worker(encoding)
    async with on_loopback(worker) as worker.address:
        yield worker


def by_index(answer: rerank_pb2.RerankResponse) -> list[rerank_pb2.Result]:
    return sorted(answer.results, key=lambda result: result.index)


async def test_texts_score_as_if_they_had_been_stored(serve, worker, texts, by_hand) -> None:
    inline = list(texts.values())[:20]
    async with serve(encoder_address=worker.address, lookup=()) as serving:
        stored = by_index(await serving.rerank(ids=list(texts)[:20]))
        encoded = by_index(await serving.rerank(inline=inline))
        for a, b in zip(stored, encoded, strict=True):
            assert (a.status, b.status) == (HIT, ENCODED)
            assert b.margin == pytest.approx(a.margin, abs=1e-4)
            assert (b.num_states, b.compression_ratio) == (a.num_states, a.compression_ratio)
        # Without a collection the ratio is the checkpoint's default, here 4 too.
        alone = by_index(await serving.rerank(inline=inline, collection=""))
        assert [r.status for r in alone] == [ENCODED] * 20  # for the request before, and kept
        assert [r.margin for r in alone] == pytest.approx([r.margin for r in encoded], abs=1e-5)
        assert len(worker.asked) == 20


async def test_many_queries_have_a_text_encoded_once(serve, worker, texts, by_hand) -> None:
    inline, queries = [*list(texts.values())[:9], "refuse this", texts["p0"]], ["gravity", "which bodies?", "yes"]
    request = rerank_pb2.RerankRequest(candidates=[rerank_pb2.Candidate(text=text) for text in inline])
    async with serve(encoder_address=worker.address, lookup=()) as serving:
        call = serving.stub.RerankMany(rerank_pb2.RerankManyRequest(request=request, queries=queries))
        answers = [by_index(answer.response) async for answer in call]
    assert sorted(worker.asked) == sorted(set(inline))
    for query, results in zip(queries, answers, strict=True):
        assert [one.status for one in results] == [*[ENCODED] * 9, FAILED, ENCODED]
        for one, text in zip(results, inline, strict=True):
            if one.status == ENCODED:
                assert one.margin == pytest.approx(by_hand(text, query=query), abs=1e-4)


async def test_a_stored_passage_of_another_text_is_encoded_anew(serve, worker, texts, by_hand) -> None:
    candidates = [
        rerank_pb2.Candidate(passage_id="p1", text=texts["p1"]),
        rerank_pb2.Candidate(passage_id="p2", text="a text that came later"),
        rerank_pb2.Candidate(passage_id="nobody", text=texts["p3"]),
        rerank_pb2.Candidate(passage_id="nobody else"),
    ]
    async with serve(encoder_address=worker.address, lookup=()) as serving:
        results = by_index(await serving.rerank(candidates=candidates))
        assert [r.status for r in results] == [HIT, ENCODED, ENCODED, MISSING]
        assert results[1].margin == pytest.approx(by_hand("a text that came later"), abs=1e-4)
        assert worker.asked == ["a text that came later", texts["p3"]]


async def test_one_text_in_many_requests_is_encoded_once(serve, worker) -> None:
    async with serve(encoder_address=worker.address) as serving:
        worker.gate.clear()
        calls = [asyncio.create_task(serving.rerank(inline=["one text", f"own {n}"])) for n in range(16)]
        while len(worker.asked) < 17:
            await asyncio.sleep(0.001)
        worker.gate.set()
        answers = await asyncio.gather(*calls)
        assert sorted(worker.asked) == sorted(["one text", *(f"own {n}" for n in range(16))])
        margins = [by_index(answer)[0].margin for answer in answers]
        assert margins == pytest.approx([margins[0]] * 16, abs=1e-5)


async def test_one_encoding_serves_every_multiple_of_the_default_ratio(serve, worker, by_hand) -> None:
    async with serve(encoder_address=worker.address) as serving:
        text = "the decoder answers yes or no to what was read once"
        for ratio in (8, 4, 12, 0):
            (result,) = (await serving.rerank(inline=[text], collection="", compression_ratio=ratio)).results
            assert result.margin == pytest.approx(by_hand(text, ratio or 4), abs=1e-4)
        assert worker.asked == [text]
        await serving.rerank(inline=[text], collection="", compression_ratio=3)
        assert worker.asked == [text, text]


async def test_kept_states_never_exceed_their_bytes(serve, worker) -> None:
    async with serve(encoder_address=worker.address, max_inline_cache_bytes=20_000) as serving:
        for n in range(30):
            await serving.rerank(inline=[f"{n} " + "passage " * 30])
        assert 0 < serving.engine.fetcher.on_demand.num_bytes <= 20_000
        # The latest is still there, the first is not.
        await serving.rerank(inline=["29 " + "passage " * 30])
        assert len(worker.asked) == 30
        await serving.rerank(inline=["0 " + "passage " * 30])
        assert len(worker.asked) == 31


async def test_who_leaves_does_not_take_anothers_encoding_along(serve, worker) -> None:
    async with serve(encoder_address=worker.address) as serving:
        worker.gate.clear()
        leaver = asyncio.create_task(serving.rerank(inline=["shared"]))
        stayer = asyncio.create_task(serving.rerank(inline=["shared"]))
        while serving.engine.admission.num_requests < 2 or not worker.asked:
            await asyncio.sleep(0.001)
        leaver.cancel()
        while serving.engine.admission.num_requests > 1:
            await asyncio.sleep(0.001)
        worker.gate.set()
        assert (await stayer).num_scored == 1
        assert worker.asked == ["shared"]


@pytest.mark.parametrize("text", ["new", ""])
async def test_skip_and_fail_look_at_the_store_alone_whoever_asked_before(serve, worker, refused, texts, text) -> None:
    """A text that is not stored, or that the stored states are not of."""
    candidates = [rerank_pb2.Candidate(passage_id="p1"), rerank_pb2.Candidate(text=text or "new")]
    if not text:
        candidates[1].passage_id = "p2"
    skip, fail = common_pb2.ON_MISS_SKIP, common_pb2.ON_MISS_FAIL
    async with serve(encoder_address=worker.address) as serving:
        for _ in range(2):
            asked = len(worker.asked)
            answer = await serving.rerank(candidates=candidates, on_miss=skip)
            assert [r.status for r in by_index(answer)] == [HIT, MISSING]
            await refused(serving.rerank(candidates=candidates, on_miss=fail), grpc.StatusCode.FAILED_PRECONDITION)
            assert len(worker.asked) == asked
            encoded = await serving.rerank(candidates=candidates)  # keeps its states in memory
            assert [r.status for r in by_index(encoded)] == [HIT, ENCODED]
        assert worker.asked == ["new"]
        fields = {"model": serving.engine.name, "status": "encoded"}
        assert serving.server.metrics.registry.get_sample_value("preread_candidates_total", fields) == 2


async def test_the_status_says_where_states_came_from(serve, worker, texts) -> None:
    for cache_bytes in (0, 1 << 20):  # the read cache in front of the store makes no other status
        async with serve(encoder_address=worker.address, max_store_cache_bytes=cache_bytes) as serving:
            for _ in range(3):
                answer = await serving.rerank(ids=["p1"], inline=["new"])
                assert [r.status for r in by_index(answer)] == [HIT, ENCODED]


async def test_asking_to_encode_without_a_worker_fails_each_candidate_with_the_reason(serve) -> None:
    async with serve() as serving:
        answer = await serving.rerank(ids=["p1"], inline=["new"], on_miss=common_pb2.ON_MISS_ENCODE)
        hit, failed = by_index(answer)
        assert (hit.status, failed.status) == (HIT, FAILED)
        assert "no encoder worker is configured" in failed.message


async def test_a_refused_text_costs_itself_only(serve, worker) -> None:
    async with serve(encoder_address=worker.address) as serving:
        good, bad = by_index(await serving.rerank(inline=["good", "refuse me"]))
        assert (good.status, bad.status, bad.message) == (ENCODED, FAILED, "this text is refused")


async def test_a_worker_that_is_down_costs_what_needs_it_and_may_come_back(serve, encoding) -> None:
    worker = Worker(encoding)
    async with on_loopback(worker) as address:
        pass
    async with serve(encoder_address=address) as serving:
        hit, failed = by_index(await serving.rerank(ids=["p1"], inline=["new"]))
        assert (hit.status, failed.status) == (HIT, FAILED)
        assert address in failed.message
        assert "could not be reached: nothing listens there" in failed.message
        assert (await serving.rerank(ids=["p1"])).num_scored == 1


async def test_a_worker_that_hangs_is_given_up(serve, worker) -> None:
    async with serve(encoder_address=worker.address, encode_timeout_seconds=0.2) as serving:
        worker.gate.clear()
        hit, failed = by_index(await serving.rerank(ids=["p1"], inline=["new"]))
        assert (hit.status, failed.status) == (HIT, FAILED)
        assert "did not answer within the time limit" in failed.message


async def test_hits_are_scored_while_the_worker_is_still_encoding(serve, worker) -> None:
    async with serve(encoder_address=worker.address) as serving, asyncio.timeout(20):
        worker.gate.clear()
        candidates = [rerank_pb2.Candidate(text="new"), rerank_pb2.Candidate(passage_id="p1")]
        call = serving.stub.RerankStream(
            rerank_pb2.RerankStreamRequest(
                request=rerank_pb2.RerankRequest(query="q", collection="docs", candidates=candidates)
            )
        )
        first = await call.read()
        assert [result.index for result in first.batch.results] == [1]
        worker.gate.set()
        second = await call.read()
        assert [result.index for result in second.batch.results] == [0]


def _other_encoder(answer: encoder_pb2.EncodeResponse) -> None:
    answer.fingerprint = "f" * 64


def _too_few(answer: encoder_pb2.EncodeResponse) -> None:
    del answer.passages[0]


def _cut_states(answer: encoder_pb2.EncodeResponse) -> None:
    answer.passages[0].states = answer.passages[0].states[:-3]


def _missing_row(answer: encoder_pb2.EncodeResponse) -> None:
    answer.passages[0].states = answer.passages[0].states[: -64 * 4]


def _no_windows(answer: encoder_pb2.EncodeResponse) -> None:
    del answer.passages[0].window_tokens[:]


def _not_finite(answer: encoder_pb2.EncodeResponse) -> None:
    states = np.frombuffer(answer.passages[0].states, "<f4").copy()
    states[5] = np.nan
    answer.passages[0].states = states.tobytes()


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (_other_encoder, "ffffffff"),
        (_too_few, "expected 1"),
        (_cut_states, "do not fit"),
        (_missing_row, "do not fit"),
        (_no_windows, "do not fit"),
        (_not_finite, "not finite"),
    ],
)
async def test_an_unusable_answer_is_never_scored(serve, worker, tamper, says: str) -> None:
    async with serve(encoder_address=worker.address) as serving:
        worker.tamper = tamper
        hit, failed = by_index(await serving.rerank(ids=["p1"], inline=["some new text"]))
        assert (hit.status, failed.status) == (HIT, FAILED)
        assert says in failed.message


@pytest.mark.parametrize("tamper", [_cut_states, _missing_row, _no_windows, _not_finite])
async def test_unusable_states_of_one_text_cost_no_other(serve, worker, by_hand, tamper) -> None:
    async with serve(encoder_address=worker.address) as serving:
        worker.tamper = tamper
        failed, encoded = by_index(await serving.rerank(inline=["some new text", "bodies attract one another"]))
        assert (failed.status, encoded.status) == (FAILED, ENCODED)
        assert encoded.margin == pytest.approx(by_hand("bodies attract one another"), abs=1e-4)


async def test_a_worker_with_another_encoder_ends_the_start(tiny, store, worker) -> None:
    worker.fingerprint = "f" * 64
    server = DecoderServer(DecoderConfig.of_one(str(tiny), port=0, encoder_address=worker.address), store=store)
    with pytest.raises(ValueError, match=r"ffffffff.*the served model reads states of"):
        await server.start()


async def test_states_travel_in_the_decoders_number_format(serve, worker, by_hand) -> None:
    async with serve(encoder_address=worker.address, dtype="bfloat16") as serving:
        (result,) = (await serving.rerank(inline=["bodies attract one another"])).results
        assert result.status == ENCODED
        assert result.margin == pytest.approx(by_hand("bodies attract one another"), abs=0.2)
        assert worker.formats == {encoder_pb2.STATE_FORMAT_BFLOAT16}
