"""Laws of write-through: what one server has encoded, every server finds; with a real worker over a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cache.collection import Collection
from cache.open import open_store
from cache.states import text_digest
from cache.store import Store
from decoder_server.config import DecoderConfig
from decoder_server.server import DecoderServer
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread import AsyncClient, ClientOptions
from preread.v1 import common_pb2
from preread_edge.access import ApiKeys

HIT, ENCODED = common_pb2.CANDIDATE_STATUS_HIT, common_pb2.CANDIDATE_STATUS_ENCODED
NEW = ["never indexed before", "a second text, which is a little longer than the first one", "third"]
SERVER_KEY = "rerank,index:server-key-0123456789"

Work = Callable[..., AbstractAsyncContextManager[EncoderServer]]


def ids_of(texts: list[str]) -> list[str]:
    return [text_digest(text).hex() for text in texts]


def counted(worker: EncoderServer, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(generate_latest(worker.metrics.registry).decode())
    samples = [sample for family in families for sample in family.samples if sample.name == f"preread_encoder_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def kept(worker: EncoderServer, num: int) -> None:
    """Returns when the worker has kept so many passages since its start."""
    deadline = time.monotonic() + 20
    while counted(worker, "kept_passages_total") < num:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def results(answer: Any) -> list[tuple[int, float, str, str]]:
    by_index = sorted(answer.results, key=lambda one: one.index)
    return [(one.status, one.margin, one.found_in, one.found_id) for one in by_index]


@pytest.fixture
def work(tiny, store) -> Work:
    """Starts a worker over the store; keyword arguments are EncoderConfig's."""

    @asynccontextmanager
    async def start(
        *, over: Store | None = None, keys: list[str] | None = None, **config: object
    ) -> AsyncIterator[EncoderServer]:
        settings = {"port": 0, "device": "cpu", "dtype": "float32"} | config
        worker = EncoderServer(
            EncoderConfig(str(tiny), **settings), store=over or store, keys=ApiKeys.parse(keys or [])
        )
        await worker.start()
        try:
            yield worker
        finally:
            await worker.stop(1)

    return start


def at(worker: EncoderServer) -> dict[str, str]:
    return {"encoder_address": f"127.0.0.1:{worker.port}", "write_through": "kept"}


@pytest.mark.parametrize("kind", ["faiss", "redis"])
async def test_what_was_encoded_once_is_found_by_every_server_and_after_a_restart(
    serve, work, kind, tmp_path, encoding, texts, request
) -> None:
    url = f"faiss:{tmp_path / 'other'}" if kind == "faiss" else request.getfixturevalue("redis_server").url
    with closing(open_store(url, read_budget_seconds=5.0)) as store:
        encoding.fill(store, "docs", texts)
        async with work(over=store) as worker, serve(over=store, **at(worker)) as serving:
            first = results(await serving.rerank(collection="", inline=[*NEW, texts["p3"]]))
            assert [one[0] for one in first] == [ENCODED] * 3 + [HIT]
            assert first[3][2:] == ("docs", "p3")
            await kept(worker, 3)
            again = results(await serving.rerank(collection="", inline=[*NEW, texts["p3"]]))
            assert [one[2:] for one in again[:3]] == [("kept", one) for one in ids_of(NEW)]
            async with serve(over=store, **at(worker)) as other:
                there = results(await other.rerank(collection="", inline=[*NEW, texts["p3"]]))
                assert other.engine.fetcher.on_demand.num_encoded == 0
            assert serving.engine.fetcher.on_demand.num_encoded == 3
    with closing(open_store(url, read_budget_seconds=5.0)) as store:
        async with serve(over=store, lookup=("docs", "kept")) as serving:  # no worker, no write-through
            later = results(await serving.rerank(collection="", inline=[*NEW, texts["p3"]]))
        collection = Collection.open(store, "kept")
        assert [damage for _, _, damage in collection.verify()] == [""] * 3
        assert store.audit("kept").problems == ()
        assert (collection.manifest.compression_ratio, collection.manifest.codec) == (4, "SQfp16")
        assert collection.get_texts(ids_of(NEW)) == [None] * 3
    # The states are the same numbers; batches of other passages may round the last bit of a margin differently.
    margins = [[one[1] for one in answer] for answer in (first, again, there, later)]
    assert margins[0] == pytest.approx(margins[1], abs=1e-6)
    assert margins[1] == margins[2] == margins[3]


