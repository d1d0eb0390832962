"""Laws of the rest of a worker: delete, stats, describe, health, reflection, start and stop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cache.store import Store, public_url
from encoder_worker.config import EncoderConfig
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.server import SERVICE, EncoderServer
from preread.v1 import encoder_pb2

Serve = Callable[..., Any]


async def test_delete_stats_and_describe(worker: Serve, store: Store, encoder: PassageEncoder) -> None:
    async with worker(store="redis://user:secret@example:6379/0") as to:
        await to.upsert(to.message("docs", a="one", b="two"), to.message(c="three"))
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
            code, text, details = await to.failure(call)
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
        gate = to.gate()
        call = asyncio.create_task(to.encode(["in flight"]))
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
