"""Both halves, real stores, one machine: indexed by the worker, ranked by the server, and `preread serve` itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cache.open import open_store
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread.v1 import common_pb2, encoder_pb2, encoder_pb2_grpc, rerank_pb2, rerank_pb2_grpc

HIT, ENCODED = common_pb2.CANDIDATE_STATUS_HIT, common_pb2.CANDIDATE_STATUS_ENCODED
CORRUPT = common_pb2.CANDIDATE_STATUS_CORRUPT


async def upsert(address: str, collection: str, texts: dict[str, str]) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = encoder_pb2_grpc.EncoderServiceStub(channel)
        passages = [encoder_pb2.Passage(passage_id=i, text=text) for i, text in texts.items()]
        request = encoder_pb2.UpsertRequest(collection=collection, passages=passages, codec="Flat", store_text=True)
        results = [result async for answer in stub.Upsert(iter([request])) for result in answer.results]
        assert len(results) == len(texts)
        assert {result.status for result in results} == {encoder_pb2.UPSERT_STATUS_STORED}


@pytest.fixture(params=["faiss", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty store that both halves open."""
    if request.param == "faiss":
        yield f"faiss:{tmp_path / 'shared'}"
    else:
        yield request.getfixturevalue("redis_server").url


async def test_what_the_worker_stored_the_server_ranks(serve, tiny, texts, by_hand, shared: str) -> None:
    store = open_store(shared)
    worker = EncoderServer(
        EncoderConfig(checkpoint=str(tiny), store=shared, port=0, device="cpu", dtype="float32"), store=store
    )
    await worker.start()
    address = f"127.0.0.1:{worker.port}"
    try:
        await upsert(address, "shared", texts)
        async with serve(over=store, encoder_address=address) as serving:
            candidates = [rerank_pb2.Candidate(passage_id=i) for i in texts]
            candidates += [rerank_pb2.Candidate(text="not stored at all"), rerank_pb2.Candidate(text=texts["p1"])]
            answer = await serving.rerank(candidates=candidates, collection="shared", return_text=True)
            assert answer.num_scored == len(texts) + 2
            assert (answer.num_looked_up, answer.num_found) == (2, 1)
            for result in answer.results:
                assert result.status == (ENCODED if result.index == len(texts) else HIT)
                assert result.margin == pytest.approx(by_hand(result.text), abs=1e-4)
            assert answer.timings.encode_seconds > 0
            split = await serving.rerank(ids=list(texts)[:5], collection="shared", compression_ratio=8)
            assert all(r.margin == pytest.approx(by_hand(texts[r.passage_id], 8), abs=1e-4) for r in split.results)
    finally:
        await worker.stop(1)
        store.close()


async def test_a_damaged_value_costs_its_passage_only(serve, encoding, texts, redis_server) -> None:
    store = open_store(redis_server.url, read_budget_seconds=20.0)
    encoding.fill(store, "damaged", {i: texts[i] for i in ("p1", "p2", "p3")})
    async with serve(over=store) as serving:
        whole = await serving.rerank(ids=["p1", "p2", "p3"], collection="damaged")
        with redis_server.client() as client:
            key = next(key for key in client.scan_iter() if b"damaged" in key and key.endswith(b"p2"))
            value = bytearray(client.get(key))
            value[len(value) // 2] ^= 1
            client.set(key, bytes(value))
    async with serve(over=store) as serving:  # no tier that remembers the whole value
        answer = await serving.rerank(ids=["p1", "p2", "p3"], collection="damaged")
        assert [(r.passage_id, r.status) for r in answer.results][-1] == ("p2", CORRUPT)
        assert "damaged" in answer.results[-1].message
        margins = {r.passage_id: r.margin for r in whole.results}
        assert all(r.margin == pytest.approx(margins[r.passage_id], abs=1e-5) for r in answer.results[:-1])
    store.close()


async def test_a_store_that_went_away_costs_what_is_stored_there(serve, encoding, texts, redis_server) -> None:
    store = open_store(redis_server.url, read_budget_seconds=20.0)
    encoding.fill(store, "docs", {i: texts[i] for i in ("p1", "p2")})
    async with serve(over=store, max_store_cache_bytes=0) as serving:
        assert (await serving.rerank(ids=["p1"])).num_scored == 1
        redis_server.stop()
        started = time.monotonic()
        answer = await serving.rerank(ids=["p1", "p2"])
        assert time.monotonic() - started < 20
        assert [r.status for r in answer.results] == [common_pb2.CANDIDATE_STATUS_FAILED] * 2
        assert "store could not be read" in answer.results[0].message
    store.close()


def test_preread_serve_starts_both_halves_and_drains_on_sigterm(tiny: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "preread", "serve", "--model", str(tiny), "--store", f"faiss:{tmp_path / 'data'}",
        "--port", "0", "--encoder-port", "0", "--device", "cpu", "--dtype", "float32", "--threads", "1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                break
        told = "".join(lines)
        address = re.search(r"listening +(127\.0\.0\.1:\d+)", told)
        assert address is not None, told
        for word in ("tiny", "float32 on cpu", "faiss:", "none yet", "in this process"):
            assert word in told
        with grpc.insecure_channel(address[1]) as channel:
            request = rerank_pb2.RerankRequest(query="q", candidates=[rerank_pb2.Candidate(text="a passage")])
            answer = rerank_pb2_grpc.RerankServiceStub(channel).Rerank(request, timeout=30)
            assert [r.status for r in answer.results] == [ENCODED]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stdout.read()


def test_preread_serve_starts_beside_a_redis_that_hangs_and_says_so(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [
            sys.executable, "-m", "preread", "serve", "--model", str(tiny), "--no-encoder", "--port", "0",
            "--store", f"redis://user:s3cr@3t@127.0.0.1:{silent.getsockname()[1]}",
            "--device", "cpu", "--dtype", "float32", "--threads", "1", "--read-budget-seconds", "0.3",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            told = ""
            for line in process.stdout:
                told += line
                if line.startswith("ready"):
                    break
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert re.search(r"^collections +unknown: .*no answer within 0.3 s", told, re.MULTILINE), told
    assert "redis://***@127.0.0.1" in told
    assert "s3cr" not in told
    assert "3t" not in told.replace("0.3 s", "")
