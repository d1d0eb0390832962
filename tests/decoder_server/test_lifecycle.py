"""Laws of a server's life, over real gRPC: ready only when proven, full but alive, left alone by who left, drained."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from checkpoint.synthetic import make_checkpoint
from decoder_server.config import DecoderConfig, ModelConfig
from decoder_server.edge.grpc import SERVICE
from decoder_server.server import DecoderServer
from preread.v1 import rerank_pb2, rerank_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel) -> set[int]:
    stub = health_pb2_grpc.HealthStub(channel)
    answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE)]
    return {answer.status for answer in answers}


async def test_not_serving_until_a_forward_pass_has_succeeded(tiny, store, gated, refused) -> None:
    gated.gate.clear()
    server = DecoderServer(DecoderConfig.of_one(str(tiny), port=0), store=store, load=lambda _: gated)
    starting = asyncio.create_task(server.start())
    while not server.port:
        await asyncio.sleep(0.001)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await health(channel) == {NOT_SERVING}
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        await refused(stub.Rerank(rerank_pb2.RerankRequest(query="q")), grpc.StatusCode.UNAVAILABLE)
        gated.gate.set()
        await starting
        assert await health(channel) == {SERVING}
    await server.stop(1)


async def test_nothing_is_answered_until_every_model_has_loaded(tiny, store, fbnl, gated, refused) -> None:
    """Or a name that comes later would be unknown, and not merely not there yet."""
    gated.gate.clear()
    models = (ModelConfig(str(tiny), "first"), ModelConfig(str(tiny), "second"))
    loading: list[str] = []

    def load(model: ModelConfig) -> object:
        loading.append(model.name)
        return fbnl if model.name == "first" else gated  # whose first pass is held

    server = DecoderServer(DecoderConfig(models, port=0), store=store, load=load)
    starting = asyncio.create_task(server.start())
    while "second" not in loading:
        await asyncio.sleep(0.001)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await health(channel) == {NOT_SERVING}
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        for name in ("", "first", "second"):
            await refused(stub.Rerank(rerank_pb2.RerankRequest(query="q", model=name)), grpc.StatusCode.UNAVAILABLE)
        gated.gate.set()
        await starting
        assert await health(channel) == {SERVING}
        assert list(server.engines) == ["first", "second"]
    await server.stop(1)


async def test_a_checkpoint_that_cannot_be_served_ends_the_start(tmp_path, store) -> None:
    (tmp_path / "config.json").write_text("{}")
    server = DecoderServer(DecoderConfig.of_one(str(tmp_path), port=0), store=store)
    with pytest.raises(ValueError, match="model_type"):
        await server.start()


async def test_a_taken_port_is_one_clear_error(serve, tiny, store) -> None:
    async with serve() as serving:
        server = DecoderServer(DecoderConfig.of_one(str(tiny), port=serving.server.port), store=store)
        with pytest.raises(OSError, match="is the port taken"):
            await server.start()


async def test_a_full_queue_says_when_to_come_back_and_the_server_lives_on(serve, gated, refused, detail) -> None:
    async with serve(backend=gated, max_queue_requests=3) as serving:
        await serving.rerank(ids=["p1"])  # a rate to measure by
        gated.gate.clear()
        gated.entered.clear()
        admitted = [asyncio.create_task(serving.rerank(ids=["p1", "p2"])) for _ in range(3)]
        await gated.wait_entered()
        while serving.engine.admission.num_requests < 3:
            await asyncio.sleep(0.001)
        for _ in range(20):
            error = await refused(serving.rerank(ids=["p1"]), grpc.StatusCode.RESOURCE_EXHAUSTED)
            delay = detail(error, error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds()
            assert 0.05 <= delay <= 120
        assert await health(serving.channel) == {SERVING}
        gated.gate.set()
        answers = await asyncio.gather(*admitted)
        assert all(answer.num_scored == 2 for answer in answers)
        assert (await serving.rerank(ids=["p1"])).num_scored == 1
        assert serving.engine.admission.num_rejected == 20


async def test_a_call_too_many_is_told_so_and_probes_get_in(serve, gated, refused, detail) -> None:
    async with serve(backend=gated, max_connections=2) as serving:
        gated.gate.clear()
        held = [asyncio.create_task(serving.rerank(ids=["p1"])) for _ in range(2)]
        await gated.wait_entered()
        while serving.engine.admission.num_requests < 2:
            await asyncio.sleep(0.001)
        error = await refused(serving.rerank(ids=["p1"]), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert detail(error, error_details_pb2.RetryInfo).retry_delay.seconds == 1
        assert await health(serving.channel) == {SERVING}
        gated.gate.set()
        await asyncio.gather(*held)
        assert (await serving.rerank(ids=["p1"])).num_scored == 1


async def test_a_queue_is_bounded_by_tokens_too(serve, gated, texts, refused) -> None:
    async with serve(backend=gated, max_queue_tokens=5000) as serving:
        gated.gate.clear()
        # Larger than the queue, and admitted because nothing else is there.
        first = asyncio.create_task(serving.rerank(ids=texts))
        await gated.wait_entered()
        error = await refused(serving.rerank(ids=["p1"]), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "5000" in error.details()
        assert serving.engine.admission.num_tokens > 5000
        gated.gate.set()
        assert (await first).num_scored == len(texts)


async def test_a_deadline_ends_the_call_and_its_work(serve, gated, texts, refused) -> None:
    async with serve(backend=gated, max_batch_tokens=1000) as serving:
        gated.gate.clear()
        call = asyncio.create_task(serving.rerank(ids=texts, timeout=1))
        await gated.wait_entered()
        await refused(call, grpc.StatusCode.DEADLINE_EXCEEDED)  # while its first pass is still held
        while serving.engine.admission.num_requests:
            await asyncio.sleep(0.001)
        before = len(gated.passes)
        gated.gate.set()
        assert (await serving.rerank(ids=["p1"])).num_scored == 1
        assert len(gated.passes) == before + 1
        assert serving.engine.scheduler.stats.num_dropped_pairs > 0
        assert serving.engine.admission.num_tokens == pytest.approx(0, abs=1e-6)


async def test_a_deadline_is_kept_without_the_transport(serve, gated, texts, make_request) -> None:
    """Edges that know no gRPC deadline give one to the engine."""
    from decoder_server.edge.grpc import unpack_request
    from preread.errors import DeadlineExceeded

    async with serve(backend=gated) as serving:
        gated.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await serving.engine.rerank(
                await unpack_request(make_request(ids=texts), 1000), deadline=time.monotonic() + 0.05
            )


async def test_who_cancels_is_dropped_before_the_next_pass(serve, gated, texts) -> None:
    async with serve(backend=gated, max_batch_tokens=1000) as serving:
        gated.gate.clear()
        call = serving.stub.RerankStream(
            rerank_pb2.RerankStreamRequest(
                request=rerank_pb2.RerankRequest(
                    query="q",
                    collection="docs",
                    candidates=[rerank_pb2.Candidate(passage_id=i) for i in texts],
                )
            )
        )
        await gated.wait_entered()
        call.cancel()
        while serving.engine.admission.num_requests:
            await asyncio.sleep(0.001)
        before = len(gated.passes)
        gated.gate.set()
        assert (await serving.rerank(ids=["p1"])).num_scored == 1
        assert len(gated.passes) == before + 1
        assert serving.engine.scheduler.stats.num_dropped_pairs > 0


async def test_a_small_request_overtakes_a_large_one(serve, gated, texts) -> None:
    async with serve(backend=gated, max_batch_tokens=600) as serving:
        gated.seconds_per_pass = 0.02
        large = asyncio.create_task(serving.rerank(ids=texts))
        await gated.wait_entered()
        before = len(gated.passes)
        small = await serving.rerank(ids=["p1"])
        assert not large.done()
        assert len(gated.passes) - before <= 3
        assert small.num_scored == 1
        assert (await large).num_scored == len(texts)


async def test_stopping_lets_requests_under_way_finish(serve, gated, refused) -> None:
    async with serve(backend=gated) as serving:
        gated.gate.clear()
        running = asyncio.create_task(serving.rerank(ids=["p1"]))
        await gated.wait_entered()
        stopping = asyncio.create_task(serving.server.stop(10))
        while await health(serving.channel) != {NOT_SERVING}:
            await asyncio.sleep(0.001)
        await refused(serving.rerank(ids=["p1"]), grpc.StatusCode.UNAVAILABLE)
        gated.gate.set()
        assert (await running).num_scored == 1
        await stopping


async def test_stopping_ends_at_its_grace(serve, gated, refused) -> None:
    async with serve(backend=gated) as serving:
        gated.gate.clear()
        running = asyncio.create_task(serving.rerank(ids=["p1"]))
        await gated.wait_entered()
        stopping = asyncio.create_task(serving.server.stop(0.1))
        await refused(running, grpc.StatusCode.UNAVAILABLE)
        gated.gate.set()  # a pass under way is not cut
        await stopping


async def test_an_alias_moves_under_a_running_server(serve, store, encoding, texts, by_hand) -> None:
    encoding.fill(store, "docs-2", {"p1": texts["p2"]}, ratio=8)
    store.set_alias("live", "docs")
    async with serve() as serving:
        before = await serving.rerank(ids=["p1"], collection="live")
        store.set_alias("live", "docs-2")
        after = await serving.rerank(ids=["p1"], collection="live")
        assert [before.results[0].compression_ratio, after.results[0].compression_ratio] == [4, 8]
        assert after.results[0].margin == pytest.approx(by_hand(texts["p2"], 8), abs=1e-5)


async def test_a_collection_written_anew_under_its_name_is_opened_anew(serve, store, encoding, texts) -> None:
    async with serve() as serving:
        await serving.rerank(ids=["p1"])
        store.drop_collection("docs")
        encoding.fill(store, "docs", {"p1": texts["p1"]}, ratio=2)
        answer = await serving.rerank(ids=["p1", "p2"])
        assert [(r.compression_ratio, r.num_states > 0) for r in answer.results] == [(2, True), (0, False)]


async def test_a_passage_written_anew_is_read_anew(serve, store, encoding, texts, by_hand) -> None:
    from cache.collection import Collection, StoredPassage

    async with serve() as serving:
        await serving.rerank(ids=["p1"])
        docs = Collection.open(store, "docs")
        docs.put_many([StoredPassage("p1", encoding.encode(texts["p2"], 4), texts["p2"])])
        answer = await serving.rerank(ids=["p1"])
        assert answer.results[0].margin == pytest.approx(by_hand(texts["p2"]), abs=1e-5)


async def test_a_collection_of_another_encoder_is_refused_by_both_names(
    serve, store, encoding, tmp_path, refused, detail
) -> None:
    from checkpoint import Checkpoint

    other = Checkpoint.open(make_checkpoint(tmp_path / "other", "tiny", seed=1)).identity
    store.write_manifest(encoding.manifest("foreign", fingerprint=other.fingerprint))
    async with serve() as serving:
        error = await refused(serving.rerank(ids=["p1"], collection="foreign"), grpc.StatusCode.FAILED_PRECONDITION)
        assert detail(error, error_details_pb2.ErrorInfo).reason == "ENCODER_MISMATCH"
        assert other.fingerprint[:12] in error.details()
        assert serving.engine.backend.identity().fingerprint[:12] in error.details()


async def test_models_and_collections_are_listed_with_their_limits(serve, store, texts) -> None:
    store.set_alias("live", "docs")
    async with serve(max_candidates=77, max_message_bytes=1 << 20) as serving:
        (model,) = (await serving.stub.ListModels(rerank_pb2.ListModelsRequest())).models
        assert (model.name, model.backend, model.dtype, model.device) == ("tiny", "fbnl", "float32", "cpu")
        assert (model.max_candidates, model.max_message_bytes, model.max_query_tokens) == (77, 1 << 20, 512)
        assert not model.encodes_on_demand
        assert model.encoder.fingerprint == serving.engine.backend.identity().fingerprint
        (docs,) = (await serving.stub.ListCollections(rerank_pb2.ListCollectionsRequest())).collections
        assert (docs.name, docs.aliases, docs.compression_ratio, docs.codec) == ("docs", ["live"], 4, "Flat")
        assert docs.num_passages == len(texts)
        assert docs.encoder == model.encoder


async def test_a_message_over_the_published_limit_is_refused(serve, refused) -> None:
    async with serve(max_message_bytes=10_000) as serving:
        await refused(serving.rerank(inline=["x" * 20_000]), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (await serving.rerank(ids=["p1"])).num_scored == 1


async def test_the_services_reflect_themselves(serve) -> None:
    async with serve() as serving:
        stub = reflection_pb2_grpc.ServerReflectionStub(serving.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        (answer,) = [one async for one in call]
        assert {SERVICE, "grpc.health.v1.Health"} <= {s.name for s in answer.list_services_response.service}
