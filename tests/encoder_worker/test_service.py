"""Laws of EncoderService: acknowledged means stored; a bad text costs itself; errors name field and reason."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from cache.collection import Collection
from cache.store import Store
from encoder_worker.config import EncoderConfig
from encoder_worker.indexing import index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.server import SERVICE, EncoderServer
from encoder_worker.service import public_url
from encoder_worker.sources import Passage
from encoder_worker.target import CollectionSettings
from preread.v1 import encoder_pb2, encoder_pb2_grpc

STORED, UNCHANGED, REFUSED = 1, 2, 3


@dataclass
class Worker:
    server: EncoderServer
    channel: grpc.aio.Channel
    stub: Any

    async def upsert(self, *messages: encoder_pb2.UpsertRequest) -> list[encoder_pb2.UpsertResponse]:
        return [response async for response in self.stub.Upsert(iter(messages), timeout=60)]

    async def encode(self, texts: Sequence[str], **fields: object) -> encoder_pb2.EncodeResponse:
        return await self.stub.Encode(encoder_pb2.EncodeRequest(texts=texts, **fields), timeout=60)


@asynccontextmanager
async def serve(checkpoint: Path, shared: Store, **config: object) -> AsyncIterator[Worker]:
    settings = {"port": 0, "device": "cpu", "dtype": "float32"} | config
    server = EncoderServer(EncoderConfig(str(checkpoint), **settings), store=shared)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{server.port}", options=[("grpc.max_receive_message_length", -1)]
        ) as channel:
            yield Worker(server, channel, encoder_pb2_grpc.EncoderServiceStub(channel))
    finally:
        for gate in Gate.made:
            gate.set()
        await server.stop(5)


Serve = Callable[..., AbstractAsyncContextManager[Worker]]


@pytest.fixture
def worker(tiny_checkpoint: Path, store: Store) -> Serve:
    return lambda **config: serve(tiny_checkpoint, store, **config)


def message(collection: str = "", **texts: str) -> encoder_pb2.UpsertRequest:
    passages = [encoder_pb2.Passage(passage_id=i, text=text) for i, text in texts.items()]
    return encoder_pb2.UpsertRequest(collection=collection, passages=passages, store_text=True)


def statuses(responses: list[encoder_pb2.UpsertResponse]) -> list[list[int]]:
    return [[result.status for result in response.results] for response in responses]


async def failure(call: Any) -> tuple[grpc.StatusCode, str, list[Any]]:
    """Code, message and unpacked details of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = await rpc_status.aio.from_call(_Done(caught.value))
    details = []
    for packed in status.details if status else []:
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(detail)
        details.append(detail)
    return caught.value.code(), caught.value.details(), details


