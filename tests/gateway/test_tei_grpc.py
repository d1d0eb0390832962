"""TEI's gRPC clients, which speak tei.v1, are answered on our gRPC port."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
import pytest

from preread.tei.v1 import tei_pb2, tei_pb2_grpc

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def channel(running):
    with grpc.insecure_channel(f"127.0.0.1:{running.server.port}") as channel:
        yield channel


@pytest.fixture
def rerank(channel):
    return tei_pb2_grpc.RerankStub(channel)


def test_the_stubs_are_those_of_the_contract(tmp_path):
    subprocess.run([ROOT / "scripts" / "generate-stubs", tmp_path], check=True, capture_output=True)

    fresh = {path.name: path.read_bytes() for path in (tmp_path / "preread" / "tei" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "preread" / "tei" / "v1").glob("*_pb2*")}
    assert fresh == committed


def test_rerank_is_what_http_says(running, rerank, query, documents):
    over_http = running.post("/tei/rerank", {"query": query, "texts": documents, "return_text": True}).json()
    answer = rerank.Rerank(tei_pb2.RerankRequest(query=query, texts=documents, return_text=True))

    assert [(rank.index, rank.text) for rank in answer.ranks] == [(one["index"], one["text"]) for one in over_http]
    assert [rank.score for rank in answer.ranks] == pytest.approx([one["score"] for one in over_http])
    assert answer.metadata.compute_tokens > 0
    assert answer.metadata.total_time_ns > 0
    raw = rerank.Rerank(tei_pb2.RerankRequest(query=query, texts=documents, raw_scores=True))
    assert [rank.index for rank in raw.ranks] == [rank.index for rank in answer.ranks]
    assert not any(rank.HasField("text") for rank in raw.ranks)
    assert raw.ranks[0].score != answer.ranks[0].score


def test_a_stream_is_answered_as_one_request(rerank, query, documents):
    messages = [tei_pb2.RerankStreamRequest(query=query, text=text, return_text=True) for text in documents]
    streamed = rerank.RerankStream(iter(messages))
    at_once = rerank.Rerank(tei_pb2.RerankRequest(query=query, texts=documents, return_text=True))

    assert [(r.index, r.text) for r in streamed.ranks] == [(r.index, r.text) for r in at_once.ranks]


def test_what_is_wrong_has_a_status(running, rerank, query):
    many = [tei_pb2.RerankStreamRequest(query=query, text="x")] * 1500
    for call in (
        lambda: rerank.Rerank(tei_pb2.RerankRequest(query=query)),
        lambda: rerank.Rerank(tei_pb2.RerankRequest(query="", texts=["x"])),
        lambda: rerank.Rerank(tei_pb2.RerankRequest(query=query, texts=["x", "x" * 2_000_000])),
        lambda: rerank.RerankStream(iter([])),
        lambda: rerank.RerankStream(iter(many)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "candidates" not in caught.value.details()  # a word of another contract


def test_info(running, channel):
    info = tei_pb2_grpc.InfoStub(channel).Info(tei_pb2.InfoRequest())

    assert info.model_id == running.engine.name
    assert info.model_type == tei_pb2.MODEL_TYPE_RERANKER
    assert info.max_client_batch_size == running.engine.limits.max_candidates
