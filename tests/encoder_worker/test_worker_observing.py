"""Laws of what a worker tells its operator, and of who may call it."""

from __future__ import annotations

import grpc
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread.v1 import encoder_pb2, encoder_pb2_grpc
from preread_edge.access import ApiKeys

ASKS, WRITES, RULES = (f"{name}-key-0123456789" for name in ("asks", "writes", "rules"))


def value(server: EncoderServer, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(generate_latest(server.metrics.registry).decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@pytest.fixture
async def worker(tiny_checkpoint, tmp_path):
    config = EncoderConfig(
        str(tiny_checkpoint), port=0, store=f"faiss:{tmp_path / 'store'}", device="cpu", dtype="float32"
    )
    server = EncoderServer(config, keys=ApiKeys.parse([f"rerank:{ASKS}", f"index:{WRITES}", RULES]))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield server, encoder_pb2_grpc.EncoderServiceStub(channel)
    await server.stop(1)


def key(value: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {value}"),)


async def messages(*texts: str):
    passages = [encoder_pb2.Passage(passage_id=f"p{i}", text=text) for i, text in enumerate(texts)]
    yield encoder_pb2.UpsertRequest(collection="docs", passages=passages)


async def test_scopes_and_numbers(worker) -> None:
    server, stub = worker
    await stub.Encode(encoder_pb2.EncodeRequest(texts=["one two", "three"]), metadata=key(ASKS))
    answers = [one async for one in stub.Upsert(messages("one two", " "), metadata=key(WRITES))]
    assert len(answers[0].results) == 2
    delete = encoder_pb2.DeleteRequest(collection="docs", passage_ids=["p0"])
    for refused, code in (
        (stub.Encode(encoder_pb2.EncodeRequest(texts=["x"])), grpc.StatusCode.UNAUTHENTICATED),
        (stub.Encode(encoder_pb2.EncodeRequest(texts=["x"]), metadata=key("wrong")), grpc.StatusCode.UNAUTHENTICATED),
        (stub.Delete(delete, metadata=key(WRITES)), grpc.StatusCode.PERMISSION_DENIED),
        (stub.Delete(delete, metadata=key(ASKS)), grpc.StatusCode.PERMISSION_DENIED),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused
        assert caught.value.code() is code
        assert "x-request-id" in dict(caught.value.trailing_metadata())
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # a stream is refused too
        [one async for one in stub.Upsert(messages("four"), metadata=key(ASKS))]
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await stub.Delete(delete, metadata=key(RULES))).num_deleted == 1

    assert value(server, "preread_encoder_passages_total", status="stored") == 1
    assert value(server, "preread_encoder_passages_total", status="refused") == 1
    assert value(server, "preread_encoder_rpcs_total", method="EncoderService/Upsert", code="OK") == 1
    assert value(server, "preread_encoder_rpcs_total", code="UNAUTHENTICATED") == 2
    assert value(server, "preread_encoder_rpcs_total", code="PERMISSION_DENIED") == 3
    assert value(server, "preread_encoder_tokens_total", kind="text") > 3
    assert value(server, "preread_encoder_forward_seconds_count") >= 2
    assert value(server, "preread_encoder_on_demand_tokens") == 0
    assert value(server, "preread_encoder_model_info", device="cpu", dtype="float32") == 1
