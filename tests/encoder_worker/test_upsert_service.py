"""Laws of Upsert: acknowledged means stored, in order; what is not wanted is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import grpc
import numpy as np
import pytest

from cache.collection import Collection
from cache.errors import StoreLocked
from cache.store import Store
from encoder_worker.config import CollectionSettings
from encoder_worker.indexing import index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.service import MANY
from encoder_worker.sources import SourcePassage
from preread.v1 import encoder_pb2

STORED, UNCHANGED, REFUSED = (
    encoder_pb2.UPSERT_STATUS_STORED, encoder_pb2.UPSERT_STATUS_UNCHANGED, encoder_pb2.UPSERT_STATUS_REFUSED,
)  # fmt: skip
Serve = Callable[..., Any]


async def test_upsert_stores_what_index_would(
    worker: Serve,
    store: Store,
    encoder: PassageEncoder,
    real_texts: list[str],
    passages: Callable[..., list[SourcePassage]],
) -> None:
    texts = real_texts[:40]
    index(passages(texts), encoder, store, "indexed", CollectionSettings(4, "Flat"))
    async with worker() as to:
        sent = [to.message("docs" if start == 0 else "", **{f"p{start + i}": text for i, text in enumerate(chunk)})
                for start in range(0, 40, 8) for chunk in [texts[start : start + 8]]]  # fmt: skip
        sent[0].compression_ratio, sent[0].codec = 4, "Flat"
        responses = await to.upsert(*sent)
        assert to.statuses(responses) == [[STORED] * 8] * 5
        again = await to.upsert(*sent)
        assert to.statuses(again) == [[UNCHANGED] * 8] * 5
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
        await call.write(to.message("docs", a="one", b="two"))
        response = await call.read()
        assert [result.passage_id for result in response.results] == ["a", "b"]
        assert None not in Collection.open(store, "docs").digests(["a", "b"])
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_uploads_share_a_collection_that_index_runs_and_renames_then_leave_alone(
    worker: Serve, store: Store, encoder: PassageEncoder, passages: Callable[..., list[SourcePassage]]
) -> None:
    async with worker() as to:
        calls = [to.stub.Upsert() for _ in range(3)]
        for number, call in enumerate(calls):
            await call.write(to.message("docs", **{f"p{number}": f"text {number}"}))
            assert to.statuses([await call.read()]) == [[STORED]]
        for refused in (
            lambda: index(passages(["a text"]), encoder, store, "docs"),
            lambda: store.rename_collection("docs", "docs-1", "docs"),
        ):
            with pytest.raises(StoreLocked, match="is being written by process"):
                await asyncio.to_thread(refused)
        for call in calls:
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() == grpc.StatusCode.OK
        with store.lease("docs"):
            with pytest.raises(grpc.aio.AioRpcError, match="'docs' is being written by process") as caught:
                await to.upsert(to.message("docs", p9="text 9"))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        store.rename_collection("docs", "docs-1", "docs")
        responses = await to.upsert(to.message("docs", p0="text 0", p9="text 9"))
        assert to.statuses(responses) == [[UNCHANGED, STORED]]
    assert Collection.open(store, "docs-1").stats().num_passages == 4


async def test_of_several_passages_with_one_id_the_first_counts_however_far_apart(worker: Serve, store: Store) -> None:
    async with worker() as to:
        many = [to.message(**{f"p{64 * i + j}": f"{i} {j}" for j in range(64)}) for i in range(4)]
        sent = [to.message("docs", x="first", empty=" "), *many, to.message(x="second", y="n"), to.message(x="first")]
        responses = await to.upsert(*sent, to.message(empty="not empty now"))
        assert to.statuses(responses) == [
            [STORED, REFUSED],
            *[[STORED] * 64] * 4,
            [REFUSED, STORED],
            [REFUSED],
            [STORED],
        ]
        assert responses[5].results[0].message == "id 'x' came before, at upload:1; the first one counts"
        twice = encoder_pb2.UpsertRequest(
            collection="docs", passages=[encoder_pb2.Passage(passage_id="z", text=text) for text in ("1", "2")]
        )
        assert to.statuses(await to.upsert(twice)) == [[STORED, REFUSED]]
        assert to.statuses(await to.upsert(to.message("docs", x="second"))) == [[STORED]]  # another upload may
        assert Collection.open(store, "docs").get_texts(["x", "z"]) == ["second", "1"]


async def test_what_the_codec_was_not_trained_for_is_refused_unless_told(
    worker: Serve,
    store: Store,
    encoder: PassageEncoder,
    real_texts: list[str],
    passages: Callable[..., list[SourcePassage]],
) -> None:
    uniform = passages([f"the same few words the same few words {i}" for i in range(16)], "u")
    index(uniform, encoder, store, "docs", CollectionSettings(4, "SQ8"))
    sent = {f"p{i}": text for i, text in enumerate(text for text in real_texts if len(text) > 200) if i < 8}
    async with worker() as to:
        (response,) = await to.upsert(to.message("docs", **sent))
        assert {result.status for result in response.results} == {REFUSED}
        assert "lie outside what SQ8 was trained for" in response.results[0].message
    async with worker(allow_clipped=True) as to:
        (response,) = await to.upsert(to.message("docs", **sent))
        assert {result.status for result in response.results} == {STORED}
        headers = store.headers_many("docs", list(sent))
        assert [result.num_clipped for result in response.results] == [header.num_clipped for header in headers]
        assert min(header.num_clipped for header in headers) > 0


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


async def test_a_message_of_very_many_passages_is_checked_in_steps_and_in_order(worker: Serve, store: Store) -> None:
    ids = [f"p{i}" for i in range(3 * MANY)]
    good = {MANY // 2: "a text", 2 * MANY: "another", 3 * MANY - 1: "the last"}
    async with worker() as to:
        (response,) = await to.upsert(to.message("docs", **{id_: good.get(i, " ") for i, id_ in enumerate(ids)}))
    assert [result.passage_id for result in response.results] == ids
    assert [i for i, result in enumerate(response.results) if result.status == STORED] == list(good)
    assert {result.status for result in response.results} == {STORED, REFUSED}


async def test_backpressure_the_next_message_is_not_read_before_there_is_room(worker: Serve, store: Store) -> None:
    async with worker(max_unacknowledged_passages=4) as to:
        gate = to.gate()
        num_sent = 0

        async def many() -> AsyncIterator[encoder_pb2.UpsertRequest]:
            nonlocal num_sent
            for i in count():
                num_sent += 1
                yield to.message("docs", **{f"p{i}": f"{i} " + "x" * 50_000})

        upload = asyncio.create_task(_collect(to.stub.Upsert(many(), timeout=120)))
        await gate.wait_entered()
        before = -1
        while before != num_sent:  # what flow control lets through, a few megabytes, is through
            before = num_sent
            await asyncio.sleep(0.5)
        assert to.num_waiting(bulk=True) + len(gate.batches[0]) <= 4
        upload.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await upload
        await to.until(lambda: to.num_waiting(bulk=True) == 0)


async def _collect(call: Any) -> list[Any]:
    return [response async for response in call]


async def test_a_stream_that_breaks_keeps_what_was_acknowledged(worker: Serve, store: Store) -> None:
    async with worker() as to:
        call = to.stub.Upsert(iter([to.message("docs", a="one"), to.message("other", b="two")]), timeout=60)
        assert to.statuses([await call.read()]) == [[STORED]]
        with pytest.raises(grpc.aio.AioRpcError, match="'docs', as in the first message"):
            await call.read()
        assert Collection.open(store, "docs").stats().num_passages == 1


async def test_upsert_errors_name_field_and_reason(
    worker: Serve, store: Store, short_encoder: PassageEncoder, passages: Callable[..., list[SourcePassage]]
) -> None:
    index(passages(["text"]), short_encoder, store, "theirs")
    async with worker() as to:
        await to.upsert(to.message("ours", a="one"))

        async def fails(**fields: object) -> tuple[grpc.StatusCode, str, list[Any]]:
            passages = [encoder_pb2.Passage(passage_id="p", text="text")]
            return await to.failure(to.upsert(encoder_pb2.UpsertRequest(passages=passages, **fields)))

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