async def test_the_first_answer_has_the_states_of_every_later_one(serve, work, store, encoding) -> None:
    """To the bit: what the worker answers is what the store gives back, at other ratios too."""
    async with work() as worker, serve(**at(worker)) as serving:
        await serving.rerank(collection="", inline=NEW)
        on_demand = serving.engine.fetcher.on_demand
        keep = serving.engine._keep()
        await kept(worker, 3)
        stored = Collection.open(store, "kept").get_many(ids_of(NEW))
        for text, later in zip(NEW, stored, strict=True):
            for ratio in (4, 8, 12):
                first = on_demand.kept(text_digest(text), ratio, keep)
                assert first.states.tobytes() == later.at_ratio(ratio).states.tobytes()
            assert first.states.tobytes() != encoding.encode(text, 12).states.tobytes()  # the codec rounds


async def test_alone_in_one_request_both_answers_have_one_margin_to_the_bit(serve, work) -> None:
    async with work() as worker, serve(max_inline_cache_bytes=0, **at(worker)) as serving:
        for text in NEW:
            before = counted(worker, "kept_passages_total")
            (first,) = results(await serving.rerank(collection="", inline=[text]))
            await kept(worker, int(before) + 1)
            (later,) = results(await serving.rerank(collection="", inline=[text]))
            assert (first[0], later[0]) == (ENCODED, HIT)
            assert first[1] == later[1]


async def test_servers_and_workers_side_by_side_make_one_record(serve, work, tmp_path) -> None:
    """Each worker with another handle, as processes have; each writes what it encoded, at the same moment."""
    path = f"faiss:{tmp_path / 'shared'}"
    with closing(open_store(path)) as one, closing(open_store(path)) as two:
        async with (
            work(over=one) as first,
            work(over=two) as second,
            serve(over=one, **at(first)) as left,
            serve(over=two, **at(second)) as right,
        ):
            for n in range(5):
                inline = [f"{n}: {text}" for text in NEW]
                await asyncio.gather(*(each.rerank(collection="", inline=inline) for each in (left, right)))
            await asyncio.sleep(2.5)
        collection = Collection.open(one, "kept")
        assert collection.stats().num_passages == 15
        assert [damage for _, _, damage in collection.verify()] == [""] * 15
        assert one.audit("kept").problems == ()


async def test_the_kept_collection_is_looked_into_last_unless_lookup_says_otherwise(
    serve, work, store, encoding
) -> None:
    async with work() as worker:
        async with serve(**at(worker)) as serving:
            await serving.rerank(collection="", inline=NEW[:1])
            await kept(worker, 1)
        encoding.fill(store, "zebra", {"z": NEW[0]})  # after `kept` by name

        async def found(**config: object) -> tuple[str, str]:
            async with serve(**at(worker) | config) as serving:
                (one,) = results(await serving.rerank(collection="", inline=NEW[:1]))
            return one[2:]

        assert await found() == ("zebra", "z")
        assert await found(lookup=("docs",)) == ("kept", ids_of(NEW)[0])
        assert await found(lookup=("kept", "zebra")) == ("kept", ids_of(NEW)[0])


async def test_a_key_keeps_and_finds_within_its_collections(tiny, store, fbnl, work) -> None:
    bound, free, other = "bound-key-0123456789", "free-key-0123456789", "other-key-0123456789"
    keys = [f"rerank@docs:{bound}", f"rerank:{free}", f"rerank@docs,kept:{other}"]
    async with work(keys=[SERVER_KEY]) as worker:
        config = at(worker) | {"encoder_api_key": SERVER_KEY.partition(":")[2], "max_staleness_seconds": 0.0}
        settings = DecoderConfig.of_one(str(tiny), port=0, device="cpu", dtype="float32", **config)
        server = DecoderServer(settings, store=store, load=lambda _: fbnl, keys=ApiKeys.parse(keys))
        await server.start()

        async def ask(key: str, text: str) -> tuple[str, str, str]:
            async with AsyncClient(f"127.0.0.1:{server.port}", options=ClientOptions(api_key=key)) as client:
                (one,) = await client.rerank("q", [text])
            return one.status, one.found_in, one.found_id

        try:
            assert (await ask(bound, NEW[0]))[0] == "encoded"
            assert (await ask(free, NEW[1]))[0] == "encoded"
            await kept(worker, 1)
            await asyncio.sleep(1.5)
            assert counted(worker, "kept_passages_total") == 1  # not what the bound key sent
            for key in (free, other):
                assert await ask(key, NEW[1]) == ("hit", "kept", ids_of(NEW)[1])
            assert (await ask(bound, NEW[1]))[0] == "encoded"
            assert Collection.open(store, "kept").list_ids(10)[0] == [ids_of(NEW)[1]]
            async with AsyncClient(f"127.0.0.1:{server.port}", options=ClientOptions(api_key=bound)) as client:
                assert [one.name for one in await client.list_collections()] == ["docs"]
        finally:
            await server.stop(1)


