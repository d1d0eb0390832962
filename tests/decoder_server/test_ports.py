"""Laws of both servers' gRPC ports: keepalive, reflection in both versions, the calls that the pages show."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory

from decoder_server.config import DecoderConfig
from decoder_server.server import DecoderServer
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread import channel
from preread_edge import grpc_server

SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1
ENHANCE_YOUR_CALM = 11
ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"^grpcurl -plaintext -d '(.*)' 127\.0\.0\.1:5005([12]) ([\w.]+/\w+)$", re.MULTILINE)


@pytest.fixture
async def ports(tiny, store, fbnl, tmp_path, monkeypatch) -> AsyncIterator[list[int]]:
    """Of both servers, which take pings a hundred times as close together."""
    monkeypatch.setattr(grpc_server, "PING_SECONDS", grpc_server.PING_SECONDS / 100)
    settings = {"port": 0, "device": "cpu", "dtype": "float32"}
    decoder = DecoderServer(DecoderConfig.of_one(str(tiny), **settings), store=store, load=lambda _: fbnl)
    worker = EncoderServer(EncoderConfig(str(tiny), store=f"faiss:{tmp_path / 'worker'}", **settings))
    await decoder.start()
    await worker.start()
    yield [decoder.port, worker.port]
    await decoder.stop(0)
    await worker.stop(0)


class Connection:
    """HTTP/2 by hand, as far as pings go; no call runs on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(SETTINGS)

    def send(self, kind: int, payload: bytes = b"", flags: int = 0) -> None:
        self._writer.write(len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload)

    async def next(self, *kinds: int) -> tuple[int, bytes]:
        """The next frame of these kinds; the server's settings are acknowledged on the way."""
        while True:
            head = await asyncio.wait_for(self._reader.readexactly(9), 30)
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == SETTINGS and not head[4] & ACK:
                self.send(SETTINGS, flags=ACK)
            if head[3] in kinds and (head[3] != PING or head[4] & ACK):
                return head[3], payload

    def close(self) -> None:
        self._writer.close()


async def test_pings_are_answered_where_no_call_runs(ports: list[int]) -> None:
    """As close together as ten seconds, by the hundredth part; what comes after an answer is never closer."""
    for port in ports:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
        for number in range(8):
            connection.send(PING, struct.pack(">Q", number))
            assert await connection.next(PING, GOAWAY) == (PING, struct.pack(">Q", number))
            await asyncio.sleep(0.1)
        connection.close()


async def test_a_flood_of_pings_ends_the_connection(ports: list[int]) -> None:
    for port in ports:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
        kind = PING
        while kind == PING:
            connection.send(PING, bytes(8))
            kind, payload = await connection.next(PING, GOAWAY)
        assert (kind, struct.unpack(">I", payload[4:8])[0]) == (GOAWAY, ENHANCE_YOUR_CALM)
        connection.close()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_every_service_it_lists(ports: list[int], version: str) -> None:
    """Spoken as a client does that knows this version only: its own messages, descriptors from what comes."""
    name = f"grpc.reflection.{version}"
    known = descriptor_pool.Default()
    request, response = (
        message_factory.GetMessageClass(known.FindMessageTypeByName(f"{name}.ServerReflection{kind}"))
        for kind in ("Request", "Response")
    )
    for port, ours in zip(ports, ("preread.v1.RerankService", "preread.v1.EncoderService"), strict=True):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
            info = opened.stream_stream(
                f"/{name}.ServerReflection/ServerReflectionInfo", request.SerializeToString, response.FromString
            )
            (listed,) = [one async for one in info(iter([request(list_services="")]), timeout=30)]
            services = [one.name for one in listed.list_services_response.service]
            assert {ours, "grpc.health.v1.Health"} <= set(services)
            assert {f"grpc.reflection.{one}.ServerReflection" for one in ("v1", "v1alpha")} <= set(services)
            asked = [request(file_containing_symbol=service) for service in services]
            files = [one async for one in info(iter(asked), timeout=30)]
        found = descriptor_pool.DescriptorPool()
        for service, answer in zip(services, files, strict=True):
            for file in reversed(answer.file_descriptor_response.file_descriptor_proto):
                found.AddSerializedFile(file)
            described = found.FindServiceByName(service)
            assert described.methods, "each with its methods, and the messages that they name"
            assert all(method.input_type.full_name for method in described.methods)


def shown_calls() -> list[object]:
    """Of every page: what is sent, to which port, and the method's full name."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [(page, *words) for page in pages for words in SHOWN.findall(page.read_text())]
    return [pytest.param(*words, id=f"{page.name}: {words[2]}") for page, *words in found]


@pytest.mark.parametrize(("document", "port", "path"), shown_calls())
async def test_shown_calls_are_answered(ports: list[int], document: str, port: str, path: str) -> None:
    service, _, name = path.partition("/")
    method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    request, response = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
    message = json_format.Parse(document, request())  # raises where a field is not one of the request's
    shape = "_".join("stream" if one else "unary" for one in (method.client_streaming, method.server_streaming))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports[int(port) - 1]}") as opened:
        call = getattr(opened, shape)(f"/{path}", request.SerializeToString, response.FromString)
        called = call(iter([message]) if method.client_streaming else message, timeout=30)
        answers = [one async for one in called] if method.server_streaming else [await called]
    assert all(answer.ListFields() for answer in answers)
    assert "refused" not in str(answers).lower()


def test_settings_go_together() -> None:
    """Clients may ping every ten seconds; our own do so less often."""
    assert grpc_server.PING_SECONDS < 10 <= channel.KEEPALIVE_SECONDS