class _Done:
    """A finished call, as grpc_status asks for one."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self._error = error

    async def code(self) -> grpc.StatusCode:
        return self._error.code()

    async def details(self) -> str | None:
        return self._error.details()

    async def trailing_metadata(self) -> Any:
        return self._error.trailing_metadata()


class Gate:
    """Holds the model up, so that a test decides what waits; remembers every batch."""

    made: ClassVar[list[threading.Event]] = []  # whatever a failing test left closed

    def __init__(self, server: EncoderServer) -> None:
        self._open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self.made.append(self._open)
        encoder = server.engine.encoder
        encode = encoder.encode

        def gated(batch: Sequence[Sequence[int]], ratio: int) -> Any:
            self.batches.append([len(tokens) for tokens in batch])
            self.entered.set()
            assert self._open.wait(30)
            return encode(batch, ratio)

        encoder.encode = gated  # type: ignore[method-assign]

    def open(self) -> None:
        self._open.set()

    async def wait_entered(self) -> None:
        await until(self.entered.is_set)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


# Encode


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
            code, text, details = await failure(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert expected in text
            (violation,) = details[0].field_violations
            assert violation.field == field
        too_large = to.encode(["x" * (65 << 20)])
        assert (await failure(too_large))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_share_batches_and_on_demand_goes_first(worker: Serve, store: Store) -> None:
    async with worker() as to:
        gate = Gate(to.server)
        first = asyncio.create_task(to.encode(["the first one"]))
        await gate.wait_entered()
        uploads = asyncio.create_task(to.upsert(message("docs", **{f"p{i}": f"upload {i} " * 99 for i in range(10)})))
        scheduler = to.server.engine.scheduler
        await until(lambda: len(scheduler._queues[1]) == 10)
        others = [asyncio.create_task(to.encode([f"number {i}"])) for i in range(5)]
        await until(lambda: len(scheduler._queues[0]) == 5)
        gate.open()
        await asyncio.gather(first, *others, uploads)
        lengths = gate.batches
        assert len(lengths[0]) == 1
        assert len(lengths[1]) == 5  # five calls in one pass, before the upload that waited longer
        assert sum(map(len, lengths[2:])) == 10


async def test_uploads_go_on_under_constant_on_demand_load(worker: Serve) -> None:
    async with worker() as to:
        gate = Gate(to.server)
        gate.open()
        done = asyncio.Event()

        async def keep_asking() -> None:
            while not done.is_set():
                await to.encode(["again and again"])

        asking = [asyncio.create_task(keep_asking()) for _ in range(8)]
        async with asyncio.timeout(30):
            responses = await to.upsert(message("docs", a="one", b="two"), message(c="three"))
        done.set()
        await asyncio.gather(*asking)
        assert statuses(responses) == [[STORED, STORED], [STORED]]


async def test_a_caller_who_leaves_is_dropped_before_the_next_batch(worker: Serve) -> None:
    async with worker() as to:
        gate = Gate(to.server)
        first = asyncio.create_task(to.encode(["the first one"]))
        await gate.wait_entered()
        scheduler = to.server.engine.scheduler
        cancelled = asyncio.create_task(to.encode(["this one is cancelled while it waits"]))
        too_late = asyncio.ensure_future(
            to.stub.Encode(encoder_pb2.EncodeRequest(texts=["and this one has little time"]), timeout=0.5)
        )
        await until(lambda: len(scheduler._queues[0]) == 2)
        cancelled.cancel()
        assert (await failure(too_late))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: all(one.done.done() for one in scheduler._queues[0]))
        gate.open()
        await first
        assert len((await to.encode(["after"])).passages) == 1
        assert len(gate.batches) == 2
        assert scheduler.on_demand_tokens == 0


async def test_too_much_on_demand_is_turned_away_with_a_hint(worker: Serve) -> None:
    async with worker(max_queue_tokens=10) as to:
        gate = Gate(to.server)
        first = asyncio.create_task(to.encode(["longer than ten tokens by itself, which is let in alone"]))
        await gate.wait_entered()
        code, _, details = await failure(to.encode(["another"]))
        gate.open()
        await first
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details[0].reason == "OVERLOADED"
        assert details[1].retry_delay.ToNanoseconds() > 0


# Upsert


async def test_upsert_stores_what_index_would(
    worker: Serve, store: Store, encoder: PassageEncoder, real_texts: list[str], passages: Callable[..., list[Passage]]
) -> None:
    texts = real_texts[:40]
    index(passages(texts), encoder, store, "indexed", CollectionSettings(4, "Flat"))
    async with worker() as to:
        sent = [message("docs" if start == 0 else "", **{f"p{start + i}": text for i, text in enumerate(chunk)})
                for start in range(0, 40, 8) for chunk in [texts[start : start + 8]]]  # fmt: skip
        sent[0].compression_ratio, sent[0].codec = 4, "Flat"
        responses = await to.upsert(*sent)
        assert statuses(responses) == [[STORED] * 8] * 5
        again = await to.upsert(*sent)
        assert statuses(again) == [[UNCHANGED] * 8] * 5
    ids = [f"p{i}" for i in range(40)]
    ours, theirs = (Collection.open(store, name).get_many(ids) for name in ("docs", "indexed"))
    for got, wanted, result in zip(ours, theirs, [r for one in responses for r in one.results], strict=True):
        np.testing.assert_allclose(got.states, wanted.states, atol=1e-5)
        assert (got.text_digest, got.window_tokens) == (wanted.text_digest, wanted.window_tokens)
        assert (result.num_tokens, result.num_states) == (wanted.num_tokens, wanted.num_states)
    assert Collection.open(store, "docs").get_texts(["p7"]) == [texts[7]]


async def test_an_acknowledged_passage_is_in_the_store(worker: Serve, store: Store) -> None:
    async with worker() as to:
        call = to.stub.Upsert()
        await call.write(message("docs", a="one", b="two"))
        response = await call.read()
        assert [result.passage_id for result in response.results] == ["a", "b"]
        assert None not in Collection.open(store, "docs").digests(["a", "b"])
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_the_last_of_several_texts_with_one_id_counts(worker: Serve, store: Store) -> None:
    async with worker() as to:
        gate = Gate(to.server)
        await_all = asyncio.create_task(
            to.upsert(message("docs", x="old"), message(x="new"), message(x="new"), message(y="n", x="newest"))
        )
        await gate.wait_entered()
        gate.open()
        assert statuses(await await_all) == [[STORED], [STORED], [UNCHANGED], [STORED, STORED]]
        assert Collection.open(store, "docs").get_texts(["x"]) == ["newest"]
        twice = encoder_pb2.UpsertRequest(
            collection="docs", passages=[encoder_pb2.Passage(passage_id="z", text=text) for text in ("1", "2")]
        )
        assert statuses(await to.upsert(twice)) == [[STORED, STORED]]
        assert Collection.open(store, "docs").get_texts(["z"]) == ["2"]


async def test_bad_passages_are_refused_one_by_one(worker: Serve, store: Store) -> None:
    async with worker(max_text_bytes=100, max_passage_tokens=16) as to:
        bad = [
            ("", "no id"),
            ("i" * 600, "long id"),
            ("empty", " "),
            ("long", "x" * 101),
            ("cut", "word " * 20),
            ("a", "b"),
        ]
        request = encoder_pb2.UpsertRequest(
            collection="docs", passages=[encoder_pb2.Passage(passage_id=i, text=text) for i, text in bad]
        )
        (response,) = await to.upsert(request)
        assert [result.status for result in response.results] == [REFUSED] * 4 + [STORED] * 2
        assert all(result.message for result in response.results[:4])
        assert [result.truncated for result in response.results[4:]] == [True, False]
    assert Collection.open(store, "docs").stats().num_passages == 2


async def test_backpressure_the_next_message_is_not_read_before_there_is_room(worker: Serve, store: Store) -> None:
    async with worker(max_unacknowledged_passages=4) as to:
        gate = Gate(to.server)
        num_sent = 0

        async def many() -> AsyncIterator[encoder_pb2.UpsertRequest]:
            nonlocal num_sent
            for i in count():
                num_sent += 1
                yield message("docs", **{f"p{i}": f"{i} " + "x" * 50_000})

        upload = asyncio.create_task(_collect(to.stub.Upsert(many(), timeout=120)))
        await gate.wait_entered()
        scheduler = to.server.engine.scheduler
        before = -1
        while before != num_sent:  # what flow control lets through, a few megabytes, is through
            before = num_sent
            await asyncio.sleep(0.5)
        assert len(scheduler._queues[1]) + len(gate.batches[0]) <= 4
        upload.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await upload
        await until(lambda: not scheduler._queues[1])


async def _collect(call: Any) -> list[Any]:
    return [response async for response in call]


async def test_a_stream_that_breaks_keeps_what_was_acknowledged(worker: Serve, store: Store) -> None:
    async with worker() as to:
        call = to.stub.Upsert(iter([message("docs", a="one"), message("other", b="two")]), timeout=60)
        assert statuses([await call.read()]) == [[STORED]]
        with pytest.raises(grpc.aio.AioRpcError, match="'docs', as in the first message"):
            await call.read()
        assert Collection.open(store, "docs").stats().num_passages == 1


async def test_upsert_errors_name_field_and_reason(
    worker: Serve, store: Store, short_encoder: PassageEncoder, passages: Callable[..., list[Passage]]
) -> None:
    index(passages(["text"]), short_encoder, store, "theirs")
    async with worker() as to:
        await to.upsert(message("ours", a="one"))

        async def fails(**fields: object) -> tuple[grpc.StatusCode, str, list[Any]]:
            passages = [encoder_pb2.Passage(passage_id="p", text="text")]
            return await failure(to.upsert(encoder_pb2.UpsertRequest(passages=passages, **fields)))

        for fields, field in [
            ({}, "collection"),
            ({"collection": "a b"}, "collection"),
            ({"collection": "new", "compression_ratio": -2}, "compression_ratio"),
            ({"collection": "new", "codec": "zip"}, "codec"),
        ]:
            code, _, details = await fails(**fields)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details[0].field_violations[0].field == field
        for fields, reason in [
            ({"collection": "theirs"}, "ENCODER_MISMATCH"),
            ({"collection": "ours", "compression_ratio": 2}, "COLLECTION_SETTINGS"),
            ({"collection": "new", "codec": "PQ16"}, "CODEC_NEEDS_TRAINING"),
        ]:
            code, text, details = await fails(**fields)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert details[0].reason == reason
            assert text
    assert store.list_collections() == ["ours", "theirs"]


# The rest


async def test_delete_stats_and_describe(worker: Serve, store: Store, encoder: PassageEncoder) -> None:
    async with worker(store="redis://user:secret@example:6379/0") as to:
        await to.upsert(message("docs", a="one", b="two"), message(c="three"))
        store.set_alias("live", "docs")
        deleted = await to.stub.Delete(encoder_pb2.DeleteRequest(collection="live", passage_ids=["a", "a", "gone", ""]))
        assert deleted.num_deleted == 1
        (info,) = (await to.stub.GetStats(encoder_pb2.GetStatsRequest())).collections
        assert (info.name, list(info.aliases), info.num_passages, info.codec) == ("docs", ["live"], 2, "SQfp16")
        assert info.encoder.fingerprint == encoder.identity.fingerprint
        assert (await to.stub.GetStats(encoder_pb2.GetStatsRequest(collection="live"))).collections[0] == info
        for call in (
            to.stub.GetStats(encoder_pb2.GetStatsRequest(collection="gone")),
            to.stub.Delete(encoder_pb2.DeleteRequest(collection="gone", passage_ids=["a"])),
        ):
            code, text, details = await failure(call)
            assert code is grpc.StatusCode.NOT_FOUND
            assert "the store has: docs" in text
            assert (details[0].resource_type, details[0].resource_name) == ("collection", "gone")
        described = await to.stub.Describe(encoder_pb2.DescribeRequest())
        assert described.encoder.dim == encoder.dim
        assert (described.dtype, described.device, described.default_codec) == ("float32", "cpu", "SQfp16")
        assert described.max_message_bytes == 64 << 20
        assert described.store == "redis://example:6379/0"


async def test_health_and_reflection(worker: Serve) -> None:
    async with worker() as to:
        health = health_pb2_grpc.HealthStub(to.channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(to.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for listed in reflection.ServerReflectionInfo(iter([asked])):
            assert SERVICE in [one.name for one in listed.list_services_response.service]


async def test_a_taken_port_is_one_clear_error(worker: Serve, tiny_checkpoint: Path, store: Store) -> None:
    async with worker() as to:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{to.server.port}"):
            await EncoderServer(EncoderConfig(str(tiny_checkpoint), port=to.server.port), store=store).start()


async def test_stop_lets_a_call_under_way_finish(worker: Serve) -> None:
    async with worker() as to:
        gate = Gate(to.server)
        call = asyncio.create_task(to.encode(["under way"]))
        await gate.wait_entered()
        stopping = asyncio.create_task(to.server.stop(20))
        await asyncio.sleep(0.1)
        gate.open()
        assert (await call).passages[0].states
        await stopping


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [({"port": -1}, "0..65535"), ({"max_texts": 0}, "at least 1"), ({"max_batch_tokens": 0}, "at least 1")],
)
def test_configuration_is_checked(wrong: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        EncoderConfig("checkpoint", **wrong)


def test_a_store_url_is_shown_without_its_password() -> None:
    assert public_url("rediss://u:p@h:1/0") == "rediss://h:1/0"
    assert public_url("faiss:./a@b") == "faiss:./a@b"
