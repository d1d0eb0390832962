"""Laws of bytes that come over gRPC, on every method of both servers: keys first, then messages, and no traceback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from decoder_server.config import DecoderConfig
from decoder_server.server import DecoderServer
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread.tei.v1 import tei_pb2
from preread.v1 import encoder_pb2, rerank_pb2, rerank_pb2_grpc
from preread_edge.access import ApiKeys
from preread_edge.grpc_server import make_server

KEY = "rules-key-0123456789"
WITH_KEY = (("authorization", f"Bearer {KEY}"),)
MIB = 1 << 20
LIMITS = {"on_call": lambda *_: None, "max_calls": 10, "max_request_bytes": MIB, "max_response_bytes": MIB}

METHODS = [
    pytest.param(kind, method, id=method.full_name)
    for kind, file in (
        ("decoder", rerank_pb2.DESCRIPTOR),
        ("decoder", tei_pb2.DESCRIPTOR),
        ("worker", encoder_pb2.DESCRIPTOR),
    )
    for service in file.services_by_name.values()
    for method in service.methods
]


@pytest.fixture
async def servers(tiny, store, fbnl, tmp_path) -> AsyncIterator[dict[str, DecoderServer | EncoderServer]]:
    """Both, with a key that may do everything."""
    keys, settings = ApiKeys.parse([KEY]), {"port": 0, "device": "cpu", "dtype": "float32", "max_message_bytes": MIB}
    decoder = DecoderServer(DecoderConfig.of_one(str(tiny), **settings), store=store, load=lambda _: fbnl, keys=keys)
    worker = EncoderServer(EncoderConfig(str(tiny), store=f"faiss:{tmp_path / 'worker'}", **settings), keys=keys)
    await decoder.start()
    await worker.start()
    yield {"decoder": decoder, "worker": worker}
    await decoder.stop(0)
    await worker.stop(0)


async def answer(server, method: MethodDescriptor, messages: list[bytes], metadata=(), **options) -> str:
    """How a call ends: the name of its status, and what it says."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        path = f"/{method.containing_service.full_name}/{method.name}"
        shape = "_".join("stream" if one else "unary" for one in (method.client_streaming, method.server_streaming))
        request = iter(messages) if method.client_streaming else messages[0]
        call = getattr(channel, shape)(path)(request, metadata=metadata, timeout=30, **options)
        try:
            _ = [one async for one in call] if method.server_streaming else await call
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {error.details()}"
        return "OK"


def count(server, method: MethodDescriptor, code: str) -> float:
    families = text_string_to_metric_families(generate_latest(server.metrics.registry).decode())
    wanted = {"method": f"{method.containing_service.name}/{method.name}", "code": code}
    return sum(s.value for family in families for s in family.samples if "rpcs_total" in s.name and s.labels == wanted)


def broken(method: MethodDescriptor) -> list[bytes]:
    """Bytes that are no message of the method: torn, nested too deep, text that is not UTF-8."""
    group = [bytes([0xA3, 0x06]), bytes([0xA4, 0x06])]  # field 100, begins and ends
    found = [b"\xff\xff", b"\x0a\x7f", group[0] * 200 + group[1] * 200, b"\x00"]
    strings = [f.number for f in method.input_type.fields if f.type == FieldDescriptor.TYPE_STRING and f.number < 16]
    return found + [bytes([number << 3 | 2, 2, 0xC3, 0x28]) for number in strings]


@pytest.mark.parametrize(("kind", "method"), METHODS)
async def test_bytes_that_are_no_message(servers, caplog, kind: str, method: MethodDescriptor) -> None:
    server, cases = servers[kind], broken(method)
    with caplog.at_level(logging.INFO):
        for data in cases:
            assert (await answer(server, method, [data])).startswith("UNAUTHENTICATED ")
        caplog.clear()
        for data in cases:
            ended = await answer(server, method, [data], WITH_KEY)
            expected = f"a message of {len(data)} bytes cannot be parsed; expected {method.input_type.full_name}"
            assert ended == f"INVALID_ARGUMENT {expected}"
    while count(server, method, "INVALID_ARGUMENT") < len(cases):  # counted and logged after the caller has its answer
        await asyncio.sleep(0.01)
    assert count(server, method, "UNAUTHENTICATED") == count(server, method, "INVALID_ARGUMENT") == len(cases)
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in warned] == ["preread_edge.grpc_server"] * len(cases)
    assert not any(record.exc_info or "\n" in record.getMessage() for record in warned)


