"""Laws of who may call a reranking server: keys by scope, certificates from files, by the product's own client."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from decoder_server.config import DecoderConfig
from decoder_server.server import DecoderServer
from preread import AsyncClient, ClientOptions, PermissionDenied, RetryPolicy, TlsFiles, Unauthenticated, Unavailable
from preread.v1 import rerank_pb2, rerank_pb2_grpc
from preread_edge.access import ApiKeys

ASKS, WRITES = "asks-0123456789ab", "writes-0123456789"
ONCE = RetryPolicy(budget_seconds=0)


@pytest.fixture
async def started(tiny, store, fbnl):
    """started(keys=..., **config): a running server."""
    running: list[DecoderServer] = []

    async def start(keys=(), **config: object) -> DecoderServer:
        settings = DecoderConfig.of_one(str(tiny), port=0, device="cpu", dtype="float32", **config)
        running.append(DecoderServer(settings, store=store, load=lambda _: fbnl, keys=ApiKeys.parse(keys)))
        await running[-1].start()
        return running[-1]

    yield start
    for server in running:
        await server.stop(1)


async def test_keys(started, refused, detail) -> None:
    server = await started([f"rerank:{ASKS}", f"index:{WRITES}"])
    address = f"127.0.0.1:{server.port}"
    async with AsyncClient(address, options=ClientOptions(api_key=ASKS)) as client:
        assert len(await client.rerank("q", ["x"])) == 1
    async with AsyncClient(address) as stranger:
        with pytest.raises(Unauthenticated, match="Authorization: Bearer KEY"):
            await stranger.list_models()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        metadata = (("authorization", f"Bearer {WRITES}"),)
        call = stub.ListModels(rerank_pb2.ListModelsRequest(), metadata=metadata)
        error = await refused(call, grpc.StatusCode.PERMISSION_DENIED)
        assert detail(error, error_details_pb2.ErrorInfo).reason == "SCOPE_REQUIRED"
        await refused(_first(stub.RerankStream(rerank_pb2.RerankStreamRequest())), grpc.StatusCode.UNAUTHENTICATED)
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, "probes carry no keys"


async def test_a_key_bound_to_collections_is_bound_in_calls_of_many(started, texts) -> None:
    """Also where texts are looked up: a collection that it may not use holds them."""
    server = await started([f"rerank@docs:{ASKS}", f"rerank@others:{WRITES}"])
    address, queries, candidates = f"127.0.0.1:{server.port}", ["one", "two"], list(texts)[:3]
    async with AsyncClient(address, options=ClientOptions(api_key=ASKS)) as client:
        assert [len(one) for one in await client.rerank_many(queries, candidates, collection="docs")] == [3, 3]
        with pytest.raises(PermissionDenied, match="'others'"):
            await client.rerank_many(queries, candidates, collection="others")
        found = await client.rerank_many(queries, [texts["p1"]])
        assert [one.summary.num_found for one in found] == [1, 1]
    async with AsyncClient(address, options=ClientOptions(api_key=WRITES)) as stranger:
        with pytest.raises(PermissionDenied, match="'docs'"):
            await stranger.rerank_many(queries, candidates, collection="docs")
        hidden = await stranger.rerank_many(queries, [texts["p1"]])
        assert [one.summary.num_found for one in hidden] == [0, 0]
    async with AsyncClient(address) as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.rerank_many(queries, candidates, collection="docs")


async def _first(call):
    return [one async for one in call]


async def test_tls(started, pem) -> None:
    cert, key = pem
    server = await started(tls_cert_file=cert, tls_key_file=key)
    address = f"127.0.0.1:{server.port}"
    async with AsyncClient(address, options=ClientOptions(tls=TlsFiles(cert))) as client:
        assert len(await client.list_models()) == 1
    async with AsyncClient(address, options=ClientOptions(retry=ONCE)) as plain:
        with pytest.raises(Unavailable):
            await plain.list_models()


async def test_mutual_tls(started, pem) -> None:
    cert, key = pem
    server = await started(tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=cert)
    address = f"127.0.0.1:{server.port}"
    async with AsyncClient(address, options=ClientOptions(tls=TlsFiles(cert, cert, key))) as client:
        assert len(await client.list_models()) == 1
    async with AsyncClient(address, options=ClientOptions(tls=TlsFiles(cert), retry=ONCE)) as stranger:
        with pytest.raises(Unavailable):
            await stranger.list_models()


async def test_files_that_are_no_certificate_end_the_start(started, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(OSError, match=r"nonsense\.pem"):
        await started(tls_cert_file=str(nonsense), tls_key_file=str(nonsense))
    with pytest.raises(FileNotFoundError):
        await started(tls_cert_file=str(tmp_path / "none"), tls_key_file=str(nonsense))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tls_cert_file": "c"}, "tls_key_file"),
        ({"tls_key_file": "k"}, "tls_cert_file"),
        ({"tls_client_ca_file": "a"}, "expected all three"),
        ({"encoder_tls_cert_file": "c"}, "go together"),
    ],
)
def test_files_go_together(files: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.of_one("x", **files)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(DecoderConfig.of_one("x", encoder_api_key="secret"))


async def test_a_server_asks_its_worker_with_key_and_tls(started, pem, tiny, tmp_path) -> None:
    from encoder_worker.config import EncoderConfig
    from encoder_worker.server import EncoderServer

    cert, key = pem
    worker = EncoderServer(
        EncoderConfig(
            str(tiny),
            port=0,
            store=f"faiss:{tmp_path / 'worker'}",
            device="cpu",
            dtype="float32",
            tls_cert_file=cert,
            tls_key_file=key,
            tls_client_ca_file=cert,
        ),
        keys=ApiKeys.parse([f"rerank:{ASKS}"]),
    )
    await worker.start()
    try:
        reach = {"encoder_address": f"127.0.0.1:{worker.port}", "encoder_tls_ca_file": cert}
        pair = {"encoder_tls_cert_file": cert, "encoder_tls_key_file": key}
        for config, well in (
            ({"encoder_api_key": ASKS, **pair}, True),
            ({"encoder_api_key": ASKS}, False),  # no certificate to show
            (pair, False),  # no key
        ):
            server = await started(**reach, **config)
            async with AsyncClient(f"127.0.0.1:{server.port}") as client:
                (result,) = await client.rerank("q", ["a text"])
                assert (result.score is not None) is well
    finally:
        await worker.stop(1)


async def test_an_aged_connection_is_renewed_without_losing_a_call(started) -> None:
    server = await started(max_connection_age_seconds=0.2)
    async with AsyncClient(f"127.0.0.1:{server.port}", options=ClientOptions(retry=ONCE)) as client:
        until = asyncio.get_running_loop().time() + 1.0
        while asyncio.get_running_loop().time() < until:
            assert len(await client.list_models()) == 1
            await asyncio.sleep(0.01)