async def test_a_flood_by_one_key_leaves_what_another_key_sent(tiny, store, fbnl, work) -> None:
    quiet, flood = "quiet-key-0123456789", "flood-key-0123456789"
    hot = [f"{n}: {NEW[1]}" for n in range(40)]
    # A faiss: store keeps half of so few bytes for the copy that a compaction makes; a passage takes about 1.5 KB.
    async with work(keys=[SERVER_KEY], max_kept_bytes=500_000) as worker:
        config = at(worker) | {"encoder_api_key": SERVER_KEY.partition(":")[2], "max_staleness_seconds": 0.0}
        settings = DecoderConfig.of_one(str(tiny), port=0, device="cpu", dtype="float32", **config)
        keys = ApiKeys.parse([f"rerank:{quiet}", f"rerank:{flood}"])
        server = DecoderServer(settings, store=store, load=lambda _: fbnl, keys=keys)
        await server.start()
        try:
            for key, texts in ((quiet, hot), (flood, [f"{n} {NEW[1]}" for n in range(600)])):
                async with AsyncClient(f"127.0.0.1:{server.port}", options=ClientOptions(api_key=key)) as client:
                    for start in range(0, len(texts), 100):
                        await client.rerank("q", texts[start : start + 100])
                await kept(worker, len(hot))
            deadline = time.monotonic() + 20
            while counted(worker, "kept_passages_total") + counted(worker, "not_kept_passages_total") < 640:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        finally:
            await server.stop(1)
        assert counted(worker, "evicted_passages_total") > 0
    records = Collection.open(store, "kept").get_many(ids_of(hot))
    assert None not in records
    assert Collection.open(store, "kept").stats().num_passages < 640


async def test_a_worker_keeps_for_a_key_that_may_write(tiny, store, fbnl, work, serve, caplog) -> None:
    async with work(keys=["rerank:only-ranks-0123456789"]) as worker:
        async with serve(encoder_api_key="only-ranks-0123456789", **at(worker)) as serving:
            (one,) = results(await serving.rerank(collection="", inline=NEW[:1]))
        assert one[0] == ENCODED
        assert counted(worker, "not_kept_passages_total", reason="denied") == 1
    assert "kept" not in store.list_collections()
    assert "the server's key lacks the scope index" in caplog.text


async def test_an_indexed_collection_is_refused_at_the_start(serve, work) -> None:
    async with work() as worker:
        with pytest.raises(
            ValueError, match=r"write_through is 'docs', which holds 'p\d+'; expected a name that is free"
        ):
            async with serve(encoder_address=f"127.0.0.1:{worker.port}", write_through="docs"):
                pass


def test_write_through_needs_lookup() -> None:
    with pytest.raises(ValueError, match="write_through is 'kept' and lookup is none; expected a lookup too"):
        DecoderConfig.of_one("model", write_through="kept", lookup=())


async def test_what_is_found_is_told_to_the_worker(serve, work) -> None:
    async with work() as worker, serve(**at(worker)) as serving:
        await serving.rerank(collection="", inline=NEW)
        await kept(worker, 3)
        usage = worker.engine.keeper._opened["kept"][0].usage
        asked = usage._entries[ids_of(NEW)[0]].asked
        await serving.rerank(collection="", inline=NEW[:1])
        deadline = time.monotonic() + 10
        while usage._entries[ids_of(NEW)[0]].asked == asked:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert usage._entries[ids_of(NEW)[1]].asked == asked


async def test_a_store_that_is_away_costs_no_answer(serve, work, redis_server, encoding, texts) -> None:
    store = open_store(redis_server.url, read_budget_seconds=5.0)
    encoding.fill(store, "docs", texts)
    async with work(over=store) as worker, serve(over=store, read_budget_seconds=0.5, **at(worker)) as serving:
        await serving.rerank(collection="", inline=NEW[:1])
        await kept(worker, 1)
        redis_server.stop()
        answer = results(await serving.rerank(collection="", inline=NEW[1:]))
        assert [one[0] for one in answer] == [ENCODED] * 2
        deadline = time.monotonic() + 20
        while counted(worker, "not_kept_passages_total", reason="failed") < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    store.close()
