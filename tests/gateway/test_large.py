"""While large bodies come, over HTTP or gRPC, others are answered; and what is in them is answered as in small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.bodies import BODIES, MIB, run
from preread.tei.v1 import tei_pb2, tei_pb2_grpc
from preread.v1 import common_pb2, rerank_pb2, rerank_pb2_grpc
from preread_edge.grpc_server import MAX_FIELDS

# Of the benchmark's bodies, those that held everybody up for longest: half a minute, on a busy machine a minute.
HOSTILE = ("objects", "600,000 values", "one text of escapes", "gRPC: empty candidates", "gRPC: 240,000 candidates")
WORDS = "some words about nothing much " * 100


@pytest.mark.slow
def test_others_are_answered_meanwhile(tiny_checkpoint: Path) -> None:
    """In 250 ms where nothing else runs; a machine that is busy with other tests gets two seconds."""
    rows = run(tiny_checkpoint, 60 * MIB, [body for body in BODIES if body.name in HOSTILE])
    assert len(rows) == len(HOSTILE)
    for row in rows:
        waits = {name: value for name, value in row.items() if name.endswith(", ms")}
        assert len(waits) == 4
        assert max(waits.values()) < 2000, row
        assert row["memory, MiB"] < 600, row
        assert row["answered"] in ("400", "INVALID_ARGUMENT"), row


@pytest.fixture
def stub(running: Any) -> Any:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{running.server.port}", options) as channel:
        yield rerank_pb2_grpc.RerankServiceStub(channel), tei_pb2_grpc.RerankStub(channel), channel


def test_long_texts_come_back_whole(running: Any, stub: Any) -> None:
    """More than a message or a body that is made in one piece."""
    reranker, tei, _ = stub
    texts = [f"{i} {WORDS} 中文 😀 \\" for i in range(40)]
    request = rerank_pb2.RerankRequest(
        query="q", return_text=True, candidates=[rerank_pb2.Candidate(text=text) for text in texts]
    )
    whole = reranker.Rerank(request)
    assert whole.num_scored == 40
    assert [result.text for result in whole.results] == [texts[result.index] for result in whole.results]
    batches = list(reranker.RerankStream(rerank_pb2.RerankStreamRequest(request=request)))
    streamed = {result.index: result for event in batches[:-1] for result in event.batch.results}
    assert {index: result.text for index, result in streamed.items()} == dict(enumerate(texts))
    assert batches[-1].summary.num_scored == 40
    ranks = tei.Rerank(tei_pb2.RerankRequest(query="q", texts=texts, return_text=True))
    assert [rank.text for rank in ranks.ranks] == [texts[rank.index] for rank in ranks.ranks]
    assert ranks.metadata.compute_chars == sum(map(len, texts))

    response = running.post("/v1/rerank", {"query": "q", "documents": texts, "return_documents": True})
    assert int(response.headers["content-length"]) == len(response.content) > 100_000
    results = response.json()["results"]
    assert [result["document"]["text"] for result in results] == [texts[result["index"]] for result in results]
    assert [result["index"] for result in results] == [result.index for result in whole.results]


def test_a_text_over_its_limit_is_not_sent_back(stub: Any) -> None:
    candidates = [rerank_pb2.Candidate(text="x" * (2 * MIB)), rerank_pb2.Candidate(text="short")]
    answer = stub[0].Rerank(rerank_pb2.RerankRequest(query="q", return_text=True, candidates=candidates))
    assert [(result.index, result.text) for result in answer.results] == [(1, "short"), (0, "")]
    assert answer.results[1].status == common_pb2.CANDIDATE_STATUS_TOO_LONG


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(data) + bytes((value,))


MANY = MAX_FIELDS + 1
TOO_MANY = {
    "empty candidates": b"\x1a\x00" * MANY,
    "texts of one candidate": b"\x1a" + varint(2 * MANY) + b"\x12\x00" * MANY,
    "unknown numbers": b"\x78\x00" * MANY,
    "unknown groups": b"\x7b\x7c" * MANY,
    "stages": b"\x52\x00" * MANY,
    "numbers of ten bytes": b"\x28\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01" * MANY,
    "fixed": b"\x7d\x00\x00\x00\x00" * MANY,
}


@pytest.mark.parametrize("data", TOO_MANY.values(), ids=TOO_MANY)
def test_a_message_of_too_many_fields_is_refused_before_it_is_parsed(stub: Any, data: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub[2].unary_unary("/preread.v1.RerankService/Rerank")(data)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "more than 250,000 fields" in caught.value.details()


@pytest.mark.parametrize(
    "data",
    [b"\x1a\xff\xff\xff\xff\x0f", b"\xff" * 70_000, b"\x1a\x7f" * 40_000, b"\x0a" * 70_001, b"\x78" + b"\x80" * 70_000],
)
def test_what_is_no_message_is_told_as_such(stub: Any, data: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub[2].unary_unary("/preread.v1.RerankService/Rerank")(data + b"\x00" * 70_000)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_more_candidates_than_a_request_may_have_are_counted_only(stub: Any) -> None:
    reranker, tei, _ = stub
    calls = (
        lambda: reranker.Rerank(rerank_pb2.RerankRequest(query="q", candidates=[rerank_pb2.Candidate()] * 2000)),
        lambda: reranker.Warm(rerank_pb2.WarmRequest(collection="c", passage_ids=["p"] * 2000)),
        lambda: tei.Rerank(tei_pb2.RerankRequest(query="q", texts=[""] * 2000)),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "2000 of them" in caught.value.details()


@pytest.mark.parametrize("field", ["model", "collection"])
def test_a_long_name_is_not_said_back(running: Any, stub: Any, field: str) -> None:
    name = "\a" * 1_000_000
    response = running.post("/v1/rerank", {"query": "q", "documents": ["d"], field: name})
    assert response.status_code in (400, 404)
    assert len(response.content) < 5000
    with pytest.raises(grpc.RpcError) as caught:
        stub[0].Rerank(rerank_pb2.RerankRequest(query="q", candidates=[{"text": "d"}], **{field: name}))
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


FIELDS = ("documents", "texts", "passages", "input", "pairs", "text_2", "passage_ids", "stages")


@pytest.mark.parametrize("field", FIELDS)
def test_a_list_longer_than_any_request_has_is_counted_only(running: Any, field: str) -> None:
    response = running.post("/v1/rerank", {"query": "q", "text_1": "q", field: [0] * 100_000})
    assert response.status_code == 400
    assert "100000 of them" in response.text
