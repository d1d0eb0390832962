"""Laws of what a server says of itself to probes, where its encoder is away, comes back, or is behind a dead proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from decoder_server import readiness
from decoder_server.config import DecoderConfig, HttpConfig
from decoder_server.edge.grpc import SERVICE
from decoder_server.server import DecoderServer, Gateway
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread import AsyncClient, Candidate
from preread.v1 import encoder_pb2, encoder_pb2_grpc
from preread_edge.access import ApiKeys

DEAD = "http://127.0.0.1:9"  # a proxy that nothing listens at
VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
STATES = {value: name for name, value in health_pb2.HealthCheckResponse.ServingStatus.items()}

StartWorker = Callable[..., Awaitable[EncoderServer]]


@pytest.fixture(autouse=True)
def quickly(monkeypatch) -> None:
    monkeypatch.setattr(readiness, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(readiness, "RETRY_SECONDS", 0.05)


@pytest.fixture
async def start_worker(tiny, tmp_path) -> AsyncIterator[StartWorker]:
    """start_worker(port=0, keys=()): a running worker."""
    running: list[EncoderServer] = []

    async def start(port: int = 0, keys=()) -> EncoderServer:
        store = f"faiss:{tmp_path / f'worker{len(running)}'}"
        config = EncoderConfig(str(tiny), port=port, store=store, device="cpu", dtype="float32")
        running.append(EncoderServer(config, keys=ApiKeys.parse(keys)))
        await running[-1].start()
        return running[-1]

    yield start
    for worker in running:
        await worker.stop(0)


async def says(channel: grpc.aio.Channel) -> dict[str, str]:
    """What gRPC's health checks answer, by what was asked for."""
    found = await _answers(channel)
    if found[""] != found[SERVICE]:  # it changed between two of the questions
        found = await _answers(channel)
    assert found[""] == found[SERVICE]
    return found


async def _answers(channel: grpc.aio.Channel) -> dict[str, str]:
    stub, found = health_pb2_grpc.HealthStub(channel), {}
    for name in ("", SERVICE, "live", "encoder"):
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            found[name] = STATES[answer.status]
        except grpc.aio.AioRpcError as exc:
            found[name] = exc.code().name
    return found


async def until(channel: grpc.aio.Channel, ready: str, encoder: str) -> None:
    async with asyncio.timeout(60):
        while (now := await says(channel))[""] != ready or now["encoder"] != encoder:
            assert now["live"] == "SERVING", "a restart would not help"
            await asyncio.sleep(0.02)


def up(server: DecoderServer) -> bool:
    return 'preread_encoder_up{model="tiny"} 1.0' in generate_latest(server.metrics.registry).decode()


async def test_ready_when_the_encoder_has_answered_and_degraded_when_it_leaves(serve, start_worker) -> None:
    worker = await start_worker()
    await worker.stop(0)
    async with serve(encoder_address=f"127.0.0.1:{worker.port}") as serving:
        gateway = Gateway(HttpConfig(port=0), serving.server)
        await gateway.start()
        http = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}", trust_env=False)
        assert await says(serving.channel) == {
            "": "NOT_SERVING", SERVICE: "NOT_SERVING", "live": "SERVING", "encoder": "NOT_SERVING",
        }  # fmt: skip
        answer = await http.get("/health/ready")
        assert (answer.status_code, str(worker.port) in answer.text) == (503, False)
        assert (await http.get("/health")).status_code == 200
        assert not up(serving.server)
        assert (await serving.rerank(ids=["p1"])).num_scored == 1, "what is stored is ranked, ready or not"

        worker = await start_worker(worker.port)
        await until(serving.channel, "SERVING", "SERVING")
        await serving.server.readiness.wait()
        assert (await http.get("/health/ready")).json() == {"status": "ready"}
        assert up(serving.server)
        assert (await serving.rerank(inline=["a text"])).num_scored == 1

        await worker.stop(0)
        await until(serving.channel, "SERVING", "NOT_SERVING")
        answer = await http.get("/health/ready")
        assert (answer.status_code, set(answer.json())) == (200, {"status", "degraded"})
        assert not up(serving.server)
        await http.aclose()
        await gateway.stop(0)


async def test_an_encoder_in_this_process_is_a_part_of_readiness(serve, start_worker) -> None:
    worker = await start_worker()
    async with serve(encoder_address=f"127.0.0.1:{worker.port}", encoder_in_process=True) as serving:
        assert set((await says(serving.channel)).values()) == {"SERVING"}
        await worker.stop(0)
        async with asyncio.timeout(60):
            while set((await says(serving.channel)).values()) != {"NOT_SERVING"}:
                await asyncio.sleep(0.02)


async def test_a_key_that_the_worker_does_not_know(serve, start_worker) -> None:
    worker = await start_worker(keys=["the-right-key-0123456789"])
    address = f"127.0.0.1:{worker.port}"
    async with serve(encoder_address=address, encoder_api_key="another-key-0123456789") as serving:
        assert (await says(serving.channel))[""] == "NOT_SERVING"
    async with serve(encoder_address=address, encoder_api_key="the-right-key-0123456789") as serving:
        assert (await says(serving.channel))[""] == "SERVING"


async def test_without_an_encoder(serve) -> None:
    async with serve() as serving:
        assert await says(serving.channel) == {
            "": "SERVING", SERVICE: "SERVING", "live": "SERVING", "encoder": "NOT_FOUND",
        }  # fmt: skip
    assert serving.server.readiness.problem == "the server is stopping"


async def test_a_dead_proxy_in_the_environment(tiny, store, fbnl, start_worker, monkeypatch) -> None:
    """Neither a server and its encoder on this machine, nor a client and its server, go through it."""
    for name in VARIABLES:
        monkeypatch.setenv(name, DEAD)
    worker = await start_worker()
    address = f"127.0.0.1:{worker.port}"
    config = DecoderConfig.of_one(str(tiny), port=0, device="cpu", dtype="float32", encoder_address=address)
    server = DecoderServer(config, store=store, load=lambda _: fbnl)
    await server.start()
    try:
        assert server.readiness.problem == server.readiness.degraded == ""
        async with AsyncClient(f"127.0.0.1:{server.port}", encoder_address=f"localhost:{worker.port}") as client:
            (result,) = await client.rerank("q", [Candidate(text="a text")])
            assert result.status == "encoded"
            assert await client.describe()
    finally:
        await server.stop(0)


async def test_a_proxy_before_a_worker_elsewhere_is_named(serve, monkeypatch, caplog) -> None:
    monkeypatch.setenv("https_proxy", DEAD)
    async with serve(encoder_address="worker.invalid:50052") as serving:
        assert serving.server.readiness.problem.startswith("an encoder does not answer")
    warned = [record.getMessage() for record in caplog.records if "worker.invalid" in record.getMessage()]
    assert len(warned) == 1, "said once"
    assert "https_proxy is set" in warned[0]


async def test_a_worker_that_cannot_go_on_says_so(start_worker) -> None:
    worker = await start_worker()
    worker.engine.encoder.encode = lambda tokens, ratio: []  # fewer results than texts: a bug that ends the loop
    async with grpc.aio.insecure_channel(f"127.0.0.1:{worker.port}") as channel:
        call = encoder_pb2_grpc.EncoderServiceStub(channel).Encode(encoder_pb2.EncodeRequest(texts=["a text"]))
        health = health_pb2_grpc.HealthStub(channel)
        async with asyncio.timeout(30):
            while (
                await health.Check(health_pb2.HealthCheckRequest())
            ).status == health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.01)
        call.cancel()