@pytest.mark.parametrize(("kind", "method"), METHODS)
async def test_messages_over_the_limit(servers, caplog, kind: str, method: MethodDescriptor) -> None:
    """Compressed ones too, whose size shows when they are decompressed."""
    data = bytes([0xA2, 0x06]) + bytes([0x80, 0x80, 0x80, 0x01]) + bytes(2 * MIB)  # field 100, which no message has
    server = servers[kind]
    for compression in (None, grpc.Compression.Gzip, grpc.Compression.Deflate):
        ended = await answer(server, method, [data], WITH_KEY, compression=compression)
        assert ended.startswith("RESOURCE_EXHAUSTED "), ended
    assert not any(record.exc_info for record in caplog.records)
    if not method.client_streaming:  # a stream's end looks the same to its reader
        async with asyncio.timeout(30):
            while count(server, method, "RESOURCE_EXHAUSTED") < 3:
                await asyncio.sleep(0.01)


async def test_a_stream_ends_at_its_broken_message_and_keeps_what_was_acknowledged(servers) -> None:
    worker = servers["worker"]
    method = encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"].methods_by_name["Upsert"]
    passages = [encoder_pb2.Passage(passage_id="kept", text="one two")]
    good = encoder_pb2.UpsertRequest(collection="docs", passages=passages).SerializeToString()
    assert (await answer(worker, method, [good, b"\xff"], WITH_KEY)).startswith("INVALID_ARGUMENT ")
    assert worker.engine.store.stats("docs").num_passages == 1


async def test_a_stranger_is_refused_before_a_message_comes(servers) -> None:
    async def never() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async with grpc.aio.insecure_channel(f"127.0.0.1:{servers['decoder'].port}") as channel:
        call = channel.stream_unary("/preread.v1.RerankService/Rerank")(never(), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "service",
    [
        "grpc.health.v1.Health/Check",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_open_services_read_messages_the_same_way(servers, caplog, service: str) -> None:
    for server in servers.values():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [one async for one in channel.stream_stream(f"/{service}")(iter([b"\xff"]), timeout=30)]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not any(record.exc_info for record in caplog.records)


async def test_an_unknown_method(servers) -> None:
    for server in servers.values():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            for path in ("/preread.v1.RerankService/Nothing", "/a/b", "/\n"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(path)(b"\xff", timeout=30)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


class Failing(rerank_pb2_grpc.RerankServiceServicer):
    """Methods with a bug in them; one that refuses."""

    async def Rerank(self, request, context):  # noqa: N802
        raise ValueError("secret")

    async def RerankStream(self, request, context):  # noqa: N802
        yield rerank_pb2.RerankStreamResponse()
        raise KeyError("secret")

    async def ListModels(self, request, context):  # noqa: N802
        await context.abort(grpc.StatusCode.NOT_FOUND, "said on purpose")

    async def Warm(self, request, context):  # noqa: N802
        return "not a message"


@pytest.fixture
async def failing() -> AsyncIterator[rerank_pb2_grpc.RerankServiceAsyncStub]:
    server = make_server(ApiKeys(), **LIMITS)
    rerank_pb2_grpc.add_RerankServiceServicer_to_server(Failing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield rerank_pb2_grpc.RerankServiceStub(channel)
    await server.stop(0)


async def test_the_text_of_an_exception_stays_inside(failing, caplog, refused) -> None:
    error = await refused(failing.Rerank(rerank_pb2.RerankRequest()), grpc.StatusCode.INTERNAL)
    assert "secret" not in str(error)
    stream = failing.RerankStream(rerank_pb2.RerankStreamRequest())
    await stream.read()
    error = await refused(stream.read(), grpc.StatusCode.INTERNAL)
    assert "secret" not in str(error)
    assert len([record for record in caplog.records if record.exc_info]) == 2, "the log has both"
    assert "x-request-id" in error.details()
    assert dict(error.trailing_metadata())["x-request-id"]
    error = await refused(failing.ListModels(rerank_pb2.ListModelsRequest()), grpc.StatusCode.NOT_FOUND)
    assert error.details() == "said on purpose"


async def test_a_unary_call_has_to_bring_its_message() -> None:
    server = make_server(ApiKeys(), **LIMITS, message_seconds=0.1)
    rerank_pb2_grpc.add_RerankServiceServicer_to_server(Failing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def never(seconds: float) -> AsyncIterator[bytes]:
        await asyncio.sleep(seconds)
        return
        yield

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for seconds, code in ((0, grpc.StatusCode.INVALID_ARGUMENT), (60, grpc.StatusCode.DEADLINE_EXCEEDED)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.stream_unary("/preread.v1.RerankService/Rerank")(never(seconds), timeout=30)
            assert caught.value.code() is code
    await server.stop(0)
