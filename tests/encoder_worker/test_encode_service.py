"""Laws of Encode: the states of each text alone; a bad text costs itself; on-demand texts go first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from encoder_worker.passage_encoder import PassageEncoder
from preread.v1 import encoder_pb2

STORED = encoder_pb2.UPSERT_STATUS_STORED
Serve = Callable[..., Any]


async def test_encode_gives_the_states_of_each_text_alone(
    worker: Serve, encoder: PassageEncoder, real_texts: list[str]
) -> None:
    texts = real_texts[:30]
    async with worker() as to:
        for ratio, sent in ((1, 0), (4, encoder_pb2.STATE_FORMAT_FLOAT32), (7, encoder_pb2.STATE_FORMAT_BFLOAT16)):
            answer = await to.encode(texts, compression_ratio=ratio, format=sent)
            assert (answer.dim, answer.compression_ratio) == (encoder.dim, ratio)
            assert answer.fingerprint == encoder.identity.fingerprint
            for text, passage in zip(texts, answer.passages, strict=True):
                alone = encoder.encode_one(text, ratio)
                assert tuple(passage.window_tokens) == alone.window_tokens
                if sent == encoder_pb2.STATE_FORMAT_BFLOAT16:
                    wide = np.frombuffer(passage.states, "<u2").astype(np.uint32) << 16
                    # Rounded to nearest: half a unit in the eighth bit.
                    tolerance = {"rtol": 2**-8, "atol": 1e-5}
                    got = wide.view(np.float32)
                else:
                    got, tolerance = np.frombuffer(passage.states, "<f4"), {"atol": 1e-5}
                np.testing.assert_allclose(got.reshape(-1, encoder.dim), alone.states, **tolerance)
        assert (await to.encode(texts[:1])).compression_ratio == encoder.settings.default_compression_ratio


async def test_encode_cuts_or_splits(worker: Serve, short_encoder: PassageEncoder) -> None:
    text = "one more word " * 40
    async with worker(max_passage_tokens=32) as to:
        cut, short = (await to.encode([text, "short"])).passages
        assert (list(cut.window_tokens), cut.truncated, short.truncated) == ([32], True, False)
        (split,) = (await to.encode([text], split=True, compression_ratio=2)).passages
        alone = short_encoder.encode_one(text, 2, split=True)
        assert (tuple(split.window_tokens), split.truncated) == (alone.window_tokens, False)
        np.testing.assert_allclose(np.frombuffer(split.states, "<f4"), alone.states.ravel(), atol=1e-5)


async def test_a_bad_text_costs_itself(worker: Serve) -> None:
    async with worker(max_text_bytes=1000) as to:
        answer = await to.encode(["good", "  ", "x" * 1001, "also good"])
        assert [bool(passage.states) for passage in answer.passages] == [True, False, False, True]
        assert [passage.message for passage in answer.passages] == [
            "", "text is empty", "text is 1,001 bytes; at most 1,000 are encoded", "",
        ]  # fmt: skip


async def test_encode_refuses_fields_out_of_range(worker: Serve) -> None:
    async with worker(max_texts=3, max_answer_bytes=2000) as to:
        for call, field, expected in [
            (to.encode([]), "texts", "1..3 texts"),
            (to.encode(["a"] * 4), "texts", "1..3 texts"),
            (to.encode(["a"], compression_ratio=-1), "compression_ratio", "is -1"),
            (to.encode(["a"], format=9), "format", "is 9"),
            (to.encode(["a long text " * 10], compression_ratio=1), "texts", "at most 2,000 are sent"),
        ]:
            code, text, details = await to.failure(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert expected in text
            (violation,) = details[0].field_violations
            assert violation.field == field
        too_large = to.encode(["x" * (65 << 20)])
        assert (await to.failure(too_large))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_share_batches_and_on_demand_goes_first(worker: Serve) -> None:
    async with worker() as to:
        gate = to.gate()
        first = asyncio.create_task(to.encode(["the first one"]))
        await gate.wait_entered()
        uploads = asyncio.create_task(
            to.upsert(to.message("docs", **{f"p{i}": f"upload {i} " * 99 for i in range(10)}))
        )
        await to.until(lambda: to.num_waiting(bulk=True) == 10)
        others = [asyncio.create_task(to.encode([f"number {i}"])) for i in range(5)]
        await to.until(lambda: to.num_waiting(bulk=False) == 5)
        gate.open()
        await asyncio.gather(first, *others, uploads)
        lengths = gate.batches
        assert len(lengths[0]) == 1
        assert len(lengths[1]) == 5  # five calls in one pass, before the upload that waited longer
        assert sum(map(len, lengths[2:])) == 10


async def test_uploads_go_on_under_constant_on_demand_load(worker: Serve) -> None:
    async with worker() as to:
        gate = to.gate()
        gate.open()
        done = asyncio.Event()

        async def keep_encoding() -> None:
            while not done.is_set():
                await to.encode(["again and again"])

        calls = [asyncio.create_task(keep_encoding()) for _ in range(8)]
        async with asyncio.timeout(30):
            responses = await to.upsert(to.message("docs", a="one", b="two"), to.message(c="three"))
        done.set()
        await asyncio.gather(*calls)
        assert to.statuses(responses) == [[STORED, STORED], [STORED]]


async def test_a_caller_who_leaves_is_dropped_before_the_next_batch(worker: Serve) -> None:
    async with worker() as to:
        gate = to.gate()
        first = asyncio.create_task(to.encode(["the first one"]))
        await gate.wait_entered()
        cancelled = asyncio.create_task(to.encode(["this one is cancelled while it waits"]))
        too_late = asyncio.ensure_future(
            to.stub.Encode(encoder_pb2.EncodeRequest(texts=["and this one has little time"]), timeout=0.5)
        )
        await to.until(lambda: to.num_waiting(bulk=False) == 2)
        cancelled.cancel()
        assert (await to.failure(too_late))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        await to.until(lambda: to.num_waiting(bulk=False) == 0)
        gate.open()
        await first
        assert len((await to.encode(["after"])).passages) == 1
        assert len(gate.batches) == 2
        assert to.server.engine.scheduler.on_demand_tokens == 0


async def test_too_much_on_demand_is_turned_away_with_a_hint(worker: Serve) -> None:
    async with worker(max_queue_tokens=10) as to:
        gate = to.gate()
        first = asyncio.create_task(to.encode(["longer than ten tokens, which alone is let in anyway"]))
        await gate.wait_entered()
        code, _, details = await to.failure(to.encode(["another"]))
        gate.open()
        await first
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details[0].reason == "OVERLOADED"
        assert details[1].retry_delay.ToNanoseconds() > 0
