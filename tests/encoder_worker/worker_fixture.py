"""A real EncoderServer on loopback and what its tests ask it with.

conftest.py takes it over by path (tests are not a package).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cache.store import Store
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread.v1 import encoder_pb2, encoder_pb2_grpc

DETAILS_KEY = "grpc-status-details-bin"


class Gate:
    """Holds the model up, so that a test decides what waits; remembers the lengths of every batch."""

    def __init__(self, server: EncoderServer) -> None:
        self._open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        encoder = server.engine.encoder
        encode = encoder.encode

        def gated(batch: Sequence[Sequence[int]], ratio: int) -> Any:
            self.batches.append([len(tokens) for tokens in batch])
            self.entered.set()
            assert self._open.wait(30)
            return encode(batch, ratio)

        encoder.encode = gated

    def open(self) -> None:
        self._open.set()

    async def wait_entered(self) -> None:
        """Returns when a forward pass is being held up."""
        await Worker.until(self.entered.is_set)


@dataclass
class Worker:
    """A running server, a stub that speaks to it, and words for what tests say often."""

    server: EncoderServer
    channel: grpc.aio.Channel
    stub: Any
    gates: list[Gate] = field(default_factory=list)

    async def upsert(self, *messages: encoder_pb2.UpsertRequest) -> list[encoder_pb2.UpsertResponse]:
        return [response async for response in self.stub.Upsert(iter(messages), timeout=60)]

    async def encode(self, texts: Sequence[str], **fields: object) -> encoder_pb2.EncodeResponse:
        return await self.stub.Encode(encoder_pb2.EncodeRequest(texts=texts, **fields), timeout=60)

    def gate(self) -> Gate:
        self.gates.append(Gate(self.server))
        return self.gates[-1]

    def num_waiting(self, *, bulk: bool) -> int:
        """Token sequences that wait for a forward pass and whose caller is still there."""
        return self.server.engine.scheduler.num_waiting(bulk=bulk)

    @staticmethod
    def message(collection: str = "", **texts: str) -> encoder_pb2.UpsertRequest:
        passages = [encoder_pb2.Passage(passage_id=i, text=text) for i, text in texts.items()]
        return encoder_pb2.UpsertRequest(collection=collection, passages=passages, store_text=True)

    @staticmethod
    def statuses(responses: Sequence[encoder_pb2.UpsertResponse]) -> list[list[int]]:
        return [[result.status for result in response.results] for response in responses]

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.002)

    @staticmethod
    async def failure(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, list[Any]]:
        """Code, message and unpacked details of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        details = []
        packed = dict(caught.value.trailing_metadata() or ()).get(DETAILS_KEY, b"")
        for one in status_pb2.Status.FromString(packed).details:
            detail = getattr(error_details_pb2, one.TypeName().rpartition(".")[2])()
            one.Unpack(detail)
            details.append(detail)
        return caught.value.code(), caught.value.details(), details


@asynccontextmanager
async def serve(checkpoint: Path, shared: Store, **config: object) -> AsyncIterator[Worker]:
    """A worker on a free port over the given store; keyword arguments are EncoderConfig's."""
    settings = {"port": 0, "device": "cpu", "dtype": "float32"} | config
    server = EncoderServer(EncoderConfig(str(checkpoint), **settings), store=shared)
    await server.start()
    gates: list[Gate] = []
    try:
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            yield Worker(server, channel, encoder_pb2_grpc.EncoderServiceStub(channel), gates)
    finally:
        for gate in gates:
            gate.open()  # whatever a failing test left closed
        await server.stop(5)
